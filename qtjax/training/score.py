"""EU scores of a model: hidden states (models) -> nll and entropy per target (scoring) -> statistics per sample.

R rows, B batch, L length, V vocab, D model, S segments.
"""

from collections.abc import Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import Mesh

from qtjax import models, scoring
from qtjax.models import ModelConfig
from qtjax.tree import Tree


def score_rows(
    config: ModelConfig,
    params: Tree,
    overlay: Any,
    rows: Mapping[str, Array],
    mesh: Mesh | None = None,
    task_ids: Array | None = None,
) -> tuple[Array, Array]:
    """nll and entropy of every target of some rows: the jit-able core of scoring and of held-out loss.

    A forward pass without [R, L, V]: the vocabulary projection runs on targets only (scoring.token_scores).

    Args:
      overlay: parameter-efficient overlay or None.
      rows: arrays [R, L]: `input_ids` int, `loss_mask` bool, and optionally `attention_mask`, `position_ids` (default
        as in `models.hidden_states`) and `segment_ids` (0 is padding). The hidden state at t-1 predicts the token at t.
      mesh: with a mesh, R must be a multiple of its data x fsdp devices; each scores its own rows.
    Returns: token_nll, token_entropy, float32 [R, L] in nats, at the TARGET position; 0 where it is no target:
      loss_mask False, padding, or the first token of a row or segment.
    """
    hidden = models.hidden_states(config, params, *_inputs(rows), overlay, task_ids)
    return _token_scores(config, params, overlay, rows, hidden, mesh, task_ids)


def rated_rows(
    config: ModelConfig,
    params: Tree,
    overlay: Any,
    rows: Mapping[str, Array],
    rater: str,
    mesh: Mesh | None = None,
    task_ids: Array | None = None,
) -> tuple[Array, Array, Array]:
    """`score_rows` and, in the same forward pass, what an attention-based rater gives every target.

    Args: rater: one of models.RATERS; others as in `score_rows`.
    Returns: token_nll, token_entropy as `score_rows`; rating float32 [R, L] at the same targets, 0 elsewhere
      (`models.rated_hidden_states`).
    """
    ids, *given = _inputs(rows)
    hidden, rating = models.rated_hidden_states(config, params, ids, _targets(rows), rater, *given, overlay, task_ids)
    return *_token_scores(config, params, overlay, rows, hidden, mesh, task_ids), rating


def kept_rows(
    config: ModelConfig,
    params: Tree,
    overlay: Any,
    rows: Mapping[str, Array],
    mesh: Mesh | None = None,
    task_ids: Array | None = None,
) -> tuple[Array, Array, Array]:
    """`score_rows`, whose arguments these are, and what every layer gave: outputs [N, R, L, D] (`models.kept_hidden_states`)."""
    hidden, outputs = models.kept_hidden_states(config, params, *_inputs(rows), overlay, task_ids)
    return *_token_scores(config, params, overlay, rows, hidden, mesh, task_ids), outputs


def _inputs(rows: Mapping[str, Array]) -> tuple[Array | None, ...]:
    """What the model reads, in its order."""
    return jnp.asarray(rows["input_ids"], jnp.int32), *map(rows.get, ("attention_mask", "position_ids", "segment_ids"))


def _targets(rows: Mapping[str, Array]) -> Array:
    return scoring.target_mask(rows["loss_mask"], rows.get("attention_mask"), rows.get("segment_ids"))


def _token_scores(
    config: ModelConfig,
    params: Tree,
    overlay: Any,
    rows: Mapping[str, Array],
    hidden: Array,
    mesh: Mesh | None,
    task_ids: Array | None,
) -> tuple[Array, Array]:
    ids, targets = jnp.asarray(rows["input_ids"], jnp.int32), _targets(rows)
    # Slot t-1 of `following` is slot t of `x`. Labels are moved to the hidden states and not the other way round, since
    # they are D times smaller; the wrapped last slot is never a target, because target_mask excludes slot 0.
    following = partial(jnp.roll, shift=-1, axis=1)
    hidden, kernel, layout = models.readout(config, params, hidden, overlay, task_ids)
    nll, entropy = scoring.token_scores(
        hidden.reshape(-1, hidden.shape[-1]),
        kernel,
        following(ids).reshape(-1),
        following(targets).reshape(-1),
        layout=layout,
        mesh=mesh,
    )
    return tuple(jnp.roll(scores.reshape(ids.shape), 1, axis=1) for scores in (nll, entropy))


@partial(jax.jit, static_argnames=("config", "num_segments", "mesh"))
def _eu_scores(config, params, overlay, rows, task_ids, num_segments, mesh):
    nll, entropy = score_rows(config, params, overlay, rows, mesh, task_ids)
    return scoring.sample_scores(nll, entropy, _targets(rows), rows.get("segment_ids"), num_segments)


def eu_scores(
    config: ModelConfig,
    params: Tree,
    input_ids: Array,
    loss_mask: Array,
    attention_mask: Array | None = None,
    position_ids: Array | None = None,
    segment_ids: Array | None = None,
    overlay: Any = None,
    task_ids: Array | None = None,
    *,
    num_segments: int | None = None,
    mesh: Mesh | None = None,
) -> scoring.EUScores:
    """Error and uncertainty of samples under the current model (Q-Tuning, arXiv 2509.23873, eq. 4 and 5), forward only.

    Args:
      input_ids: int [B, L], padded on either side. loss_mask: bool [B, L], True where the token is to be predicted.
      attention_mask: [B, L], 1 for real tokens. position_ids: int [B, L], default as in
        `models.hidden_states`.
      segment_ids: int [B, L], samples 1..S packed into a row, 0 for padding.
      overlay, task_ids: as in `models.hidden_states`.
      num_segments: S, static; default: the largest segment id, which needs concrete `segment_ids` (not under jit).
      mesh: devices that share the batch; B must be a multiple of data x fsdp.
    Returns: EUScores with float32 perplexity = exp(mean nll) and entropy = mean entropy (nats) [B], or [B, S] when
      `segment_ids` is given; token_nll and token_entropy [B, L] (nats) at the TARGET position, 0 where there is no
      target; count int32 [B] or [B, S]. A sample without targets has count 0, perplexity and entropy NaN. The first
      token of a row or segment is never a target.
    """
    if segment_ids is not None and num_segments is None and not isinstance(segment_ids, jax.core.Tracer):
        num_segments = max(int(np.max(np.asarray(segment_ids), initial=0)), 1)
    rows = {
        "input_ids": input_ids,
        "loss_mask": loss_mask,
        "attention_mask": attention_mask,
        "position_ids": position_ids,
        "segment_ids": segment_ids,
    }
    rows = {name: jnp.asarray(array) for name, array in rows.items() if array is not None}
    return _eu_scores(config, params, overlay, rows, task_ids, num_segments, mesh)
