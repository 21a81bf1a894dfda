"""A tokenized dataset: flat arrays, in memory or memory-mapped, and the statistics of how it came about."""

import dataclasses
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import numpy as np
from rich.table import Table

from qtjax.errors import QtjaxError

ARRAYS = {
    "input_ids": np.int32, "loss_mask": np.bool_, "closing": np.bool_, "offsets": np.int64, "row_index": np.int64,
    "task_ids": np.int32,
}  # fmt: skip


@dataclass(frozen=True)
class DataStats:
    """What became of the rows. Nothing is lost in silence: rows == samples + skipped, except that a long `text` makes several samples.

    rows: rows read. samples: sequences made of them. cut: samples that lost trained tokens to max_length.
    skipped: reason -> rows. noted: remark -> how often; such rows are kept. tokens, trained_tokens: counts over all samples.
    """

    rows: int = 0
    samples: int = 0
    cut: int = 0
    skipped: Mapping[str, int] = field(default_factory=dict)
    noted: Mapping[str, int] = field(default_factory=dict)
    tokens: int = 0
    trained_tokens: int = 0

    def counted(self, samples: int, tokens: int, trained_tokens: int) -> "DataStats":
        """The same remarks with these counts."""
        return dataclasses.replace(self, samples=samples, tokens=tokens, trained_tokens=trained_tokens)

    def line(self) -> str:
        """One line for a log: "7,473 rows -> 7,470 samples (12 cut; 3 skipped: empty answer 3), 1,000 tokens, 500 trained"."""
        remarks = [f"{self.cut:,} cut"] if self.cut else []
        if self.skipped:
            reasons = ", ".join(f"{reason} {count:,}" for reason, count in sorted(self.skipped.items()))
            remarks.append(f"{sum(self.skipped.values()):,} skipped: {reasons}")
        remarks += [f"{remark}: {count:,}" for remark, count in sorted(self.noted.items())]
        inside = f" ({'; '.join(remarks)})" if remarks else ""
        return f"{self.rows:,} rows -> {self.samples:,} samples{inside}, {self.tokens:,} tokens, {self.trained_tokens:,} trained"

    def table(self, title: str = "data") -> Table:
        """The same as a rich table."""
        table = Table("", "count", title=title, title_justify="left")
        table.columns[1].justify = "right"
        cells = [("rows read", self.rows), ("samples", self.samples), ("samples cut at max_length", self.cut)]
        cells += [(f"rows skipped: {reason}", count) for reason, count in sorted(self.skipped.items())]
        cells += [(f"noted: {remark}", count) for remark, count in sorted(self.noted.items())]
        cells += [("tokens", self.tokens), ("trained tokens", self.trained_tokens)]
        for name, count in cells:
            table.add_row(name, f"{count:,}")
        return table


@dataclass(frozen=True)
class TokenizedDataset:
    """n samples in flat arrays, which may lie in files: a step reads the samples that it needs.

    input_ids: int32 [total]. loss_mask: bool [total], True at targets (target position). closing: bool [total], True at
    the token that closes an answer (a target too). offsets: int64 [n+1], sample i is offsets[i]:offsets[i+1].
    row_index: int64 [n], the source row of each sample. task_ids: int32 [n], its task, 0 where there is only one.
    """

    input_ids: np.ndarray
    loss_mask: np.ndarray
    closing: np.ndarray
    offsets: np.ndarray
    row_index: np.ndarray
    task_ids: np.ndarray
    stats: DataStats

    def __len__(self) -> int:
        return len(self.row_index)

    @property
    def lengths(self) -> np.ndarray:
        """int64 [n], tokens per sample."""
        return np.diff(self.offsets)

    @property
    def trained(self) -> np.ndarray:
        """int64 [n], targets per sample."""
        return np.add.reduceat(self.loss_mask, self.offsets[:-1], dtype=np.int64)

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of ids and targets: what has begun with these samples goes on with no others."""
        digest = hashlib.sha256()
        for array in (self.input_ids, self.loss_mask, self.offsets):
            digest.update(np.ascontiguousarray(array).view(np.uint8).data)
        return digest.hexdigest()

    def sample(self, i: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(input_ids int32 [l], loss_mask bool [l], closing bool [l]) of sample i; views, not copies."""
        at = slice(int(self.offsets[i]), int(self.offsets[i + 1]))
        return self.input_ids[at], self.loss_mask[at], self.closing[at]

    def subset(self, indices: Sequence[int] | np.ndarray) -> "TokenizedDataset":
        """These samples in this order, with counts of their own; cut, skipped and noted stay those of the whole."""
        chosen = [self.sample(int(i)) for i in indices]
        rows = self.row_index[np.asarray(indices, dtype=np.int64)]
        stats = dataclasses.replace(self.stats, rows=len(set(rows.tolist())))
        return assemble(chosen, rows, stats, self.task_ids[np.asarray(indices, dtype=np.int64)])

    def save(self, folder: str | Path) -> None:
        """Writes one .npy per array and stats.json. Raises OSError when the disk is full."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        for name in ARRAYS:
            np.save(folder / f"{name}.npy", getattr(self, name), allow_pickle=False)
        write_stats(folder, self.stats)

    @classmethod
    def load(cls, folder: str | Path, *, mmap: bool = True) -> "TokenizedDataset":
        """The inverse of `save`; with `mmap` the arrays stay on disk. Raises QtjaxError for a folder that is none or is damaged."""
        folder = Path(folder)
        try:
            # A view, because every slice of a np.memmap itself costs some microseconds.
            arrays = {n: np.load(folder / f"{n}.npy", mmap_mode="r" if mmap else None, allow_pickle=False).view(np.ndarray) for n in ARRAYS}
            stats = DataStats(**json.loads((folder / "stats.json").read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError) as error:
            raise QtjaxError(f"{folder}: not a complete tokenized dataset ({error}); tokenize again") from None
        tokens, samples = len(arrays["input_ids"]), len(arrays["row_index"])
        lengths = {"loss_mask": tokens, "closing": tokens, "offsets": samples + 1, "task_ids": samples}
        if (
            any(arrays[n].dtype != kind for n, kind in ARRAYS.items())
            or any(len(arrays[n]) != length for n, length in lengths.items())
            or arrays["offsets"][-1] != tokens
        ):
            raise QtjaxError(f"{folder}: the arrays of the tokenized dataset do not fit together; tokenize again")
        return cls(**arrays, stats=stats)


def write_stats(folder: Path, stats: DataStats) -> None:
    """The file that `TokenizedDataset.load` reads the statistics from."""
    (folder / "stats.json").write_text(json.dumps(dataclasses.asdict(stats), indent=2) + "\n", encoding="utf-8")


def assemble(
    samples: Sequence[tuple[np.ndarray, np.ndarray, np.ndarray]],
    row_index: Sequence[int] | np.ndarray,
    stats: DataStats,
    task_ids: Sequence[int] | np.ndarray | None = None,
) -> TokenizedDataset:
    """A dataset of (input_ids, loss_mask, closing) triples; samples, tokens and trained_tokens of `stats` are counted here."""

    def flat(part: int, kind: type) -> np.ndarray:
        return np.concatenate([np.asarray(s[part], dtype=kind) for s in samples]) if samples else np.zeros(0, kind)

    input_ids, loss_mask, closing = flat(0, np.int32), flat(1, np.bool_), flat(2, np.bool_)
    offsets = np.zeros(len(samples) + 1, np.int64)
    np.cumsum([len(s[0]) for s in samples], out=offsets[1:])
    counted = stats.counted(len(samples), len(input_ids), int(loss_mask.sum()))
    tasks = np.zeros(len(samples), np.int32) if task_ids is None else np.asarray(task_ids, np.int32)
    return TokenizedDataset(input_ids, loss_mask, closing, offsets, np.asarray(row_index, dtype=np.int64), tasks, counted)
