"""Stage 1 of Q-Tuning: which K samples of a scoring batch to keep, from their points on the EU plane.

Source: Q-Tuning, arXiv 2509.23873, section 3, Figures 1a and 2, Algorithm 1, eq. 1. Shape letter: B samples of the batch.

Algorithm 1 bisects one level a in [0, 0.49] that opens the kept corners of the plane until K samples lie in them. The
corners only ever grow with a, so every sample has one level at which it enters; sorting by that level gives the same
choice without a search, exactly K, with static shapes:

    n = eligible samples, rP and rE = ranks 0..n-1 of perplexity and entropy among them
    m2 = max(n-1-rP, rE)   enters Q2 (high PPL, low Ent)  when a passes m2/n
    m4 = max(rP, n-1-rE)   enters Q4 (low PPL, high Ent)
    m  = min(m2, m4)       placed iff 100*m < 49*n

Samples that no level up to 0.49 reaches supplement the choice, by how far they lie off the diagonal.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax

from qtjax.errors import QtjaxError, near_names
from qtjax.pruning.base import Candidates, SampleChoice, checked_candidates
from qtjax.pruning.budget import budget_table
from qtjax.pruning.ranks import median_quadrants, stable_ranks

POLICIES = ("paper", "article")
SUPPLEMENTS = ("minmax", "ranks", "random")
CORNERS = ("extreme", "random")


def _unit_range(values_B: jax.Array, eligible_B: jax.Array) -> jax.Array:
    """Min-max normalised over the eligible samples, 0..1; 0.5 where the range is zero."""
    low = jnp.min(jnp.where(eligible_B, values_B, jnp.inf), initial=jnp.inf)
    high = jnp.max(jnp.where(eligible_B, values_B, -jnp.inf), initial=-jnp.inf)
    width = jnp.broadcast_to(high - low, values_B.shape)
    # Behind the barrier XLA cannot turn the division into a product with 1/width, which is one bit off now and then:
    # the largest value must come out as exactly 1, or samples that tie on the diagonal are ranked by rounding.
    divisor = lax.optimization_barrier(jnp.where(width > 0, width, 1.0))
    return jnp.where(width > 0, (values_B - low) / divisor, 0.5)


@functools.partial(jax.jit, static_argnames=("policy", "supplement", "corners"))
def _select(perplexity_B, entropy_B, budgets, valid_B, draws_B, policy: str, supplement: str, corners: str) -> SampleChoice:
    eligible = valid_B & jnp.isfinite(perplexity_B) & jnp.isfinite(entropy_B)
    n = jnp.sum(eligible, dtype=jnp.int32)
    kept = jnp.minimum(budgets[jnp.sum(valid_B, dtype=jnp.int32)], n)
    # Ineligible scores may be NaN or inf: kept out of every later sort, difference and sum.
    perplexity = jnp.where(eligible, perplexity_B, 0.0)
    entropy = jnp.where(eligible, entropy_B, 0.0)
    rank_p, rank_e = stable_ranks(perplexity, eligible), stable_ranks(entropy, eligible)

    m2 = jnp.maximum(n - 1 - rank_p, rank_e)
    if policy == "paper":
        other, m_other = 4, jnp.maximum(rank_p, n - 1 - rank_e)
        # Largest distance from the diagonal first.
        if supplement == "ranks":
            last_resort = -jnp.abs(rank_p - rank_e).astype(jnp.float32)
        else:
            last_resort = -jnp.abs(_unit_range(perplexity, eligible) - _unit_range(entropy, eligible))
    else:
        other, m_other = 3, jnp.maximum(rank_p, rank_e)
        last_resort = rank_e.astype(jnp.float32) if supplement == "ranks" else _unit_range(entropy, eligible)
    if supplement == "random":
        last_resort = draws_B
    m = jnp.minimum(m2, m_other)
    placed = eligible & (100 * m < 49 * n)
    quadrant = jnp.where(placed, jnp.where(m2 <= m_other, 2, other), 0).astype(jnp.int32)

    group = jnp.where(placed, 0, jnp.where(eligible, 1, 2))
    # m is exact in float32 below 2**24 samples; lexsort is stable, so what is left of a tie goes to the lower index.
    first = m.astype(jnp.float32) if corners == "extreme" else draws_B
    order = jnp.lexsort((jnp.where(placed, first, last_resort), group))
    keep = jnp.argsort(order) < kept

    extra = keep & ~placed
    last_m = jnp.max(jnp.where(keep & placed, m, -1), initial=-1)
    level = jnp.where(jnp.any(extra), 0.49, last_m / jnp.maximum(n, 1))  # of corners drawn at random, the widest drawn
    return SampleChoice(
        keep=keep,
        quadrant=quadrant,
        supplement=extra,
        median_quadrant=median_quadrants(rank_p, rank_e, eligible),
        level=jnp.where(jnp.any(placed), level, jnp.nan).astype(jnp.float32),
        eligible=eligible,
        weight=keep.astype(jnp.float32),
    )


def select_samples(
    perplexity: jax.Array,
    entropy: jax.Array,
    keep: float = 0.25,
    policy: str = "paper",
    supplement: str = "minmax",
    valid: jax.Array | None = None,
    *,
    corners: str = "extreme",
    draws: jax.Array | None = None,
) -> SampleChoice:
    """Keeps K = max(1, floor(keep * N + 1e-6)) samples of the batch: corners first, then the supplement.

    Equals Algorithm 1's bisection wherever no tie lies on its level. Deterministic; what ties is decided by index.
    Works under jit (keep, policy and supplement are Python values); a change of `keep` alone does not recompile.

    Args:
      perplexity: float [B], exp(mean nll) of each sample, over the WHOLE scoring batch (all devices and hosts).
      entropy: float [B], mean predictive entropy of each sample, nats.
      keep: fraction (0, 1] of the N real samples, those without any target or with a score that is not finite included.
        With fewer than K eligible samples all of these are kept.
      policy: "paper" keeps Q2 (high PPL, low Ent) and Q4 (low PPL, high Ent), as figures, text, Algorithm 1 and
        examples of the paper do; "article" keeps Q2 and the low/low corner (3), as a widely read article prints it.
      supplement: what ranks the samples that no corner reaches. paper: |PPL^ - Ent^|, largest first, with min-max
        normalised scores ("minmax", the paper's) or with |rank - rank| ("ranks"); article: lowest Ent first; "random":
        by `draws`, under either policy.
      valid: bool [B], False on padding; None: all are real.
      corners: which of the kept quadrants' samples come first: "extreme", by their level, as Algorithm 1 opens the corners;
        or "random", by `draws`, so that every sample which a level up to 0.49 reaches has the same chance.
      draws: float [B], a random number for each sample, for whatever is "random".
    Returns: SampleChoice.
    Raises: QtjaxError for keep outside (0, 1], an unknown policy or supplement, arrays of unequal length.
    """
    for name, value, known in (("policy", policy, POLICIES), ("supplement", supplement, SUPPLEMENTS), ("corners", corners, CORNERS)):
        if value not in known:
            raise QtjaxError(f"{name} = {value!r}: must be one of {', '.join(known)}{near_names(str(value), known)}")
    if draws is None and "random" in (supplement, corners):
        raise QtjaxError("draws is missing: what is chosen at random needs a random number for each sample")
    perplexity, entropy = jnp.asarray(perplexity, jnp.float32), jnp.asarray(entropy, jnp.float32)
    draws = jnp.zeros(perplexity.shape) if draws is None else jnp.asarray(draws, jnp.float32)
    valid = jnp.ones(perplexity.shape, bool) if valid is None else jnp.asarray(valid) != 0
    if not perplexity.shape == entropy.shape == valid.shape == draws.shape or perplexity.ndim != 1:
        raise QtjaxError(
            f"perplexity, entropy, valid and draws have shapes {perplexity.shape}, {entropy.shape}, {valid.shape} and {draws.shape}:"
            " must be one dimension of equal length; flatten packed [B, S] scores first"
        )
    return _select(perplexity, entropy, budget_table(keep, perplexity.size), valid, draws, policy, supplement, corners)


def choose_by_quadrant(
    candidates: Candidates, keep: float, *, policy: str = "paper", supplement: str = "minmax", corners: str = "extreme"
) -> SampleChoice:
    """`select_samples` of a scoring batch; a sample without targets has no score. Draws come from the samples' own keys."""
    candidates = checked_candidates(candidates)
    draws = jax.vmap(jax.random.uniform)(candidates.keys) if "random" in (supplement, corners) else None
    perplexity = jnp.where(candidates.count > 0, candidates.perplexity, jnp.nan)
    return select_samples(
        perplexity, candidates.entropy, keep, policy, supplement, candidates.valid, corners=corners, draws=draws
    )


def _average_ranks(values_B: jax.Array, eligible_B: jax.Array) -> jax.Array:
    """float32 [B], ranks among the eligible; equal values share the mean of their ranks."""
    line = jnp.sort(jnp.where(eligible_B, values_B, jnp.inf))
    return (jnp.searchsorted(line, values_B, side="left") + jnp.searchsorted(line, values_B, side="right") - 1) / 2


@jax.jit
def spearman(perplexity: jax.Array, entropy: jax.Array, valid: jax.Array | None = None) -> jax.Array:
    """Spearman's rank correlation of the two scores over the eligible samples, float32 scalar in [-1, 1].

    The number to watch beside the supplement share: at rho, the two kept corners hold about arccos(rho)/pi of a batch.

    Args: perplexity, entropy: float [B]; valid: bool [B], False on padding; None: all are real. Scores that are not
      finite are left out; equal values share their mean rank.
    Returns: NaN with fewer than two eligible samples, or when either score is constant.
    """
    perplexity, entropy = jnp.asarray(perplexity, jnp.float32), jnp.asarray(entropy, jnp.float32)
    eligible = jnp.isfinite(perplexity) & jnp.isfinite(entropy)
    if valid is not None:
        eligible &= valid != 0
    n = jnp.sum(eligible)
    # Centred on the mean rank (n - 1) / 2, which ties do not move.
    x, y = (jnp.where(eligible, _average_ranks(v, eligible) - (n - 1) / 2, 0.0) for v in (perplexity, entropy))
    spread = jnp.sqrt(jnp.sum(x * x)) * jnp.sqrt(jnp.sum(y * y))
    return jnp.where(spread > 0, jnp.clip(jnp.sum(x * y) / jnp.where(spread > 0, spread, 1.0), -1, 1), jnp.nan)
