"""CSV and TSV. Two habits of real files are met by rule, not by guess: tables without a header, and TSV with bare quotes."""

import csv
import io
import re
from collections.abc import Sequence

import numpy as np

from qtjax.data.rows import Rows
from qtjax.errors import QtjaxError

# The csv module's default of 128 KiB per field is smaller than real documents.
csv.field_size_limit(1 << 30)


def read_delimited(name: str, text: str, delimiter: str, columns: Sequence[str] = ()) -> Rows:
    """The rows of a CSV or TSV text; every value is a string.

    The first line names the columns, unless `columns` asks for c0, c1, ... and the first line has no such names: then
    the file has no header and its columns are c0, c1, ... CSV must follow its quoting rules. A TSV is
    read with those rules if the whole file follows them, otherwise quotes are plain characters: many TSV files
    are written without quoting.
    Raises QtjaxError naming file and line: broken quoting, or a line with another number of fields.
    """
    try:
        records, lines = _parse(name, text, delimiter, quoted=True)
    except QtjaxError:
        if delimiter != "\t":
            raise
        records, lines = _parse(name, text, delimiter, quoted=False)
    header = records[0]
    if any(re.fullmatch(r"c\d+", column) and column not in header for column in columns):
        header = [f"c{i}" for i in range(len(header))]
    else:
        records, lines = records[1:], lines[1:]
        twice = sorted({column for column in header if header.count(column) > 1})
        if twice:
            raise QtjaxError(
                f"{name}:1: the header names {', '.join(map(repr, twice))} twice; rename one, or ask for columns c0, c1, ... if there is no header"
            )
    if not records:
        raise QtjaxError(f"{name}: has a header but no rows; give a file with at least one")
    return Rows(name, len(records), lambda i: dict(zip(header, records[i])), lambda i: f"{name}:{lines[i]}")


def _parse(name: str, text: str, delimiter: str, *, quoted: bool) -> tuple[list[list[str]], np.ndarray]:
    """Records and the line each begins on (from 1). Blank lines are passed over."""
    quoting = csv.QUOTE_MINIMAL if quoted else csv.QUOTE_NONE
    # newline="" leaves line ends inside quotes as they are, as the csv module asks for.
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, quoting=quoting, strict=quoted)
    records: list[list[str]] = []
    lines: list[int] = []
    begin = 1
    try:
        for record in reader:
            if record:
                if records and len(record) != len(records[0]):
                    raise QtjaxError(
                        f"{name}:{begin}: has {len(record)} fields, the first line has {len(records[0])}; quote fields that hold the delimiter"
                    )
                records.append(record)
                lines.append(begin)
            begin = reader.line_num + 1
    except csv.Error as error:
        raise QtjaxError(f"{name}:{begin}: broken quoting ({error}); double the quotes inside quoted fields") from None
    return records, np.asarray(lines, dtype=np.int64)
