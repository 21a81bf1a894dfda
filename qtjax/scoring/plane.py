"""The Error-Uncertainty plane: one point (perplexity, entropy) per sample, from per-token scores.

Source: Q-Tuning, arXiv 2509.23873, eq. 4 and 5. Shape letters: B batch rows, L length, S segments per packed row.
Everything is indexed by the TARGET position: `token_nll[b, t]` is the surprise of `input_ids[b, t]`.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from qtjax.errors import QtjaxError


class EUScores(NamedTuple):
    """Scores of a batch; per sample [B], or [B, S] for packed rows with segments 1..S.

    perplexity: float32, exp(mean nll over the sample's targets); NaN without targets.
    entropy: float32, mean predictive entropy over the targets, nats; NaN without targets.
    token_nll, token_entropy: float32 [B, L], nats, at the target position; 0 where there is no target.
    count: int32, targets of the sample.
    """

    perplexity: jax.Array
    entropy: jax.Array
    token_nll: jax.Array
    token_entropy: jax.Array
    count: jax.Array


def target_mask(
    loss_mask: jax.Array, attention_mask: jax.Array | None = None, segment_ids: jax.Array | None = None
) -> jax.Array:
    """bool [B, L]: the legal targets among the tokens that the caller wants trained.

    A token is a target if loss_mask is nonzero there, it is real, and the slot before it is real and of the same
    segment: the first token of a row, of a segment or after left padding has nothing to be predicted from.

    Args:
      loss_mask: bool or int [B, L]. attention_mask: bool or int [B, L], nonzero on real tokens; None: all are real.
      segment_ids: int [B, L], 0 on padding, 1..S on packed samples; None: one segment per row.
    """
    loss_mask = jnp.asarray(loss_mask) != 0
    real = jnp.ones(loss_mask.shape, bool) if attention_mask is None else jnp.asarray(attention_mask) != 0
    joined = jnp.ones(real[:, 1:].shape, bool)
    if segment_ids is not None:
        segment_ids = jnp.asarray(segment_ids)
        real = real & (segment_ids != 0)
        joined = segment_ids[:, 1:] == segment_ids[:, :-1]
    has_past = jnp.pad(real[:, :-1] & joined, ((0, 0), (1, 0)))
    return loss_mask & real & has_past


def _row_scores(num_segments: int | None, nll_L, entropy_L, mask_L, segment_L) -> EUScores:
    """The scores of ONE row; a sample's mean never sees another row, whatever the batch."""
    nll_L = jnp.where(mask_L, nll_L.astype(jnp.float32), 0.0)
    entropy_L = jnp.where(mask_L, entropy_L.astype(jnp.float32), 0.0)
    if num_segments is None:
        count, nll, entropy = jnp.sum(mask_L, dtype=jnp.int32), jnp.sum(nll_L), jnp.sum(entropy_L)
    else:
        # [S, L] membership instead of a scatter: each segment is summed in the same order as an unpacked row, and a
        # NaN of one segment stays out of the others.
        member_SL = segment_L[None, :] == jnp.arange(1, num_segments + 1)[:, None]
        count = jnp.sum(member_SL & mask_L, axis=1, dtype=jnp.int32)
        nll = jnp.sum(jnp.where(member_SL, nll_L, 0.0), axis=1)
        entropy = jnp.sum(jnp.where(member_SL, entropy_L, 0.0), axis=1)
    # 0 / 0 is the NaN that an empty sample is documented to have.
    return EUScores(jnp.exp(nll / count), entropy / count, nll_L, entropy_L, count)


@functools.partial(jax.jit, static_argnums=(4,))
def _batch_scores(token_nll, token_entropy, mask, segment_ids, num_segments) -> EUScores:
    row = functools.partial(_row_scores, num_segments)
    return jax.vmap(row, in_axes=(0, 0, 0, None if segment_ids is None else 0))(token_nll, token_entropy, mask, segment_ids)


def sample_scores(
    token_nll: jax.Array,
    token_entropy: jax.Array,
    mask: jax.Array,
    segment_ids: jax.Array | None = None,
    num_segments: int | None = None,
) -> EUScores:
    """PPL = exp(mean nll) and Ent = mean H over each sample's targets (eq. 4 and 5), jit(vmap) over rows.

    Args:
      token_nll, token_entropy: float [B, L], nats; read only where mask is True.
      mask: bool [B, L], True on targets.
      segment_ids: int [B, L] of packed rows (0 padding, 1..S); None: a row is one sample.
      num_segments: S, static; needed under jit, otherwise the largest id in the batch.
    Returns: EUScores in float32; per-sample fields [B], or [B, S] with segments. count 0 gives NaN, NaN.
    Raises: QtjaxError if segment_ids is traced and num_segments is not given.
    """
    if segment_ids is None:
        num_segments = None
    elif num_segments is None:
        if isinstance(segment_ids, jax.core.Tracer):
            raise QtjaxError("num_segments = None: must be given when segment_ids is traced by jit; pass the packer's maximum")
        num_segments = max(1, int(np.max(segment_ids, initial=0)))
    return _batch_scores(token_nll, token_entropy, jnp.asarray(mask) != 0, segment_ids, num_segments)
