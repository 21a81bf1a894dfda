"""What full-data training costs on the same work, measured with the same compiled programs after a pruned run."""

import time
from dataclasses import dataclass

import jax
import numpy as np

from qtjax.parallel import agree_sums, everywhere
from qtjax.training.batch import whole_samples
from qtjax.training.loop import Loop


@dataclass(frozen=True)
class FullData:
    """steps timed, out of total; seconds: median of a step, times total."""

    steps: int
    total: int
    seconds: float


def time_full_data(loop: Loop, steps: int, total: int) -> FullData:
    """Times optimizer steps on whole scoring batches: packed, accumulated and updated like the pruned ones, not scored.

    The batches are spread over the run. Changes loop.state: call it when the trained state is safe.
    """
    measured = []
    for step in np.linspace(0, total - 1, min(steps, total)).astype(int).tolist():
        prepared = loop.prepare(step)  # read and packed ahead of time in training as well
        begin = time.perf_counter()
        parts = loop.pack(whole_samples(prepared.batch))
        gradients, _ = loop.gradients(parts, step)
        targets = agree_sums({"targets": int(prepared.batch.targets.sum())})["targets"]
        loop.state, _ = loop.programs.update(loop.state, gradients, everywhere(loop.mesh, np.float32(max(targets, 1))))
        jax.block_until_ready(loop.state.trainable)
        measured.append(time.perf_counter() - begin)
    return FullData(len(measured), total, float(np.median(measured)) * total)
