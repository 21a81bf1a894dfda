"""The likelihood of many samples: packed into rows of one fixed shape, scored by one compiled program."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from qtjax import parallel
from qtjax.data.packing import PackedRows, Sample, fill_rows, pack
from qtjax.models import ModelConfig, check_task_ids
from qtjax.training.score import rated_rows, score_rows
from qtjax.tree import Tree

# Samples that are packed together: far more than a launch holds, and few enough to have in memory at once.
TOGETHER = 1 << 14


class Likelihood(NamedTuple):
    """nll, entropy: float64 [n], nats summed over a sample's targets; targets: int64 [n], how many those are."""

    nll: np.ndarray
    entropy: np.ndarray
    targets: np.ndarray

    @property
    def mean(self) -> float:
        """nats per target over all samples, token-weighted; NaN without targets."""
        count = int(self.targets.sum())
        return float(self.nll.sum() / count) if count else float("nan")


@partial(jax.jit, static_argnames=("config", "mesh", "rater"))
def _token_scores(config, params, overlay, rows, mesh, rater):
    given = (config, params, overlay, rows)
    tasks = rows.get("task_ids")
    scores = rated_rows(*given, rater, mesh, tasks) if rater else score_rows(*given, mesh, tasks)
    # Every host sums the same numbers, so every host needs all of them; they are small beside the activations.
    return scores if mesh is None else jax.lax.with_sharding_constraint(scores, parallel.replicated(mesh))


def _on_device(rows: Mapping[str, np.ndarray], mesh: Mesh | None) -> Mapping[str, Any]:
    if mesh is None:
        return rows
    sharding = parallel.batch_sharding(mesh)
    return {name: jax.make_array_from_callback(x.shape, sharding, x.__getitem__) for name, x in rows.items()}


def scored_rows(
    config: ModelConfig,
    params: Tree,
    samples: Sequence[Sample],
    *,
    row_length: int,
    rows: int,
    overlay: Any = None,
    mesh: Mesh | None = None,
    rater: str = "",
    progress: Callable[[int], None] | None = None,
) -> Iterator[tuple[PackedRows, list[np.ndarray]]]:
    """Scores all samples, launch by launch: (packed rows, [nll, entropy] and with a rater its attention rating).

    Args: as `likelihood`, but `rows` is the shape that is launched (rounded up to the devices). `sample` of the packed rows
    counts in `samples`; scores are float32 [R, L] (nats) at targets, 0 elsewhere.
    """
    config = config.replace(max_segments=0)  # that is of the training data
    ways = 1 if mesh is None else parallel.batch_size(mesh)
    rows = parallel.round_up(rows, ways)
    names = ("input_ids", "loss_mask", "position_ids", "segment_ids")
    names += ("task_ids",) if overlay is not None and overlay.tasks else ()
    for first in range(0, len(samples), TOGETHER):
        some = samples[first : first + TOGETHER]
        if overlay is not None:
            check_task_ids(overlay.tasks, np.asarray([s.task_id for s in some], np.int32), (len(some),))
        bins = pack([len(s.input_ids) for s in some], row_length)
        with jax.set_mesh(mesh) if mesh is not None else nullcontext():
            for at in range(0, len(bins), rows):
                packed = fill_rows(some, bins[at : at + rows], rows, row_length)
                device_rows = _on_device({name: getattr(packed, name) for name in names}, mesh)
                scores = [np.asarray(x) for x in _token_scores(config, params, overlay, device_rows, mesh, rater)]
                yield packed._replace(sample=np.where(packed.sample < 0, -1, packed.sample + first)), scores
                if progress:
                    progress(sum(len(members) for members in bins[at : at + rows]))


def likelihood(
    config: ModelConfig,
    params: Tree,
    samples: Sequence[Sample],
    *,
    row_length: int,
    rows: int,
    overlay: Any = None,
    mesh: Mesh | None = None,
    progress: Callable[[int], None] | None = None,
) -> Likelihood:
    """Summed nll and entropy of every sample's targets, a forward pass without [R, L, V].

    Args:
      samples: ids, loss mask (at the target position) and position ids; none longer than row_length. They are asked for
        TOGETHER at a time, so that a sequence that makes them on the way holds no more.
      row_length, rows: the one shape that is compiled; `rows` is rounded up to the devices of `mesh` and lowered where
        fewer rows hold everything. What is missing in the last batch are empty rows.
      mesh: rows are divided over its data x fsdp devices. All hosts must give the same samples.
      progress: called with the number of samples done since the last call.
    Returns: Likelihood, one entry per sample; a sample's first token is never a target.
    """
    sums, targets = np.zeros((2, len(samples))), np.zeros(len(samples), np.int64)
    rows = min(rows, max(len(pack([len(s.input_ids) for s in samples[:TOGETHER]], row_length)), 1))
    launches = scored_rows(
        config, params, samples, row_length=row_length, rows=rows, overlay=overlay, mesh=mesh, progress=progress
    )
    for packed, scored in launches:
        found, owner = np.unique(packed.sample[packed.loss_mask], return_inverse=True)
        for total, scores in zip(sums, scored):
            total[found] += np.bincount(owner, weights=scores.astype(np.float64)[packed.loss_mask], minlength=len(found))
        targets[found] += np.bincount(owner, minlength=len(found))
    return Likelihood(*sums, targets)
