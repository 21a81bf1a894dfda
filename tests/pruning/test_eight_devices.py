"""Pruners decide the same on a batch that lies on one device and on one that is split over eight."""


import pytest

SCRIPT = """
import jax, numpy as np
from qtjax.pruning import SAMPLE_PRUNERS, TOKEN_PRUNERS, Candidates, Targets, choose_tokens

assert jax.device_count() == 8
B, L = 32, 12
r = np.random.default_rng(0)
keys = np.asarray(jax.random.key_data(jax.random.split(jax.random.key(1), B)))
perplexity, entropy = np.exp(r.normal(1, 1, B)).astype(np.float32), r.uniform(0, 3, B).astype(np.float32)
perplexity[3] = np.nan
candidates = Candidates(perplexity, entropy, r.integers(0, 9, B).astype(np.int32), r.random(B) < 0.9, keys)
planned_keep = r.random(B) < 0.5
plan = {"planned_keep": planned_keep, "planned_weight": np.where(planned_keep, 2, 0).astype(np.float32)}
nll, reference, attention = r.uniform(0, 5, (3, B, L)).astype(np.float32)
targets = Targets(nll, r.random((B, L)) < 0.7, keys, reference, attention)
split = jax.sharding.NamedSharding(jax.sharding.Mesh(np.array(jax.devices()), ("data",)), jax.sharding.PartitionSpec("data"))

for name, pruner in SAMPLE_PRUNERS.items():
    options = plan if name == "infobatch" else {}
    one = pruner.choose(candidates, 0.5, **options)
    eight = jax.jit(lambda c, o: pruner.choose(c, 0.5, **o))(*jax.device_put((candidates, options), split))
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a, b, err_msg=name), one, eight)
for name in TOKEN_PRUNERS:
    eight = jax.jit(lambda t: choose_tokens(name, t, 0.5))(jax.device_put(targets, split))
    np.testing.assert_array_equal(choose_tokens(name, targets, 0.5), eight, err_msg=name)
print("equal")
"""


@pytest.mark.slow
def test_eight_devices_decide_as_one(run_python):
    """All sample pruners and all token pruners, the batch split over 8 devices: every field of every decision."""
    assert run_python(SCRIPT, devices=8).strip().endswith("equal")
