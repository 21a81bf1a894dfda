"""QLoRA (Dettmers et al. 2023, arXiv 2305.14314): LoRA over a base whose linear kernels are quantised.

Everything is lora's; the base does the rest (models/quantized.py: the kernel is dequantised in its layer, forward and
backward, and never kept). The name only insists that the base is quantised. PEFT has one method for both and its folder says
nothing about the base, so an adapter is saved as LoRA and read again as "lora".
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from qtjax.errors import QtjaxError
from qtjax.models import Quantized
from qtjax.overlays import lora
from qtjax.overlays.base import Base
from qtjax.overlays.sites import claims


def _read(base: Base, fields: Mapping[str, Any], strict: bool) -> Any:
    if not any(isinstance(leaf, Quantized) for leaf in base.leaves.values()):
        raise QtjaxError(
            "qlora: the base model's kernels are not quantised; load it with load_pretrained(..., quantization=\"nf4\") (in a"
            " config: model.quantization = \"nf4\"), or use lora"
        )
    return lora.METHOD.read(base, fields, strict)


METHOD = dataclasses.replace(lora.METHOD, read=_read, claims=claims())
