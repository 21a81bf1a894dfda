"""DiffPruning (Guo, Rush, Kim 2021, arXiv 2012.07463): y = x (W + z g D), D trained, the gates z and g driven to zero.

Every value of D [in, out] has a gate with a parameter alpha, every matrix one more, g: a hard concrete variable stretched
over [0, 1], z = clip(sigmoid(log u - log(1 - u) + alpha) (upper - lower) + lower, 0, 1), u uniform in training and 1/2, no
noise, otherwise. The loss gains sparsity_weight times the expected number of open gates, sum sigmoid(alpha -
log(-lower / upper)), over values and matrices alike. As in the authors' code: alpha starts at 5 (open), learns faster than
D, and after a part of the training the difference is projected: the kept_fraction of its values with the largest |z g D|
over all matrices stays, and from then on only those values are trained.
Ours: the projected values are z g D, so that the function is continuous there (the authors start again from D or from 0);
exactly the stated number stays, ties by order in the model; a closed value does not open again. The projection writes
+-PINNED into alpha, at which every gate is exactly 1 or 0 whatever the noise, so that a saved overlay knows its support.
total_step = 0 leaves the schedule to the run, which knows its length; `after_step` refuses it.
Not in PEFT: our own file of trainables, and `sparse_delta`, the few values by which the model differs.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.tree_util import Partial

from qtjax.errors import QtjaxError
from qtjax.models import Edits, LinearEdit
from qtjax.overlays.base import Base, Context, Method, Overlay
from qtjax.overlays.fields import Targeted, read_fields, require, setting, to_peft
from qtjax.overlays.leaves import Leaf, filled, transposed, zeros
from qtjax.overlays.sites import Spec, claims, layer_keys, linears_of, needs, resolve_sites
from qtjax.overlays.targets import Names
from qtjax.tree import Tree, flatten, unflatten

PINNED = 50.0  # sigmoid(50 +- 9.2) is 1 in float32 and sigmoid(-50 +- 9.2) below 1e-17, 9.2 being the largest noise
_NOISE = 1e-4  # u stays this far from 0 and 1, as in the authors' code
_PARTS = ("delta", "alpha", "alpha_group")


@dataclass(frozen=True)
class DiffPruneFields(Targeted):
    """target_modules: few by default; two trained values for each weight are too much for all (7B: 13 G, 207 GB with Adam).

    kept_fraction: of all values of the targets, the fraction that differs from the base after the projection (0.005: one in
    200). project_at: when that happens, as a fraction of total_step, the optimizer steps of the run. sparsity_weight: nats
    for each gate that is expected open, a sum over all of them, so that it goes down as targets grow; 0 leaves all to the
    projection. lower < 0 and upper > 1: the stretch of the gates. alpha_init: alpha at the start. alpha_rate: learning rate
    of alpha over that of delta (the authors' 0.1 at a rate of 1e-4): lower it where the learning rate is higher, since steps of
    1 and more close every gate before any difference has grown.
    """

    target_modules: Names = setting(("q_proj", "v_proj"), "targets")
    kept_fraction: float = setting(0.005, "(0,1]")
    project_at: float = setting(0.5, "(0,1]")
    total_step: int = setting(0, "int>=0")
    sparsity_weight: float = setting(1.25e-7, "number>=0")
    lower: float = setting(-1.5, "number")
    upper: float = setting(1.5, "number>0")
    alpha_init: float = setting(5.0, "number")
    alpha_rate: float = setting(1000.0, "number>0")


@dataclass(frozen=True)
class Gate:
    """The difference z g D of one matrix, float32; compared by value, so that compiled programs are found again."""

    lower: float
    upper: float

    def __call__(self, delta: Array, alpha: Array, group: Array, key: Array | None = None) -> Array:
        """delta, alpha [in, out], group [1]; key: of the noise, or None. Without a key also for stacks [N, ...]."""
        own, whole = (None, None) if key is None else jax.random.split(key)
        wide = group.reshape(*group.shape[:-1], *[1] * (delta.ndim - group.ndim + 1))
        return self.opened(alpha, own) * self.opened(wide, whole) * delta

    def opened(self, alpha: Array, key: Array | None) -> Array:
        """z, from 0 to 1, in alpha's shape."""
        if key is not None:
            u = jax.random.uniform(key, alpha.shape, jnp.float32, _NOISE, 1 - _NOISE)
            alpha = alpha + jnp.log(u) - jnp.log1p(-u)
        return jnp.clip(jax.nn.sigmoid(alpha) * (self.upper - self.lower) + self.lower, 0, 1)


def _read(base: Base, fields: Mapping[str, Any], strict: bool) -> Spec:
    if not strict:
        needs(fields, "target_modules", "lower", "upper", method="DiffPruning")
    f = read_fields("diffprune", DiffPruneFields, fields, base.linears)
    require(f.lower < 0, "lower", f.lower, "must be below 0, or no gate ever closes")
    require(f.upper > 1, "upper", f.upper, "must be above 1, or no gate is ever fully open")
    require(f.alpha_init <= 20, "alpha_init", f.alpha_init, f"must be at most 20; {PINNED:g} marks a gate that is fixed")
    return Spec(f, resolve_sites(base, f, strict))


def _leaves(spec: Spec) -> list[Leaf]:
    """delta and alpha [in, out], alpha_group [1]; in the file "model.layers.0.self_attn.q_proj.weight.delta" [out, in]."""
    leaves, start = [], filled(spec.fields.alpha_init)
    for site in spec.sites:
        shape = (site.linear.inputs, site.linear.outputs)
        for name, own, axes, init, layout in (
            ("delta", shape, ("in", "out"), zeros, transposed()),
            ("alpha", shape, ("in", "out"), start, transposed()),
            ("alpha_group", (1,), (None,), start, {}),
        ):
            keys = tuple(f"{site.linear.module(n)}.weight.{name}" if hit else None for n, hit in enumerate(site.hits))
            shapes = tuple(own if hit else None for hit in site.hits)
            leaves.append(Leaf(f"{site.linear.path}/{name}", shapes, axes, keys, init, site.linear.path, **layout))
    return leaves


def _gate(spec: Spec) -> Gate:
    return Gate(spec.fields.lower, spec.fields.upper)


def _expand(spec: Spec, params: Tree, frozen: Tree, context: Context) -> Edits:
    del frozen
    flat, edits, gate = flatten(params), {}, _gate(spec)
    for linear in spec.linears:
        parts = [flat[f"{linear.path}/{name}"] for name in _PARTS]
        if context.rng is not None:
            parts.append(layer_keys(context.rng, linear))
        edits[f"{linear.path}/edit"] = LinearEdit(delta=Partial(gate, *parts))
    return Edits(unflatten(edits))


def _penalty(spec: Spec, params: Tree) -> Array:
    """sparsity_weight times the expected number of open gates, of values and of matrices; a constant once they are fixed."""
    f, flat, total = spec.fields, flatten(params), jnp.float32(0)
    for site in spec.sites:
        for name in ("alpha", "alpha_group"):
            alpha = flat[f"{site.linear.path}/{name}"]
            real = np.array(site.hits).reshape(-1, *[1] * (alpha.ndim - 1))
            total += jnp.sum(jnp.where(real, jax.nn.sigmoid(alpha - np.log(-f.lower / f.upper)), 0))
    return f.sparsity_weight * total


def _after_step(spec: Spec, params: Tree, state: Tree, gradients: Tree | None, step: Array) -> tuple[Tree, Tree]:
    """The projection at step project_at * total_step (or the first one after it), and after it the support held fast."""
    del gradients
    f = spec.fields
    require(f.total_step > 0, "total_step", 0, "the projection needs the number of optimizer steps; set total_step")
    fixed = state["fixed"]
    projects = (jnp.asarray(step) >= max(1, round(f.project_at * f.total_step))) & ~fixed
    params = jax.lax.cond(projects, lambda p: _projected(spec, p), lambda p: p, params)
    fixed = fixed | projects
    return jax.lax.cond(fixed, lambda p: _held(spec, p), lambda p: p, params), {"fixed": fixed}


def _state(spec: Spec, params: Tree) -> Tree:
    """Whether the projection was done, bool []: then, and never by training, every alpha is exactly +-PINNED."""
    flat = flatten(params)
    gates = [flat[f"{site.linear.path}/{name}"][np.flatnonzero(site.hits)] for site in spec.sites for name in _PARTS[1:]]
    return {"fixed": jnp.all(jnp.stack([jnp.all(jnp.abs(alpha) == PINNED) for alpha in gates]))}


def _held(spec: Spec, params: Tree) -> Tree:
    """alpha back at +-PINNED and delta zero off the support: what the optimizer's momentum has moved."""
    flat = dict(flatten(params))
    for site in spec.sites:
        delta, alpha, group = (f"{site.linear.path}/{name}" for name in _PARTS)
        stays, real = flat[alpha] > 0, np.array(site.hits)[:, None]
        flat[delta] = jnp.where(stays, flat[delta], 0)
        flat[alpha] = jnp.where(real[:, None], jnp.where(stays, PINNED, -PINNED), 0)
        flat[group] = jnp.where(real, PINNED, jnp.zeros_like(flat[group]))
    return unflatten(flat)


def _projected(spec: Spec, params: Tree) -> Tree:
    """delta as z g D where it is among the largest, and alpha the sign of that choice."""
    flat = dict(flatten(params))
    gated = [_gate(spec)(*(flat[f"{linear.path}/{name}"] for name in _PARTS)) for linear in spec.linears]
    count = sum(leaf.size for leaf in _leaves(spec) if leaf.path.endswith("/delta"))
    kept = largest(gated, max(1, round(spec.fields.kept_fraction * count)))
    for linear, value, stays in zip(spec.linears, gated, kept):
        flat[f"{linear.path}/delta"] = jnp.where(stays, value, 0)
        flat[f"{linear.path}/alpha"] = jnp.where(stays, 1.0, -1.0)
    return unflatten(flat)


def largest(values: Sequence[Array], count: int) -> list[Array]:
    """bool arrays: the `count` float32 values of largest magnitude in all arrays, ties by order; zeros are never among them.

    Without a sort: the count-th largest is found bit by bit, since floats of one sign are ordered as their bits are. It
    needs no array of all values and no order of a sharded one. Raises QtjaxError beyond 2^31 - 1 values.
    """
    total = sum(value.size for value in values)
    if total >= 2**31:
        raise QtjaxError(f"target_modules: {total} values are more than can be ranked (2^31 - 1); name fewer targets")
    bits = [jax.lax.bitcast_convert_type(jnp.abs(value), jnp.int32) for value in values]

    def refine(i: Array, known: Array) -> Array:
        more = known | (jnp.int32(1) << (30 - i))
        return jnp.where(sum(jnp.sum(b >= more) for b in bits) >= count, more, known)

    last = jax.lax.fori_loop(0, 31, refine, jnp.int32(0))
    room, kept = count - sum(jnp.sum(b > last) for b in bits), []
    for b in bits:
        ties = b == last
        order = jnp.cumsum(ties.ravel()).reshape(ties.shape)
        kept.append(((b > last) | (ties & (order <= room))) & (b > 0))
        room = room - jnp.sum(ties)
    return kept


def sparse_delta(overlay: Overlay) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """The values by which the merged model differs from the base, on the host.

    Returns: {"model.layers.0.self_attn.q_proj.weight": (indices int32 [2, n], values float32 [n]), ...} for every edited
      matrix: row (out) and column (in) of torch's layout in row order, as torch.sparse_coo_tensor takes them. Before the
      projection all open gates are in it. checkpoints.save_sparse_delta writes it.
    Raises QtjaxError for an overlay of another method.
    """
    require(overlay.method == "diffprune", "method", overlay.method, "has no sparse difference; only diffprune has")
    flat, gate, out = flatten(overlay.params), _gate(overlay.spec), {}
    for site in overlay.spec.sites:
        parts = [flat[f"{site.linear.path}/{name}"] for name in _PARTS]
        for n in np.flatnonzero(site.hits):
            matrix = np.asarray(gate(*(jnp.asarray(part[n]) for part in parts))).T
            rows, columns = np.nonzero(matrix)
            out[f"{site.linear.module(n)}.weight"] = (np.stack([rows, columns]).astype(np.int32), matrix[rows, columns])
    return out


def is_projected(overlay: Overlay) -> bool:
    """Whether a diffprune overlay has been projected, so that `sparse_delta` is as sparse as kept_fraction says."""
    return bool(_state(overlay.spec, overlay.params)["fixed"])


METHOD = Method(
    fields=DiffPruneFields,
    read=_read,
    leaves=_leaves,
    expand=_expand,
    to_peft=lambda spec: {"peft_type": "QTJAX_DIFFPRUNE", **to_peft(spec.fields)},
    claims=claims("QTJAX_DIFFPRUNE"),
    linears=linears_of,
    draws=lambda spec: True,
    penalty=_penalty,
    state=_state,
    after_step=_after_step,
    rates=lambda spec: {"alpha": spec.fields.alpha_rate, "alpha_group": spec.fields.alpha_rate},
    in_peft=False,
)
