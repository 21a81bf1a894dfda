"""Host side of a step: one scoring batch read sample by sample, packed into rows, and its survivors packed again.

N samples (this process's part of the scoring batch, padding included), T slots per sample, R rows, L slots per row.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from qtjax.config import PruneSection
from qtjax.data.packing import PackedRows, Sample, drop_tokens, fill_rows, mask_tokens, pack
from qtjax.parallel import agree_max
from qtjax.training.ladder import cut


@dataclass(frozen=True)
class ScoringBatch:
    """Samples side by side, padded on the right: what the decision is made on.

    indices int64 [N], -1 for padding; input_ids int32 [N, T]; targets, closing bool [N, T]; lengths int32 [N] in tokens;
    task_ids int32 [N]; reference float32 [N, T], the targets' nll under a reference model, or None.
    """

    indices: np.ndarray
    input_ids: np.ndarray
    targets: np.ndarray
    closing: np.ndarray
    lengths: np.ndarray
    task_ids: np.ndarray
    reference: np.ndarray | None = None

    @property
    def valid(self) -> np.ndarray:
        return self.indices >= 0


@dataclass(frozen=True)
class Microbatch:
    """One launch: this process's rows, arrays [R, L], and where each slot came from (sample -1: padding); size: rows of all processes."""

    rows: dict[str, np.ndarray]
    sample: np.ndarray
    size: int

    @property
    def tokens(self) -> int:
        """Real tokens among the R x L slots."""
        return int((self.sample >= 0).sum())


@dataclass(frozen=True)
class Prepared:
    """What needs no weights: read and packed ahead of time, in a thread."""

    batch: ScoringBatch
    scoring: list[Microbatch]


def read_batch(dataset, indices: np.ndarray, length: int, reference: np.ndarray | None = None) -> ScoringBatch:
    """Copies the samples `indices` (-1: none) of a TokenizedDataset side by side.

    Args: reference float32 [total]: nll of the data set's tokens under a reference model, in its own flat order.
    """
    count = len(indices)
    input_ids = np.zeros((count, length), np.int32)
    targets, closing = np.zeros((count, length), bool), np.zeros((count, length), bool)
    lengths = np.zeros(count, np.int32)
    theirs = None if reference is None else np.zeros((count, length), np.float32)
    for i, index in enumerate(indices):
        if index >= 0:
            ids, mask, close = dataset.sample(int(index))
            lengths[i] = len(ids)
            input_ids[i, : len(ids)], targets[i, : len(ids)], closing[i, : len(ids)] = ids, mask, close
            if theirs is not None:
                theirs[i, : len(ids)] = reference[dataset.offsets[index] : dataset.offsets[index + 1]]
    targets[:, 0] = closing[:, 0] = False  # nothing stands before a sample's first token
    indices = np.asarray(indices)
    tasks = np.where(indices >= 0, dataset.task_ids[np.maximum(indices, 0)], 0)
    return ScoringBatch(indices, input_ids, targets, closing, lengths, tasks, theirs)


def whole_samples(batch: ScoringBatch, keep: np.ndarray | None = None) -> list[Sample]:
    """Every sample as it is, for the scoring pass; padding, and what `keep` bool [N] leaves out, is an empty one."""
    slots = np.arange(batch.input_ids.shape[1], dtype=np.int32)
    lengths = batch.lengths if keep is None else np.where(keep, batch.lengths, 0)
    return [
        Sample(batch.input_ids[i, :n], batch.targets[i, :n], slots[:n], int(batch.task_ids[i])) for i, n in enumerate(lengths.tolist())
    ]


def survivors(batch: ScoringBatch, tokens: np.ndarray, prune: PruneSection) -> list[Sample]:
    """What is left to train on: a shorter sequence per sample, empty where nothing is kept.

    Args: tokens bool [N, T]: the targets that stay in the loss.
    """
    out = []
    for i, n in enumerate(batch.lengths.tolist()):
        ids, kept = batch.input_ids[i, :n], tokens[i, :n]
        if prune.mode == "drop":
            left = drop_tokens(ids, batch.targets[i, :n], kept, compact_positions=prune.compact_positions)
        else:
            left = mask_tokens(ids, kept)
        out.append(left._replace(task_id=int(batch.task_ids[i])))
    return out


def microbatches(
    samples: Sequence[Sample], shapes: tuple[int, ...], row_length: int, processes: int, weight: np.ndarray | None = None, most: int = 0
) -> list[Microbatch]:
    """Packs samples densely into the ladder's shapes; all processes launch the same number of each.

    Args: shapes: global rows per launch, largest first; a process fills shapes[i] / processes of them. weight float32 [n]:
    a sample's factor in the loss; None: 1. most: samples of a row (ModelConfig.max_segments), 0: any number.
    """
    bins = pack([len(s.input_ids) for s in samples], row_length, most)
    out, start = [], 0
    for size in cut(agree_max(len(bins)) * processes, shapes):
        own = size // processes
        packed = fill_rows(samples, bins[start : start + own], own, row_length)
        out.append(Microbatch(_for_device(packed, weight), packed.sample, size))
        start += own
    return out


def _for_device(packed: PackedRows, weight: np.ndarray | None) -> dict[str, np.ndarray]:
    weights = packed.loss_mask.astype(np.float32)
    if weight is not None:
        weights *= weight[packed.sample]  # padding (-1) is no target
    return {
        "input_ids": packed.input_ids,
        "position_ids": packed.position_ids,
        "segment_ids": packed.segment_ids,
        "weights": weights,
        "task_ids": packed.task_ids,
    }
