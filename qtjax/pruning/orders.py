"""Sample pruners that keep the first K of one order (random, length, entropy, perplexity), and the one that keeps all.

Source: the baselines of Q-Tuning, arXiv 2509.23873, section 4. Where that paper is silent, our decisions:
- longest: the paper's table says that the longest are kept, its prose that they are removed; `shortest` is the other
  reading. Length is the number of targets, the answer's, not the prompt's.
- perplexity: low, middle or high is kept, three pruners. Middle is the smallest |2*rank + 1 - n|, the distance from the
  median in ranks, which a heavy tail does not move; the pair at equal distances above and below ties, by index.
- A pruner that reads one score asks for both to be finite, so that all pruners that score choose among the same samples.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp

from qtjax.pruning.base import Candidates, SampleChoice, checked_candidates, plain_choice, scored
from qtjax.pruning.budget import budget_table
from qtjax.pruning.ranks import stable_ranks

# (candidates, eligible bool [B]) -> [B], finite where eligible; the lowest are kept.
Order = Callable[[Candidates, jax.Array], jax.Array]


def at_random(candidates: Candidates, eligible_B: jax.Array) -> jax.Array:
    """One draw in [0, 1) per sample, from its own key alone."""
    return jax.vmap(jax.random.uniform)(candidates.keys)


def longest(candidates: Candidates, eligible_B: jax.Array) -> jax.Array:
    """Most targets first."""
    return -candidates.count


def shortest(candidates: Candidates, eligible_B: jax.Array) -> jax.Array:
    """Fewest targets first."""
    return candidates.count


def highest_entropy(candidates: Candidates, eligible_B: jax.Array) -> jax.Array:
    """Least certain first."""
    return -candidates.entropy


def lowest_perplexity(candidates: Candidates, eligible_B: jax.Array) -> jax.Array:
    """Best known first."""
    return candidates.perplexity


def highest_perplexity(candidates: Candidates, eligible_B: jax.Array) -> jax.Array:
    """Worst known first."""
    return -candidates.perplexity


def middle_perplexity(candidates: Candidates, eligible_B: jax.Array) -> jax.Array:
    """Nearest to the median in ranks first."""
    rank = stable_ranks(jnp.where(eligible_B, candidates.perplexity, 0.0), eligible_B)
    return jnp.abs(2 * rank + 1 - jnp.sum(eligible_B, dtype=jnp.int32))


@functools.partial(jax.jit, static_argnames=("order", "scores"))
def _first(candidates: Candidates, budgets: jax.Array, order: Order, scores: bool) -> SampleChoice:
    eligible = scored(candidates) if scores else candidates.valid & (candidates.count > 0)
    place = order(candidates, eligible)
    rank = stable_ranks(jnp.where(eligible, place, jnp.zeros_like(place)), eligible)
    return plain_choice(candidates, eligible & (rank < budgets[jnp.sum(candidates.valid, dtype=jnp.int32)]), eligible)


def choose_first(candidates: Candidates, keep: float, *, order: Order, scores: bool) -> SampleChoice:
    """Keeps the K eligible samples that come first.

    Args: order: one of the functions above (static). scores: only samples with finite scores are eligible.
    Raises: QtjaxError for keep outside (0, 1] and as `checked_candidates`.
    """
    candidates = checked_candidates(candidates)
    return _first(candidates, budget_table(keep, candidates.count.size), order, scores)


@jax.jit
def _all(candidates: Candidates) -> SampleChoice:
    eligible = candidates.valid & (candidates.count > 0)
    return plain_choice(candidates, eligible, eligible)


def choose_all(candidates: Candidates, keep: float) -> SampleChoice:
    """Keeps every sample that has a target: full data. `keep` is checked, not used."""
    budget_table(keep, 0)
    return _all(checked_candidates(candidates))
