"""Rows of a source: a read-only sequence of dicts that knows where in its file each row came from."""

import json
import mmap
from collections.abc import Callable, Sequence
from typing import Any, overload

import numpy as np

from qtjax.errors import QtjaxError

Row = dict[str, Any]

# Bytes scanned at a time for line ends: large enough for numpy to win, small against the file itself.
_SCAN_BYTES = 1 << 26


class Rows(Sequence[Row]):
    """A sequence of rows. `where(i)` says "file:line" or "file row 7" (counted from 0), for messages and records.

    Args:
      name: the source as the user named it.
      count: number of rows.
      get: i -> row; may raise QtjaxError (a malformed line of a file that is read lazily).
      where: i -> text; default "<name> row i".
      index: int64 [count], the row's number in the whole source (other than i after `select`).
    """

    def __init__(
        self,
        name: str,
        count: int,
        get: Callable[[int], Row],
        where: Callable[[int], str] | None = None,
        index: np.ndarray | None = None,
    ):
        self.name = name
        self._count = count
        self._get = get
        self._where = where or (lambda i: f"{name} row {i}")
        self.index = np.arange(count, dtype=np.int64) if index is None else index

    def __len__(self) -> int:
        return self._count

    @overload
    def __getitem__(self, i: int) -> Row: ...
    @overload
    def __getitem__(self, i: slice) -> "Rows": ...
    def __getitem__(self, i: int | slice) -> "Row | Rows":
        if isinstance(i, slice):
            return self.select(np.arange(self._count)[i])
        if not -self._count <= i < self._count:
            raise IndexError(f"row {i} of {self._count}")
        return self._get(int(i) % self._count)

    def where(self, i: int) -> str:
        return self._where(int(i) % max(self._count, 1))

    def select(self, indices: Sequence[int] | np.ndarray) -> "Rows":
        """These rows in this order; `where` and `index` still point into the source."""
        chosen = np.asarray(indices, dtype=np.int64)
        return Rows(
            self.name,
            len(chosen),
            lambda i: self[int(chosen[i])],
            lambda i: self.where(int(chosen[i])),
            self.index[chosen],
        )


def from_objects(name: str, objects: Sequence[Any]) -> Rows:
    """Rows over a list of dicts. Raises QtjaxError when one is something else, or when there is none."""
    if not objects:
        raise QtjaxError(f"{name}: holds no rows; give a file with at least one")
    for i, row in enumerate(objects):
        if not isinstance(row, dict):
            raise QtjaxError(f"{name} row {i}: must be an object with named fields, is {type(row).__name__}")
    return Rows(name, len(objects), lambda i: objects[i])


def _line_bounds(data: bytes | mmap.mmap) -> tuple[np.ndarray, np.ndarray]:
    """Start and end (exclusive, without the line feed) of every line, int64."""
    ends = []
    for at in range(0, len(data), _SCAN_BYTES):
        block = np.frombuffer(data[at : at + _SCAN_BYTES], dtype=np.uint8)
        ends.append(np.flatnonzero(block == 10).astype(np.int64) + at)
    end = np.concatenate(ends) if ends else np.zeros(0, np.int64)
    if not len(end) or end[-1] != len(data) - 1:
        end = np.append(end, len(data))
    return np.concatenate([[0], end[:-1] + 1]), end


def from_json_lines(name: str, data: bytes | mmap.mmap) -> Rows:
    """One JSON object a line, parsed when asked for; blank lines are passed over.

    Raises QtjaxError at once when there is no row, and on access when a line is not a JSON object.
    """
    start, end = _line_bounds(data)
    if data[:3] == b"\xef\xbb\xbf":
        start[0] = 3
    # Only a short line can be blank in practice; a long run of spaces is reported as malformed instead.
    short = np.flatnonzero(end - start <= 16)
    blank = short[[not data[start[i] : end[i]].strip() for i in short]] if len(short) else short
    kept = np.delete(np.arange(len(start)), blank)
    if not len(kept):
        raise QtjaxError(f"{name}: holds no rows; give a file with one JSON object per line")

    def where(i: int) -> str:
        return f"{name}:{kept[i] + 1}"

    def get(i: int) -> Row:
        line = kept[i]
        try:
            row = json.loads(data[start[line] : end[line]])
        except json.JSONDecodeError as error:
            raise QtjaxError(
                f"{where(i)}: malformed JSON ({error.msg}, column {error.colno}); each line must be one JSON object"
            ) from None
        except UnicodeDecodeError as error:
            raise QtjaxError(f"{where(i)}: not UTF-8 ({error.reason}); save the file as UTF-8") from None
        except RecursionError:
            raise QtjaxError(f"{where(i)}: JSON nested too deeply to read") from None
        if not isinstance(row, dict):
            raise QtjaxError(f"{where(i)}: must be a JSON object with named fields, is {type(row).__name__}")
        return row

    return Rows(name, len(kept), get, where)


def _in_blocks(name: str, count: int, read: Callable[[int, int], list[Row]], block: int = 1000) -> Rows:
    """Rows read `block` at a time and the last block kept: reading in order, as tokenization does, costs one read a block."""
    kept: dict[str, Any] = {"at": -1, "rows": []}

    def get(i: int) -> Row:
        at = i - i % block
        if kept["at"] != at:
            kept.update(at=at, rows=read(at, min(at + block, count)))
        return kept["rows"][i - at]

    if not count:
        raise QtjaxError(f"{name}: holds no rows; give a source with at least one")
    return Rows(name, count, get)


def from_arrow(name: str, dataset: Any) -> Rows:
    """Rows over a `datasets.Dataset` (memory-mapped Arrow). Raises QtjaxError when it is empty."""

    def read(start: int, stop: int) -> list[Row]:
        columns = dataset[start:stop]
        return [dict(zip(columns, values)) for values in zip(*columns.values())]

    return _in_blocks(name, len(dataset), read)


def from_parquet(name: str, data: bytes | mmap.mmap) -> Rows:
    """Rows of a Parquet file, one row group in memory at a time. Raises QtjaxError when it is empty or damaged."""
    import pyarrow
    import pyarrow.parquet

    def damaged(error: Exception) -> QtjaxError:
        return QtjaxError(f"{name}: damaged or not Parquet ({' '.join(str(error).split())[:200]}); fetch the file again")

    try:
        file = pyarrow.parquet.ParquetFile(pyarrow.BufferReader(pyarrow.py_buffer(data)))
    except (pyarrow.ArrowException, OSError) as error:
        raise damaged(error) from None
    sizes = [file.metadata.row_group(g).num_rows for g in range(file.num_row_groups)]
    begins = np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64)
    kept: dict[str, Any] = {"group": -1, "table": None}

    def read(start: int, stop: int) -> list[Row]:
        rows: list[Row] = []
        while start < stop:
            group = int(np.searchsorted(begins, start, side="right")) - 1
            try:
                if kept["group"] != group:
                    kept.update(group=group, table=file.read_row_group(group))
            except (pyarrow.ArrowException, OSError) as error:
                raise damaged(error) from None
            until = min(stop, int(begins[group + 1]))
            rows += kept["table"].slice(start - int(begins[group]), until - start).to_pylist()
            start = until
        return rows

    return _in_blocks(name, int(begins[-1]), read)
