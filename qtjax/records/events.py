"""TensorBoard event files of scalars, written in step with metrics.jsonl.

The format is TFRecord framing (length, masked CRC-32C, data, masked CRC-32C) around the protocol buffer
tensorflow.Event; only four of its fields are needed, so they are encoded here. tensorboardX is not used: its writer goes
through a queue that `flush` does not drain, names files by the second (a restart within one truncates the first
file), and its import pulls torch in where torch is installed.
"""

import math
import os
import struct
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from qtjax.atomic import append_whole, disk_errors, write_atomic
from qtjax.records.metrics import plain


def _crc_table() -> list[int]:
    table = []
    for byte in range(256):
        for _ in range(8):
            byte = byte >> 1 ^ (0x82F63B78 if byte & 1 else 0)  # the Castagnoli polynomial, bits reversed
        table.append(byte)
    return table


_CRC = _crc_table()


def _masked_crc(data: bytes) -> bytes:
    crc = 0xFFFFFFFF
    for byte in data:
        crc = _CRC[(crc ^ byte) & 0xFF] ^ crc >> 8
    crc ^= 0xFFFFFFFF
    return struct.pack("<I", ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF)


def _record(data: bytes) -> bytes:
    length = struct.pack("<Q", len(data))
    return length + _masked_crc(length) + data + _masked_crc(data)


def _varint(number: int) -> bytes:
    out = bytearray()
    while number > 0x7F:
        out.append(number & 0x7F | 0x80)
        number >>= 7
    return bytes(out) + bytes([number])


def _message(field: int, data: bytes) -> bytes:
    return _varint(field << 3 | 2) + _varint(len(data)) + data


def tag(name: str) -> str:
    """The name under which a metric is shown, "group/name": TensorBoard folds its charts by group."""
    for group in ("seconds", "kept", "supplement", "closing", "eval"):
        if name.startswith(group + "_"):
            return f"{group}/{name[len(group) + 1 :]}"
    return f"train/{name}"


def event(step: int, values: Mapping[str, Any], wall_time: float) -> bytes:
    """One record: the numbers among `values` at `step`; NaN and None (not measured), texts and `time` are left out.

    Args:
      wall_time: seconds since 1970.
    """
    summary = b""
    for name, value in values.items():
        value = plain(value)
        if name in ("step", "time") or value is None or isinstance(value, str) or math.isnan(value):
            continue
        number = struct.pack("<f", value) if abs(value) < 3.4e38 else struct.pack("<f", math.copysign(math.inf, value))
        summary += _message(1, _message(1, tag(name).encode()) + b"\x15" + number)  # Summary.Value: tag, simple_value
    # Event: wall_time = 1 (double), step = 2 (varint), summary = 5 (message)
    return _record(b"\x09" + struct.pack("<d", wall_time) + b"\x10" + _varint(step) + _message(5, summary))


def _header(wall_time: float) -> bytes:
    return _record(b"\x09" + struct.pack("<d", wall_time) + _message(3, b"brain.Event:2"))


class EventFile:
    """The one event file of a run, rewritten from the metrics at every start and then appended to."""

    def __init__(self, folder: str | os.PathLike, rows: Iterable[Mapping[str, Any]]):
        """Replaces all event files in `folder` by one that holds `rows` (dicts with "step" and "time"). Raises QtjaxError."""
        folder = Path(folder)
        with disk_errors(folder):
            folder.mkdir(exist_ok=True)
        now = time.time()
        data = bytearray(_header(now))
        for row in rows:
            data += event(row["step"], row, row.get("time", now))
        old = sorted(folder.glob("events.out.tfevents.*"))
        # A reader that follows the folder moves on to later names only, so a restart takes a new one.
        self.path = folder / f"events.out.tfevents.{time.time_ns():020d}.qtjax"
        with disk_errors(folder):
            for path in old:
                path.unlink(missing_ok=True)
        write_atomic(self.path, bytes(data))
        with disk_errors(self.path):
            self._fd = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CLOEXEC)

    def append(self, step: int, values: Mapping[str, Any], wall_time: float) -> None:
        append_whole(self._fd, event(step, values, wall_time), self.path)

    def sync(self) -> None:
        with disk_errors(self.path):
            os.fsync(self._fd)

    def close(self) -> None:
        os.close(self._fd)
