"""What is suggested to a run that does not fit: in which order, what is compiled for it, and what is not."""

from types import SimpleNamespace

import jax
import pytest

from qtjax.config import Config, override
from qtjax.models import ModelConfig
from qtjax.planning import Chip, Held, Need, Weighed, attempts, fit, kept_instead
from qtjax.training.memory import GIB, as_flags

SHAPE = ModelConfig(
    vocab_size=1024, hidden_size=512, intermediate_size=1024, num_hidden_layers=2, num_attention_heads=8, num_key_value_heads=4, head_dim=64
)  # fmt: skip
CHIP = Chip(memory=10, peak=1, bandwidth=1, links=1)


def weighed(gib):
    return Weighed(None, None, Held(0, 0, 0, 0), 8, 128, {"training": Need(0, int(gib * GIB), 0, [])})


@pytest.fixture
def compiled(monkeypatch):
    """compiled(by): `weigh` gives by(config) GiB; the flags that were weighed are kept in the list that is returned."""

    def install(by, keeps=lambda config: 1):
        seen = []

        def weigh(config, shape, devices, enough, read):
            seen.append(config)
            return weighed(by(config))

        monkeypatch.setattr(fit, "weigh", weigh)
        monkeypatch.setattr(fit, "_held", lambda config, shape, devices: Held(int(keeps(config) * GIB), 0, 0, 0))
        return seen

    return install


def here(devices, own=8):
    """So many devices, `own` of them in each process."""
    return [SimpleNamespace(process_index=i // own, id=i) for i in range(devices)]


def tried(config, devices=8, chip=CHIP, plan=None):
    return [(each.flags, each.free) for each in attempts(config, SHAPE, here(devices), chip, plan or weighed(14))]


def test_the_cheapest_that_fits_ends_it(compiled):
    """Cut finer, then layers again, each beside those before; nothing after the first that fits."""
    seen = compiled(lambda config: 9 if config.model.remat == "full" else 12)
    assert tried(override(Config(), {"train.rows": 32})) == [("--mesh.fsdp 8", -2), ("--mesh.fsdp 8 --model.remat full", 1)]
    assert len(seen) == 2


def test_never_more_than_three_are_compiled(compiled):
    """Of four ways the first two and the last, which has the third in it and shares a row among four devices, as many as key heads."""
    compiled(lambda config: 11)
    assert [flags for flags, _ in tried(override(Config(), {"train.rows": 32}))] == [
        "--mesh.fsdp 8", "--mesh.fsdp 8 --model.remat full", "--mesh.fsdp 2 --model.remat full --train.rows 2 --mesh.tensor 4"
    ]  # fmt: skip


def test_a_row_is_shared_inside_a_process_only(compiled):
    """Two devices a host: two share a row, as four could."""
    compiled(lambda config: 11)
    *_, last = attempts(override(Config(), {"train.rows": 32}), SHAPE, here(8, own=2), CHIP, weighed(14))
    assert last.flags == "--mesh.fsdp 4 --model.remat full --train.rows 4 --mesh.tensor 2"


def test_what_cannot_fit_is_not_compiled(compiled):
    """What a run keeps is counted first."""
    seen = compiled(lambda config: 1, keeps=lambda config: 11)
    assert tried(Config()) == [] and seen == []


def test_a_gpu_is_given_more_of_its_memory_first(compiled):
    """7.5 of 10 GiB by itself: what needs 9 fits once JAX may take 95 %, and nothing is compiled; what needs 9.8 does not, until it is cut."""
    seen, gpu = compiled(lambda config: 8), CHIP.shared(0.75)
    [attempt] = attempts(Config(), SHAPE, here(8), gpu, weighed(9))
    assert (attempt.flags, attempt.share) == ("", True) and attempt.free == pytest.approx(0.5) and seen == []
    [attempt] = attempts(Config(), SHAPE, here(8), gpu, weighed(9.8))
    assert (attempt.flags, attempt.share) == ("--mesh.fsdp 8", True) and attempt.free == pytest.approx(1.5)
    compiled(lambda config: 7)
    [attempt] = attempts(Config(), SHAPE, here(8), gpu, weighed(9.8))
    assert (attempt.flags, attempt.share, attempt.free) == ("--mesh.fsdp 8", False, 0.5)


def test_a_mesh_that_was_given_is_given_up_as_a_whole(compiled):
    """mesh.data of its own must make room for a wider fsdp."""
    compiled(lambda config: 1)
    assert tried(override(Config(), {"mesh.data": 8}))[0][0] == "--mesh.fsdp 8 --mesh.data -1"


@pytest.mark.parametrize(("changes", "flags", "least", "most"), [
    ({}, "--overlay.method lora --model.param-dtype bfloat16", 0.1, 0.2),  # 2 bytes a parameter instead of 16
    ({"overlay.method": "lora"}, "--model.param-dtype bfloat16", 0.45, 0.6),
    ({"overlay.method": "lora", "model.param_dtype": "bfloat16"}, "--model.quantization nf4", 0.3, 0.6),
])  # fmt: skip
def test_other_ways_to_train_are_counted(changes, flags, least, most):
    """What the run would keep, against what it keeps; no compilation."""
    config = override(Config(), changes)
    [(said, held)] = kept_instead(config, SHAPE, jax.devices()[:1])
    now = fit._held(config, SHAPE, jax.devices()[:1])
    assert said == flags and least < held.total / now.total < most


def test_flags_are_as_a_command_line_has_them():
    """Fields with dashes."""
    assert as_flags({"model.param_dtype": "bfloat16", "mesh.fsdp": 4}) == "--model.param-dtype bfloat16 --mesh.fsdp 4"
