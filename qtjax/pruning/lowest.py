"""Keeps the lowest-rated targets within a budget, of each row or of the whole batch."""

import jax
import jax.numpy as jnp

from qtjax.errors import QtjaxError
from qtjax.pruning.budget import budget_table


def _row_keep(rate_L, mask_L, protect_L, budgets) -> jax.Array:
    """The lowest rates of ONE row, protected targets before all others."""
    protected = protect_L & mask_L
    group = jnp.where(protected, 0, jnp.where(mask_L, 1, 2))
    rank = jnp.argsort(jnp.lexsort((rate_L, group)))  # stable: of equal rates the earlier token comes first
    count = jnp.maximum(budgets[jnp.sum(mask_L)], jnp.sum(protected))
    return mask_L & (rank < count)


@jax.jit
def _rows_keep(rate, mask, protect, budgets) -> jax.Array:
    rate = jnp.where(jnp.isfinite(rate), rate, jnp.inf)
    return jax.vmap(_row_keep, in_axes=(0, 0, 0, None))(rate, mask, protect, budgets)


def keep_lowest(
    rate: jax.Array, mask: jax.Array, keep: float, protect: jax.Array | None = None, whole_batch: bool = False
) -> jax.Array:
    """bool [B, L]: the max(1, floor(keep * |T| + 1e-6)) targets of each row with the lowest rate; ties: the earlier one.

    Args:
      rate: float32 [B, L]; what is not finite is kept last. mask: bool [B, L], the targets. keep: fraction (0, 1] of them.
      protect: bool [B, L], targets that must stay. They count against the budget; where there are more of them than it
        holds, all of them are kept and nothing else.
      whole_batch: one budget for all targets of the batch; ties: the earlier row, in it the earlier token.
    Raises: QtjaxError for keep outside (0, 1] or a protect of another shape.
    """
    protect = jnp.zeros(mask.shape, bool) if protect is None else jnp.asarray(protect) != 0
    if protect.shape != mask.shape:
        raise QtjaxError(f"protect has shape {protect.shape}: must be {mask.shape}, as loss_mask")
    shape = (1, mask.size) if whole_batch else mask.shape
    kept = _rows_keep(*(x.reshape(shape) for x in (rate, mask, protect)), budget_table(keep, shape[1]))
    return kept.reshape(mask.shape)
