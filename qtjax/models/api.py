"""The decoder as pure functions of (config, params): what every other room calls."""

import re
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from qtjax.models.attention import visible
from qtjax.models.config import ModelConfig
from qtjax.models.decoder import Decoder
from qtjax.tree import Tree, flatten, match_rules, unflatten

# Which logical axis each dimension of a leaf is; parallel/sharding.py maps these names to mesh axes.
_AXES: tuple[tuple[str, tuple[str | None, ...]], ...] = (
    ("embed_tokens/embedding", ("vocab", "embed")),
    ("lm_head/kernel", ("embed", "vocab")),
    ("norm/weight", (None,)),
    ("layers/.*layernorm/weight", ("layers", None)),
    ("layers/self_attn/q_proj/kernel", ("layers", "embed", "heads")),
    ("layers/self_attn/[kv]_proj/kernel", ("layers", "embed", "kv_heads")),
    ("layers/self_attn/o_proj/kernel", ("layers", "heads", "embed")),
    ("layers/mlp/(gate|up)_proj/kernel", ("layers", "embed", "mlp")),
    ("layers/mlp/down_proj/kernel", ("layers", "mlp", "embed")),
    ("layers/self_attn/q_proj/bias", ("layers", "heads")),
    ("layers/self_attn/[kv]_proj/bias", ("layers", "kv_heads")),
    ("layers/mlp/(gate|up)_proj/bias", ("layers", "mlp")),
    ("layers/(self_attn/o|mlp/down)_proj/bias", ("layers", None)),
)


def _init(config: ModelConfig, key: Array) -> Tree:
    ids = jnp.zeros((1, 1), jnp.int32)
    return Decoder(config).init(key, ids, ids, jnp.ones((1, 1, 1, 1), bool))["params"]


def abstract_params(config: ModelConfig) -> Tree:
    """The parameter tree as jax.ShapeDtypeStruct leaves; allocates nothing."""
    return jax.eval_shape(lambda key: _init(config, key), jax.ShapeDtypeStruct((2,), jnp.uint32))


def init_params(config: ModelConfig, key: Array) -> Tree:
    """Random parameters: normal(initializer_range), norms one, biases zero; dtype config.param_dtype."""
    return jax.jit(_init, static_argnums=0)(config, key)


def logical_axes(config: ModelConfig) -> Tree:
    """A tree like the parameters' whose leaves are tuples of logical axis names, one per dimension."""
    paths = list(flatten(abstract_params(config)))
    rules = [rule for rule in _AXES if any(re.fullmatch(rule[0], p) for p in paths)]
    return unflatten(match_rules(paths, rules))


def _variables(params: Tree, overlay: Any, rng: Array | None) -> dict[str, Tree]:
    variables = {"params": params}
    if overlay is not None:
        variables["overlay"] = overlay.sites(rng)
    return variables


def segments(input_ids: Array, attention_mask: Array | None, segment_ids: Array | None) -> Array:
    """int32 [B, L]: the segment of every slot, 0 where nothing real stands."""
    own = jnp.ones(input_ids.shape, jnp.int32) if segment_ids is None else segment_ids.astype(jnp.int32)
    return own if attention_mask is None else jnp.where(attention_mask != 0, own, 0)


def hidden_states(
    config: ModelConfig,
    params: Tree,
    input_ids: Array,
    attention_mask: Array | None = None,
    position_ids: Array | None = None,
    segment_ids: Array | None = None,
    overlay: Any = None,
    task_ids: Array | None = None,
    rng: Array | None = None,
) -> Array:
    """Hidden states after the final norm.

    Args:
      input_ids: int [B, L]. attention_mask: [B, L], 1 for real tokens. position_ids: int [B, L], default arange.
      segment_ids: int [B, L], 0 for padding; a token sees only its own nonzero segment.
      overlay: parameter-efficient overlay or None; task_ids: int [B] for overlays that choose by task.
      rng: key for an overlay's dropout; None means none.
    Returns: [B, L, D] in config.dtype; exactly zero, with zero gradient, at slots that hold nothing real.
    """
    del task_ids  # no overlay method of today chooses by task
    length = input_ids.shape[1]
    segment = segments(input_ids, attention_mask, segment_ids)
    if position_ids is None:
        position_ids = jnp.broadcast_to(jnp.arange(length, dtype=jnp.int32), input_ids.shape)
    slots = jnp.arange(length)
    mask = visible(slots, slots, segment, segment, config.sliding_window)
    hidden, _ = Decoder(config).apply(_variables(params, overlay, rng), input_ids, position_ids, mask)
    return jnp.where((segment != 0)[..., None], hidden, 0)


def head(config: ModelConfig, params: Tree, overlay: Any = None) -> tuple[Array, str]:
    """The vocabulary projection as it is stored, in config.dtype, and its layout for `scoring`.

    Returns: ([D, V], "dv"), or ([V, D], "vd") for a tied embedding: transposing it would copy it.
    """
    del overlay  # today's methods leave the head alone
    tied = config.tie_word_embeddings
    kernel = params["embed_tokens"]["embedding"] if tied else params["lm_head"]["kernel"]
    return kernel.astype(jnp.dtype(config.dtype)), "vd" if tied else "dv"


def head_kernel(config: ModelConfig, params: Tree, overlay: Any = None) -> Array:
    """The vocabulary projection [D, V] in config.dtype, for a plain product with hidden states."""
    kernel, layout = head(config, params, overlay)
    return kernel if layout == "dv" else kernel.T


def apply(
    config: ModelConfig,
    params: Tree,
    input_ids: Array,
    attention_mask: Array | None = None,
    position_ids: Array | None = None,
    segment_ids: Array | None = None,
    overlay: Any = None,
    task_ids: Array | None = None,
) -> Array:
    """Logits float32 [B, L, V], jitted; arguments as in `hidden_states`. Slots that hold nothing real give zero logits."""
    arrays = (input_ids, attention_mask, position_ids, segment_ids, task_ids)
    return _logits(config, params, overlay, *(x if x is None else jnp.asarray(x) for x in arrays))


@partial(jax.jit, static_argnames="config")
def _logits(config, params, overlay, input_ids, attention_mask, position_ids, segment_ids, task_ids):
    hidden = hidden_states(config, params, input_ids, attention_mask, position_ids, segment_ids, overlay, task_ids)
    return jnp.matmul(hidden, head_kernel(config, params, overlay), preferred_element_type=jnp.float32)
