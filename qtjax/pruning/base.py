"""What every pruner sees and gives back: candidates and a choice for samples, targets and a rate for tokens.

Shape letters: B samples of the scoring batch, L length. All arrays are those of the WHOLE batch, all devices and hosts.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp

from qtjax.errors import QtjaxError
from qtjax.pruning.ranks import quadrants_of_scores


class Candidates(NamedTuple):
    """What a sample pruner sees of one scoring batch.

    perplexity, entropy: float32 [B], exp(mean nll) and mean predictive entropy (nats); NaN where not scored or without
      targets. count: int32 [B], targets of the sample. valid: bool [B], False on padding.
    keys: jax.random keys [B] (threefry2x32) or their data, uint32 [B, 2]: one per sample, derived by the caller from
      (seed, step, sample index), so that a draw depends neither on padding nor on devices.
    """

    perplexity: jax.Array
    entropy: jax.Array
    count: jax.Array
    valid: jax.Array
    keys: jax.Array


class SampleChoice(NamedTuple):
    """What a sample pruner decided about each of the B samples.

    keep: bool [B], the chosen samples; exactly min(K, eligible) of them where the pruner is exact.
    quadrant: int32 [B], the corner that the sample enters first: 2 or 4 ("paper"), 2 or 3 ("article"), 0 if no level up
      to 0.49 reaches it or it is not eligible. Does not depend on the budget: a sample in a corner may not be kept.
      0 from pruners without quadrants, as are supplement (False) and level (NaN).
    supplement: bool [B], kept without being in a corner (such samples keep all their tokens).
    median_quadrant: int32 [B], 1..4 by the two medians (high means 2*rank + 1 > n) of the samples with targets and
      finite scores, from every pruner; 0 for the others. For reports.
    level: float32 scalar in [0, 0.49]: m/n of the last corner sample kept; 0.49 once the supplement is used; NaN if no
      sample lies in a corner.
    eligible: bool [B], real samples with targets and, if the pruner reads scores, both scores finite; the others are
      never kept.
    weight: float32 [B], the factor on the sample's loss: 1 where kept, but for the infobatch family; 0 where not kept.
    """

    keep: jax.Array
    quadrant: jax.Array
    supplement: jax.Array
    median_quadrant: jax.Array
    level: jax.Array
    eligible: jax.Array
    weight: jax.Array


@dataclass(frozen=True)
class SamplePruner:
    """One rule that chooses samples.

    choose: (candidates, keep, **options) -> SampleChoice. keep is a fraction (0, 1] of the N valid samples:
      K = max(1, floor(keep * N + 1e-6)) are kept, or all eligible ones if these are fewer. Ties go to the lower index.
      Under jit `keep` and the options that are names must be Python values; outside, a change of keep does not recompile.
    scores: reads perplexity or entropy, so that the batch must be scored first. exact: keeps exactly min(K, eligible);
    otherwise keep is checked but not used. quadrants: its choice has quadrants, so that tokens are pruned in Q2 only
    by default. source: one line. options: the names of the options of `choose`.
    """

    choose: Callable[..., SampleChoice]
    scores: bool
    exact: bool
    quadrants: bool
    source: str
    options: frozenset[str] = frozenset()


class Targets(NamedTuple):
    """What a token pruner sees of the samples whose tokens it may prune.

    token_nll: float32 [B, L], nats, indexed by target position; anything where mask is False.
    mask: bool [B, L], the targets to choose among. keys: as in `Candidates`; the same ones may be given, the draws differ.
    reference_nll: float32 [B, L], nats, of the same targets under a reference model; None if there is none.
    attention: float32 [B, L], attention that the target receives from later ones, by the rater that the pruner names;
      None if not computed.
    """

    token_nll: jax.Array
    mask: jax.Array
    keys: jax.Array
    reference_nll: jax.Array | None = None
    attention: jax.Array | None = None


@dataclass(frozen=True)
class TokenPruner:
    """One rule that rates targets.

    rate: (targets, **options) -> float32 [B, L]; the LOWEST stay, 0 where mask is False. What is not finite goes first.
    needs: of "scores", "reference", "attention", what `Targets` must hold (token_nll, reference_nll, attention).
    source: one line. whole_batch: the budget is a share of all targets of the batch instead of each sample's own, so that
    a sample may lose all of its tokens. rater: name of the attention rater, "" if none. exact: meets the budget; False
    keeps every target. options: the names of the options of `rate`.
    """

    rate: Callable[..., jax.Array]
    needs: frozenset[str]
    source: str
    whole_batch: bool = False
    rater: str = ""
    exact: bool = True
    options: frozenset[str] = frozenset()


def checked_keys(keys: jax.Array, samples: int) -> jax.Array:
    """Typed threefry keys [B].

    Other generators are refused: under vmap the draws of rbg depend on the rows beside them.
    """
    typed = jnp.issubdtype(keys.dtype, jax.dtypes.prng_key)
    data = jax.random.key_data(keys) if typed else jnp.asarray(keys)
    if data.shape != (samples, 2) or data.dtype != jnp.uint32:
        kind = keys.dtype if typed else f"{data.dtype} {data.shape}"
        raise QtjaxError(f"keys are {kind}: must be threefry2x32 keys [{samples}] or uint32 [{samples}, 2], one per sample")
    return jax.random.wrap_key_data(data, impl="threefry2x32")


def checked_candidates(candidates: Candidates) -> Candidates:
    """The same as device arrays of the promised types.

    Raises: QtjaxError if perplexity, entropy, count and valid are not one dimension of equal length, or for wrong keys.
    """
    perplexity, entropy = (jnp.asarray(x, jnp.float32) for x in (candidates.perplexity, candidates.entropy))
    count, valid = jnp.asarray(candidates.count), jnp.asarray(candidates.valid) != 0
    shapes = perplexity.shape, entropy.shape, count.shape, valid.shape
    if len(set(shapes)) > 1 or perplexity.ndim != 1:
        raise QtjaxError(
            f"perplexity, entropy, count and valid have shapes {', '.join(map(str, shapes))}:"
            " must be one dimension of equal length; flatten packed [B, S] scores first"
        )
    return Candidates(perplexity, entropy, count, valid, checked_keys(candidates.keys, len(perplexity)))


def scored(candidates: Candidates) -> jax.Array:
    """bool [B], real samples with targets and both scores finite."""
    c = candidates
    return c.valid & (c.count > 0) & jnp.isfinite(c.perplexity) & jnp.isfinite(c.entropy)


def plain_choice(candidates: Candidates, keep_B: jax.Array, eligible_B: jax.Array, weight_B: jax.Array | float = 1.0):
    """SampleChoice of a pruner without quadrants. Median quadrants come from the scores, if there are any."""
    known = scored(candidates)
    return SampleChoice(
        keep=keep_B,
        quadrant=jnp.zeros(keep_B.shape, jnp.int32),
        supplement=jnp.zeros(keep_B.shape, bool),
        median_quadrant=quadrants_of_scores(candidates.perplexity, candidates.entropy, known),
        level=jnp.float32(jnp.nan),
        eligible=eligible_B,
        weight=jnp.where(keep_B, weight_B, 0.0).astype(jnp.float32),
    )
