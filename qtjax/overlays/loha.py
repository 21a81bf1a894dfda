"""LoHa (Hyeon-Woo et al. 2021, FedPara, arXiv 2108.06098): dW = alpha / r (w1_b w1_a) o (w2_b w2_a), a rank up to r^2.

Layouts [in, out]: w1_b, w2_b [in, R], w1_a, w2_a [R, out]; w2_b is zero at the start. The Hadamard product of two rank-R
matrices is one matrix of rank R^2, whose factors are the column-wise Kronecker products of theirs: for small R the model
goes through these and no full weight gradient arises; for larger ones dW is formed inside the layer.
Paddings of unequal ranks stay zero: the gradient of a column of w_b is proportional to the matching row of w_a.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.tree_util import Partial

from qtjax.errors import QtjaxError
from qtjax.models import Edits, LinearEdit
from qtjax.overlays import lycoris
from qtjax.overlays.base import Base, Context, Method
from qtjax.overlays.fields import read_fields, setting, to_peft
from qtjax.overlays.leaves import Leaf, kaiming, zeros
from qtjax.overlays.lycoris import LycorisFields, ranked_sites
from qtjax.overlays.sites import Spec, claims, linears_of, needs
from qtjax.overlays.targets import Linear
from qtjax.tree import Tree, flatten, unflatten


@dataclass(frozen=True)
class LohaFields(LycorisFields):
    """Those of LycorisFields. init_weights: False makes w2_b random as well, so that the fresh overlay is not the base."""

    init_weights: bool = setting(True, "bool")


def _read(base: Base, fields: Mapping[str, Any], strict: bool) -> Spec:
    if not strict:
        needs(fields, "r", "alpha", "target_modules", method="LoHa")
    settings = read_fields("loha", LohaFields, fields, base.linears, inert=lycoris.INERT)
    sites = ranked_sites(base, settings, strict)
    for site in sites:
        limit = min(site.linear.inputs, site.linear.outputs)
        for n, rank in enumerate(site.ranks):
            if rank > limit:
                raise QtjaxError(
                    f"r = {rank}: {site.linear.module(n)} is {site.linear.inputs} x {site.linear.outputs}, so its rank is at"
                    f" most {limit}; lower r, or set rank_pattern for {site.linear.name!r}"
                )
    return Spec(settings, sites)


def _leaves(spec: Spec) -> list[Leaf]:
    leaves = []
    for site in spec.sites:
        inputs, outputs = site.linear.inputs, site.linear.outputs
        last = zeros if spec.fields.init_weights else kaiming(inputs)
        for name, init in (("hada_w1", kaiming(inputs)), ("hada_w2", last)):
            leaves.append(site.factor(f"{name}_a", lambda r, o=outputs: (r, o), kaiming(*site.ranks), (None, "out")))
            leaves.append(site.factor(f"{name}_b", lambda r, i=inputs: (i, r), init, ("in", None)))
    return leaves


def _hadamard(first_b: Array, first_a: Array, second_b: Array, second_a: Array) -> Array:
    exact = jax.lax.Precision.HIGHEST
    return jnp.matmul(first_b, first_a, precision=exact) * jnp.matmul(second_b, second_a, precision=exact)


@jax.checkpoint
def _thin(first_b: Array, first_a: Array, second_b: Array, second_a: Array, x: Array) -> Array:
    """x dW through the R^2 columns; they are formed again in the backward pass, not kept for every layer."""
    down = (first_b[:, :, None] * second_b[:, None, :]).reshape(first_b.shape[0], -1)
    up = (first_a[:, None] * second_a[None]).reshape(-1, first_a.shape[1])
    return (x @ down.astype(x.dtype)) @ up.astype(x.dtype)


def is_thin(linear: Linear, rank: int) -> bool:
    """Whether R^2 columns cost less than dW's own gradient: a forward, a recomputed and two backward products of size
    R^2 (in + out) a token against one of in out."""
    return 4 * rank**2 * (linear.inputs + linear.outputs) <= linear.inputs * linear.outputs


def _expand(spec: Spec, params: Tree, frozen: Tree, context: Context) -> Edits:
    del frozen
    flat, edits = flatten(params), {}
    for site in spec.sites:
        path = site.linear.path
        first_a, first_b, second_a, second_b = (flat[f"{path}/hada_{name}"] for name in ("w1_a", "w1_b", "w2_a", "w2_b"))
        first_a = site.scaled(first_a)
        kept = lycoris.kept_outputs(spec, site, context.rng, rescale=spec.fields.rank_dropout > 0)
        first_a = first_a if kept is None else first_a * kept[:, None, :]
        factors = (first_b, first_a, second_b, second_a)
        thin = Partial(_thin, *factors) if is_thin(site.linear, max(site.ranks)) else None
        edits[f"{path}/edit"] = LinearEdit(delta=Partial(_hadamard, *factors), thin=thin)
    return Edits(unflatten(edits))


METHOD = Method(
    fields=LohaFields,
    read=_read,
    leaves=_leaves,
    expand=_expand,
    to_peft=lambda spec: {"peft_type": "LOHA", **to_peft(spec.fields), "modules_to_save": None, "layers_pattern": None},
    claims=claims("LOHA"),
    linears=linears_of,
    draws=lycoris.draws,
)
