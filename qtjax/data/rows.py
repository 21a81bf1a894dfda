"""Rows of a source: a read-only sequence of dicts that knows where in its file each row came from.

Rows stay in their file and are read when they are asked for; what is held of each is where it begins, some bytes.
"""

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, overload

import numpy as np

from qtjax.data.stored import BLOCK, Stored
from qtjax.errors import QtjaxError

Row = dict[str, Any]

# Rows that are read together, where a source is quicker to read so.
ROWS = 1000


class Rows(Sequence[Row]):
    """A sequence of rows. `where(i)` says "file:line" or "file row 7" (counted from 0), for messages and records.

    Args:
      name: the source as the user named it.
      count: number of rows.
      get: i -> row; may raise QtjaxError (a malformed line of a file that is read lazily).
      where: i -> text; default "<name> row i".
      chosen: int64 [count], the row's number in the whole source; None: i itself.
      fingerprint: () -> text that tells these rows from any others; it may have to read all of them.
    """

    def __init__(
        self,
        name: str,
        count: int,
        get: Callable[[int], Row],
        where: Callable[[int], str] | None = None,
        chosen: np.ndarray | None = None,
        *,
        fingerprint: Callable[[], str],
    ):
        self.name = name
        self._count = count
        self._get = get
        self._where = where or (lambda i: f"{name} row {i}")
        self._chosen = chosen
        self._fingerprint = fingerprint

    @property
    def index(self) -> np.ndarray:
        """int64 [count], the row's number in the whole source (other than i after `select`)."""
        return np.arange(self._count, dtype=np.int64) if self._chosen is None else self._chosen

    @property
    def fingerprint(self) -> str:
        """A text that is the same for the same rows, read from the same content, and other for others."""
        return self._fingerprint()

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
            chosen if self._chosen is None else self._chosen[chosen],
            fingerprint=lambda: hashlib.sha256(self.fingerprint.encode() + chosen.tobytes()).hexdigest(),
        )


def from_objects(name: str, objects: Sequence[Any]) -> Rows:
    """Rows over a list of dicts. Raises QtjaxError when one is something else, or when there is none."""
    if not objects:
        raise QtjaxError(f"{name}: holds no rows; give a file with at least one")
    for i, row in enumerate(objects):
        if not isinstance(row, dict):
            raise QtjaxError(f"{name} row {i}: must be an object with named fields, is {type(row).__name__}")

    def fingerprint() -> str:
        digest = hashlib.sha256()
        for row in objects:
            digest.update(json.dumps(row, default=str).encode() + b"\n")
        return digest.hexdigest()

    return Rows(name, len(objects), lambda i: objects[i], fingerprint=fingerprint)


def _line_starts(data: Stored) -> np.ndarray:
    """int64, where each line begins, and where one more would after the last."""
    starts = [np.zeros(1, np.int64)]
    for at, block in data.blocks():
        starts.append(np.flatnonzero(np.frombuffer(block, np.uint8) == 10) + (at + 1))
    found = np.concatenate(starts)
    return found if found[-1] == data.size else np.append(found, data.size + 1)


def from_json_lines(name: str, data: Stored) -> Rows:
    """One JSON object a line, parsed when asked for; blank lines are passed over.

    Raises QtjaxError at once when there is no row, and on access when a line is not a JSON object.
    """
    start = _line_starts(data)
    if data.read(0, 3) == b"\xef\xbb\xbf":
        start[0] = 3
    # Only a short line can be blank in practice; a long run of spaces is reported as malformed instead.
    short = np.flatnonzero(np.diff(start) <= 17)
    blank = short[[not data.line(start[i]).strip() for i in short]] if len(short) else short
    start = np.delete(start[:-1], blank) if len(blank) else start[:-1]
    if not len(start):
        raise QtjaxError(f"{name}: holds no rows; give a file with one JSON object per line")
    before = blank - np.arange(len(blank))  # of each blank line, the rows before it

    def where(i: int) -> str:
        return f"{name}:{i + int(np.searchsorted(before, i, side='right')) + 1}"

    def get(i: int) -> Row:
        try:
            row = json.loads(data.line(int(start[i])))
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

    return Rows(name, len(start), get, where, fingerprint=data.fingerprint)


def in_blocks(
    name: str, count: int, read: Callable[[int, int], list[Row]], where: Callable[[int], str] | None = None, *, fingerprint: Callable[[], str]
) -> Rows:
    """Rows read some at a time and the last of them kept: reading in order, as tokenization does, reads each once."""
    kept: dict[str, Any] = {"at": -1, "rows": []}

    def get(i: int) -> Row:
        at = i - i % ROWS
        if kept["at"] != at:
            kept.update(at=at, rows=read(at, min(at + ROWS, count)))
        return kept["rows"][i - at]

    if not count:
        raise QtjaxError(f"{name}: holds no rows; give a source with at least one")
    return Rows(name, count, get, where, fingerprint=fingerprint)


def from_arrow(name: str, dataset: Any) -> Rows:
    """Rows over a `datasets.Dataset` (memory-mapped Arrow). Raises QtjaxError when it is empty."""

    def read(start: int, stop: int) -> list[Row]:
        columns = dataset[start:stop]
        return [dict(zip(columns, values)) for values in zip(*columns.values())]

    def fingerprint() -> str:
        # The library's own says what was done to get there; the files' sizes and times, that nobody changed them since.
        files = [Path(file["filename"]).stat() for file in dataset.cache_files]
        return f"{dataset._fingerprint} {[(file.st_size, file.st_mtime_ns) for file in files]}"

    return in_blocks(name, len(dataset), read, fingerprint=fingerprint)


def from_parquet(name: str, data: Stored) -> Rows:
    """Rows of a Parquet file, read page by page whatever its row groups' size. Raises QtjaxError when it is empty or damaged."""
    import pyarrow
    import pyarrow.parquet

    def damaged(error: Exception) -> QtjaxError:
        return QtjaxError(f"{name}: damaged or not Parquet ({' '.join(str(error).split())[:200]}); fetch the file again")

    try:
        file = pyarrow.parquet.ParquetFile(data.file, buffer_size=BLOCK)  # without a size whole column chunks are read
    except (pyarrow.ArrowException, OSError) as error:
        raise damaged(error) from None
    sizes = [file.metadata.row_group(g).num_rows for g in range(file.num_row_groups)]
    pages = _Pages(file, np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64))

    def read(start: int, stop: int) -> list[Row]:
        try:
            return pages.read(start, stop)
        except (pyarrow.ArrowException, OSError) as error:
            raise damaged(error) from None

    return in_blocks(name, int(pages.begins[-1]), read, fingerprint=data.fingerprint)


class _Pages:
    """Reads a Parquet file batch by batch, forward; what lies behind begins again with its row group.

    begins: int64 [groups + 1], the row that each row group begins with, and their number.
    """

    def __init__(self, file: Any, begins: np.ndarray):
        self.file, self.begins = file, begins
        self.at, self.batch = 0, ()  # the batch in memory begins with row `at`
        self.ahead: Iterator[Any] | None = None  # those after it

    def read(self, start: int, stop: int) -> list[Row]:
        """Rows start..stop-1."""
        rows: list[Row] = []
        while start < stop:
            self._go_to(start)
            until = min(stop, self.at + len(self.batch))
            rows += self.batch.slice(start - self.at, until - start).to_pylist()
            start = until
        return rows

    def _go_to(self, row: int) -> None:
        group = int(np.searchsorted(self.begins, row, side="right")) - 1
        if self.ahead is None or row < self.at or self.begins[group] > self.at + len(self.batch):
            self.at, self.batch = int(self.begins[group]), ()
            self.ahead = self.file.iter_batches(ROWS, row_groups=range(group, len(self.begins) - 1))
        while row >= self.at + len(self.batch):
            self.at, self.batch = self.at + len(self.batch), next(self.ahead)
