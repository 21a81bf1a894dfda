"""AdaLoRA (Zhang et al. 2023, arXiv 2303.10512): y = x W + s ((dropout(x) A) * E) B, its R triplets pruned in training.

A [in, R] and B [R, out] are N(0, 0.02^2), E [R] is zero, s = lora_alpha / (init_r + 1e-5), also after pruning. The loss
gains orth_reg_weight times the mean over matrices of |P P^T - I|_F (P = A^T or B). After each step the sensitivity |w g|
of every weight and its uncertainty are smoothed, their product is the weight's importance, a triplet's score is that of E
plus the means of A's and of B's, and the lowest scores of all matrices are cut to a budget that falls with the cube of
the time left. As in PEFT:
- until tinit nothing is cut; then every deltaT steps; at total_step - tfinal once more, and that choice then stays;
- between cuts E of a cut triplet may grow back; ties with the last cut score are cut as well.
PEFT's file holds only the triplets that are left, and rank_pattern in adapter_config.json says which. Ours are those with
E != 0 (PEFT takes the last cut's, losing what grew back since); a file of all trainables beside it lets training go on.
total_step = 0 leaves the schedule to the run, which knows its length; `after_step` refuses it. PEFT wants a number, so it
is written as tinit + tfinal + 1, the least that PEFT takes, and read back as 0.
"""

import functools
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from qtjax.errors import QtjaxError, near_names
from qtjax.models import Edits, LinearEdit
from qtjax.overlays import lora
from qtjax.overlays.base import Base, Context, Method
from qtjax.overlays.fields import Targeted, read_fields, require, setting, to_peft
from qtjax.overlays.leaves import Leaf, abstract, column, normal, tensors, transposed, trees, zeros
from qtjax.overlays.sites import Spec, claims, layer_keys, linears_of, needs, resolve_sites
from qtjax.tree import Tree, flatten, unflatten

# Beside LoRA's; alpha_pattern and use_rslora PEFT itself takes without effect.
_INERT = lora.INERT | {"use_rslora": (False, None), "alpha_pattern": ({}, None)}
_FACTORS = ("lora_A", "lora_B", "lora_E")


@dataclass(frozen=True)
class AdaLoraFields(Targeted):
    """init_r: triplets of each matrix at the start; target_r: their mean number at the end.

    tinit, tfinal, deltaT, total_step: optimizer steps, see the head of the file. beta1, beta2: smoothing of sensitivity and
    of uncertainty, fractions. orth_reg_weight: factor of the orthogonality penalty. lora_alpha: s (init_r + 1e-5); init_r
    if it is not above 0. lora_dropout: fraction [0, 1) of the side path's input dropped in training.
    """

    init_r: int = setting(12, "int>0")
    target_r: int = setting(8, "int>0")
    lora_alpha: float = setting(8.0, "number")
    lora_dropout: float = setting(0.0, "[0,1)")
    tinit: int = setting(0, "int>=0")
    tfinal: int = setting(0, "int>=0")
    deltaT: int = setting(1, "int>0")
    beta1: float = setting(0.85, "(0,1]")
    beta2: float = setting(0.85, "(0,1]")
    orth_reg_weight: float = setting(0.5, "number>=0")
    total_step: int = setting(0, "int>=0")
    init_lora_weights: bool = setting(True, "bool")


@dataclass(frozen=True)
class AdaLoraSpec(Spec):
    """kept: (HF module, which of its triplets the file holds) for each module; empty: all of all."""

    kept: tuple[tuple[str, tuple[bool, ...]], ...] = ()

    @property
    def factor(self) -> float:
        f = self.fields
        return (f.lora_alpha if f.lora_alpha > 0 else f.init_r) / (f.init_r + 1e-5)

    @property
    def modules(self) -> list[str]:
        return [site.linear.module(n) for site in self.sites for n, hit in enumerate(site.hits) if hit]


def _read(base: Base, fields: Mapping[str, Any], strict: bool) -> AdaLoraSpec:
    given = dict(fields)
    pattern, rank = given.pop("rank_pattern", None), given.pop("r", None)
    if strict:
        require(rank is None, "r", rank, "is not used by adalora; set init_r, and target_r for the end")
        require(not pattern, "rank_pattern", pattern, "is written by training, and read with its file by load_adapter")
    else:
        needs(given, "init_r", "lora_alpha", "target_modules", method="AdaLoRA")
    settings = read_fields(
        "adalora", AdaLoraFields, given, base.linears, inert=_INERT, descriptive=("megatron_core", "qalora_group_size")
    )
    if not strict and settings.total_step == settings.tinit + settings.tfinal + 1:
        settings = replace(settings, total_step=0)
    _check(settings)
    spec = AdaLoraSpec(settings, resolve_sites(base, settings, strict))
    if strict:
        require(settings.init_lora_weights, "init_lora_weights", False, "must be True: a fresh overlay is the base")
    for linear in spec.linears if strict else ():
        limit = min(linear.inputs, linear.outputs)
        where = f"{linear.path} is {linear.inputs} x {linear.outputs}, so its rank is at most {limit}; lower init_r"
        require(settings.init_r <= limit, "init_r", settings.init_r, where)
    return replace(spec, kept=_kept(pattern, spec))


def _check(settings: AdaLoraFields) -> None:
    for name in ("beta1", "beta2"):
        require(getattr(settings, name) < 1, name, getattr(settings, name), "is a fraction above 0 and below 1")
    start, end = settings.init_r, settings.target_r
    require(end <= start, "target_r", end, f"must be at most init_r = {start}, from which ranks are pruned")
    if settings.total_step:
        ends = settings.total_step - settings.tfinal
        rule = f"leaves no step for pruning: must be below total_step - tfinal = {settings.total_step} - {settings.tfinal}"
        require(settings.tinit < ends, "tinit", settings.tinit, rule)


def _kept(pattern: Any, spec: AdaLoraSpec) -> tuple[tuple[str, tuple[bool, ...]], ...]:
    """PEFT's rank_pattern, {"model.layers.0.self_attn.q_proj.lora_E": [true, false, ...]}, checked against the targets."""
    mapping = pattern is None or isinstance(pattern, Mapping)
    require(mapping, "rank_pattern", pattern, "must map names of lora_E to lists of true and false")
    found, modules, rank = {}, set(spec.modules), spec.fields.init_r
    for key, marks in (pattern or {}).items():
        name = key.removeprefix("base_model.model.").removesuffix(".default").removesuffix(".lora_E")
        if name not in modules:
            raise QtjaxError(f"rank_pattern: {key!r} is no edited module{near_names(name, modules)}")
        fits = isinstance(marks, (list, tuple)) and len(marks) == rank and all(isinstance(m, bool) for m in marks)
        require(fits, f"rank_pattern[{key!r}]", marks, f"must be init_r = {rank} times true or false")
        found[name] = tuple(marks)
    return tuple((name, found.get(name, (True,) * rank)) for name in spec.modules) if found else ()


def _leaves(spec: AdaLoraSpec) -> list[Leaf]:
    """lora_A [in, r], lora_B [r, out] and lora_E [r]; PEFT stores [r, in], [out, r] and [r, 1]."""
    leaves, rank = [], spec.fields.init_r
    for site in spec.sites:
        linear = site.linear
        leaves += [
            site.leaf("lora_A", (linear.inputs, rank), ("in", None), "lora_A", init=normal(0.02), **transposed()),
            site.leaf("lora_B", (rank, linear.outputs), (None, "out"), "lora_B", init=normal(0.02), **transposed()),
            site.leaf("lora_E", (rank,), (None,), "lora_E", init=zeros, **column()),
        ]
    return leaves


def _expand(spec: AdaLoraSpec, params: Tree, frozen: Tree, context: Context) -> Edits:
    del frozen
    flat, edits, rate = flatten(params), {}, spec.fields.lora_dropout
    for linear in spec.linears:
        down, up, values = (flat[f"{linear.path}/{name}"] for name in _FACTORS)
        keys = None
        if context.rng is not None and rate > 0:
            keys = layer_keys(context.rng, linear)
        mid = values * spec.factor
        edits[f"{linear.path}/edit"] = LinearEdit(down=down, up=up, mid=mid, dropout_key=keys, dropout_rate=rate)
    return Edits(unflatten(edits))


def _penalty(spec: AdaLoraSpec, params: Tree) -> Array:
    """orth_reg_weight * mean |P P^T - I|_F over the 2 matrices of each module, float32.

    A row of P that is all zero has no 1 in I: it belongs to a layer that is not edited, or the file that was read lacks it.
    """
    flat, total = flatten(params), jnp.float32(0)
    for linear in spec.linears:
        for p in (flat[f"{linear.path}/lora_A"].swapaxes(1, 2), flat[f"{linear.path}/lora_B"]):  # [N, R, in or out]
            gram = jnp.einsum("nrk,nsk->nrs", p, p, precision=jax.lax.Precision.HIGHEST)
            off = gram - jnp.eye(p.shape[1]) * jnp.any(p != 0, axis=2)[:, None, :]
            square = jnp.sum(off * off, axis=(1, 2))
            total += jnp.sum(jnp.where(square > 0, jnp.sqrt(jnp.where(square > 0, square, 1)), 0))  # no NaN slope at 0
    return spec.fields.orth_reg_weight * total / (2 * len(spec.modules))


def _state(spec: AdaLoraSpec, params: Tree) -> Tree:
    """Smoothed sensitivity and uncertainty, as `params`, and which triplets the last cut kept, bool [N, r] by module.

    An overlay that was trained and read again starts with the triplets that it has; a fresh one, E = 0, with all.
    """
    values = {path: value for path, value in flatten(params).items() if path.endswith("/lora_E")}
    fresh = jnp.all(jnp.stack([jnp.all(value == 0) for value in values.values()]))
    nothing = {"exp_avg_ipt": jax.tree.map(jnp.zeros_like, params), "exp_avg_unc": jax.tree.map(jnp.zeros_like, params)}
    return nothing | {"kept": unflatten({path: (value != 0) | fresh for path, value in values.items()})}


@functools.lru_cache(maxsize=16)
def _budgets(settings: AdaLoraFields, count: int) -> np.ndarray:
    """Triplets left after each step 0 ... total_step - tfinal, of `count` matrices, rounded as PEFT's float64 does."""
    first, last = settings.init_r * count, settings.target_r * count
    span = settings.total_step - settings.tfinal - settings.tinit
    left = (1 - max(step - settings.tinit, 0) / span for step in range(settings.tinit + span + 1))
    return np.array([int((first - last) * part**3 + last) for part in left], np.int32)


def _after_step(spec: AdaLoraSpec, params: Tree, state: Tree, gradients: Tree | None, step: Array) -> tuple[Tree, Tree]:
    f = spec.fields
    require(f.total_step > 0, "total_step", 0, "AdaLoRA's rank schedule needs the number of optimizer steps; set total_step")
    step, ends = jnp.asarray(step, jnp.int32), f.total_step - f.tfinal
    ipt, unc = state["exp_avg_ipt"], state["exp_avg_unc"]
    if gradients is not None:  # a step without targets says nothing about what is sensitive
        new_ipt, new_unc = _averages(f, params, gradients, ipt, unc)
        ipt, unc = (
            jax.tree.map(lambda new, old: jnp.where(step < ends, new, old), now, before)
            for now, before in ((new_ipt, ipt), (new_unc, unc))
        )
    cuts = (step > f.tinit) & (step < ends) & (step % f.deltaT == 0) | (step == ends)
    budget = jnp.asarray(_budgets(f, len(spec.modules)))[jnp.clip(step, 0, ends)]
    kept = jax.lax.cond(cuts, lambda: _cut(spec, ipt, unc, budget), lambda: flatten(state["kept"]))
    flat = dict(flatten(params))
    for path, mask in kept.items():
        flat[path] = jnp.where(mask | ~(cuts | (step > ends)), flat[path], 0)
    return unflatten(flat), {"exp_avg_ipt": ipt, "exp_avg_unc": unc, "kept": unflatten(kept)}


def _averages(f: AdaLoraFields, params: Tree, gradients: Tree, ipt: Tree, unc: Tree) -> tuple[Tree, Tree]:
    """Sensitivity |w dw| and its distance from its average, both smoothed once more."""
    seen = jax.tree.map(lambda w, g: jnp.abs(w * g), params, gradients)
    ipt = jax.tree.map(lambda old, new: f.beta1 * old + (1 - f.beta1) * new, ipt, seen)
    unc = jax.tree.map(lambda old, new, mean: f.beta2 * old + (1 - f.beta2) * jnp.abs(new - mean), unc, seen, ipt)
    return ipt, unc


def _cut(spec: AdaLoraSpec, ipt: Tree, unc: Tree, budget: Array) -> dict[str, Array]:
    """{path of lora_E: bool [N, r]}: the `budget` triplets of highest score over all matrices, without ties of a cut one."""
    ipt, unc, scores = flatten(ipt), flatten(unc), {}
    for site in spec.sites:
        a, b, e = (ipt[f"{site.linear.path}/{name}"] * unc[f"{site.linear.path}/{name}"] for name in _FACTORS)
        score = e + (jnp.mean(a, axis=1) + jnp.mean(b, axis=2))
        # A layer that is not edited stands behind all others: it is neither cut nor counted.
        scores[f"{site.linear.path}/lora_E"] = jnp.where(np.array(site.hits)[:, None], score, jnp.inf)
    ranked = jnp.sort(jnp.concatenate([score.ravel() for score in scores.values()]))
    cut = len(spec.modules) * spec.fields.init_r - budget
    threshold = jnp.where(cut > 0, ranked[jnp.maximum(cut - 1, 0)], -jnp.inf)
    return {path: ~(score <= threshold) for path, score in scores.items()}


def _saved_spec(spec: AdaLoraSpec, params: Tree) -> AdaLoraSpec:
    """The spec with `kept` as E says; () where none is zero, and where all are: an overlay that was not trained yet."""
    flat, marks = flatten(params), {}
    for site in spec.sites:
        for n, hit in enumerate(site.hits):
            if hit:
                marks[site.linear.module(n)] = tuple((np.asarray(flat[f"{site.linear.path}/lora_E"][n]) != 0).tolist())
    values = [mark for own in marks.values() for mark in own]
    return replace(spec, kept=() if all(values) or not any(values) else tuple(marks.items()))


def _picks(spec: AdaLoraSpec) -> dict[str, tuple[Any, ...]]:
    """{tensor in the file: index that takes the kept triplets out of the full tensor}."""
    picks = {}
    for name, marks in spec.kept:
        rows = np.flatnonzero(marks)
        for factor in _FACTORS:
            picks[f"base_model.model.{name}.{factor}"] = (slice(None), rows) if factor == "lora_B" else (rows,)
    return picks


def _file(spec: AdaLoraSpec, params: Tree, frozen: Tree) -> dict[str, Any]:
    picks = _picks(spec)
    return {key: value[picks.get(key, ())] for key, value in tensors(_leaves(spec), params, frozen).items()}


def _from_file(spec: AdaLoraSpec, found: Mapping[str, Any]) -> tuple[AdaLoraSpec, Tree, Tree]:
    """Triplets that the file lacks are zero and stay so: no gradient reaches a triplet whose three parts are zero."""
    leaves, picks, full = _leaves(spec), _picks(spec), {}
    whole = jax.eval_shape(lambda both: tensors(leaves, *both), abstract(leaves))
    for key, value in found.items():
        full[key] = np.zeros(whole[key].shape, np.float32)
        full[key][picks.get(key, ())] = value
    return spec, *trees(leaves, full)


def _to_peft(spec: AdaLoraSpec) -> dict[str, Any]:
    f = spec.fields
    off = {"r": 8, "use_rslora": False, "bias": "none", "fan_in_fan_out": False, "lora_bias": False, "modules_to_save": None}
    marks = {f"{name}.lora_E": list(own) for name, own in spec.kept} or None
    total = f.total_step or f.tinit + f.tfinal + 1
    return {"peft_type": "ADALORA", **to_peft(f), **off, "use_dora": False, "total_step": total, "rank_pattern": marks}


METHOD = Method(
    fields=AdaLoraFields,
    read=_read,
    leaves=_leaves,
    expand=_expand,
    to_peft=_to_peft,
    claims=claims("ADALORA"),
    linears=linears_of,
    draws=lambda spec: spec.fields.lora_dropout > 0,
    penalty=_penalty,
    state=_state,
    after_step=_after_step,
    saved_spec=_saved_spec,
    file=_file,
    from_file=_from_file,
)
