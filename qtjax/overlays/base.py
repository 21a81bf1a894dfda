"""Overlays: parameter-efficient fine-tuning as a tree laid over the model's parameter tree, which it never changes.

An overlay is (static spec, trainable tree, frozen tree). A method is one file with a `Method` record of functions and
one line of registration; nothing outside that file asks which method it is. The model sees only `Overlay.sites`:
edits by module path.
"""

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from qtjax import models
from qtjax.errors import QtjaxError, near_names
from qtjax.tree import Tree, flatten, unflatten


@dataclass(frozen=True, eq=False)
class Overlay:
    """A trained or trainable overlay; a pytree whose leaves are `params` and `frozen`, so jit, grad, optax and
    device_put take it as it is.

    method: the registered name; spec: the method's hashable settings (both static).
    params: the trainable tree, nested by module path with all layers stacked on axis 0. frozen: arrays that the method
    needs and does not train.
    """

    method: str
    spec: Any
    params: Tree
    frozen: Tree

    def sites(self, rng: Array | None = None) -> Tree:
        """What the model applies: {"layers": {"self_attn": {"q_proj": {"edit": LinearEdit}, ...}}}.

        rng: a key for what the method draws in training (dropout); None draws nothing. Frozen arrays get no gradient.
        """
        return METHODS[self.method].sites(self.spec, self.params, jax.lax.stop_gradient(self.frozen), rng)

    def replace(self, **changes: Any) -> "Overlay":
        """A copy with other `params` (or another field): `overlay.replace(params=new)`."""
        return dataclasses.replace(self, **changes)

    @property
    def draws(self) -> bool:
        """Whether a training step needs a key for `sites` (dropout)."""
        return METHODS[self.method].draws(self.spec)

    @property
    def trainable_count(self) -> int:
        """Number of trained values, as PEFT counts them: padding of unequal ranks and of unedited layers left out."""
        return METHODS[self.method].count(self.spec)


jax.tree_util.register_dataclass(Overlay, data_fields=["params", "frozen"], meta_fields=["method", "spec"])


@dataclass(frozen=True)
class Method:
    """One method's functions. `spec` is its frozen settings; `base` the base parameter tree, used for shapes only.

    init(base, key, fields) -> (spec, params, frozen): `fields` by PEFT's names; must be traceable.
    sites(spec, params, frozen, rng) -> what `Overlay.sites` returns.
    axes(spec, base_axes) -> (params axes, frozen axes): tuples of logical axis names in the shape of the two trees,
      given the base leaves' axes by path.
    count(spec) -> trained values.
    abstract(spec) -> (params, frozen) as jax.ShapeDtypeStruct leaves.
    claims(peft_config) -> whether this method reads that adapter_config.json.
    from_peft(base, peft_config) -> spec; to_peft(spec) -> the method's own fields of adapter_config.json.
    tensors(spec, params, frozen) -> {PEFT key: array}: slices and transposes only, on numpy and traced arrays alike.
    trees(spec, tensors) -> (params, frozen): its inverse.
    unmergeable: why `merge` is impossible; empty when it is possible.
    draws(spec) -> whether training draws random numbers (dropout), so that `sites` needs a key.
    """

    init: Callable[[Tree, Array, Mapping[str, Any]], tuple[Any, Tree, Tree]]
    sites: Callable[[Any, Tree, Tree, Array | None], Tree]
    axes: Callable[[Any, Mapping[str, tuple]], tuple[Tree, Tree]]
    count: Callable[[Any], int]
    abstract: Callable[[Any], tuple[Tree, Tree]]
    claims: Callable[[Mapping[str, Any]], bool]
    from_peft: Callable[[Tree, Mapping[str, Any]], Any]
    to_peft: Callable[[Any], dict[str, Any]]
    tensors: Callable[[Any, Tree, Tree], dict[str, Any]]
    trees: Callable[[Any, Mapping[str, Any]], tuple[Tree, Tree]]
    unmergeable: str = ""
    draws: Callable[[Any], bool] = lambda spec: False


METHODS: dict[str, Method] = {}


def register(name: str, method: Method) -> None:
    """Makes a method known by its name in configs, `init_overlay` and adapter folders."""
    assert name not in METHODS, f"the overlay method {name!r} is registered twice"
    METHODS[name] = method


def init_overlay(
    method: str, config: models.ModelConfig, params: Tree | None, key: Array, **fields: Any
) -> Overlay:
    """A fresh overlay that leaves the model's function unchanged.

    Args:
      method: "lora".
      config, params: the base model; only shapes are used, so `params` may be abstract or None.
      key: a jax.random key, typed or raw. Each module's draw depends on the key and its path, not on the other targets.
      fields: the method's settings by PEFT's names; for lora r=8, lora_alpha=16, target_modules="all-linear",
        lora_dropout=0.0, use_rslora=False, rank_pattern, alpha_pattern, layers_to_transform, exclude_modules,
        init_lora_weights=True or "gaussian".
    Returns: an Overlay with float32 trainables. Traceable: under jit with out_shardings it is born sharded, under
      jax.eval_shape it costs nothing.
    Raises QtjaxError for an unknown method or field, an unsupported value, targets that match nothing.
    """
    if method not in METHODS:
        raise QtjaxError(
            f"overlay method {method!r}: not known{near_names(str(method), METHODS)}; known: {', '.join(METHODS)}"
        )
    base = models.abstract_params(config) if params is None else params
    spec, trainable, frozen = METHODS[method].init(base, key, fields)
    return Overlay(method, spec, trainable, frozen)


def overlay_axes(overlay: Overlay, config: models.ModelConfig) -> Overlay:
    """The logical axis names of every array in the overlay, derived from those of its base leaf.

    Returns: an Overlay whose leaves are tuples of axis names ("layers", "embed", None), one per dimension; map them to
      shardings with is_leaf=lambda x: isinstance(x, tuple) and the result fits jit and device_put for the overlay.
    """
    params, frozen = METHODS[overlay.method].axes(overlay.spec, flatten(models.logical_axes(config)))
    return overlay.replace(params=params, frozen=frozen)


def merge(config: models.ModelConfig, params: Tree, overlay: Overlay) -> tuple[models.ModelConfig, Tree]:
    """The model with the overlay folded into its weights: W + down up in float32, then cast to the leaf's dtype.

    Returns: (config, params); a new tree that shares every leaf that is not edited, sharded as the given one.
    Dropout plays no part. Raises QtjaxError for a method whose effect is no weight, and for an overlay that does not
    fit the tree.
    """
    if METHODS[overlay.method].unmergeable:
        raise QtjaxError(f"merge: {overlay.method} cannot be merged into weights: {METHODS[overlay.method].unmergeable}")
    leaves = flatten(params)
    for site, edit in flatten(overlay.sites()).items():
        path = site.removesuffix("/edit") + "/kernel"
        expected = (edit.down.shape[0], edit.down.shape[1], edit.up.shape[2])
        if path not in leaves or tuple(leaves[path].shape) != expected:
            found = f"is {tuple(leaves[path].shape)}" if path in leaves else "does not exist"
            raise QtjaxError(f"merge: the overlay needs {path} of shape {expected}, which {found}; it is for another base")
        leaf = leaves[path]
        sharding = leaf.sharding if isinstance(leaf, jax.Array) and not isinstance(leaf, jax.core.Tracer) else None
        fold = jax.jit(_fold, out_shardings=sharding) if sharding is not None else _fold
        leaves[path] = fold(leaf, edit.down, edit.up)
    return config, unflatten(leaves)


def _fold(kernel: Array, down: Array, up: Array) -> Array:
    """[N, in, out] + [N, in, R] [N, R, out], one layer at a time, so that float32 exists for a single layer only."""

    def one(layer: tuple[Array, Array, Array]) -> Array:
        w, a, b = layer
        delta = jnp.matmul(a.astype(jnp.float32), b.astype(jnp.float32), precision=jax.lax.Precision.HIGHEST)
        return (w.astype(jnp.float32) + delta).astype(w.dtype)

    return jax.lax.map(one, (kernel, down, up))
