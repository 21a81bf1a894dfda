"""Checkpoints of a run in progress (Orbax): arrays with their shardings, a small JSON beside them, and where the next step
was begun (prune.score_lag) what it began with.

Orbax writes into a temporary folder and renames it, so a checkpoint is whole or absent. A folder that looks like a
checkpoint and cannot be read (truncated file, empty folder) is skipped in favour of the one before it, said, and set aside.
"""

import contextlib
import logging
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import orbax.checkpoint as ocp

from qtjax.atomic import disk_errors
from qtjax.errors import QtjaxError

# Orbax narrates every save, and prints each failure four times with a traceback; failures reach us as exceptions.
logging.getLogger("absl").setLevel(logging.CRITICAL)


class Restored(NamedTuple):
    """step: optimizer steps done; state: the tree asked for; meta: the JSON saved with it; skipped: unreadable steps; reason: what
    the last of them said; pending: the tree that was asked for beside the state, None if none was."""

    step: int
    state: Any
    meta: dict[str, Any]
    skipped: list[int]
    reason: str = ""
    pending: Any = None


class RunState:
    """The checkpoints of one run folder, newest `keep` kept."""

    def __init__(self, folder: Path, keep: int = 2):
        self.folder = Path(folder).absolute()
        self._keep = keep
        self._writing: int | None = None  # Orbax's latest_step knows nothing of a save that failed
        self._failed = False
        self._manager = self._open()

    def _open(self) -> ocp.CheckpointManager:
        options = ocp.CheckpointManagerOptions(max_to_keep=self._keep, enable_async_checkpointing=True, create=True)
        return ocp.CheckpointManager(self.folder, options=options, item_names=("state", "meta", "pending"))

    def _sound(self) -> ocp.CheckpointManager:
        """The manager; after a failed save a fresh one, since the old one raises that failure again at the next restore."""
        if self._failed:
            self._let_go()
            self._manager, self._failed = self._open(), False
        return self._manager

    def _let_go(self) -> None:
        for _ in range(3):  # after a failure each of its two threads raises once before it closes
            with contextlib.suppress(OSError, ValueError, RuntimeError):
                return self._manager.close()

    @contextlib.contextmanager
    def _refusals(self) -> Iterator[None]:
        try:
            yield
        except (OSError, ValueError, RuntimeError) as error:
            self._failed = True
            reason = " ".join(str(error).split())
            if len(reason) > 200:  # TensorStore names long paths first and the cause last
                reason = f"{reason[:60]} ... {reason[-120:]}"
            raise QtjaxError(
                f"{self.folder}: the checkpoint of step {self._writing} could not be written ({reason}); free space or"
                " permissions there and run the same command again: it continues from the last whole checkpoint"
            ) from error

    def save(self, step: int, state: Any, meta: dict[str, Any], pending: Any = None) -> None:
        """Writes in the background; the previous save is waited for first.

        Args: state: arrays with shardings, or numpy arrays, of which process 0 writes its own. pending: a tree kept apart
        from the state, so that readers of the model need not know of it; None: none.
        Raises QtjaxError when the disk refuses this save or the previous one; checkpoints written before stay whole, and
        with space again the next save goes through.
        """
        self.wait()
        self._writing = step
        items = {"state": ocp.args.PyTreeSave(state), "meta": ocp.args.JsonSave(meta)}
        if pending is not None:
            items["pending"] = ocp.args.PyTreeSave(pending)
        with self._refusals():
            self._sound().save(step, args=ocp.args.Composite(**items))

    def wait(self) -> None:
        """Returns when the last save is on disk. Raises QtjaxError, once, if it could not be written."""
        if not self._failed:
            with self._refusals():
                self._manager.wait_until_finished()

    def latest(self) -> int | None:
        """The newest step that stands on the disk, None if there is none."""
        return self._sound().latest_step()

    def restore(
        self, target: Any, *, part: bool = False, pending: Callable[[int], Any] = lambda step: None
    ) -> Restored | None:
        """The newest readable checkpoint, or None if there is none.

        Args:
          target: a tree of arrays or jax.ShapeDtypeStruct with shardings, or numpy arrays for what is to stay on the
            host, whole on every process; its structure and shapes must match.
          part: the checkpoint may hold more than `target`, which is then neither read nor given memory.
          pending: such a tree for what was saved beside the state of a step, None where nothing is wanted.
        Raises QtjaxError when there are checkpoints and none can be read, and what a device says whose memory does not suffice.
        """
        manager = self._sound()
        steps = sorted(manager.all_steps(), reverse=True)
        state = _reading(target, part)
        skipped: list[int] = []
        reason = ""
        for step in steps:
            try:
                items = {"state": state, "meta": ocp.args.JsonRestore()}
                if (beside := pending(step)) is not None:
                    items["pending"] = _reading(beside)
                found = manager.restore(step, args=ocp.args.Composite(**items))
                _check_whole(found.state)
            except Exception as error:  # noqa: BLE001 - a damaged file raises whatever its reader raises
                if "RESOURCE_EXHAUSTED" in str(error):
                    raise
                reason = " ".join(str(error).split())[:160]
                skipped.append(step)
                continue
            if found.meta is None or found.state is None:
                reason = "it has no state" if found.state is None else "it has no meta"
                skipped.append(step)
                continue
            return Restored(step, found.state, found.meta, skipped, reason, found.pending if beside is not None else None)
        if skipped:
            raise QtjaxError(
                f"{self.folder}: none of the checkpoints of steps {', '.join(map(str, sorted(skipped)))} can be read"
                f" ({reason}); remove the run folder to start again"
            )
        return None

    def forget(self, steps: list[int]) -> None:
        """Sets unreadable checkpoints aside, as "<step>.unreadable" and in place of those before, so that their steps can be saved again;
        only the run itself may."""
        if not steps:
            return
        self._let_go()
        if jax.process_index() == 0:
            for older in self.folder.glob("*.unreadable"):
                shutil.rmtree(older, ignore_errors=True)
            with disk_errors(self.folder):
                for step in steps:
                    (self.folder / str(step)).rename(self.folder / f"{step}.unreadable")
        self._manager = self._open()

    def close(self) -> None:
        """Waits for the last save, then lets go of threads and files. Raises QtjaxError as `wait` does."""
        try:
            self.wait()
        finally:
            self._let_go()


def _check_whole(state: Any) -> None:
    """Raises ValueError for leaves that are still descriptions."""
    missing = [jax.tree_util.keystr(path) for path, x in jax.tree.leaves_with_path(state) if isinstance(x, jax.ShapeDtypeStruct)]
    if missing:
        raise ValueError(f"it has no {', '.join(missing[:3])}")


def _reading(target: Any, part: bool = False) -> ocp.args.PyTreeRestore:
    def args(x: Any) -> ocp.RestoreArgs:
        if isinstance(x, np.ndarray | np.generic):
            return ocp.RestoreArgs(restore_type=np.ndarray, dtype=x.dtype)
        return ocp.ArrayRestoreArgs(sharding=x.sharding, global_shape=x.shape, dtype=x.dtype)

    # Descriptions only: Orbax hands back what a partial restore does not find as it was asked for, and says nothing.
    described = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), target)
    return ocp.args.PyTreeRestore(described, restore_args=jax.tree.map(args, target), partial_restore=part)
