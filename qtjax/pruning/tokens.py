"""Stage 2 of Q-Tuning: which target tokens of a sample stay in the loss.

Source: Q-Tuning, arXiv 2509.23873, eq. 7. Shape letters: B samples, L length; T the set of a sample's target positions.
"""

import functools

import jax
import jax.numpy as jnp

from qtjax.errors import QtjaxError, near_names
from qtjax.pruning.lowest import keep_lowest

NEIGHBORS = ("sum", "mean")
# exp(50) is 5e21: sums of three stay finite in float32, and no model is meaningfully worse than that.
NLL_CEILING = 50.0


def _row_criterion(token_nll_L, mask_L, neighbor_weight, neighbors: str) -> jax.Array:
    """eq. 7's s_i at the targets of ONE row, 0 elsewhere."""
    length = mask_L.shape[0]
    # Targets moved to the front, in order: the neighbours of eq. 7 are then one slot away, whatever gap lay between.
    order = jnp.argsort(~mask_L, stable=True)
    last = jnp.sum(mask_L) - 1
    nll = token_nll_L.astype(jnp.float32)[order]
    own = jnp.exp(jnp.where(nll <= NLL_CEILING, nll, NLL_CEILING))  # the comparison sends NaN to the ceiling as well
    slot = jnp.arange(length)
    before = jnp.where(slot == 0, own, jnp.roll(own, 1))
    after = jnp.where(slot == last, own, jnp.roll(own, -1))
    around = before + after if neighbors == "sum" else (before + after) / 2
    s = (1 - neighbor_weight) * own + neighbor_weight * around
    return jnp.zeros(length, jnp.float32).at[order].set(jnp.where(slot <= last, s, 0.0), unique_indices=True)


@functools.partial(jax.jit, static_argnames=("neighbors",))
def _criterion(token_nll, mask, neighbor_weight, neighbors: str) -> jax.Array:
    return jax.vmap(functools.partial(_row_criterion, neighbors=neighbors), in_axes=(0, 0, None))(
        token_nll, mask, neighbor_weight
    )


def token_criterion(
    token_nll: jax.Array, loss_mask: jax.Array, neighbor_weight: float = 0.5, neighbors: str = "sum"
) -> jax.Array:
    """s_i = (1-lambda) PPL_i + lambda (PPL_{i-1} + PPL_{i+1}), PPL_i = exp(nll_i) (eq. 7); low is good.

    Neighbours are the previous and the next target of the same row: what lies between two turns is skipped. At the ends
    the missing neighbour takes the token's own PPL. nll is clamped to 50 nats first; NaN counts as 50.

    Args: as `select_tokens`.
    Returns: float32 [B, L], s at the targets, 0 elsewhere.
    Raises: QtjaxError for neighbor_weight outside [0, 1], unknown neighbors, arrays that are not [B, L] of one shape.
    """
    if neighbors not in NEIGHBORS:
        raise QtjaxError(f"neighbors = {neighbors!r}: must be one of {', '.join(NEIGHBORS)}{near_names(str(neighbors), NEIGHBORS)}")
    if not isinstance(neighbor_weight, jax.core.Tracer) and not 0 <= neighbor_weight <= 1:
        raise QtjaxError(f"neighbor_weight = {neighbor_weight!r}: lambda of eq. 7 is a fraction from 0 to 1")
    token_nll, mask = jnp.asarray(token_nll), jnp.asarray(loss_mask) != 0
    if token_nll.shape != mask.shape or mask.ndim != 2:
        raise QtjaxError(f"token_nll and loss_mask have shapes {token_nll.shape} and {mask.shape}: must both be [B, L]")
    return _criterion(token_nll, mask, jnp.float32(neighbor_weight), neighbors)


def select_tokens(
    token_nll: jax.Array,
    loss_mask: jax.Array,
    keep: float = 0.5,
    neighbor_weight: float = 0.5,
    neighbors: str = "sum",
    protect: jax.Array | None = None,
) -> jax.Array:
    """Keeps the max(1, floor(keep * |T| + 1e-6)) targets of each row whose own and neighbouring perplexity is lowest.

    Every row is pruned; the caller applies the mask to Q2 samples only. Ties keep the earlier token.

    Args:
      token_nll: float [B, L], nats, at the target position; read only where loss_mask is True.
      loss_mask: bool [B, L], the targets T of each row; a row without any keeps none.
      keep: fraction (0, 1] of a row's targets.
      neighbor_weight: lambda of eq. 7, fraction [0, 1]; 0 rates a token by its own perplexity alone.
      neighbors: "sum", eq. 7 as printed, or "mean", the average of the two as in the caption of Figure 2.
      protect: bool [B, L], targets that must stay (an end-of-turn token). They count against the budget; where a row has
        more of them than its budget, all of them are kept and nothing else.
    Returns: bool [B, L], the kept targets, a subset of loss_mask.
    Raises: QtjaxError for keep outside (0, 1] and as `token_criterion`.
    """
    mask = jnp.asarray(loss_mask) != 0
    criterion = token_criterion(token_nll, mask, neighbor_weight, neighbors)
    return keep_lowest(criterion, mask, keep, protect)
