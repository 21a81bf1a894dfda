"""metrics.jsonl: one JSON object a line, one line a step, steps 1, 2, 3, ... without a gap.

The file is strict JSON: NaN and None (not measured) are written as null (and read back as NaN), an infinity as 1e999,
which every IEEE parser reads as infinity. A line that was not written whole, and everything after it, does not count.
"""

import json
import math
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from qtjax.atomic import append_whole, disk_errors
from qtjax.errors import QtjaxError


def to_line(values: Mapping[str, Any]) -> bytes:
    """One line of the file, newline included. Values: numbers (Python, numpy or 0-d arrays), texts, booleans, None."""
    return ("{" + ", ".join(f"{json.dumps(k)}: {_json(v)}" for k, v in values.items()) + "}\n").encode()


def _json(value: Any) -> str:
    value = plain(value)
    if isinstance(value, float) and not math.isfinite(value):
        return "null" if math.isnan(value) else ("1e999" if value > 0 else "-1e999")
    return json.dumps(value)


def plain(value: Any) -> Any:
    """A Python int, float, bool, str or None from a Python, numpy or 0-d array value."""
    return value if value is None or isinstance(value, (bool, int, float, str)) else value.item()


def scan(path: str | os.PathLike) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yields (byte offset behind the line, its values) for the whole lines of steps 1, 2, 3, ...; stops at the first flaw.

    A missing file is an empty one. Raises QtjaxError if the file cannot be read.
    """
    if not Path(path).exists():
        return
    end, step = 0, 0
    with disk_errors(path, "reading"), open(path, "rb") as file:
        for line in file:
            if not line.endswith(b"\n"):
                return
            try:
                values = json.loads(line)
            except ValueError:
                return
            if not isinstance(values, dict) or values.get("step") != step + 1:
                return
            end, step = end + len(line), step + 1
            yield end, {k: math.nan if v is None else v for k, v in values.items()}


class MetricsLog:
    """The file opened for appending; the caller holds the run folder's lock."""

    def __init__(self, path: str | os.PathLike):
        """Opens or creates `path`; whatever follows the last whole line is cut off. Raises QtjaxError."""
        self.path = Path(path)
        with disk_errors(self.path):
            self._fd = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o666)
        self.last_step, end = 0, 0
        for end, _ in scan(self.path):
            self.last_step += 1
        self._truncate(end)

    def append(self, step: int, values: Mapping[str, Any]) -> None:
        """Writes one line. Raises ValueError unless `step` follows the last one, QtjaxError if the disk refuses."""
        if step != self.last_step + 1:
            raise ValueError(f"step {step} does not follow step {self.last_step}: cut back to the restored step first")
        append_whole(self._fd, to_line({"step": step, **values}), self.path)
        self.last_step = step

    def check(self, step: int) -> None:
        """Raises QtjaxError unless steps 1..step are all there."""
        if self.last_step < step:
            raise QtjaxError(
                f"{self.path}: holds steps 1 to {self.last_step}, but the checkpoint is of step {step}; restore the file,"
                " or start over with another run.folder"
            )

    def cut_back(self, step: int) -> None:
        """Leaves exactly steps 1..step (`check` first)."""
        self.check(step)
        end = 0
        for end, values in scan(self.path):
            if values["step"] == step:
                break
        self._truncate(end if step else 0)
        self.last_step = step
        self.sync()

    def _truncate(self, size: int) -> None:
        with disk_errors(self.path):
            if os.fstat(self._fd).st_size != size:
                os.ftruncate(self._fd, size)

    def sync(self) -> None:
        with disk_errors(self.path):
            os.fsync(self._fd)

    def close(self) -> None:
        os.close(self._fd)
