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
    kept = token * CONFIG.prune.batch_size * 64  # launches of 4, 2 and 1 rows hold a sample each at the least
    assert reuses["scoring"].beside - own["scoring"].beside == reuses["backward"].beside - own["training"].beside == kept
    assert reuses["backward"].arguments - own["training"].arguments == token * 4 * 64
    assert reuses["training"] == own["training"] and reuses["update"] == own["update"]  # of steps without a scoring pass; after the last use


def test_a_scoring_pass_that_cannot_be_kept_is_no_plan():
    """The plan refuses what the run would."""
    config = override(CONFIG, {"prune.reuse_forward": True, "prune.mode": "drop"})
    with pytest.raises(QtjaxError, match="prune.reuse_forward = True: prune.mode = 'drop'"):
        planning.weigh(config, SMOL, jax.devices()[:1])
