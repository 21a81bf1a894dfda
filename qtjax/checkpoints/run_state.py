"""Checkpoints of a run in progress (Orbax): arrays with their shardings, a small JSON beside them, and where the next step
was begun (prune.score_lag) what it began with.

Orbax writes into a temporary folder and renames it, so a checkpoint is whole or absent. A folder that looks like a
checkpoint and cannot be read (truncated file, empty folder) is skipped in favour of the one before it, and said.
"""

import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import orbax.checkpoint as ocp

from qtjax.errors import QtjaxError

logging.getLogger("absl").setLevel(logging.ERROR)  # Orbax narrates every save otherwise


class Restored(NamedTuple):
    """step: optimizer steps done; state: the tree asked for; meta: the JSON saved with it; skipped: unreadable steps;
    pending: the tree that was asked for beside the state, None if none was."""

    step: int
    state: Any
    meta: dict[str, Any]
    skipped: list[int]
    pending: Any = None


class RunState:
    """The checkpoints of one run folder, newest `keep` kept."""

    def __init__(self, folder: Path, keep: int = 2):
        self.folder = Path(folder).absolute()
        self._keep = keep
        self._manager = self._open()

    def _open(self) -> ocp.CheckpointManager:
        options = ocp.CheckpointManagerOptions(max_to_keep=self._keep, enable_async_checkpointing=True, create=True)
        return ocp.CheckpointManager(self.folder, options=options, item_names=("state", "meta", "pending"))

    def save(self, step: int, state: Any, meta: dict[str, Any], pending: Any = None) -> None:
        """Writes in the background; the previous save is waited for first.

        Args: pending: a tree kept apart from the state, so that readers of the model need not know of it; None: none.
        Raises QtjaxError when the disk refuses; checkpoints written before stay whole.
        """
        try:
            self.wait()
            items = {"state": ocp.args.StandardSave(state), "meta": ocp.args.JsonSave(meta)}
            if pending is not None:
                items["pending"] = ocp.args.StandardSave(pending)
            self._manager.save(step, args=ocp.args.Composite(**items))
        except (OSError, ValueError, RuntimeError) as error:
            raise _refused(self.folder, step, error) from error

    def wait(self) -> None:
        """Returns when the last save is on disk. Raises QtjaxError if it could not be written."""
        try:
            self._manager.wait_until_finished()
        except (OSError, ValueError, RuntimeError) as error:
            raise _refused(self.folder, self._manager.latest_step(), error) from error

    def latest(self) -> int | None:
        return self._manager.latest_step()

    def restore(self, target: Any, pending: Callable[[int], Any] = lambda step: None) -> Restored | None:
        """The newest readable checkpoint, or None if there is none.

        Args: target: a tree of arrays or jax.ShapeDtypeStruct with shardings; its structure and shapes must match.
          pending: such a tree for what was saved beside the state of a step, None where nothing is wanted.
        Raises QtjaxError when there are checkpoints and none can be read.
        """
        steps = sorted(self._manager.all_steps(), reverse=True)
        skipped: list[int] = []
        reason = ""
        for step in steps:
            try:
                items = {"state": ocp.args.StandardRestore(target), "meta": ocp.args.JsonRestore()}
                if (beside := pending(step)) is not None:
                    items["pending"] = ocp.args.StandardRestore(beside)
                found = self._manager.restore(step, args=ocp.args.Composite(**items))
            except Exception as error:  # noqa: BLE001 - a damaged file raises whatever its reader raises
                reason = " ".join(str(error).split())[:160]
                skipped.append(step)
                continue
            if found.meta is None or found.state is None:
                skipped.append(step)
                continue
            return Restored(step, found.state, found.meta, skipped, found.pending if beside is not None else None)
        if skipped:
            raise QtjaxError(
                f"{self.folder}: none of the checkpoints of steps {', '.join(map(str, sorted(skipped)))} can be read"
                f" ({reason}); remove the run folder to start again"
            )
        return None

    def forget(self, steps: list[int]) -> None:
        """Removes unreadable checkpoints, so that their steps can be saved again; only the run itself may."""
        if not steps:
            return
        self._manager.close()
        for step in steps if jax.process_index() == 0 else []:
            shutil.rmtree(self.folder / str(step), ignore_errors=True)
        self._manager = self._open()

    def close(self) -> None:
        self.wait()
        self._manager.close()


def _refused(folder: Path, step: int | None, error: Exception) -> QtjaxError:
    reason = " ".join(str(error).split())[:200]
    return QtjaxError(
        f"{folder}: the checkpoint of step {step} could not be written ({reason}); free space or permissions there and run"
        " the same command again: it continues from the last whole checkpoint"
    )
