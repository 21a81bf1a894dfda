"""Held-out loss: nats per trained token."""

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
from jax.sharding import Mesh

from qtjax.data.dataset import TokenizedDataset
from qtjax.data.packing import Sample
from qtjax.evals.rows import likelihood
from qtjax.models import ModelConfig
from qtjax.tree import Tree


class HeldOutLoss(NamedTuple):
    """loss: mean nll per trained token, nats (token-weighted); perplexity: its exponential; NaN without tokens."""

    loss: float
    perplexity: float
    tokens: int
    samples: int

    def summary(self) -> dict[str, Any]:
        return self._asdict()


def whole_sequences(dataset: TokenizedDataset, samples: Iterable[int]) -> list[Sample]:
    """These samples as they are, with positions from 0."""
    out = []
    for i in samples:
        ids, mask, _ = dataset.sample(int(i))
        out.append(Sample(ids, mask, np.arange(len(ids), dtype=np.int32), int(dataset.task_ids[i])))
    return out


def held_out_loss(
    config: ModelConfig,
    params: Tree,
    dataset: TokenizedDataset,
    *,
    row_length: int,
    rows: int = 8,
    samples: Sequence[int] | None = None,
    overlay: Any = None,
    mesh: Mesh | None = None,
    progress: Callable[[int], None] | None = None,
) -> HeldOutLoss:
    """Mean nll over the trained tokens of `dataset`.

    Args:
      row_length: tokens per packed row, at least the longest sample. rows: rows per launch, all devices together.
      samples: which samples of the dataset; default all. overlay, mesh, progress: as in `rows.likelihood`.
    Returns: HeldOutLoss. One program is compiled per (row_length, rows), whatever the data.
    """
    sequences = whole_sequences(dataset, range(len(dataset)) if samples is None else samples)
    found = likelihood(
        config, params, sequences, row_length=row_length, rows=rows, overlay=overlay, mesh=mesh, progress=progress
    )
    # exp overflows from 709.8 nats on, which only a broken model reaches
    perplexity = math.exp(found.mean) if found.mean < 700 else float("inf") if found.mean >= 700 else float("nan")
    return HeldOutLoss(found.mean, perplexity, int(found.targets.sum()), len(sequences))
