"""How full the launched rows are: over an epoch of steps, padding of rows and of launches counted."""

import numpy as np
import pytest

from qtjax.config import DataSection, PruneSection
from qtjax.data.iterate import BatchPlan
from qtjax.data.prepare import training_data
from qtjax.data.tokenizer import load_tokenizer
from qtjax.training.batch import microbatches, read_batch, survivors
from qtjax.training.ladder import ladder

LENGTH = 128


@pytest.fixture(scope="module")
def data():
    return training_data(DataSection(path="smol-instruct", max_length=LENGTH), load_tokenizer("smol"), progress=False)


@pytest.mark.parametrize("mode", ["mask", "drop"])
@pytest.mark.parametrize("processes", [1, 2])
def test_an_epoch_of_many_survivors_fills_its_rows(data, mode, processes):
    """Where a step's survivors take more than 32 rows of a device, at least 97 % of an epoch's launched slots hold a token.

    Half of the samples survive, with half of their targets. Each process packs its own part; the others' rows are as many at most
    as its own here, since lengths are alike.
    """
    prune, rng = PruneSection(mode=mode), np.random.default_rng(0)
    shapes = ladder(8 * processes, processes, 4)
    plan = BatchPlan(len(data), 1024, 0, 0, processes)
    tokens = slots = 0
    for step in range(plan.steps_per_epoch):
        batch = read_batch(data, plan.batch(step), LENGTH)
        kept = batch.targets & (rng.random(batch.targets.shape) < 0.5) & (rng.random(len(batch.indices)) < 0.5)[:, None]
        parts = microbatches(survivors(batch, kept, prune), shapes, LENGTH, processes)
        rows = sum(len(part.sample) for part in parts)
        assert rows > 32 or step + 1 == plan.steps_per_epoch
        tokens, slots = tokens + sum(part.tokens for part in parts), slots + rows * LENGTH
    assert 0.97 <= tokens / slots <= 1
