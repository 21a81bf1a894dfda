"""DoRA (Liu et al. 2024, arXiv 2402.09353): y = (m / ||W + s A B||) * (x W + s (x A) B) + b, norms over each output column.

m [out] is trained and starts as the norms of the base's columns, so that a fresh overlay is the base. The norm gets no
gradient (section 4.3), and it is formed without the product A B. With dropout in training, x' the dropped x and
c = m / ||.||: y = x W + (c - 1) x' W + c s (x' A) B, as in the authors' code and in PEFT; this costs a second base product.
Everything else is LoRA's: fields, factors, initial factors, modules_to_save. PEFT's folder is a LoRA folder with use_dora.
The embedding and the head are no targets here.
"""

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import jax.numpy as jnp
from jax import Array

from qtjax.models import Edits
from qtjax.overlays import lora
from qtjax.overlays.base import Context, base_array
from qtjax.overlays.leaves import Leaf, Shape
from qtjax.overlays.lora import LoraSite, LoraSpec
from qtjax.overlays.saved import saved_edits
from qtjax.overlays.sites import claims
from qtjax.tree import Tree, flatten, unflatten

_MAGNITUDE = "lora_magnitude_vector"


def _leaves(spec: LoraSpec) -> list[Leaf]:
    """LoRA's, and lora_magnitude_vector [out] of every edited layer."""
    return lora.lora_leaves(spec) + [
        site.leaf(
            _MAGNITUDE, lambda r, o=site.linear.outputs: (o,), ("out",), partial(_norms, site), _MAGNITUDE
        )
        for site in spec.sites
    ]


def _norms(site: LoraSite, key: Array, shape: Shape, base: Mapping[str, Any]) -> Array:
    del key, shape
    kernel = base_array(base, f"{site.linear.path}/kernel")
    return jnp.sqrt(jnp.sum(kernel * kernel, axis=1))


def _expand(spec: LoraSpec, params: Tree, frozen: Tree, context: Context) -> Edits:
    edits, flat = lora.lora_edits(spec, params, context.rng, frozen), flatten(params)
    for site in spec.sites:
        here = None if all(site.ranks) else jnp.asarray(site.ranks) > 0
        magnitude = flat[f"{site.linear.path}/{_MAGNITUDE}"]
        edits[site.linear.path] = replace(edits[site.linear.path], magnitude=magnitude, here=here)
    return Edits(unflatten({f"{path}/edit": edit for path, edit in edits.items()} | saved_edits(spec.saved, params)))


METHOD = replace(
    lora.METHOD,
    read=partial(lora.read_lora, method="dora", ends=False, use_dora=True),
    leaves=_leaves,
    expand=_expand,
    to_peft=partial(lora.lora_to_peft, use_dora=True),
    claims=claims("LORA", use_dora=True),
    conversion=lora.converts(_leaves),
)
