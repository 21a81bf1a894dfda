"""Bottleneck adapters (Houlsby et al. 2019, arXiv 1902.00751): h + up(act(down(h))) behind attention and behind the MLP.

h is the sub-layer's output before it is added to the residual stream, which here is that of o_proj and of down_proj;
AdapterHub's "double sequential" adapter computes the same. down [D, m] and up [m, D] start from N(0, 0.02^2) and their
biases from zero, so a fresh adapter is nearly but not exactly the identity. PEFT lacks the method.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from qtjax.models import Edits, LinearEdit
from qtjax.overlays.base import Base, Context, Method
from qtjax.overlays.fields import Targeted, read_fields, require, setting, to_peft
from qtjax.overlays.leaves import Leaf, normal, transposed, zeros
from qtjax.overlays.sites import Site, Spec, claims, linears_of, resolve_sites
from qtjax.overlays.targets import Names
from qtjax.tree import Tree, flatten, unflatten

_ENDS = ("down_proj", "o_proj")  # the products that end the two sub-layers


def _bottleneck(act: Any, down: Array, down_bias: Array, up: Array, up_bias: Array, h: Array) -> Array:
    down, down_bias, up, up_bias = (x.astype(h.dtype) for x in (down, down_bias, up, up_bias))
    return h + act(h @ down + down_bias) @ up + up_bias


# Made once, so that the same settings are the same function to jit.
_ADAPTERS = {
    "silu": partial(_bottleneck, jax.nn.silu),
    "relu": partial(_bottleneck, jax.nn.relu),
    "gelu": partial(_bottleneck, partial(jax.nn.gelu, approximate=False)),
    "gelu_new": partial(_bottleneck, partial(jax.nn.gelu, approximate=True)),
    "tanh": partial(_bottleneck, jnp.tanh),
}


@dataclass(frozen=True)
class HoulsbyFields(Targeted):
    """bottleneck: width m; act: its nonlinearity; target_modules: o_proj and down_proj, or one of them."""

    target_modules: Names = setting(_ENDS, "targets")
    bottleneck: int = setting(64, "int>0")
    act: str = setting("silu", "choice", tuple(_ADAPTERS))


def _read(base: Base, fields: Mapping[str, Any], strict: bool) -> Spec:
    settings = read_fields("houlsby", HoulsbyFields, fields, base.linears)
    sites = resolve_sites(base, settings, strict)
    for site in sites:
        require(
            site.linear.name in _ENDS, "target_modules", site.linear.name,
            "adapters stand behind a sub-layer's last product; name o_proj (attention), down_proj (MLP) or both",
        )  # fmt: skip
    return Spec(settings, sites)


def _site_leaves(site: Site, width: int) -> list[Leaf]:
    size, leaves = site.linear.outputs, []
    for name, shape, axes, more in (
        ("down.weight", (size, width), ("out", None), transposed(init=normal(0.02))),
        ("down.bias", (width,), (None,), {"init": zeros}),
        ("up.weight", (width, size), (None, "out"), transposed(init=normal(0.02))),
        ("up.bias", (size,), ("out",), {"init": zeros}),
    ):
        rooms = [site.linear.module(n).rsplit(".", 1)[0] for n in range(site.linear.layers)]
        keys = tuple(f"{room}.adapter.{name}" if hit else None for room, hit in zip(rooms, site.hits))
        shapes = tuple(shape if hit else None for hit in site.hits)
        path = f"{site.linear.path}/{name.replace('.', '_')}"
        leaves.append(Leaf(path, shapes, axes, keys, module=site.linear.path, **more))
    return leaves


def _leaves(spec: Spec) -> list[Leaf]:
    return [leaf for site in spec.sites for leaf in _site_leaves(site, spec.fields.bottleneck)]


def _expand(spec: Spec, params: Tree, frozen: Tree, context: Context) -> Edits:
    """In layers that are not edited everything is zero, and the adapter adds nothing."""
    del frozen, context
    flat, edits = flatten(params), {}
    for site in spec.sites:
        parts = (flat[f"{site.linear.path}/{name}"] for name in ("down_weight", "down_bias", "up_weight", "up_bias"))
        edits[f"{site.linear.path}/edit"] = LinearEdit(after=jax.tree_util.Partial(_ADAPTERS[spec.fields.act], *parts))
    return Edits(unflatten(edits))


METHOD = Method(
    fields=HoulsbyFields,
    read=_read,
    leaves=_leaves,
    expand=_expand,
    to_peft=lambda spec: {"peft_type": "QTJAX_HOULSBY", **to_peft(spec.fields)},
    claims=claims("QTJAX_HOULSBY"),
    linears=linears_of,
    unmergeable="the adapter behind each product is not linear",
    in_peft=False,
)
