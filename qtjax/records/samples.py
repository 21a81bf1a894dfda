"""EU records: one row per scored sample and step, in Parquet shards eu/steps-000001-000100.parquet.

A shard's name says which steps it covers (ends included), also those without rows; shards follow one another without
a gap. Where a crash left two shards that overlap, the longer one counts.
"""

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from qtjax.atomic import disk_errors, remove_leftovers, write_atomic
from qtjax.errors import QtjaxError

SCHEMA = pa.schema(
    [
        ("step", pa.int32()),  # optimizer step, from 1
        ("epoch", pa.int32()),  # pass over the data, from 0
        ("row", pa.int64()),  # row in the source
        ("perplexity", pa.float32()),  # exp(mean nll); NaN without targets
        ("entropy", pa.float32()),  # nats, mean over targets; NaN without targets
        ("count", pa.int32()),  # targets
        ("quadrant", pa.int8()),  # corner chosen by the level: 2, 4 (article: 2, 3), 0 not placed
        ("median_quadrant", pa.int8()),  # 1..4 by the batch's medians, 0 ineligible
        ("keep", pa.bool_()),
        ("supplement", pa.bool_()),  # kept although not placed
        ("kept_tokens", pa.int32()),  # targets that stay in the loss; 0 if dropped
    ]
)

_NAME = re.compile(r"steps-(\d{6,})-(\d{6,})\.parquet")


def to_table(step: int, columns: Mapping[str, Any]) -> pa.Table:
    """A table of SCHEMA from arrays of shape [B]; `epoch` may be one number; rows with `row` < 0 (padding) are left out.

    Raises ValueError for missing or unknown columns or unequal lengths.
    """
    columns = {"step": step, **columns}
    if set(columns) != set(SCHEMA.names):
        raise ValueError(f"EU records need the columns {SCHEMA.names}, got {sorted(columns)}")
    arrays = {name: np.asarray(value) for name, value in columns.items()}
    real = arrays["row"] >= 0
    for name, array in arrays.items():
        if array.ndim and array.shape != real.shape:
            raise ValueError(f"EU column {name!r} has shape {array.shape}, expected {real.shape}")
    return pa.table(
        {f.name: np.broadcast_to(arrays[f.name], real.shape)[real].astype(f.type.to_pandas_dtype()) for f in SCHEMA},
        schema=SCHEMA,
    )


def _shards(folder: Path) -> tuple[list[tuple[int, int, Path]], list[Path]]:
    """(first step, last step, path) of the shards that count, in order; and those that an interrupted cut left over."""
    found = []
    for path in folder.glob("steps-*.parquet"):
        if match := _NAME.fullmatch(path.name):
            found.append((int(match[1]), int(match[2]), path))
    chosen: list[tuple[int, int, Path]] = []
    extra = []
    for first, last, path in sorted(found, key=lambda s: (s[0], -s[1])):
        if chosen and first <= chosen[-1][1]:
            extra.append(path)
        else:
            chosen.append((first, last, path))
    return chosen, extra


def _read(path: Path) -> pa.Table:
    try:
        with disk_errors(path, "reading"):
            return pq.read_table(pa.BufferReader(path.read_bytes()), schema=SCHEMA)
    except pa.ArrowException as error:
        reason = str(error).splitlines()[0]
        raise QtjaxError(
            f"{path}: not a readable Parquet file of EU records ({reason}); restore or delete it"
        ) from error


def _write(path: Path, table: pa.Table) -> None:
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, compression="zstd")
    write_atomic(path, sink.getvalue().to_pybytes())


def read_samples(folder: str | os.PathLike) -> pa.Table:
    """All rows of all shards in step order; an empty table if there are none. Raises QtjaxError for a damaged shard."""
    return pa.concat_tables([SCHEMA.empty_table(), *(_read(path) for _, _, path in _shards(Path(folder))[0])])


class SampleShards:
    """The shards opened for writing; rows wait in memory until `flush`. The caller holds the run folder's lock."""

    def __init__(self, folder: str | os.PathLike):
        self.folder = Path(folder)
        with disk_errors(self.folder):
            self.folder.mkdir(exist_ok=True)
        remove_leftovers(self.folder)
        self._waiting: list[tuple[int, pa.Table]] = []
        shards, _ = _shards(self.folder)
        self._covered = shards[-1][1] if shards else 0

    def append(self, step: int, columns: Mapping[str, Any]) -> None:
        """Holds the rows of one step. Raises ValueError for a step that is already there."""
        last = self._waiting[-1][0] if self._waiting else self._covered
        if step <= last:
            raise ValueError(f"EU records already cover step {step}: cut back to the restored step first")
        self._waiting.append((step, to_table(step, columns)))

    def flush(self, step: int) -> None:
        """Writes what waits up to `step` as one shard; nothing if no step ever had rows. Raises QtjaxError, losing nothing."""
        ready = [table for s, table in self._waiting if s <= step]
        if step <= self._covered or not (ready or self._covered):
            return
        path = self.folder / f"steps-{self._covered + 1:06d}-{step:06d}.parquet"
        _write(path, pa.concat_tables([SCHEMA.empty_table(), *ready]))
        self._waiting = [(s, table) for s, table in self._waiting if s > step]
        self._covered = step

    def check(self, step: int) -> None:
        """Raises QtjaxError if there are shards but steps 1..step are not all covered."""
        shards, _ = _shards(self.folder)
        covered = 0
        for first, last, _ in shards:
            if first != covered + 1:
                break
            covered = last
        if shards and covered < step:
            raise QtjaxError(
                f"{self.folder}: EU records cover steps 1 to {covered}, but the checkpoint is of step {step}; restore the"
                " missing shard, or start over with another run.folder"
            )

    def cut_back(self, step: int) -> None:
        """Leaves the rows of steps 1..step (`check` first); interrupted anywhere, it can be repeated."""
        self.check(step)
        shards, extra = _shards(self.folder)
        self._waiting, self._covered = [], step if shards else 0
        unwanted = set(extra)
        for first, last, path in shards:
            if last > step:
                unwanted.add(path)
            if first <= step < last:
                shorter = path.with_name(f"steps-{first:06d}-{step:06d}.parquet")
                _write(shorter, _read(path).filter(pc.field("step") <= step))
                unwanted.discard(shorter)  # an interrupted cut to the same step may have left it
        with disk_errors(self.folder):
            for path in unwanted:
                path.unlink(missing_ok=True)
