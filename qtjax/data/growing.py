"""A tokenized dataset while it grows: in memory as long as it is small, then in files, so that any number of rows takes the
memory of a small one."""

import io
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from qtjax.atomic import disk_errors, write_all
from qtjax.data.dataset import ARRAYS, DataStats, TokenizedDataset, write_stats

# Tokens up to which a dataset stays in memory: 100 MB of arrays.
IN_MEMORY = 1 << 24

Triple = tuple[np.ndarray, np.ndarray, np.ndarray]  # input_ids, loss_mask, closing of one sample


class Growing:
    """Samples in the order in which they are added.

    Args: folder: where the files of the dataset (`TokenizedDataset.load`) are written from the first sample on; None: they
    are written in a folder of their own in `scratch` (None: the system's for temporary files) past IN_MEMORY tokens, and
    are gone with their last reader. Use it in a `with` block; raises QtjaxError when the disk refuses.
    """

    def __init__(self, folder: Path | None = None, scratch: Path | None = None):
        self.samples = self.tokens = self.trained = 0
        self._folder, self._scratch = folder, scratch
        self._temporary: tempfile.TemporaryDirectory | None = None
        self._parts: list[dict[str, np.ndarray]] = []
        self._files: dict[str, _File] = {}
        if folder is not None:
            self._open(folder)

    def add(self, samples: Sequence[Triple], row_index: Sequence[int], task_ids: Sequence[int]) -> None:
        """Appends samples, with the source row and the task of each."""
        if not samples:
            return
        part = {name: np.concatenate([sample[i] for sample in samples], dtype=ARRAYS[name]) for i, name in enumerate(("input_ids", "loss_mask", "closing"))}
        part["offsets"] = self.tokens + np.cumsum([len(sample[0]) for sample in samples], dtype=np.int64)
        part |= {"row_index": np.asarray(row_index, np.int64), "task_ids": np.asarray(task_ids, np.int32)}
        self.samples += len(samples)
        self.tokens += len(part["input_ids"])
        self.trained += int(part["loss_mask"].sum())
        if self._files:
            self._write(part)
            return
        self._parts.append(part)
        if self.tokens > IN_MEMORY:
            with disk_errors(self._scratch or tempfile.gettempdir()):
                # A network disk keeps a mapped file under another name until it is let go; the folder is cleared away later.
                self._temporary = tempfile.TemporaryDirectory(dir=self._scratch, prefix=".tokens-", suffix=".tmp", ignore_cleanup_errors=True)
            self._open(Path(self._temporary.name))
            while self._parts:
                self._write(self._parts.pop(0))

    def finish(self, stats: DataStats) -> TokenizedDataset:
        """The dataset, its files memory-mapped. stats: samples, tokens and trained_tokens are counted here."""
        stats = stats.counted(self.samples, self.tokens, self.trained)
        if not self._files:
            whole = {name: np.concatenate([np.zeros(int(name == "offsets"), kind), *(p[name] for p in self._parts)]) for name, kind in ARRAYS.items()}
            return TokenizedDataset(**whole, stats=stats)
        folder = self._folder or Path(self._temporary.name)
        with disk_errors(folder):
            for file in self._files.values():
                file.finish(durable=self._folder is not None)
            write_stats(folder, stats)
        return TokenizedDataset.load(folder)

    def _open(self, folder: Path) -> None:
        with disk_errors(folder):
            folder.mkdir(parents=True, exist_ok=True)
            self._files = {name: _File(folder / f"{name}.npy", kind) for name, kind in ARRAYS.items()}
            self._files["offsets"].append(np.zeros(1, np.int64))

    def _write(self, part: dict[str, np.ndarray]) -> None:
        with disk_errors(self._folder or self._temporary.name):
            for name, file in self._files.items():
                file.append(part[name])

    def __enter__(self) -> "Growing":
        return self

    def __exit__(self, *_: object) -> None:
        for file in self._files.values():
            file.close()
        if self._temporary:
            self._temporary.cleanup()  # what is mapped stays, until nobody maps it


class _File:
    """An .npy file of one dimension that grows; its header is written again when the length is known."""

    def __init__(self, path: Path, kind: type):
        self._kind, self._length = np.dtype(kind), 0
        self._file = path.open("wb", buffering=0)  # what a full disk refuses is not tried again when the file is closed
        write_all(self._file.fileno(), self._header())

    def _header(self) -> bytes:
        # numpy leaves room in it for a length of up to 21 digits
        out = io.BytesIO()
        np.lib.format.write_array_header_1_0(out, {"descr": self._kind.str, "fortran_order": False, "shape": (self._length,)})
        return out.getvalue()

    def append(self, array: np.ndarray) -> None:
        write_all(self._file.fileno(), np.ascontiguousarray(array, self._kind).view(np.uint8).data)
        self._length += len(array)

    def finish(self, *, durable: bool) -> None:
        """Closes a file that is whole."""
        self._file.seek(0)
        write_all(self._file.fileno(), self._header())
        if durable:
            os.fsync(self._file.fileno())
        self.close()

    def close(self) -> None:
        self._file.close()
