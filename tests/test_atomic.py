"""A file written through qtjax.atomic is the old one or the new one, whatever the disk does."""

import errno
import gc
import os

import pytest

from qtjax import atomic
from qtjax.errors import QtjaxError


def refuse(code):
    def call(*_args, **_kwargs):
        raise OSError(code, os.strerror(code))

    return call


def test_writes_and_replaces_leaving_nothing_else_behind(tmp_path):
    """After a write the folder holds the file and only the file."""
    path = tmp_path / "a.json"
    atomic.write_atomic(path, "one")
    atomic.write_atomic(path, b"two")
    assert path.read_bytes() == b"two"
    assert os.listdir(tmp_path) == ["a.json"]


@pytest.mark.parametrize("call", ["write", "fsync", "replace"])
@pytest.mark.parametrize(("code", "remedy"), [(errno.ENOSPC, "disk is full"), (errno.EACCES, "no permission")])
def test_a_refusing_disk_leaves_the_old_file_and_one_line(tmp_path, monkeypatch, call, code, remedy):
    """Whichever system call fails, the old content stays, no temporary file is left, the error is one line with a remedy."""
    path = tmp_path / "a.json"
    atomic.write_atomic(path, "old")
    monkeypatch.setattr(atomic.os, call, refuse(code))
    with pytest.raises(QtjaxError) as error:
        atomic.write_atomic(path, "new and longer")
    monkeypatch.undo()
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["a.json"]
    assert str(path) in str(error.value) and remedy in str(error.value) and "\n" not in str(error.value)


def test_short_writes_are_completed(tmp_path, monkeypatch):
    """A system that writes three bytes at a time still ends with the whole file."""
    write = os.write
    monkeypatch.setattr(atomic.os, "write", lambda fd, data: write(fd, bytes(data)[:3]))
    atomic.write_atomic(tmp_path / "a", "0123456789")
    assert (tmp_path / "a").read_text() == "0123456789"


def test_append_is_all_or_nothing(tmp_path, monkeypatch):
    """A disk that fills up in the middle of an append leaves the file as it was before the append."""
    path = tmp_path / "log"
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    atomic.append_whole(fd, b"first\n", path)
    write, calls = os.write, []

    def fills_up(fd, data):
        calls.append(1)
        if len(calls) > 1:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write(fd, bytes(data)[:4])

    monkeypatch.setattr(atomic.os, "write", fills_up)
    with pytest.raises(QtjaxError, match="disk is full"):
        atomic.append_whole(fd, b"second\n", path)
    monkeypatch.undo()
    assert path.read_bytes() == b"first\n"
    atomic.append_whole(fd, b"third\n", path)
    assert path.read_bytes() == b"first\nthird\n"
    os.close(fd)


def test_a_missing_folder_is_one_line(tmp_path):
    """Writing into a folder that does not exist names the path."""
    with pytest.raises(QtjaxError, match="No such file"):
        atomic.write_atomic(tmp_path / "none" / "a", "x")


def test_a_failed_stream_writes_nothing_more(tmp_path):
    """What was buffered when the block failed goes nowhere, although the descriptor's number is soon another file's."""
    path = tmp_path / "a.bin"
    atomic.write_atomic(path, "old")
    with pytest.raises(RuntimeError), atomic.open_atomic(path) as file:
        file.write(b"half")
        raise RuntimeError
    with open(tmp_path / "other", "wb") as other:  # takes the lowest free number
        del file
        gc.collect()
    assert other.name and (tmp_path / "other").read_bytes() == b"" and path.read_text() == "old"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.bin", "other"]
