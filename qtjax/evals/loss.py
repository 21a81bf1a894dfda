"""Held-out loss: nats per trained token."""

import math
from collections.abc import Callable, Sequence
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


class WholeSequences(Sequence[Sample]):
    """Samples of a dataset as they are, with positions from 0; each is made when it is asked for."""

    def __init__(self, dataset: TokenizedDataset, samples: Sequence[int]):
        self._dataset, self._samples = dataset, samples

    def __len__(self) -> int:
        return len(self._samples)

    def __getitem__(self, i: int | slice) -> "Sample | list[Sample]":
        if isinstance(i, slice):
            return [self[k] for k in range(*i.indices(len(self)))]
        at = int(self._samples[i])
        ids, mask, _ = self._dataset.sample(at)
        return Sample(ids, mask, np.arange(len(ids), dtype=np.int32), int(self._dataset.task_ids[at]))


def whole_sequences(dataset: TokenizedDataset, samples: Sequence[int] | None = None) -> WholeSequences:
    """These samples, by default all of them."""
    return WholeSequences(dataset, range(len(dataset)) if samples is None else samples)


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
    sequences = whole_sequences(dataset, samples)
    found = likelihood(
        config, params, sequences, row_length=row_length, rows=rows, overlay=overlay, mesh=mesh, progress=progress
    )
    # exp overflows from 709.8 nats on, which only a broken model reaches
    perplexity = math.exp(found.mean) if found.mean < 700 else float("inf") if found.mean >= 700 else float("nan")
    return HeldOutLoss(found.mean, perplexity, int(found.targets.sum()), len(sequences))
