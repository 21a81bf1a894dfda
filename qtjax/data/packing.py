"""Samples into fixed-shape rows: packing, token removal, and the arrays a packed batch consists of. numpy, host side."""

from collections import deque
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from qtjax.errors import QtjaxError


class Sample(NamedTuple):
    """One sample on its way into a row: input_ids int32 [l], loss_mask bool [l] (at targets), position_ids int32 [l]; its task."""

    input_ids: np.ndarray
    loss_mask: np.ndarray
    position_ids: np.ndarray
    task_id: int = 0


class PackedRows(NamedTuple):
    """R rows of L slots.

    input_ids int32 [R, L] (0 at padding). loss_mask bool [R, L], at the target position. position_ids int32 [R, L] (0 at
    padding). segment_ids int32 [R, L], 1..S in a row, 0 padding. sample int32 [R, L], index of the sample, -1 padding.
    task_ids int32 [R, L], 0 at padding.
    """

    input_ids: np.ndarray
    loss_mask: np.ndarray
    position_ids: np.ndarray
    segment_ids: np.ndarray
    sample: np.ndarray
    task_ids: np.ndarray

    @property
    def labels(self) -> np.ndarray:
        """int32 [R, L], the label AT the target position, predicted from the slot before it: the ids themselves, also
        in drop mode, where the slot before a kept token is the last kept one (or the end of the prompt)."""
        return self.input_ids

    @property
    def fill(self) -> float:
        """Real tokens per slot, fraction 0-1."""
        return float((self.segment_ids > 0).mean())


def pack(lengths: Sequence[int] | np.ndarray, row_length: int, most: int = 0) -> list[list[int]]:
    """Every sample into exactly one row, in few rows: best-fit decreasing, or filling row after row, whichever takes fewer.

    Args:
      lengths: int [n], tokens per sample; samples of length 0 take no place and are left out.
      row_length: tokens a row holds; most: samples it holds, 0: any number. A row with more is cut, which costs fill.
    Returns: rows of sample indices, ascending inside a row, rows ordered by their first sample. Deterministic; at
      most 11/9 of the fewest possible rows, plus one (Johnson 1973), where `most` cuts none.
    Raises QtjaxError when a sample is longer than a row.
    """
    sizes = np.asarray(lengths, dtype=np.int64)
    if len(sizes) and sizes.max() > row_length:
        i = int(sizes.argmax())
        raise QtjaxError(f"sample {i} has {sizes[i]} tokens, a row holds {row_length}; raise train.row_length or lower data.max_length")
    rows = _best_fit(sizes, row_length)
    if len(sizes) <= _FEW and len(rows) > -(-int(sizes.sum()) // row_length):
        rows = min(rows, _filled(sizes, row_length), key=len)
    rows = [row[at : at + most] for row in rows for at in range(0, len(row), most)] if most else rows
    return sorted((sorted(row) for row in rows), key=lambda row: row[0])


_FEW = 2048  # samples; `_filled` takes time with their square, a tenth of a second here


def _best_fit(sizes: np.ndarray, row_length: int) -> list[list[int]]:
    """Largest first, each into the row it fills best; ties go to the row left that way first."""
    rows: list[list[int]] = []
    # open_rows[f]: rows with f free slots, first come first; bit f of `some` says that there are any.
    open_rows: list[deque[int]] = [deque() for _ in range(row_length + 1)]
    some = 0
    for i in np.argsort(-sizes, kind="stable").tolist():
        size = int(sizes[i])
        if size == 0:
            continue
        fitting = some >> size
        if fitting:
            free = size + (fitting & -fitting).bit_length() - 1
            row = open_rows[free].popleft()
            if not open_rows[free]:
                some &= ~(1 << free)
        else:
            free, row = row_length, len(rows)
            rows.append([])
        rows[row].append(i)
        left = free - size
        if left:
            open_rows[left].append(row)
            some |= 1 << left
    return rows


def _filled(sizes: np.ndarray, row_length: int) -> list[list[int]]:
    """Row after row: the largest sample left, and of the others those that together fill what is free best, large ones first.

    Better than best fit where a row holds several samples (Gupta and Ho 1999, minimum bin slack, with the largest in first).
    """
    left = [(int(sizes[i]), i) for i in np.argsort(-sizes, kind="stable").tolist() if sizes[i]]
    rows = []
    while left:
        size, first = left.pop(0)
        row, free = [first], row_length - size
        sums, tried = [1], []  # sums[j]: bit t says that some of the first j tried samples have t tokens together
        for at, (size, _) in enumerate(left):
            if size <= free:
                sums.append((sums[-1] | sums[-1] << size) & (1 << free + 1) - 1)
                tried.append(at)
                if sums[-1] >> free:
                    break
        best, taken = sums[-1].bit_length() - 1, []
        while best:
            at = tried[next(j for j, some in enumerate(sums) if some >> best & 1) - 1]
            taken.append(at)
            best -= left[at][0]
        for at in taken:  # the last first
            row.append(left.pop(at)[1])
        rows.append(row)
    return rows


def mask_tokens(input_ids: np.ndarray, kept: np.ndarray) -> Sample:
    """method.md section 4, mode "mask": pruned tokens leave the loss and stay as context.

    Args:
      input_ids: int32 [l]; kept: bool [l], the targets that stay.
    Returns: the sequence up to its last kept target (what follows cannot change the loss); empty if none is kept.
    """
    end = int(np.flatnonzero(kept)[-1]) + 1 if kept.any() else 0
    return Sample(
        np.asarray(input_ids[:end], np.int32), np.array(kept[:end], bool), np.arange(end, dtype=np.int32)
    )  # fmt: skip


def drop_tokens(
    input_ids: np.ndarray, loss_mask: np.ndarray, kept: np.ndarray, *, compact_positions: bool = False
) -> Sample:
    """method.md section 4, mode "drop": pruned targets leave the input as well; the rest moves together.

    The label of a kept token is the next kept token of the same answer, and what predicts the first one is the last token
    of the prompt before it: in the shorter sequence that is again "the slot before the target".

    Args:
      input_ids: int32 [l]; loss_mask: bool [l], all targets T; kept: bool [l], the targets that stay (a subset of T).
      compact_positions: number the kept tokens 0, 1, ...; otherwise they keep their position ids.
    Returns: prompts and kept targets, up to the last kept target; empty if none is kept.
    """
    end = int(np.flatnonzero(kept)[-1]) + 1 if kept.any() else 0
    stays = np.flatnonzero(~loss_mask[:end] | kept[:end])
    positions = np.arange(len(stays)) if compact_positions else stays
    return Sample(
        np.asarray(input_ids[stays], np.int32), np.array(kept[stays], bool), positions.astype(np.int32)
    )  # fmt: skip


def fill_rows(samples: Sequence[Sample], bins: Sequence[Sequence[int]], rows: int, row_length: int) -> PackedRows:
    """The arrays of one microbatch.

    Args:
      samples: all sequences; bins: at most `rows` lists of indices into them, from `pack`.
      rows, row_length: the fixed shape; rows without a bin are padding.
    Returns: PackedRows. The first token of a sample is never a target, whatever its mask says.
    Raises ValueError when the bins do not fit the shape (a bug of the caller, not of the data).
    """
    if len(bins) > rows:
        raise ValueError(f"{len(bins)} bins for {rows} rows")
    out = PackedRows(
        input_ids=np.zeros((rows, row_length), np.int32),
        loss_mask=np.zeros((rows, row_length), bool),
        position_ids=np.zeros((rows, row_length), np.int32),
        segment_ids=np.zeros((rows, row_length), np.int32),
        sample=np.full((rows, row_length), -1, np.int32),
        task_ids=np.zeros((rows, row_length), np.int32),
    )
    for r, members in enumerate(bins):
        at = 0
        for segment, i in enumerate(members, start=1):
            ids, mask, positions, task = samples[i]
            slots = slice(at, at + len(ids))
            if slots.stop > row_length:
                raise ValueError(f"bin {r} holds more than {row_length} tokens")
            out.input_ids[r, slots] = ids
            out.loss_mask[r, slots] = mask
            out.loss_mask[r, at : at + 1] = False
            out.position_ids[r, slots] = positions
            out.segment_ids[r, slots] = segment
            out.sample[r, slots] = i
            out.task_ids[r, slots] = task
            at = slots.stop
    return out
