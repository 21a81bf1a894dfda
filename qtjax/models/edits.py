"""What an overlay may change inside the model, as plain records: at a dense product, a norm, attention, the embeddings.

Every record is a pytree. Under "layers/" its arrays carry the layer axis N in front, which the scan over layers
consumes; shapes below are those of one layer. A field that holds a function is a jax.tree_util.Partial of a
module-level function (the function is static, its arrays are leaves), evaluated inside the layer.
B batch, L length, D model, H heads, K kv heads, C head dim, R rank, P virtual tokens, G groups of them.
"""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from qtjax.errors import QtjaxError
from qtjax.models.config import ModelConfig
from qtjax.models.products import as_array, matmul, product, through
from qtjax.tree import Tree, flatten, unflatten

_record = partial(dataclass, frozen=True)


def _pytree(*static: str) -> Callable[[type], type]:
    """Registers a dataclass as a pytree whose fields other than `static` are children; None fields hold nothing."""

    def register(cls: type) -> type:
        data = [f.name for f in fields(cls) if f.name not in static]
        return jax.tree_util.register_dataclass(cls, data_fields=data, meta_fields=list(static))

    return register


@_pytree("dropout_rate", "undropped", "scales_bias")
@_record
class LinearEdit:
    """A dense product edited: W_eff = diag(pre) R W + down diag(mid) up diag(out) + kron + delta, columns times scale.

    y = scale * (rotation(pre * x) W + side(x)) + b + bias, then `after`. W [in, out] as the tree stores it.

    kernel [in, out]: stands in place of W. pre [in]. rotation: x -> x R, linear in x.
    down [in, R], up [R, out], mid [R] or [B, L, R], out [out]: the low-rank side path; dropout acts on its input.
    kron: (a [m, l], b [n, k]), the side path x kron(a, b) with in = m n and out = l k.
    path: x -> contribution to y, for side paths that depend on the token or the sample; it cannot be folded.
    delta: () -> [in, out], added to W; formed anew in the backward pass, never stored. thin: x -> x delta by a cheaper
    way, where there is one; delta is then formed for a merge alone.
    scale = post [out], times magnitude [out] / column norms of (W + down up), the norm without gradient (DoRA).
    here: bool [], False in layers where kernel and magnitude have no effect; None: they have in all.
    bias [out] is added to b; scales_bias: b is scaled too (IA3). after: y -> y (adapters behind the product).
    dropout_key: one key per layer, or None (no dropout). undropped: the last columns of down belong to the base, and
    dropout leaves their input alone.
    """

    down: Array | None = None
    up: Array | None = None
    mid: Array | None = None
    out: Array | None = None
    kron: tuple[Array, Array] | None = None
    path: Callable[[Array], Array] | None = None
    delta: Callable[[], Array] | None = None
    thin: Callable[[Array], Array] | None = None
    kernel: Array | None = None
    pre: Array | None = None
    rotation: Callable[[Array], Array] | None = None
    post: Array | None = None
    magnitude: Array | None = None
    here: Array | None = None
    bias: Array | None = None
    after: Callable[[Array], Array] | None = None
    dropout_key: Array | None = None
    dropout_rate: float = 0.0
    undropped: int = 0
    scales_bias: bool = False

    def __call__(self, x: Array, kernel: Any, bias: Array | None = None) -> Array:
        """The edited product of x [..., in] in x's dtype."""
        kernel = self.own_kernel(kernel)
        if self.magnitude is not None and self.drops:
            return self._dropped(x, kernel, bias)
        turned = self.turned(x)
        # Where delta meets the same input as W, one product serves both; but in 16 bits W + delta would round away
        # what is smaller than 2^-9 W, which is all of it when training begins.
        together = turned is x and x.dtype == jnp.float32 and self.thin is None
        y = product(turned, kernel, self.delta if together else None)
        if self.delta is not None and not together:
            y += (through(x, self.delta) if self.thin is None else self.thin(x)).astype(y.dtype)
        if self.has_side:
            y += self.side(x)
        return self._finished(y, self.scale(kernel), bias)

    def own_kernel(self, kernel: Any) -> Any:
        """What stands in the place of W."""
        if self.kernel is None:
            return kernel
        return self.kernel if self.here is None else jnp.where(self.here, self.kernel, as_array(kernel, self.kernel.dtype))

    def turned(self, x: Array) -> Array:
        """What W is applied to."""
        x = x if self.pre is None else x * self.pre.astype(x.dtype)
        return x if self.rotation is None else self.rotation(x).astype(x.dtype)

    def _dropped(self, x: Array, kernel: Any, bias: Array | None) -> Array:
        """With a magnitude, dropout acts on all that training changes, and so on W's input in (scale - 1) x W as well:
        y = base(x - x') + scale (base(x') + side(x')) with x' the dropped x, as in DoRA's own code and in PEFT.
        """
        dropped, still = self.drop(x), dataclasses.replace(self, dropout_key=None)
        y = product(self.turned(dropped), kernel, self.delta) + still.side(dropped)
        rest = product(self.turned(x - dropped), kernel, self.delta)
        if self.undropped:
            down, up = self.down[:, -self.undropped :], self.up[-self.undropped :]
            rest += matmul(matmul(x - dropped, down.astype(x.dtype)), up.astype(x.dtype))
        rest = rest if self.post is None else rest * self.post.astype(x.dtype)
        return still._finished(y, self.scale(kernel), bias, rest)

    def _finished(self, y: Array, scale: Array | None, bias: Array | None, rest: Array | None = None) -> Array:
        """scale y + rest + biases, then `after`."""
        if scale is not None and self.scales_bias and bias is not None:
            y, bias = y + bias.astype(y.dtype), None
        y = y if scale is None else y * scale.astype(y.dtype)
        for term in (rest, bias, self.bias):
            y = y if term is None else y + term.astype(y.dtype)
        return y if self.after is None else self.after(y).astype(y.dtype)

    @property
    def has_side(self) -> bool:
        return self.down is not None or self.kron is not None or self.path is not None

    @property
    def drops(self) -> bool:
        return self.dropout_key is not None and self.dropout_rate > 0

    def drop(self, x: Array) -> Array:
        """x after dropout."""
        if not self.drops:
            return x
        keep = jax.random.bernoulli(self.dropout_key, 1 - self.dropout_rate, x.shape)
        return jnp.where(keep, x / (1 - self.dropout_rate), 0).astype(x.dtype)

    def narrow(self, x: Array) -> Array:
        """The input of `up`: diag(mid) down x, after dropout. [..., R] in x's dtype."""
        down = self.down.astype(x.dtype)
        if self.drops and self.undropped:
            h = jnp.concatenate([matmul(self.drop(x), down[:, : -self.undropped]), matmul(x, down[:, -self.undropped :])], axis=-1)
        else:
            h = matmul(self.drop(x), down)
        return h if self.mid is None else h * self.mid.astype(x.dtype)

    def side(self, x: Array) -> Array:
        """The side paths' contribution to y, in x's dtype."""
        terms = []
        if self.down is not None:
            y = matmul(self.narrow(x), self.up.astype(x.dtype))
            terms.append(y if self.out is None else y * self.out.astype(x.dtype))
        if self.kron is not None:
            a, b = (factor.astype(x.dtype) for factor in self.kron)
            grid = x.reshape(*x.shape[:-1], a.shape[0], b.shape[0])
            y = jnp.einsum("...mk,ml->...lk", grid @ b, a)
            terms.append(y.reshape(*x.shape[:-1], a.shape[1] * b.shape[1]))
        if self.path is not None:
            terms.append(self.path(x).astype(x.dtype))
        return sum(terms[1:], terms[0])

    def scale(self, kernel: Any) -> Array | None:
        """The factor of every output [out], float32; None if there is none."""
        if self.magnitude is None:
            return self.post
        norm = jax.lax.stop_gradient(_column_norms(as_array(kernel, jnp.float32), self.down, self.up))
        factor = self.magnitude / norm
        factor = factor if self.here is None else jnp.where(self.here, factor, 1)
        return factor if self.post is None else factor * self.post

    def fold(self, kernel: Any, bias: Array | None) -> tuple[Array, Array | None]:
        """(kernel, bias) of one layer, float32, that compute the same without this edit."""
        exact = partial(jnp.matmul, precision=jax.lax.Precision.HIGHEST)
        own = as_array(self.own_kernel(kernel), jnp.float32)
        w = own
        if self.rotation is not None:
            w = exact(self.rotation(jnp.eye(w.shape[0], dtype=jnp.float32)), w)
        w = w if self.pre is None else self.pre.astype(jnp.float32)[:, None] * w
        if self.down is not None:
            down = self.down.astype(jnp.float32)
            delta = exact(down if self.mid is None else down * self.mid, self.up.astype(jnp.float32))
            w += (delta if self.out is None else delta * self.out).reshape(w.shape)  # one task: factors of one row
        w = w if self.kron is None else w + jnp.kron(*self.kron)
        w = w if self.delta is None else w + self.delta()
        scale = self.scale(own)
        bias = None if bias is None else bias.astype(jnp.float32)
        if scale is not None:
            w = w * scale
            bias = bias * scale if self.scales_bias and bias is not None else bias
        if self.bias is not None:
            bias = self.bias if bias is None else bias + self.bias
        return w, bias


@_pytree()
@_record
class NormEdit:
    """weight [D] stands in place of an RMS norm's scale; not in layers where `here` (bool []) is False."""

    weight: Array
    here: Array | None = None

    def of(self, base: Array) -> Array:
        """The scale that applies in this layer."""
        return self.weight if self.here is None else jnp.where(self.here, self.weight, base.astype(self.weight.dtype))


@_pytree()
@_record
class EmbeddingEdit:
    """table [V, D] in place of the embedding table, and down [V, R] up [R, D] added to it row by row."""

    table: Array | None = None
    down: Array | None = None
    up: Array | None = None


@_pytree("tanh")
@_record
class AttentionEdit:
    """Extra keys and values, or an extra output.

    prefix_k, prefix_v [P, K, C] (or [B, P, K, C]): before the row's own keys, without rotary positions; the model is told by
    `Edits.prefix`. prompt [P, D], gate [1] or [H]: heads attend to the prompt's keys and values as well, with a softmax
    of its own, times the gate (or its tanh), added before o_proj; where alone [] is 1 and not 0, o_proj takes it by
    itself, so that o_proj's bias is added again (PEFT's LLaMA-Adapter).
    """

    prefix_k: Array | None = None
    prefix_v: Array | None = None
    prompt: Array | None = None
    gate: Array | None = None
    alone: Array | None = None
    tanh: bool = False


@_pytree("prefix")
@_record
class Edits:
    """One overlay, expanded for one forward pass: what the model reads.

    tree: records by module path, {"layers": {"self_attn": {"q_proj": {"edit": LinearEdit}, "attention": AttentionEdit}}}.
    shared: the same paths; arrays that all layers share, without a layer axis, completing the records of `tree`.
    virtual: embeddings [G, P, D] before every row; a token sees those of its group (task). prefix: P of the attention edits.
    """

    tree: Tree
    shared: Tree = dataclasses.field(default_factory=dict)
    virtual: Array | None = None
    prefix: int = 0

    @property
    def ahead(self) -> int:
        """How many virtual tokens a token's positions start after."""
        return self.prefix if self.virtual is None else self.virtual.shape[1]


def expanded(config: ModelConfig, params: Tree, overlay: Any, rng: Array | None, task_ids: Array | None) -> Edits:
    """What `overlay` says about this model. Raises QtjaxError when it is for another base."""
    overlay.check_base(flatten(params))
    edits = overlay.expand(rng, task_ids)
    _check_edits(config, edits, overlay.method)
    return edits


def _check_edits(config: ModelConfig, edits: Edits, who: str) -> None:
    """Raises QtjaxError when an edit is made for a model with other layers, widths, heads or vocabulary than `config`."""
    layers, width = config.num_hidden_layers, config.hidden_size

    def fits(where: str, what: str, found: Any, expected: Any) -> None:
        if found != expected:
            raise QtjaxError(f"overlay: {who} has {what} {found} at {where}, the model has {expected}; it is for another base")

    for path, record in flatten(edits.tree).items():
        if path.startswith("layers/"):
            for array in jax.tree.leaves(record):
                fits(path, "layers", array.shape[0], layers)
        if isinstance(record, NormEdit):
            fits(path, "width", record.weight.shape[-1], width)
        if isinstance(record, AttentionEdit):
            if record.prefix_k is not None:
                fits(path, "heads and head_dim", record.prefix_k.shape[-2:], (config.num_key_value_heads, config.head_dim))
            if record.prompt is not None:
                fits(path, "width", record.prompt.shape[-1], width)
        if isinstance(record, EmbeddingEdit):
            if record.table is not None:
                fits(path, "vocabulary and width", record.table.shape, (config.vocab_size, width))
            if record.down is not None:
                fits(path, "vocabulary and width", (record.down.shape[0], record.up.shape[-1]), (config.vocab_size, width))
    if edits.virtual is not None:
        fits("its virtual tokens", "width", edits.virtual.shape[-1], width)


def combine(first: Any, second: Any, where: str = "") -> Any:
    """Two records of one place as one. Raises QtjaxError when both set the same field."""
    changes = {}
    for f in fields(second):
        current, value = getattr(first, f.name), getattr(second, f.name)
        if _unset(value, f.default):
            continue
        if not _unset(current, f.default):
            raise QtjaxError(f"{where}: two overlays both set {f.name!r} there; only one of them can")
        changes[f.name] = value
    return dataclasses.replace(first, **changes)


def _unset(value: Any, default: Any) -> bool:
    return value is None or (isinstance(value, (bool, int, float)) and value == default)


def combine_trees(first: Tree, second: Tree) -> Tree:
    """Edits of two overlays by path; records of the same place are combined."""
    flat = dict(flatten(first))
    for path, record in flatten(second).items():
        flat[path] = combine(flat[path], record, path) if path in flat else record
    return unflatten(flat)


def _column_norms(w: Array, down: Array, up: Array) -> Array:
    """Norms of the columns of w + down up, float32 [out], without forming the product."""
    down, up = down.astype(jnp.float32), up.astype(jnp.float32)
    square = jnp.sum(w * w, axis=0) + 2 * jnp.sum((down.T @ w) * up, axis=0) + jnp.sum(((down.T @ down) @ up) * up, axis=0)
    return jnp.sqrt(jnp.maximum(square, 0))
