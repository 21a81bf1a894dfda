"""Token scores kept for the whole data set, which steps take in place of a scoring pass: of an earlier epoch
(prune.score_every), or of another model (prune.score_model)."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from qtjax.data.dataset import TokenizedDataset
from qtjax.parallel import all_rows
from qtjax.training.batch import ScoringBatch


class ScoreStore:
    """Every host holds all of it: the next epoch shuffles the samples over the hosts.

    Args: signals: names of `Pruners.signals`. every: epochs from one pass to the next. first: the first epoch (0, 1, ...)
    that prunes from its beginning. given float32 [signals, total]:
    scores in the data set's flat order that are never renewed; None: zeros until they are recorded.
    """

    def __init__(self, dataset: TokenizedDataset, signals: Sequence[str], every: int, steps_per_epoch: int, first: int, given: np.ndarray | None):
        self.first = first
        self.offsets, self.signals, self.every, self.steps_per_epoch = dataset.offsets, tuple(signals), every, steps_per_epoch
        self.fixed = given is not None
        self.scores = np.zeros((len(signals), len(dataset.input_ids)), np.float32) if given is None else given

    def passes(self, step: int) -> bool:
        """Whether `step` (0, 1, ...) runs a scoring pass of its own."""
        epoch = step // self.steps_per_epoch - self.first
        return not self.fixed and (epoch < 0 or epoch % self.every == 0)

    def record(self, batch: ScoringBatch, scores: Sequence[np.ndarray]) -> None:
        """Takes the signals [N, T] of this process's samples, and of all others'."""
        indices = all_rows(batch.indices)
        samples, slots, there = self._places(indices, batch.input_ids.shape[1])
        for kept, own in zip(self.scores, scores):
            kept[there] = all_rows(own)[samples, slots]

    def read(self, batch: ScoringBatch) -> dict[str, np.ndarray]:
        """float32 [N, T] by signal, of this process's samples; 0 behind a sample's end and for padding."""
        samples, slots, there = self._places(batch.indices, batch.input_ids.shape[1])
        out = {name: np.zeros(batch.input_ids.shape, np.float32) for name in self.signals}
        for name, kept in zip(self.signals, self.scores):
            out[name][samples, slots] = kept[there]
        return out

    def _places(self, indices: np.ndarray, length: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(sample, slot, place in the flat order) of every token of these samples."""
        begin, end = self.offsets[np.maximum(indices, 0)], self.offsets[np.maximum(indices, 0) + 1]
        samples, slots = np.nonzero((np.arange(length) < (end - begin)[:, None]) & (indices >= 0)[:, None])
        return samples, slots, begin[samples] + slots

    def tree(self) -> dict[str, Any]:
        """What a checkpoint needs; {} where the scores stand in a file of their own."""
        return {} if self.fixed else {name: kept for name, kept in zip(self.signals, self.scores)}

    def restore(self, tree: dict[str, Any]) -> None:
        """Goes on with what `tree` gave."""
        self.scores = np.stack([np.asarray(tree[name], np.float32) for name in self.signals])
