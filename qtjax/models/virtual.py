"""Virtual tokens before a row: where they stand, whose they are, and who sees them.

They are embeddings that pass through every layer (prompt tuning) or keys and values of every layer (prefix tuning). One
copy stands before a row. Every segment of a packed row sees it as if it alone stood behind it: a segment's positions,
and the distances that a sliding window measures, count from its own first slot plus P.
B batch, L length, D model, P virtual tokens, G groups (tasks) of them.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from qtjax.errors import QtjaxError


def offsets(slots: Array, segment_ids: Array | None) -> Array:
    """int [B, L] or [L]: slots since the segment began in a packed row, since the row began otherwise (as HF counts).

    segment_ids as they were given: a masked slot inside a segment does not end it.
    """
    if segment_ids is None:
        return slots
    return slots - jnp.argmax(segment_ids[:, :, None] == segment_ids[:, None, :], axis=-1)


def sees_virtual(
    offset_BL: Array, segment_BL: Array, count: int, sliding_window: int | None, same_group_BLG: Array | None = None
) -> Array:
    """bool [B, 1, L, G P]: which of the virtual tokens before the row each of its slots sees; padding sees none.

    Args: offset: see `offsets`. count: P. same_group bool [B, L, G]: whether a slot is of that group; None: one for all.
    """
    near = jnp.broadcast_to((segment_BL != 0)[..., None], (*segment_BL.shape, count))
    if sliding_window is not None:
        near &= offset_BL[..., None] + count - jnp.arange(count) < sliding_window
    if same_group_BLG is not None:
        near = (near[:, :, None, :] & same_group_BLG[..., None]).reshape(*near.shape[:2], -1)
    return near[:, None]


def among_virtual(groups: int, count: int, sliding_window: int | None) -> Array:
    """bool [G P, G P]: virtual tokens see those of their group that are not later, within the window."""
    group, slot = (x.reshape(-1) for x in jnp.mgrid[:groups, :count])
    distance = slot[:, None] - slot[None, :]
    near = (distance >= 0) & (group[:, None] == group[None, :])
    return near if sliding_window is None else near & (distance < sliding_window)


def of_rows(virtual_GPD: Array, task_ids_B: Array | None) -> Array:
    """The virtual tokens of each row's task: [P, D] without a choice, else [B, P, D], NaN where there is no such task."""
    groups = virtual_GPD.shape[0]
    if groups == 1:
        return virtual_GPD[0]
    if task_ids_B is None or task_ids_B.ndim != 1:
        shape = "none were given" if task_ids_B is None else f"got the shape {task_ids_B.shape}"
        raise QtjaxError(f"task_ids: the overlay has {groups} tasks and needs one id a row, int [B]; {shape}")
    known = (task_ids_B >= 0) & (task_ids_B < groups)
    return jnp.where(known[:, None, None], jnp.take(virtual_GPD, task_ids_B, axis=0, mode="clip"), jnp.nan)


def check_task_ids(tasks: int, task_ids: Any, rows: tuple[int, ...], real: Any = True) -> None:
    """Raises QtjaxError where task_ids do not choose among `tasks` tasks (0: the overlay has none).

    Shapes always; values where they are known (not under jit). rows: (B, L), or (B,) where tokens cannot choose.
    real: bool [B, L], which slots hold something.
    """
    if not tasks or task_ids is None and tasks == 1:
        return
    if task_ids is None:
        raise QtjaxError(f"task_ids: the overlay has {tasks} tasks; say which, int [B] or, in one forward pass, [B, L]")
    if task_ids.shape not in (rows[:1], rows) or not jnp.issubdtype(task_ids.dtype, jnp.integer):
        allowed = " or ".join(str(list(shape)) for shape in dict.fromkeys((rows[:1], rows)))
        raise QtjaxError(f"task_ids: must be int {allowed}, got {task_ids.dtype} {list(task_ids.shape)}")
    if isinstance(task_ids, jax.core.Tracer) or isinstance(real, jax.core.Tracer):
        return
    used = np.asarray(task_ids)
    used = used[np.broadcast_to(np.asarray(real), used.shape)] if used.ndim == 2 else used
    if used.size and not 0 <= used.min() <= used.max() < tasks:
        raise QtjaxError(f"task_ids: hold {used.min()} to {used.max()}; the overlay's tasks are 0 to {tasks - 1}")
