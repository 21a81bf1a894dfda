"""The run folder: everything that a run writes, in step with its checkpoints.

    config.json              the resolved config; the folder belongs to it, wherever and on whatever mesh it goes on
    metrics.jsonl            one line a step                             (qtjax/records/metrics.py)
    eu/*.parquet             one row per scored sample and step          (qtjax/records/samples.py)
    tensorboard/             the metrics once more, as event files       (qtjax/records/events.py)
    tokens/                  the training data, tokenized; may be deleted, a restart then makes it again (qtjax/data/prepare.py)
    checkpoints/ model/ pictures/ compile_cache/                         written by others
    summary.json             present once the run has finished

How a run killed at any moment stays whole: `flush` makes the records up to step s durable BEFORE the checkpoint of
step s is committed; after a restart `cut_back(s)` to the restored step removes whatever was recorded later, and the
steps are done again. So the records hold each step once.
"""

import fcntl
import json
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from qtjax import config as configs
from qtjax.atomic import disk_errors, remove_leftovers, write_atomic, write_json
from qtjax.config import Config
from qtjax.errors import QtjaxError
from qtjax.records.events import EventFile
from qtjax.records.metrics import MetricsLog, scan
from qtjax.records.samples import SampleShards, read_samples

# Where a run lies and caches does not change what it computes.
_PLACES = ("run.folder", "run.compile_cache")
# Nor does this, but for rounding and what dropout draws: a run that goes on elsewhere may have others, and says so.
_MACHINE = (
    "mesh.data", "mesh.fsdp", "mesh.tensor", "model.remat", "model.unroll_layers", "prune.reuse_forward", "train.rows", "train.shapes",
    "train.keep_checkpoints",
)  # fmt: skip
_RECORDS = ("metrics.jsonl", "eu", "tensorboard", "checkpoints", "summary.json")


class RunFolder:
    """One run's files. Use `open`; close it (or leave its `with` block) to let another process have the folder.

    moved: what the run has otherwise than before, "mesh.fsdp 8 instead of 1"; said when it goes on, and kept from then on.
    """

    def __init__(self, path: Path, lock: int | None, config: Config, moved: list[str]):
        tensorboard = config.run.tensorboard and lock is not None
        self.path, self.moved, self._config = path, moved, config
        self._lock = lock
        self._tensorboard = tensorboard
        self._metrics: MetricsLog | None = None
        self._samples: SampleShards | None = None
        self._events: EventFile | None = None
        if self.writes:
            remove_leftovers(path)
            self._metrics = MetricsLog(path / "metrics.jsonl")
            self._samples = SampleShards(path / "eu")

    @classmethod
    def open(cls, config: Config, *, writes: bool = True) -> "RunFolder":
        """Creates `config.run.folder`, or opens it if it belongs to the same config.

        Args:
          writes: False on all hosts but the first: nothing is locked, created or written, and the methods that write do
            nothing. The first host opens before the others do.
        Raises QtjaxError, one line: the folder belongs to another config (the differing fields are named), holds records
        without a config, is in use by another process, or cannot be written.
        """
        path = Path(config.run.folder)
        if not writes:
            return cls(path, None, config, _check_config(path, config))
        with disk_errors(path):
            path.mkdir(parents=True, exist_ok=True)
        if (path / "config.json").exists():
            _check_is_run(path)  # before a lock file is left in somebody else's folder
        lock, moved = take_lock(path), []
        try:
            if (path / "config.json").exists() and _begun(path):
                moved = _check_config(path, config)
            elif (path / "config.json").exists():
                # The run before this one ended before its first step (a typo in a path, say): all that depends on its config is how the
                # untrained model did.
                try:
                    _check_config(path, config)
                except QtjaxError:
                    (path / "base.json").unlink(missing_ok=True)
                write_atomic(path / "config.json", configs.to_json(config))
            else:
                found = [name for name in _RECORDS if (path / name).exists()]
                if found:
                    raise QtjaxError(
                        f"run.folder = {str(path)!r}: holds {', '.join(found)} but no config.json, so it is not known whose"
                        " they are; choose another run.folder"
                    )
                write_atomic(path / "config.json", configs.to_json(config))
            return cls(path, lock, config, moved)
        except BaseException:
            os.close(lock)
            raise

    @property
    def writes(self) -> bool:
        return self._lock is not None

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def tokens(self) -> Path:
        """Where the tokenized data lie, and what else is too large for memory."""
        return self.path / "tokens"

    @property
    def model(self) -> Path:
        """Where the exported model (or adapter) goes."""
        return self.path / "model"

    @property
    def pictures(self) -> Path:
        return self.path / "pictures"

    @property
    def finished(self) -> bool:
        return (self.path / "summary.json").exists()

    @property
    def last_step(self) -> int:
        """The last step in metrics.jsonl, 0 if none (as opened, on hosts that do not write)."""
        return self._metrics.last_step if self._metrics else sum(1 for _ in scan(self.path / "metrics.jsonl"))

    def summary(self) -> dict[str, Any]:
        """What `write_summary` wrote. Raises QtjaxError if the run has not finished."""
        return read_summary(self.path)

    def cut_back(self, step: int) -> None:
        """Leaves exactly steps 1..step in the metrics, the event files and the EU records; 0 empties them.

        Call it once after the checkpoint is restored. Raises QtjaxError, changing nothing, if the records do not reach that
        far (a file was lost).
        """
        if not self.writes:
            return
        self._metrics.check(step)
        self._samples.check(step)
        self._metrics.cut_back(step)
        self._samples.cut_back(step)
        self._start_events()
        if self.moved:
            write_atomic(self.path / "config.json", configs.to_json(self._config))

    def _start_events(self) -> None:
        if self._tensorboard:
            if self._events:
                self._events.close()
            self._events = EventFile(self.path / "tensorboard", (row for _, row in scan(self._metrics.path)))

    def log_step(self, step: int, metrics: Mapping[str, float | int]) -> None:
        """Appends one step; `time` (seconds since 1970) is added.

        Raises ValueError if `step` does not follow the last one, QtjaxError if the disk refuses (the files stay whole).
        """
        if not self.writes:
            return
        if self._tensorboard and not self._events:
            self._start_events()
        now = round(time.time(), 3)
        self._metrics.append(step, {**metrics, "time": now})
        if self._events:
            self._events.append(step, metrics, now)

    def log_samples(self, step: int, columns: Mapping[str, np.ndarray]) -> None:
        """Holds the EU records of one step until `flush`.

        Args:
          columns: every column of `qtjax.records.samples.SCHEMA` but `step`, arrays [B] (`epoch` may be one number); rows
            with `row` < 0 are padding and left out.
        Raises ValueError for other columns or a step that is already there.
        """
        if self.writes:
            self._samples.append(step, columns)

    def flush(self) -> None:
        """Makes everything logged so far durable. Call it right before a checkpoint is committed. Raises QtjaxError."""
        if not self.writes:
            return
        self._samples.flush(self._metrics.last_step)
        self._metrics.sync()
        if self._events:
            self._events.sync()

    def write_summary(self, summary: Mapping[str, Any]) -> None:
        """Flushes, then marks the run as finished. NaN and infinity become null: JSON has none. Raises QtjaxError."""
        if self.writes:
            self.flush()
            write_json(self.path / "summary.json", summary)

    def read_metrics(self) -> list[dict[str, Any]]:
        """One dict a step, in order; see `qtjax.records.metrics`."""
        return read_metrics(self.path)

    def read_samples(self) -> pa.Table:
        """The EU records on disk (those after the last `flush` are not there yet)."""
        return read_samples(self.path / "eu")

    def close(self) -> None:
        """Closes the files and lets go of the folder. What was not flushed is not lost to a live process, but is to a crash."""
        for part in (self._metrics, self._events):
            if part:
                part.close()
        if self._lock is not None:
            os.close(self._lock)
        self._metrics = self._events = self._samples = self._lock = None

    def __enter__(self) -> "RunFolder":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def read_metrics(path: str | os.PathLike) -> list[dict[str, Any]]:
    """The metrics of the run folder `path`, one dict a step; [] if there are none. Needs no lock: a run may be going on."""
    return [values for _, values in scan(Path(path) / "metrics.jsonl")]


def read_summary(path: str | os.PathLike) -> dict[str, Any]:
    """The summary of the run folder `path`. Raises QtjaxError if the run has not finished."""
    file = Path(path) / "summary.json"
    if not file.exists():
        raise QtjaxError(
            f"{path}: this run has not finished (no summary.json); run its training command again to continue it"
        )
    return _read_json(file)


def _read_json(file: Path) -> dict[str, Any]:
    with disk_errors(file, "reading"):
        text = file.read_text(encoding="utf-8")
    try:
        return json.loads(text)
    except ValueError as error:
        raise QtjaxError(f"{file}: not readable as JSON ({error}); restore it, or choose another run.folder") from None


def _begun(path: Path) -> bool:
    """Whether anything was recorded under this folder's config, or trained for it (experts)."""
    metrics = path / "metrics.jsonl"
    saved = path / "checkpoints"
    return (
        (metrics.exists() and metrics.stat().st_size > 0)
        or (path / "summary.json").exists()
        or (saved.is_dir() and any(p.name.isdigit() for p in saved.iterdir()))
        or any(map(_begun, (path / "experts").glob("*")))
    )


def _check_is_run(path: Path) -> None:
    raw = _read_json(path / "config.json")
    if not isinstance(raw, dict) or not isinstance(raw.get("train"), dict):
        raise QtjaxError(f"run.folder = {str(path)!r}: its config.json is not a run's (a model folder?); choose another run.folder")


def _check_config(path: Path, config: Config) -> list[str]:
    """What of _MACHINE is other here than in the folder's config.json, in words.

    Raises QtjaxError naming the fields in which they differ and may not.
    """
    _check_is_run(path)
    stored = {f"{s}.{k}": v for s, section in _read_json(path / "config.json").items() for k, v in section.items()}
    here = config.flat()
    names = [n for n in {**here, **stored} if n not in _PLACES and (n not in stored or n not in here or stored[n] != here[n])]
    moved = [n for n in names if n in _MACHINE and n in stored and n in here]
    differing = [
        f"{n} is {stored[n]!r} there, {here[n]!r} here"
        if n in stored and n in here
        else f"{n} is {stored[n]!r} there, no field here"
        if n in stored
        else f"{n} is no field there, {here[n]!r} here"
        for n in names
        if n not in moved
    ]
    if differing:
        raise QtjaxError(
            f"run.folder = {str(path)!r}: belongs to another config: {'; '.join(differing)}; choose another run.folder,"
            " or set these back to continue that run"
        )
    return [f"{n} {here[n]} instead of {stored[n]}" for n in moved]


def take_lock(path: Path) -> int:
    """An open, locked file descriptor; the system lets go of the lock when the process ends, however it ends."""
    file = path / ".lock"
    with disk_errors(file):
        lock = os.open(file, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        owner = os.pread(lock, 100, 0).decode(errors="replace").strip()
        os.close(lock)
        raise QtjaxError(
            f"{path}: in use by another process{f' ({owner})' if owner else ''}; wait for it, or choose another folder"
        ) from None
    except OSError:
        pass  # some network file systems have no locks; one writer is then the user's own care
    with disk_errors(file):
        os.ftruncate(lock, 0)
        os.pwrite(lock, f"process {os.getpid()} on {os.uname().nodename}".encode(), 0)
    return lock
