"""Polytropon (Ponti et al. 2022, arXiv 2202.13914) and multi-head routing (Caccia et al. 2022, arXiv 2211.03831).

n_skills low-rank adapters in each module, mixed by task: with z = sigmoid(logits[task]) [q, s], normalised over the
skills s, A_t = sum_s z_s A_s and B_t likewise in each of the n_splits blocks q of the inputs and outputs, and
y = x W + x A_t B_t / r. In training z is drawn from a relaxed Bernoulli of temperature 1, as the paper and PEFT do; we
draw once for each task and forward pass, PEFT once for each row of a batch, since here rows hold several samples.
The mixing is done on activations, x A_s for all skills and then the gates, so that every token may have its own task.
"""

import math
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.tree_util import Partial

from qtjax.errors import QtjaxError
from qtjax.models import Edits, LinearEdit
from qtjax.overlays.base import Base, Context, Method
from qtjax.overlays.fields import Named, read_fields, setting, to_peft
from qtjax.overlays.leaves import Leaf, uniform, zeros
from qtjax.overlays.sites import Spec, claims, linears_of, needs, resolve_sites
from qtjax.tree import Tree, flatten, unflatten

_EPS = 1e-12  # PEFT's, in the normalisation of the gates


@dataclass(frozen=True)
class PolyFields(Named):
    """r: rank of a skill; n_tasks, n_skills, n_splits; init_weights: B starts at zero."""

    r: int = setting(8, "int>0")
    n_tasks: int = setting(1, "int>0")
    n_skills: int = setting(4, "int>0")
    n_splits: int = setting(1, "int>0")
    init_weights: bool = setting(True, "bool")
    poly_type: str = setting("poly", "choice", ("poly",))


def _read(base: Base, fields: Mapping[str, Any], strict: bool) -> Spec:
    if not strict:
        needs(fields, "r", "n_tasks", "n_skills", "n_splits", "target_modules", method="Polytropon")
    settings = read_fields("poly", PolyFields, fields, base.linears)
    sites = resolve_sites(base, settings, strict)
    for site in sites:
        sizes = {"inputs": site.linear.inputs, "outputs": site.linear.outputs}
        for side, size in sizes.items():
            if size % settings.n_splits:
                raise QtjaxError(f"n_splits = {settings.n_splits}: must divide the {size} {side} of {site.linear.name}")
        if settings.r > min(sizes.values()):
            raise QtjaxError(f"r = {settings.r}: {site.linear.name} is {' x '.join(map(str, sizes.values()))}; lower r to that")
    return Spec(settings, sites)


def _leaves(spec: Spec) -> list[Leaf]:
    """poly_lora_A [q, s, in/q, r], poly_lora_B [q, s, r, out/q], module_logits [tasks, q s]: PEFT's own layouts."""
    f, leaves = spec.fields, []
    for site in spec.sites:
        inputs, outputs = site.linear.inputs // f.n_splits, site.linear.outputs // f.n_splits
        up = zeros if f.init_weights else uniform(1 / math.sqrt(f.r))
        whole = (None, None, None, None)
        for name, shape, init in (
            ("poly_lora_A", (f.n_splits, f.n_skills, inputs, f.r), uniform(1 / math.sqrt(inputs))),
            ("poly_lora_B", (f.n_splits, f.n_skills, f.r, outputs), up),
        ):
            leaves.append(site.leaf(name, shape, whole, name, init=init))
        shape = (f.n_tasks, f.n_splits * f.n_skills)
        leaves.append(site.leaf("module_logits", shape, (None, None), "poly_router.module_logits", init=uniform(1e-3)))
    return leaves


def _gates(spec: Spec, logits: Array, path: str, rng: Array | None) -> Array:
    """float32 [N, tasks, q, s], summing to one over the skills."""
    if rng is not None:
        noise = jax.random.logistic(jax.random.fold_in(rng, zlib.crc32(path.encode())), logits.shape)
        logits = logits + noise
    gates = jax.nn.sigmoid(logits).reshape(*logits.shape[:2], spec.fields.n_splits, spec.fields.n_skills)
    return gates / (gates.sum(axis=-1, keepdims=True) + _EPS)


def _expand(spec: Spec, params: Tree, frozen: Tree, context: Context) -> Edits:
    del frozen
    flat, edits, f = flatten(params), {}, spec.fields
    tasks = context.task_ids
    if tasks is None:
        if f.n_tasks > 1:
            raise QtjaxError(f"task_ids: this overlay has n_tasks = {f.n_tasks}; say which task each row is")
        tasks = jnp.zeros(1, jnp.int32)
    for site in spec.sites:
        path = site.linear.path
        down, up = flat[f"{path}/poly_lora_A"], flat[f"{path}/poly_lora_B"] / f.r
        gates = jnp.take(_gates(spec, flat[f"{path}/module_logits"], path, context.rng), tasks, axis=1)
        if tasks.ndim == 1:  # one task a row: its own factors, [N, B, in, r] and [N, B, r, out]
            mixed = jnp.einsum("nbqs,nqsdr->nbqdr", gates, down)
            mixed_up = jnp.einsum("nbqs,nqsrd->nbrqd", gates, up)
            edit = LinearEdit(
                down=mixed.reshape(*mixed.shape[:2], -1, f.r), up=mixed_up.reshape(*mixed_up.shape[:3], -1)
            )
        else:
            edit = LinearEdit(path=Partial(_by_token, down, up, gates))
        edits[f"{path}/edit"] = edit
    return Edits(unflatten(edits))


def _by_token(down: Array, up: Array, gates: Array, x: Array) -> Array:
    """The side path where every token has its own gates [B, L, q, s]; x [B, L, in]."""
    down, up, gates = (value.astype(x.dtype) for value in (down, up, gates))
    blocks = x.reshape(*x.shape[:-1], down.shape[0], down.shape[2])
    h = jnp.einsum("blqd,qsdr,blqs->blr", blocks, down, gates)
    return jnp.einsum("blr,qsrd,blqs->blqd", h, up, gates).reshape(*x.shape[:-1], -1)


METHOD = Method(
    fields=PolyFields,
    read=_read,
    leaves=_leaves,
    expand=_expand,
    to_peft=lambda spec: {"peft_type": "POLY", **to_peft(spec.fields)},
    claims=claims("POLY"),
    linears=linears_of,
    draws=lambda spec: True,
    tasks=lambda spec: spec.fields.n_tasks,
)
