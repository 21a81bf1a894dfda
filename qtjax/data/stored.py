"""The bytes of a data file, read where they are asked for: neither copied into memory nor mapped into it."""

import gzip
import hashlib
import io
import os
import shutil
import tempfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from qtjax.errors import QtjaxError

# Read at a time where all of a file is gone through.
BLOCK = 1 << 22


class Stored:
    """An open file of a fixed size; it is closed when nothing asks for it any more. file: open for reading bytes."""

    def __init__(self, file: BinaryIO):
        self.file = file
        self.size = os.fstat(file.fileno()).st_size

    def read(self, at: int, count: int) -> bytes:
        """At most `count` bytes from `at` on, fewer only where the file ends."""
        data = os.pread(self.file.fileno(), count, at)
        while len(data) < min(count, self.size - at):
            more = os.pread(self.file.fileno(), count - len(data), at + len(data))
            if not more:
                break
            data += more
        return data

    def line(self, at: int) -> bytes:
        """From `at` up to the next line feed, which is left out, or to the end."""
        data, size = b"", 1 << 12
        while (end := data.find(b"\n")) < 0 and at + len(data) < self.size:
            data, size = data + self.read(at + len(data), size), 4 * size
        return data if end < 0 else data[:end]

    def blocks(self) -> Iterator[tuple[int, bytes]]:
        """(where it begins, bytes) of the whole file, one block after the other."""
        for at in range(0, self.size, BLOCK):
            yield at, self.read(at, BLOCK)

    def stream(self) -> io.BufferedReader:
        """The content from its beginning, with a position of its own; closing it closes nothing else."""
        return io.BufferedReader(_Cursor(self), BLOCK)

    def fingerprint(self) -> str:
        """SHA-256 of the content."""
        digest = hashlib.sha256()
        for _, block in self.blocks():
            digest.update(block)
        return digest.hexdigest()


class _Cursor(io.RawIOBase):
    def __init__(self, stored: Stored):
        self._stored, self._at = stored, 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        data = self._stored.read(self._at, len(buffer))
        buffer[: len(data)] = data
        self._at += len(data)
        return len(data)


def open_stored(name: str, path: Path, scratch: Path | None = None) -> Stored:
    """The content of a file; of a gzipped one (.gz), unpacked.

    Args: name: the file as the user named it. scratch: folder for what is unpacked, a file that has no name and is gone
    with its last reader; None: the system's folder for temporary files.
    Raises QtjaxError for damaged gzip, OSError as opening and writing do.
    """
    if not path.name.lower().endswith(".gz"):
        return Stored(path.open("rb"))
    unpacked = tempfile.TemporaryFile(dir=scratch)
    try:
        with gzip.open(path, "rb") as packed:
            shutil.copyfileobj(packed, unpacked, BLOCK)
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise QtjaxError(f"{name}: damaged or not gzip ({error}); fetch the file again") from None
    unpacked.flush()
    return Stored(unpacked)
