"""The training state: where each of its arrays lies on a mesh."""

import jax
import pytest

from qtjax import models
from qtjax.config import MeshSection, TrainSection
from qtjax.overlays import abstract_overlay
from qtjax.parallel import make_mesh
from qtjax.training.optimizer import make_optimizer
from qtjax.training.state import Subject, state_shardings
from qtjax.tree import flatten

CONFIG = models.ModelConfig(
    vocab_size=64, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1, head_dim=8,
)  # fmt: skip


@pytest.mark.parametrize(("method", "own"), [("adalora", "own"), ("ln_tuning+adalora", "own/adalora"), ("diffprune", "own")])
def test_what_a_rule_keeps_lies_beside_its_trainables(method, own):
    """An array that the rule after a step keeps for each value of a trainable is cut as the trainable is; counters are whole."""
    mesh = make_mesh(MeshSection(), jax.devices()[:1])
    overlay = abstract_overlay(method, CONFIG, **({"init_r": 4, "target_r": 2} if "adalora" in method else {}))
    subject = Subject(CONFIG, overlay)
    optimizer = make_optimizer(TrainSection(), 10, subject.decayed(), subject.rates())
    found = state_shardings(subject, mesh, overlay.params, optimizer)
    trainable, kept = (
        {path: sharding.spec for path, sharding in flatten(tree).items()} for tree in (found.trainable, found.method)
    )
    expected = {"step": ()}
    if method == "diffprune":
        expected["own/fixed"] = ()
    else:
        part = own.removeprefix("own").removeprefix("/")
        matrices = {p.removeprefix(f"{part}/"): spec for p, spec in trainable.items() if "lora_" in p}
        assert any(spec and spec[1] == "fsdp" for spec in matrices.values())
        for name in ("exp_avg_ipt", "exp_avg_unc"):
            expected |= {f"{own}/{name}/{p}": spec for p, spec in matrices.items()}
        expected |= {f"{own}/kept/{p}": spec for p, spec in matrices.items() if p.endswith("lora_E")}
    assert {path: tuple(spec) for path, spec in kept.items()} == {path: tuple(spec) for path, spec in expected.items()}
