"""Folding an overlay into the base weights: the same records that the forward pass applies, applied once and for all."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from qtjax import models
from qtjax.errors import QtjaxError
from qtjax.models.edits import EmbeddingEdit, LinearEdit, NormEdit, combine
from qtjax.models.products import as_array
from qtjax.overlays.base import Overlay, method_named
from qtjax.tree import Tree, flatten, unflatten

_ATTENTION, _MLP = ("q_proj", "k_proj", "v_proj", "o_proj"), ("gate_proj", "up_proj", "down_proj")


def merge(
    config: models.ModelConfig, params: Tree, overlay: Overlay, task_id: int | None = None
) -> tuple[models.ModelConfig, Tree]:
    """The model with the overlay folded into its weights, in float32, then cast to the leaf's dtype.

    Args: task_id: which task, for methods that choose by task.
    Returns: (config, params); a new tree that shares every leaf that is not edited, sharded as the given one. A quantised
      base comes back as arrays in config.param_dtype, with config.quantization None. The config changes where the merge needs it: biases that
      the base has not, a head no longer tied to an edited embedding.
    Dropout plays no part. Raises QtjaxError for a method whose effect is no weight, and for an overlay that does not
    fit the tree.
    """
    own = method_named(overlay.method)
    if own.unmergeable:
        raise QtjaxError(f"merge: {overlay.method} cannot be merged into weights: {own.unmergeable}")
    leaves = flatten(params)
    overlay.check_base(leaves, "merge")
    task_ids = None if task_id is None else jnp.asarray([task_id], jnp.int32)
    models.check_task_ids(overlay.tasks, task_ids, (1,))
    edits = overlay.expand(task_ids=task_ids)
    shared = flatten(edits.shared)
    records = {path: record for path, record in flatten(edits.tree).items() if path not in ("lm_head/edit", "embed_tokens/edit")}
    for path, record in records.items():
        module = path.rsplit("/", 1)[0]
        if isinstance(record, NormEdit):
            leaves[f"{module}/weight"] = _norm(record, module, leaves.get(f"{module}/weight"))
        elif isinstance(record, LinearEdit):
            _fold_layers(config, leaves, module, record, shared.get(path))
    for path, leaf in leaves.items():
        if isinstance(leaf, models.Quantized):
            leaves[path] = _unpack(leaf, config.param_dtype)
    config = _fold_ends(config.replace(quantization=None), leaves, edits.tree)
    return _with_biases(config, leaves), unflatten(leaves)


def _norm(record: NormEdit, module: str, leaf: Any) -> Array:
    """A norm's new scale [D], or [N, D] under the layers, in the leaf's dtype."""
    if leaf is None or leaf.shape != record.weight.shape:
        found = "does not exist" if leaf is None else f"is {tuple(leaf.shape)}"
        raise QtjaxError(
            f"merge: the overlay needs {module}/weight of shape {record.weight.shape}, which {found}; it is for another base"
        )
    return (record.of(leaf) if record.here is None else jax.vmap(NormEdit.of)(record, leaf)).astype(leaf.dtype)


def _fold_layers(config: models.ModelConfig, leaves: dict[str, Any], module: str, record: LinearEdit, shared: Any) -> None:
    kernel = leaves[f"{module}/kernel"]
    touches_bias = record.bias is not None or record.scales_bias
    bias = leaves.get(f"{module}/bias") if touches_bias else None
    dtype = config.param_dtype if hasattr(kernel, "dequantize") else kernel.dtype

    def one(layer: tuple[Any, Any, LinearEdit]) -> tuple[Array, Array | None]:
        w, b, edit = layer
        w, b = (edit if shared is None else combine(edit, shared, module)).fold(w, b)
        return w.astype(dtype), None if b is None else b.astype(dtype)

    def fold(*layers: Any) -> tuple[Array, Array | None]:  # one layer at a time: float32 exists for a single layer only
        return jax.lax.map(one, layers)

    concrete = isinstance(kernel, jax.Array) and not isinstance(kernel, jax.core.Tracer)
    sharding = (kernel.sharding, None) if concrete else None
    kernel, bias = (jax.jit(fold, out_shardings=sharding) if concrete else fold)(kernel, bias, record)
    leaves[f"{module}/kernel"] = kernel
    if bias is not None:
        leaves[f"{module}/bias"] = bias


@partial(jax.jit, static_argnames="dtype")
def _unpack(leaf: models.Quantized, dtype: str) -> Array:
    return jax.lax.map(lambda layer: layer.dequantize(dtype), leaf)


def _fold_ends(config: models.ModelConfig, leaves: dict[str, Any], tree: Tree) -> models.ModelConfig:
    """Embedding and head; a tied head that no longer equals the embedding gets a kernel of its own."""
    embed: EmbeddingEdit | None = tree.get("embed_tokens", {}).get("edit")
    head: LinearEdit | None = tree.get("lm_head", {}).get("edit")
    if embed is None and head is None:
        return config
    table = leaves["embed_tokens/embedding"]
    kernel = table.T if config.tie_word_embeddings else leaves["lm_head/kernel"]
    if embed is not None:
        own = as_array(table if embed.table is None else embed.table, jnp.float32)
        if embed.down is not None:
            own = own + jnp.matmul(embed.down, embed.up, precision=jax.lax.Precision.HIGHEST)
        leaves["embed_tokens/embedding"] = own.astype(table.dtype)
    if head is not None:
        kernel = head.fold(kernel, None)[0].astype(table.dtype)
    leaves["lm_head/kernel"] = kernel
    return config.replace(tie_word_embeddings=False)


def _with_biases(config: models.ModelConfig, leaves: dict[str, Any]) -> models.ModelConfig:
    """Where some products have gained a bias, the config says so and the others of their kind get zeros."""
    for room, names, field in (("self_attn", _ATTENTION, "attention_bias"), ("mlp", _MLP, "mlp_bias")):
        paths = {name: f"layers/{room}/{name}" for name in names}
        if getattr(config, field) or not any(f"{path}/bias" in leaves for path in paths.values()):
            continue
        if config.model_type != "llama":
            if config.sliding_window is not None:
                raise QtjaxError(
                    f"merge: the overlay adds biases and a {config.model_type} checkpoint has no place for them; keep the adapter"
                    " beside the base instead"
                )
            config = config.replace(model_type="llama")  # without a window the two are the same function
        for path in paths.values():
            kernel = leaves[f"{path}/kernel"]
            leaves.setdefault(f"{path}/bias", jnp.zeros((kernel.shape[0], kernel.shape[2]), config.param_dtype))
        config = config.replace(**{field: True})
    return config
