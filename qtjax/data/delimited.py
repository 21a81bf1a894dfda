"""CSV and TSV. Two habits of real files are met by rule, not by guess: tables without a header, and TSV with bare quotes."""

import csv
import io
import re
from array import array
from codecs import getincrementaldecoder
from collections.abc import Iterator, Sequence

import numpy as np

from qtjax.data.rows import Row, Rows, in_blocks
from qtjax.data.stored import Stored
from qtjax.errors import QtjaxError

_MARK = "\ufeff"  # some programs open a text with it; it is no part of it

# The csv module's default of 128 KiB per field is smaller than real documents.
csv.field_size_limit(1 << 30)


def read_delimited(name: str, data: Stored, delimiter: str, columns: Sequence[str] = ()) -> Rows:
    """The rows of a CSV or TSV file; every value is a string.

    The first line names the columns, unless `columns` asks for c0, c1, ... and the first line has no such names: then
    the file has no header and its columns are c0, c1, ... CSV must follow its quoting rules. A TSV is
    read with those rules if the whole file follows them, otherwise quotes are plain characters: many TSV files
    are written without quoting.
    The file is gone through once to check it, and read again row by row.
    Raises QtjaxError naming file and line: not UTF-8, broken quoting, or a line with another number of fields.
    """
    _check_text(name, data)
    quoted = True
    try:
        header, begins, lines = _records(name, data, delimiter, quoted=True)
    except QtjaxError:
        if delimiter != "\t":
            raise
        quoted = False
        header, begins, lines = _records(name, data, delimiter, quoted=False)
    if any(re.fullmatch(r"c\d+", column) and column not in header for column in columns):
        header = [f"c{i}" for i in range(len(header))]
    else:
        begins, lines = begins[1:], lines[1:]
        twice = sorted({column for column in header if header.count(column) > 1})
        if twice:
            raise QtjaxError(
                f"{name}:1: the header names {', '.join(map(repr, twice))} twice; rename one, or ask for columns c0, c1, ... if there is no header"
            )
    if not len(begins):
        raise QtjaxError(f"{name}: has a header but no rows; give a file with at least one")

    def read(start: int, stop: int) -> list[Row]:
        end = int(begins[stop]) if stop < len(begins) else data.size
        text = data.read(int(begins[start]), end - int(begins[start])).decode()
        return [dict(zip(header, record)) for record in _reader(io.StringIO(text, newline=""), delimiter, quoted) if record]

    return in_blocks(name, len(begins), read, lambda i: f"{name}:{lines[i]}", fingerprint=data.fingerprint)


def _check_text(name: str, data: Stored) -> None:
    """Raises QtjaxError where the file is not UTF-8, or has nothing in it but space."""
    decoder, blank, lines = getincrementaldecoder("utf-8")(), True, 0
    for at, block in data.blocks():
        held = len(decoder.getstate()[0])  # of a character that the last block's end cuts in two
        try:
            blank &= not decoder.decode(block, final=at + len(block) == data.size).lstrip(_MARK).strip()
        except UnicodeDecodeError as error:
            line = lines + block.count(b"\n", 0, max(error.start - held, 0)) + 1
            raise QtjaxError(f"{name}:{line}: not UTF-8 ({error.reason}); save the file as UTF-8") from None
        lines += block.count(b"\n")
    if blank:
        raise QtjaxError(f"{name}: holds no rows; the file has only blank lines")


def _reader(lines: Iterator[str], delimiter: str, quoted: bool) -> Iterator[list[str]]:
    return csv.reader(lines, delimiter=delimiter, quoting=csv.QUOTE_MINIMAL if quoted else csv.QUOTE_NONE, strict=quoted)


def _records(name: str, data: Stored, delimiter: str, *, quoted: bool) -> tuple[list[str], np.ndarray, np.ndarray]:
    """(first record, and int64 by record: the byte and the line it begins on, lines from 1). Blank lines are passed over."""
    first: list[str] = []
    begins, lines = array("q"), array("q")
    at = 3 if data.read(0, 3) == _MARK.encode() else 0  # the byte that the next line begins with
    begin, begin_at = 1, at

    def text() -> Iterator[str]:
        nonlocal at
        # newline="" leaves line ends inside quotes as they are, as the csv module asks for.
        for line in io.TextIOWrapper(data.stream(), encoding="utf-8-sig", newline=""):
            at += len(line) if line.isascii() else len(line.encode())
            yield line

    reader = _reader(text(), delimiter, quoted)
    try:
        for record in reader:
            if record:
                if first and len(record) != len(first):
                    raise QtjaxError(
                        f"{name}:{begin}: has {len(record)} fields, the first line has {len(first)}; quote fields that hold the delimiter"
                    )
                first = first or record
                begins.append(begin_at)
                lines.append(begin)
            begin, begin_at = reader.line_num + 1, at
    except csv.Error as error:
        raise QtjaxError(f"{name}:{begin}: broken quoting ({error}); double the quotes inside quoted fields") from None
    return first, np.frombuffer(begins, np.int64), np.frombuffer(lines, np.int64)
