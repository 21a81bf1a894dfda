"""InfoBatch's rule within one scoring batch and to an exact budget, which the original cannot reach.

Source: our adaptation of arXiv 2303.04947: samples whose loss is at or above the mean first, the rest of the budget
drawn at random from below, each of these standing for n_below / (number drawn) samples. Unbiased, like the original,
while the budget holds one sample more than lie above the mean; smaller budgets are a ranking by loss with weights 1.
"""

import jax
import jax.numpy as jnp

from qtjax.pruning.base import Candidates, SampleChoice, checked_candidates, plain_choice, scored
from qtjax.pruning.budget import budget_table


@jax.jit
def _fill(candidates: Candidates, budgets: jax.Array) -> SampleChoice:
    eligible = scored(candidates)
    loss = jnp.log(jnp.where(eligible, candidates.perplexity, 1.0))
    # Measured from the smallest loss, so that equal losses have a mean of exactly 0 and lie at it, however a sum rounds.
    excess = jnp.where(eligible, loss - jnp.min(jnp.where(eligible, loss, jnp.inf), initial=jnp.inf), 0.0)
    above = eligible & (excess >= jnp.sum(excess) / jnp.maximum(jnp.sum(eligible), 1))
    below = eligible & ~above

    # Perplexity orders as the loss does, without the ties that a rounded log makes.
    place = jnp.where(above, -candidates.perplexity, jax.vmap(jax.random.uniform)(candidates.keys))
    group = jnp.where(above, 0, jnp.where(below, 1, 2))
    rank = jnp.argsort(jnp.lexsort((jnp.where(eligible, place, 0.0), group)))
    keep = eligible & (rank < budgets[jnp.sum(candidates.valid, dtype=jnp.int32)])

    filled = keep & below
    weight = jnp.where(filled, jnp.sum(below) / jnp.maximum(jnp.sum(filled), 1), 1.0)
    return plain_choice(candidates, keep, eligible, weight)


def choose_by_loss_and_fill(candidates: Candidates, keep: float) -> SampleChoice:
    """Keeps K: highest loss first among those at or above the mean of the eligible, then a random draw of the others.

    Raises: QtjaxError for keep outside (0, 1] and as `checked_candidates`.
    """
    candidates = checked_candidates(candidates)
    return _fill(candidates, budget_table(keep, candidates.count.size))
