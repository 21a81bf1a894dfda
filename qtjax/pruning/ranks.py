"""Ranks of a score over the samples that have one, and the quadrants that the two medians make of them."""

import jax
import jax.numpy as jnp


def stable_ranks(values_B: jax.Array, eligible_B: jax.Array) -> jax.Array:
    """int32 [B], stable ranks 0..n-1 among the eligible (ties: lower index first); the others come after them."""
    return jnp.argsort(jnp.lexsort((values_B, ~eligible_B))).astype(jnp.int32)


def quadrants_of_scores(perplexity_B: jax.Array, entropy_B: jax.Array, eligible_B: jax.Array) -> jax.Array:
    """`median_quadrants` of the scores themselves; those of the ineligible may be anything."""
    ranks = (stable_ranks(jnp.where(eligible_B, x, 0.0), eligible_B) for x in (perplexity_B, entropy_B))
    return median_quadrants(*ranks, eligible_B)


def median_quadrants(rank_p_B: jax.Array, rank_e_B: jax.Array, eligible_B: jax.Array) -> jax.Array:
    """int32 [B], 1..4 by the medians of perplexity and entropy (high means 2*rank + 1 > n); 0 if not eligible."""
    n = jnp.sum(eligible_B, dtype=jnp.int32)
    high_p, high_e = 2 * rank_p_B + 1 > n, 2 * rank_e_B + 1 > n
    quadrant = jnp.where(high_p, jnp.where(high_e, 1, 2), jnp.where(high_e, 4, 3))
    return jnp.where(eligible_B, quadrant, 0).astype(jnp.int32)
