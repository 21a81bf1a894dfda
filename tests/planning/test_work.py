"""FLOPs by hand, and the slots and seconds that a step is charged for."""

import pytest

from qtjax.config import Config, override
from qtjax.models import ModelConfig
from qtjax.planning import PUBLISHED, Chip, Collective, Need, needed_flops, spent_flops, step_parts

LLAMA3 = ModelConfig.from_hf(PUBLISHED["meta-llama/Meta-Llama-3-8B"])
# 32 layers of q, o 4096 x 4096, k, v 4096 x 1024, three of 4096 x 14336, and the head; 8.03e9 parameters less embedding and norms.
N = 32 * (2 * 4096 * 4096 + 2 * 4096 * 1024 + 3 * 4096 * 14336) + 4096 * 128256
ATTENTION = 4 * 4096 * 32  # of a token for every key that it sees, all layers, forward


def test_needed_flops_of_llama_3_8b():
    """A token of a row of 2048 sees 1024.5 keys: 2 N + attention scored, 6 N + 3 x attention trained, 4 N + 3 x with a frozen base."""
    assert N == 7_504_658_432
    seen = ATTENTION * 1024.5
    assert needed_flops(LLAMA3, 1, 2048, trains=False) == 2 * N + seen
    assert needed_flops(LLAMA3, 10, 2048, trains=True) == 10 * (6 * N + 3 * seen)
    assert needed_flops(LLAMA3, 1, 2048, trains=True, frozen=True) == 4 * N + 3 * seen
    assert needed_flops(LLAMA3, 1, 2048, trains=True) / 1e9 == pytest.approx(45.03 + 1.61, abs=0.01)


def test_a_window_is_what_is_seen():
    """Mistral's window of 4096: in a row of 8192 a query sees 3072.25 keys, (1 + .. + 4096 + 4096 x 4096) / 8192."""
    mistral = ModelConfig.from_hf(PUBLISHED["mistralai/Mistral-7B-v0.1"])
    weights = needed_flops(mistral, 1, 1, trains=False) - ATTENTION
    assert needed_flops(mistral, 1, 8192, trains=False) == weights + ATTENTION * (4096 * 4097 / 2 + 4096 * 4096) / 8192


def test_spent_flops_count_what_is_computed_twice():
    """Plain attention goes over whole rows, a kernel over what is seen; remat full and offload compute layers once more, dots plain
    attention, scoring nothing."""
    head, row, seen = 4096 * 128256, 2048 * ATTENTION, 1024.5 * ATTENTION
    assert spent_flops(LLAMA3, 1, 2048, trains=False) == 2 * N + row
    assert spent_flops(LLAMA3, 1, 2048, trains=True) == 6 * N + 3 * row
    assert spent_flops(LLAMA3.replace(remat="full"), 1, 2048, trains=True, frozen=True) == 4 * N + 2 * (N - head) + 4 * row
    assert spent_flops(LLAMA3.replace(remat="dots"), 1, 2048, trains=True) == 6 * N + 4 * row
    assert spent_flops(LLAMA3.replace(remat="full"), 1, 2048, trains=False) == 2 * N + row
    splash = LLAMA3.replace(attention="splash")
    assert spent_flops(splash, 1, 2048, trains=False) == 2 * N + seen
    assert spent_flops(splash.replace(remat="dots"), 1, 2048, trains=True) == 6 * N + 3 * seen
    assert spent_flops(splash.replace(remat="offload"), 1, 2048, trains=True) == 6 * N + 2 * (N - head) + 4 * seen


def test_a_scoring_pass_that_is_kept_saves_training_the_layers_second_run():
    """Under remat full 2 x (N - head) and one attention less a slot than without prune.reuse_forward."""
    chip, model = Chip(16, peak=1.0, bandwidth=2.0, links=4.0), LLAMA3.replace(remat="full")
    own, reused, half = (
        step_parts(override(Config(), {"prune.reuse_forward": on, "prune.score_every": every}), model, chip, 1, {}, (8,), 2048, 200, 0)[1]
        for on, every in ((False, 1), (True, 1), (True, 2))
    )
    less = 2 * (N - 4096 * 128256) + 2048 * ATTENTION
    assert own.slots == reused.slots and own.compute - reused.compute == pytest.approx(own.slots * less / 0.6e12)
    assert own.compute - half.compute == pytest.approx(own.slots * less / 0.6e12 / 2)  # every other epoch has a pass to keep


def test_a_step_is_charged_for_launched_slots():
    """128 samples of 200 tokens fill 12.5 rows of 2048, a quarter of them 3.1; launches have 8, 4 or 2 rows."""
    config = override(Config(), {"prune.batch_size": 128, "prune.sample_keep": 0.25})
    moved = [Collective("all-gather", 1, 50_000)]
    needs = {"scoring": Need(0, 0, 0, moved), "training": Need(0, 0, 0, None), "update": Need(0, 0, 0, [])}
    chip = Chip(16, peak=1.0, bandwidth=2.0, links=4.0)
    scoring, training, update = step_parts(config, LLAMA3, chip, 8, needs, (8, 4, 2), 2048, 200, 3000)
    assert (scoring.tokens, scoring.slots) == (25600, 14 * 2048)  # 13 rows: 8, 4, and 2 for the last one
    assert (training.tokens, training.slots) == (6400, 4 * 2048)
    assert scoring.compute == spent_flops(LLAMA3, 14 * 2048, 2048, trains=False) / 8 / 0.6e12
    assert training.flops == needed_flops(LLAMA3, 6400, 200, trains=True)
    assert scoring.links == 3 * 50_000 / 4e9 and training.links is None and update.links == 0
    assert update.memory == 3000 / 2e9 and update.seconds == (1.5e-6, 1.5e-6)


@pytest.mark.parametrize(("changes", "samples"), [
    ({"prune.sample_pruner": "none"}, (128, 128)),  # all are scored for their tokens, all are trained on
    ({"prune.sample_pruner": "none", "prune.token_pruner": "none"}, (0, 128)),
    ({"prune.score_every": 2}, (64, 32)),
    ({"prune.sample_pruner": "random"}, (32, 32)),  # chosen without scores, and only those are scored
    ({"prune.sample_pruner": "infobatch", "prune.token_pruner": "none"}, (0, 96)),
])  # fmt: skip
def test_which_samples_are_scored_and_trained_on(changes, samples):
    """Of 128: what the pruners of the config leave."""
    config = override(Config(), {"prune.batch_size": 128, "prune.sample_keep": 0.25} | changes)
    parts = {part.name: part.tokens / 100 for part in step_parts(config, LLAMA3, Chip(1, 1, 1, 1), 1, {}, (1,), 100, 100, 0)}
    assert (parts.get("scoring", 0), parts["training"]) == samples


@pytest.mark.parametrize(("batch", "kept"), [(1, 1), (3, 1), (9, 2), (128, 32)])
def test_a_batch_keeps_whole_samples(batch, kept):
    """max(1, floor(0.25 x samples)), as the run does."""
    config = override(Config(), {"prune.batch_size": batch, "prune.sample_keep": 0.25})
    [tokens] = [part.tokens for part in step_parts(config, LLAMA3, Chip(1, 1, 1, 1), 1, {}, (1,), 100, 10, 0) if part.name == "training"]
    assert tokens == pytest.approx(10 * kept)
