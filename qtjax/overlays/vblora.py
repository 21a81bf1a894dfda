"""VB-LoRA (Li et al. 2024, arXiv 2405.15179): LoRA whose factors are cut into pieces, each a mixture of a shared bank's.

A piece of length b is sum_j softmax(its k largest logits)_j bank[index_j], bank [h, b] one for the whole model. A's pieces:
logits_A [R, in/b, h]; B's: logits_B [out/b, R, h]. There is no alpha. The mixing is done once a step, in float32.
Logits start as N(0, init_logits_std^2) and the bank as U(+-init_vector_bank_bound): as in PEFT a fresh overlay is not quite
the base. The trained logits (h values a piece) are many more than what is stored with save_only_topk_weights: the k
indices and the first k - 1 weights a piece. A file of that form is for inference and merging: read alone it gives logits
of -inf for all vectors that were not chosen, so training could not choose others; our own file beside it keeps the raw
logits, and from it training goes on.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from qtjax.errors import QtjaxError
from qtjax.models import Edits, LinearEdit
from qtjax.overlays import leaves as table
from qtjax.overlays.base import Base, Context, Method
from qtjax.overlays.fields import OFF, Targeted, read_fields, require, setting, to_peft
from qtjax.overlays.leaves import Leaf, normal, uniform
from qtjax.overlays.sites import Spec, claims, layer_keys, linears_of, needs, resolve_sites
from qtjax.tree import Tree, flatten, unflatten

_BANK = "vblora_vector_bank"


@dataclass(frozen=True)
class VbloraFields(Targeted):
    """r: rank; num_vectors, vector_length: h and b, b a divisor of every in and out; topk: vectors in a mixture;
    vblora_dropout: fraction of the side path's input dropped in training; save_only_topk_weights: see above."""

    r: int = setting(4, "int>0")
    num_vectors: int = setting(256, "int>0")
    vector_length: int = setting(256, "int>0")
    topk: int = setting(2, "int>0")
    save_only_topk_weights: bool = setting(False, "bool")
    vblora_dropout: float = setting(0.0, "[0,1)")
    init_vector_bank_bound: float = setting(0.02, "number>0")
    init_logits_std: float = setting(0.1, "number>=0")


def _read(base: Base, fields: Mapping[str, Any], strict: bool) -> Spec:
    if not strict:
        needs(fields, "r", "num_vectors", "vector_length", "topk", "target_modules", method="VB-LoRA")
    settings = read_fields("vblora", VbloraFields, fields, base.linears)
    vectors, length = settings.num_vectors, settings.vector_length
    require(settings.topk <= vectors, "topk", settings.topk, f"is at most num_vectors, which is {vectors}")
    sites = resolve_sites(base, settings, strict)
    for site in sites:
        i, o = site.linear.inputs, site.linear.outputs
        if i % length or o % length:
            fitting = int(np.gcd.reduce([n for s in sites for n in (s.linear.inputs, s.linear.outputs)]))
            raise QtjaxError(
                f"vector_length = {length}: does not divide {site.linear.name}, {i} x {o}; it must divide both sizes of"
                f" every target, so {fitting} and its divisors do"
            )
        if settings.r > min(i, o):
            limit = min(i, o)
            raise QtjaxError(f"r = {settings.r}: {site.linear.name} is {i} x {o}, so its rank is at most {limit}; lower r")
    return Spec(settings, sites)


def _leaves(spec: Spec) -> list[Leaf]:
    s = spec.fields
    start = uniform(s.init_vector_bank_bound)
    leaves = [
        Leaf(_BANK, ((s.num_vectors, s.vector_length),), (None, None), (f"base_model.{_BANK}",), start, stacked=False)
    ]  # fmt: skip
    for site in spec.sites:
        inputs, outputs = (n // s.vector_length for n in (site.linear.inputs, site.linear.outputs))
        for name, shape in (("A", (s.r, inputs, s.num_vectors)), ("B", (outputs, s.r, s.num_vectors))):
            axes, init = (None, None, None), normal(s.init_logits_std)
            leaves.append(site.leaf(f"logits_{name}", shape, axes, f"vblora_logits_{name}", init=init))
    return leaves


def _mixtures(logits: Array, bank: Array, k: int) -> Array:
    """[..., h] logits to [..., b] pieces."""
    top, index = jax.lax.top_k(logits, k)
    return (jax.nn.softmax(top, axis=-1)[..., None] * bank[index]).sum(-2)


def _expand(spec: Spec, params: Tree, frozen: Tree, context: Context) -> Edits:
    del frozen
    s, flat, edits = spec.fields, flatten(params), {}
    bank = flat[_BANK]
    for site in spec.sites:
        linear = site.linear
        # A layer that is not edited has logits of zero, which would mix a piece like any other; its zero up stops that.
        hits = jnp.asarray(site.hits, jnp.float32)[:, None, None]
        a = _mixtures(flat[f"{linear.path}/logits_A"], bank, s.topk)  # [N, R, in/b, b]
        b = _mixtures(flat[f"{linear.path}/logits_B"], bank, s.topk)  # [N, out/b, R, b]
        down = a.reshape(linear.layers, s.r, linear.inputs).swapaxes(1, 2)
        up = b.swapaxes(1, 2).reshape(linear.layers, s.r, linear.outputs) * hits
        dropped = context.rng is not None and s.vblora_dropout > 0
        keys = layer_keys(context.rng, linear) if dropped else None
        edits[f"{linear.path}/edit"] = LinearEdit(down=down, up=up, dropout_key=keys, dropout_rate=s.vblora_dropout)
    return Edits(unflatten(edits))


def _index_dtype(spec: Spec) -> Any:
    """PEFT's choice by the number of vectors."""
    return jnp.uint8 if spec.fields.num_vectors < 2**8 else jnp.int16 if spec.fields.num_vectors < 2**15 else jnp.int32


def _file(spec: Spec, params: Tree, frozen: Tree) -> dict[str, Array] | None:
    """With save_only_topk_weights: of every piece its k indices, and all weights but the last, which the others give."""
    if not spec.fields.save_only_topk_weights:
        return None
    out = {}
    for key, value in table.tensors(_leaves(spec), params, frozen).items():
        if key.endswith(_BANK):
            out[key] = value
            continue
        top, index = jax.lax.top_k(value, spec.fields.topk)
        out[f"{key}_topk_indices"] = index.astype(_index_dtype(spec))
        out[f"{key}_topk_weights"] = jax.nn.softmax(top, axis=-1)[..., :-1]
    return out


def _from_file(spec: Spec, found: Mapping[str, Any]) -> tuple[Spec, Tree, Tree]:
    """Logits that give the stored weights: their logarithms, -inf for the vectors that were not chosen."""
    out = {key: value for key, value in found.items() if key.endswith(_BANK)}
    for key, index in found.items():
        name = key.removesuffix("_topk_indices")
        if name == key:
            continue
        if index.min(initial=0) < 0 or index.max(initial=0) >= spec.fields.num_vectors:
            raise QtjaxError(f"{key}: names vectors outside the bank of {spec.fields.num_vectors}; the file is corrupt")
        first = np.asarray(found[f"{name}_topk_weights"], np.float32)
        weights = np.concatenate([first, 1 - first.sum(-1, keepdims=True)], axis=-1)
        logits = np.full((*index.shape[:-1], spec.fields.num_vectors), -np.inf, np.float32)
        with np.errstate(divide="ignore"):
            np.put_along_axis(logits, index.astype(np.int64), np.log(np.maximum(weights, 0)), axis=-1)
        out[name] = logits
    return spec, *table.trees(_leaves(spec), out)


def _to_peft(spec: Spec) -> dict[str, Any]:
    return {"peft_type": "VBLORA", **to_peft(spec.fields), **OFF}


METHOD = Method(
    fields=VbloraFields,
    read=_read,
    leaves=_leaves,
    expand=_expand,
    to_peft=_to_peft,
    claims=claims("VBLORA"),
    linears=linears_of,
    draws=lambda spec: spec.fields.vblora_dropout > 0,
    file=_file,
    from_file=_from_file,
)
