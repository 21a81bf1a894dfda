"""Files that are either whole or absent: atomic replacement, all-or-nothing appends, and one-line errors for a bad disk."""

import contextlib
import errno
import io
import json
import math
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, Any

from qtjax.errors import QtjaxError

_TEMPORARY = ".tmp"

_AGAIN = "free some space, then run the same command again, it continues from what is saved"
_REMEDIES = {
    errno.ENOSPC: f"the disk is full: {_AGAIN}",
    errno.EDQUOT: f"the disk quota is used up: {_AGAIN}",
    errno.EFBIG: "the file would be larger than this file system allows: choose a folder on another disk",
    errno.EACCES: "no permission: choose a folder that you may write to, or change its permissions",
    errno.EPERM: "no permission: choose a folder that you may write to, or change its permissions",
    errno.EROFS: "the file system is read-only: choose a folder on another disk",
    errno.ENOTDIR: "a part of the path is a file, not a folder: choose another path",
    errno.EISDIR: "a folder is in the way: move it, or choose another path",
    errno.ENAMETOOLONG: "the name is too long: choose a shorter path",
    errno.EIO: "the disk reports an error: check it, or choose a folder on another disk",
}


@contextlib.contextmanager
def disk_errors(path: str | os.PathLike, doing: str = "writing") -> Iterator[None]:
    """Turns an OSError of the block into a one-line QtjaxError: "writing PATH: what happened; remedy".

    Args:
      path: what is being written or read, for the message.
      doing: the first word of the message.
    """
    try:
        yield
    except OSError as error:
        remedy = _REMEDIES.get(error.errno, "check the path, or choose another one")
        reason = error.strerror or str(error)
        raise QtjaxError(f"{doing} {path}: {reason}; {remedy}") from error


class _Raw(io.RawIOBase):
    """An open descriptor as a stream; whoever opened it closes it."""

    def __init__(self, fd: int):
        self._fd, self._at, self.over = fd, 0, False

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        if self.over:  # what a failed write left in the buffer comes here when that is collected: the descriptor is another's by then
            return len(data)
        count = os.write(self._fd, data)
        self._at += count
        return count

    def seekable(self) -> bool:
        return False

    def tell(self) -> int:
        return self._at


@contextlib.contextmanager
def open_atomic(path: str | os.PathLike) -> Iterator[IO[bytes]]:
    """A file to write into that replaces `path` when the block ends: a reader, a crash or a full disk sees the old or the new one.

    Writes a hidden temporary file in the same folder, syncs it, renames it over `path` and syncs the folder. The folder
    must exist. Raises QtjaxError when the disk refuses; the old file is then untouched and no temporary one is left.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}{_TEMPORARY}")
    with disk_errors(path):
        try:
            fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o666)
            try:
                raw = _Raw(fd)
                file = io.BufferedWriter(raw, 1 << 20)
                yield file
                file.flush()
                os.fsync(fd)
            finally:
                raw.over = True
                os.close(fd)
            os.replace(temporary, path)
        except BaseException:
            with contextlib.suppress(OSError):
                os.unlink(temporary)
            raise
        sync_folder(path.parent)


def write_atomic(path: str | os.PathLike, data: bytes | str) -> None:
    """Replaces `path` by `data` (text as UTF-8), as `open_atomic` does."""
    with open_atomic(path) as file:
        file.write(data.encode() if isinstance(data, str) else data)


def write_json(path: str | os.PathLike, value: Any) -> None:
    """`write_atomic` of indented JSON. NaN and infinity become null: JSON has none. Numpy numbers become Python's."""
    write_atomic(path, json.dumps(_finite(value), indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(k): _finite(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(v) for v in value]
    if hasattr(value, "item"):
        value = value.item()
    return None if isinstance(value, float) and not math.isfinite(value) else value


def append_whole(fd: int, data: bytes, path: str | os.PathLike) -> None:
    """Appends `data` to the open file, all of it or nothing: a short write (a disk that fills up) is taken back.

    Args:
      fd: opened for writing with O_APPEND; `path` is its name, for the message.
    Raises QtjaxError when the disk refuses.
    """
    with disk_errors(path):
        before = os.fstat(fd).st_size
        try:
            write_all(fd, data)
        except BaseException:
            with contextlib.suppress(OSError):
                os.ftruncate(fd, before)
            raise


def write_all(fd: int, data: bytes | memoryview) -> None:
    """All of `data`, where the system takes it piece by piece. Raises OSError."""
    view = memoryview(data)
    while view:
        view = view[os.write(fd, view) :]


def sync_folder(folder: str | os.PathLike) -> None:
    """Makes renames and removals in `folder` durable where the file system can (some network ones cannot)."""
    fd = os.open(folder, os.O_RDONLY | os.O_CLOEXEC)
    try:
        with contextlib.suppress(OSError):
            os.fsync(fd)
    finally:
        os.close(fd)


def remove_leftovers(folder: str | os.PathLike) -> None:
    """Deletes temporary files that a killed `write_atomic` left in `folder`; only safe while nobody else writes there."""
    with disk_errors(folder, "clearing"):
        for path in Path(folder).glob(f".*{_TEMPORARY}"):
            path.unlink(missing_ok=True)
