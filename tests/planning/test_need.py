"""What a run needs of a device, weighed on the devices that are here."""

import json
from pathlib import Path

import jax
import pytest

from qtjax import planning, smol
from qtjax.config import override, read_config
from qtjax.errors import QtjaxError
from qtjax.models import ModelConfig

SMOL = ModelConfig.from_hf(json.loads((Path(smol.__file__).parent / "model" / "config.json").read_text()))
CONFIG = override(read_config("configs/smol.py"), {"data.max_length": 64, "train.row_length": 64, "train.rows": 4})


@pytest.mark.slow
def test_a_scoring_pass_that_is_kept_is_counted():
    """Every layer's width for every token of the batch lies beside all programs, and that of a launch is an argument of training."""
    own, reuses = (
        planning.weigh(override(CONFIG, {"prune.reuse_forward": on}), SMOL, jax.devices()[:1]).needs for on in (False, True)
    )
    token = 4 * SMOL.num_hidden_layers * SMOL.hidden_size
    for name in ("scoring", "training", "update"):
        assert reuses[name].beside - own[name].beside == token * CONFIG.prune.batch_size * 64
    assert reuses["training"].arguments - own["training"].arguments == token * 4 * 64


def test_a_mesh_that_cannot_keep_a_scoring_pass_is_no_plan():
    """The plan refuses what the run would."""
    config = override(CONFIG, {"prune.reuse_forward": True, "prune.mode": "drop"})
    with pytest.raises(QtjaxError, match="prune.reuse_forward = True: prune.mode = 'drop'"):
        planning.weigh(config, SMOL, jax.devices()[:1])
