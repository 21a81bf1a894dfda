"""InfoBatch: each epoch leaves out at random a share of the samples that are known better than average, without bias.

Source: arXiv 2303.04947 and its authors' code. A sample's score is its last loss; no scoring pass. At the start of an
epoch a fraction of the samples whose score is below the mean is dropped; those that stay among them weigh
1/(1 - fraction), so that the expected gradient is that of the full data. The last epochs train on everything.

Decisions beside the authors' code:
- weights return to 1 in the annealing epochs unconditionally (theirs stay as the last pruned epoch left them unless
  epochs * 0.875 is an integer);
- a fraction above 0.9 is used as given (theirs is cut to 0.9);
- a score that is not finite is left out of the mean and its sample kept (theirs then prunes nobody);
- the mean is taken in float64.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np

from qtjax.errors import QtjaxError
from qtjax.pruning.base import Candidates, SampleChoice, checked_candidates, plain_choice
from qtjax.pruning.budget import budget_table

# The score of a sample not trained on yet, nats. Equal scores lie at the mean, not below: the first epoch drops nothing.
INITIAL_SCORE = 3.0
# Epoch orders are Philox(seed, epoch) as well: from the same stream the dropped ones would be the last of the order.
_STREAM = 2**62


def epoch_choice(scores: np.ndarray, seed: int, epoch: int, fraction: float = 0.5) -> tuple[np.ndarray, np.ndarray]:
    """The samples of one epoch and their weights, a pure function of its arguments, the same under every numpy.

    Of the n_below samples with a score below the mean, int((1 - fraction) * n_below) stay: the floor makes the sum of
    their weights fall short of n_below by less than 1/(1 - fraction) samples.

    Args: scores: float32 [n], last loss of each sample in nats, INITIAL_SCORE before the first; seed, epoch: ints from 0;
      fraction: [0, 1), share of the samples below the mean that is dropped.
    Returns: keep bool [n]; weight float32 [n], 1/(1 - fraction) for kept samples below the mean, 1 for those not below
      it, 0 if dropped.
    Raises: QtjaxError for a fraction outside [0, 1).
    """
    if isinstance(fraction, bool) or not isinstance(fraction, (int, float)) or not 0 <= fraction < 1:
        raise QtjaxError(
            f"fraction = {fraction!r}: the dropped share of the samples below the mean is at least 0 and below 1"
        )
    scores = np.asarray(scores, np.float32).astype(np.float64)
    finite = np.isfinite(scores)
    # In float64 the sum of up to 2^29 equal float32 is exact; in float32 the mean of equal scores can lie above them.
    mean = scores[finite].sum() / max(finite.sum(), 1)
    below = np.flatnonzero(finite & (scores < mean))
    draws = np.random.Philox(key=np.array([seed, _STREAM + epoch], np.uint64)).random_raw(len(scores))[below]
    chosen = below[np.argsort(draws, kind="stable")[: int((1 - fraction) * len(below))]]
    weight = np.ones(len(scores), np.float32)
    weight[below] = 0
    weight[chosen] = 1 / (1 - fraction)
    return weight > 0, weight


def anneals(epoch: int, epochs: int, share: float = 0.125) -> bool:
    """Whether `epoch` (from 0) of `epochs` trains on all samples with weights 1: the last ceil(share * epochs) do.

    Rounded up, as in the authors' code (epoch + 1 > 0.875 * epochs): 8 epochs anneal in the last one, 9 in the last
    two, 3 in the last one, so that 3 epochs prune in the second only (the first has no scores yet) and 2 prune never.

    Raises: QtjaxError for a share outside [0, 1].
    """
    if not 0 <= share <= 1:
        raise QtjaxError(f"share = {share!r}: the share of the epochs that train on all samples is from 0 to 1")
    # 1e-6 so that 0.07 * 100 = 7.000000000000001 is 7.
    return epoch >= epochs - math.ceil(share * epochs - 1e-6)


@jax.jit
def _planned(candidates: Candidates, planned_keep: jax.Array, planned_weight: jax.Array) -> SampleChoice:
    eligible = candidates.valid & (candidates.count > 0)
    return plain_choice(candidates, eligible & planned_keep, eligible, planned_weight)


def choose_planned(
    candidates: Candidates, keep: float, *, planned_keep: jax.Array, planned_weight: jax.Array
) -> SampleChoice:
    """Keeps what the epoch's plan keeps. `keep` is checked, not used: the plan's fraction decides.

    Args: planned_keep bool [B], planned_weight float [B]: what `epoch_choice` gave, at the batch's samples; anything on
      padding.
    Raises: QtjaxError for keep outside (0, 1], plans of another shape, and as `checked_candidates`.
    """
    budget_table(keep, 0)
    candidates = checked_candidates(candidates)
    planned_keep, planned_weight = jnp.asarray(planned_keep) != 0, jnp.asarray(planned_weight, jnp.float32)
    if not planned_keep.shape == planned_weight.shape == candidates.valid.shape:
        raise QtjaxError(
            f"planned_keep and planned_weight have shapes {planned_keep.shape} and {planned_weight.shape}: must be"
            f" {candidates.valid.shape}, epoch_choice's answer at the samples of the batch"
        )
    return _planned(candidates, planned_keep, planned_weight)
