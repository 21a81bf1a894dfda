"""The decoder as pure functions of (config, params): what every other room calls."""

import re
from collections.abc import Callable
from functools import lru_cache, partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from qtjax.models.config import ModelConfig
from qtjax.models.decoder import Decoder
from qtjax.models.passes import row_of, segments, states, with_known
from qtjax.models.ratings import check_rater
from qtjax.models.virtual import check_task_ids
from qtjax.models.quantized import abstract_quantized, is_quantized_path, quantize_layers
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
    """The parameter tree as jax.ShapeDtypeStruct leaves; allocates nothing. Quantised kernels are records of such."""
    return _quantized(config, jax.tree.map(lambda leaf: leaf, _abstract(config)), abstract_quantized)


@lru_cache(maxsize=16)
def _abstract(config: ModelConfig) -> Tree:
    """Kept, since tracing the model takes a quarter of a second and starting a run asks eight times."""
    return jax.eval_shape(lambda key: _init(config, key), jax.ShapeDtypeStruct((2,), jnp.uint32))


def _quantized(config: ModelConfig, tree: Tree, quantize: Callable[[Any, str], Any]) -> Tree:
    if config.quantization is None:
        return tree
    leaves = flatten(tree)
    return unflatten(
        {path: quantize(leaf, config.quantization) if is_quantized_path(path) else leaf for path, leaf in leaves.items()}
    )


def init_params(config: ModelConfig, key: Array) -> Tree:
    """Random parameters: normal(initializer_range), norms one, biases zero; dtype config.param_dtype.

    With config.quantization kernels are drawn first and then packed.
    """
    return _initial(config, key)


@partial(jax.jit, static_argnums=0)
def _initial(config: ModelConfig, key: Array) -> Tree:
    return _quantized(config, _init(config, key), quantize_layers)


def logical_axes(config: ModelConfig) -> Tree:
    """A tree like the parameters' whose leaves are tuples of logical axis names, one per dimension.

    Of a quantised kernel those of the matrix that it stands for; `Quantized.axes` carries them over to its arrays.
    """
    paths = list(flatten(abstract_params(config)))
    rules = [rule for rule in _AXES if any(re.fullmatch(rule[0], p) for p in paths)]
    return unflatten(match_rules(paths, rules))


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
    outputs: Array | None = None,
) -> Array:
    """Hidden states after the final norm.

    Args:
      input_ids: int [B, L]. attention_mask: [B, L], 1 for real tokens. position_ids: int [B, L], default arange, in a packed
        row from each segment's first slot.
      segment_ids: int [B, L], 0 for padding; a token sees only its own nonzero segment.
      overlay: parameter-efficient overlay or None; task_ids: int [B] or [B, L] for overlays that choose by task.
      rng: key for what an overlay draws in training (dropout); None draws nothing.
      outputs: [N, B, L, D] in config.dtype, what each of the N layers gave for these tokens under these weights
        (`kept_hidden_states`, in whatever rows). The layers are then not run for their results, which are known, but in
        the backward pass alone, as with remat "full" (or "offload", where that is set); gradients are those of a pass of one's own.
    Virtual tokens of an overlay stand before the row once; every segment sees them, and its positions start after them
      (position_ids count without them).
    Returns: [B, L, D] in config.dtype; exactly zero, with zero gradient, at slots that hold nothing real. Raises
      QtjaxError for task_ids that do not fit the overlay, and for outputs of other shape or dtype, with rng, virtual tokens or
      an overlay of two passes; where task_ids are traced, the states of unknown tasks are NaN.
    """
    row = row_of(input_ids, attention_mask, position_ids, segment_ids, task_ids)._replace(outputs=outputs)
    if outputs is not None:
        config = with_known(config, row, rng)
    return states(config, params, row, overlay, rng)[0]


def kept_hidden_states(
    config: ModelConfig,
    params: Tree,
    input_ids: Array,
    attention_mask: Array | None = None,
    position_ids: Array | None = None,
    segment_ids: Array | None = None,
    overlay: Any = None,
    task_ids: Array | None = None,
) -> tuple[Array, Array]:
    """Hidden states, and what every layer gave on the way to them; arguments and errors as in `hidden_states`.

    Returns: hidden [B, L, D]; outputs [N, B, L, D] in config.dtype, of slots that hold nothing real too.
    """
    row = row_of(input_ids, attention_mask, position_ids, segment_ids, task_ids)
    return states(config, params, row._replace(keep=True), overlay)


def rated_hidden_states(
    config: ModelConfig,
    params: Tree,
    input_ids: Array,
    targets: Array,
    rater: str,
    attention_mask: Array | None = None,
    position_ids: Array | None = None,
    segment_ids: Array | None = None,
    overlay: Any = None,
    task_ids: Array | None = None,
) -> tuple[Array, Array]:
    """Hidden states, and how much attention each target gets from later targets of its segment, in one forward pass.

    With A[i, j] the attention weight of row i on slot j, averaged over heads, and `last` a segment's last target:
      "fastv" (after arXiv 2403.06764): rating_j = A[last, j] in the last layer.
      "sparsevlm" (after arXiv 2410.04417): rating_j = mean over the targets i > j of A[i, j] max(0, cos(x_i, x_j)), x the
        hidden states that enter the layer, averaged over the layers round(N d / 32), d = 2, 6, 15, counted from 0 (a layer
        that two depths share counts once).
    Both papers rate the image tokens of a prompt; that targets are rated by later targets is ours, since under a causal
    mask nothing else of a sample sees them. What the papers leave open is settled so: row i is the one at target i itself,
    not the one that predicts it; the last target, which no later row sees, is rated by its own row; a row whose sliding
    window does not reach j pays it 0 and counts as a row, so that "fastv" is 0 beyond the last row's window; prompt
    tokens and an overlay's virtual tokens take their part of the softmax and get no rating; a prompt that has a softmax of
    its own (LLaMA-Adapter) takes none.

    Args:
      targets: bool [B, L], whom to rate; every segment for itself. Those at slots that hold nothing real are left out.
      rater: one of RATERS. Others as in `hidden_states`.
    Returns: hidden [B, L, D] as `hidden_states` gives it (with config.attention "xla" to the bit, but for 16-bit unrolled
      layers, which XLA may round elsewhere when it fuses them otherwise); rating float32 [B, L], fractions 0 to 1, 0 where no target
      stands; without gradient; NaN where a traced task is unknown. Beside what the forward pass needs anyway at most
      [B, H, 64, S] weights are held at a time, in the layers that rate. Raises QtjaxError for an unknown rater, for
      targets that are not bool [B, L], and as `hidden_states` does.
    """
    targets = jnp.asarray(targets)
    check_rater(rater, targets, input_ids.shape)
    row = row_of(input_ids, attention_mask, position_ids, segment_ids, task_ids)
    return states(config, params, row._replace(targets=targets & (row.segment != 0), rater=rater), overlay)


def readout(
    config: ModelConfig,
    params: Tree,
    hidden: Array,
    overlay: Any = None,
    task_ids: Array | None = None,
    rng: Array | None = None,
) -> tuple[Array, Array, str]:
    """Hidden states and the vocabulary projection as it is stored, in config.dtype: logits are their product.

    A low-rank edit of the head makes both longer by R ([h, narrow(h)] and [W; up]): no full copy of its gradient.
    Returns: (hidden [..., D or D + R], kernel, layout): kernel [D, V] is "dv"; [V, D], "vd", for a tied embedding, since
      transposing it would copy it.
    """
    dtype = jnp.dtype(config.dtype)
    edit = None
    if overlay is not None:
        edit = overlay.expand(rng, task_ids).tree.get("lm_head", {}).get("edit")
    tied = config.tie_word_embeddings and (edit is None or edit.kernel is None)
    kernel, layout = (params["embed_tokens"]["embedding"], "vd") if tied else (params.get("lm_head", {}).get("kernel"), "dv")
    if edit is None:
        return hidden, kernel.astype(dtype), layout
    kernel = (kernel if edit.kernel is None else edit.kernel).astype(dtype)
    if edit.down is not None:
        axis = 0 if layout == "dv" else 1
        up = edit.up if edit.out is None else edit.up * edit.out
        hidden = jnp.concatenate([hidden, edit.narrow(hidden)], axis=-1)
        kernel = jnp.concatenate([kernel, (up if layout == "dv" else up.T).astype(dtype)], axis=axis)
    return hidden, kernel, layout


def logits(
    config: ModelConfig, params: Tree, hidden: Array, overlay: Any = None, task_ids: Array | None = None
) -> Array:
    """float32 logits [..., V] of hidden states [..., D]; arguments as in `hidden_states`."""
    hidden, kernel, layout = readout(config, params, hidden, overlay, task_ids)
    return jnp.matmul(hidden, kernel if layout == "dv" else kernel.T, preferred_element_type=jnp.float32)


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
    """Logits float32 [B, L, V], jitted; arguments as in `hidden_states`. No virtual tokens; zeros where nothing is real."""
    arrays = (input_ids, attention_mask, position_ids, segment_ids, task_ids)
    ids, mask, _, segment_ids, tasks = arrays = [x if x is None else jnp.asarray(x) for x in arrays]
    if overlay is not None and overlay.tasks:
        check_task_ids(overlay.tasks, tasks, ids.shape, segments(ids, mask, segment_ids) != 0)
    return _logits(config, params, overlay, *arrays)


@partial(jax.jit, static_argnames="config")
def _logits(config, params, overlay, input_ids, attention_mask, position_ids, segment_ids, task_ids):
    hidden = hidden_states(config, params, input_ids, attention_mask, position_ids, segment_ids, overlay, task_ids)
    return logits(config, params, hidden, overlay, task_ids)
