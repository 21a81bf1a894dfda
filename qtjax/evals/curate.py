"""Offline curation: what the pruners keep of a dataset under one model, decided once, batch by batch, and written down.

The folder holds, when done, kept.jsonl or kept.parquet (the source's own rows, each with a field "qtjax"), scores.parquet
(every sample, kept or not; records.samples.SCHEMA) and eu_plane.png; on the way parts/, from which a stopped run goes on.
"""

import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from qtjax.atomic import disk_errors, open_atomic, remove_leftovers, write_atomic, write_json
from qtjax.config import Config
from qtjax.data.dataset import TokenizedDataset
from qtjax.data.rows import Rows
from qtjax.errors import QtjaxError
from qtjax.evals.decisions import Decided
from qtjax.evals.survey import record_columns
from qtjax.records.samples import SCHEMA, to_table

FORMATS = ("jsonl", "parquet")
FIELD = "qtjax"  # the name under which a kept row carries what was decided about it
_OPTIONS = "curation.json"
# Beside SCHEMA: the sample's place in the data set, its factor in the loss, and which of its tokens stay in the loss.
_PART = pa.schema([*SCHEMA, ("sample", pa.int64()), ("weight", pa.float32()), ("kept", pa.list_(pa.int32()))])


class Parts:
    """parts/batches-000001-000050.parquet: decided batches on disk, in order and without a gap.

    Raises QtjaxError when the folder holds a curation of other settings or data.
    """

    def __init__(self, out: Path, config: Config, model: str, dataset: TokenizedDataset):
        settings = {name: value for name, value in config.flat().items() if name.split(".")[0] in ("data", "prune", "model")}
        settings |= {"train.seed": config.train.seed, "checkpoint": model, "data.fingerprint": dataset.fingerprint}
        self.folder, self._dataset = out / "parts", dataset
        with disk_errors(out, "making the folder"):
            self.folder.mkdir(parents=True, exist_ok=True)
        remove_leftovers(out)
        remove_leftovers(self.folder)
        known = out / _OPTIONS
        if known.is_file():
            before = json.loads(known.read_text())
            differ = [name for name, value in settings.items() if before.get(name) != value]
            if differ:
                raise QtjaxError(
                    f"{out}: holds a curation with {differ[0]} = {before.get(differ[0])!r}, this one has {settings[differ[0]]!r}; choose"
                    " another --out, or remove that folder"
                )
        else:
            write_json(known, settings)
        self._waiting: list[pa.Table] = []
        self.done = 0
        for first, last, path in self._shards():
            if first != self.done + 1:
                raise QtjaxError(f"{path}: batches {self.done + 1} to {first - 1} are missing before it; remove {out} and start again")
            self.done = last

    def _shards(self) -> list[tuple[int, int, Path]]:
        found = [(*map(int, path.stem.split("-")[1:]), path) for path in self.folder.glob("batches-*-*.parquet")]
        return sorted(found)

    def append(self, decided: Decided) -> None:
        """Holds a batch until `flush`."""
        batch, decision = decided.batch, decided.decision
        columns = record_columns(self._dataset, batch, decision)
        table = to_table(decided.step + 1, columns)
        real = np.flatnonzero(batch.valid)
        kept = [np.flatnonzero(decision.tokens[i]).astype(np.int32) for i in real]
        more = (pa.array(batch.indices[real]), pa.array(decision.weight[real]), pa.array(kept, pa.list_(pa.int32())))
        for field, column in zip(list(_PART)[len(SCHEMA) :], more):
            table = table.append_column(field, column)
        self._waiting.append(table)

    def flush(self) -> None:
        """Writes what waits as one part."""
        if not self._waiting:
            return
        first, last = self.done + 1, self.done + len(self._waiting)
        data = io.BytesIO()
        pq.write_table(pa.concat_tables(self._waiting), data, compression="zstd")
        write_atomic(self.folder / f"batches-{first:06d}-{last:06d}.parquet", data.getvalue())
        self._waiting, self.done = [], last

    def read(self) -> Iterator[pa.Table]:
        """Every part in order. Raises QtjaxError for a damaged one."""
        for _, _, path in self._shards():
            try:
                with disk_errors(path, "reading"):
                    yield pq.read_table(pa.BufferReader(path.read_bytes()), schema=_PART)
            except pa.ArrowException as error:
                raise QtjaxError(f"{path}: not a readable part ({str(error).splitlines()[0]}); remove the folder and start again") from error


def write_results(parts: Parts, out: Path, format: str, rows: Rows, dataset: TokenizedDataset) -> pa.Table:
    """Writes kept.* and scores.parquet from the parts; returns all scores in the order of the dataset.

    rows: the source rows that the dataset was made of, found by their place in the source.
    """
    place = {int(index): i for i, index in enumerate(rows.index)}
    table = pa.concat_tables([_PART.empty_table(), *parts.read()])
    table = table.take(pa.array(np.argsort(table["sample"].to_numpy(), kind="stable")))
    scores = table.select(SCHEMA.names)
    with open_atomic(out / "scores.parquet") as file:
        pq.write_table(scores, file, compression="zstd")
    kept = table.filter(table["keep"])
    with open_atomic(out / f"kept.{format}") as file:
        writer = _jsonl if format == "jsonl" else _parquet
        writer(file, _kept_rows(kept, rows, place, dataset))
    return scores


def _kept_rows(kept: pa.Table, rows: Rows, place: dict[int, int], dataset: TokenizedDataset) -> Iterator[dict[str, Any]]:
    for batch in kept.to_batches(max_chunksize=1024):
        for one in batch.to_pylist():
            row = dict(rows[place[one["row"]]])
            if FIELD in row:
                raise QtjaxError(f"{rows.where(place[one['row']])}: has a field {FIELD!r} already; rename it, its place is needed")
            names = ("row", "perplexity", "entropy", "count", "quadrant", "median_quadrant", "supplement", "weight", "kept_tokens")
            ids, _, _ = dataset.sample(one["sample"])
            values = {name: _json_number(one[name]) for name in names}
            yield row | {FIELD: values | {"input_ids": ids.tolist(), "kept": one["kept"]}}


def _json_number(value: Any) -> Any:
    """NaN (a sample that was not scored) as null."""
    return None if isinstance(value, float) and not np.isfinite(value) else value


def _jsonl(file: Any, rows: Iterator[dict[str, Any]]) -> None:
    """What JSON has no word for (a date, bytes) goes in as its text, NaN as null."""
    for row in rows:
        try:
            text = json.dumps(row, ensure_ascii=False, default=str, allow_nan=False)
        except ValueError:
            text = json.dumps(_without_nan(row), ensure_ascii=False, default=str)
        file.write(text.encode() + b"\n")


def _without_nan(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _without_nan(each) for name, each in value.items()}
    return [_without_nan(each) for each in value] if isinstance(value, list | tuple) else _json_number(value)


def _parquet(file: Any, rows: Iterator[dict[str, Any]]) -> None:
    try:
        pq.write_table(pa.Table.from_pylist(list(rows)), file, compression="zstd")
    except pa.ArrowException as error:
        reason = str(error).splitlines()[0]
        raise QtjaxError(f"kept.parquet: the rows have no common types ({reason}); write them as JSON lines: --format jsonl") from None


__all__ = ["FIELD", "FORMATS", "Parts", "write_results"]
