"""BitFit (Ben Zaken et al. 2022, arXiv 2106.10199) for models without biases: y = x W + b + d, d [out] trained from zero.

The paper trains the biases that a model has; LLaMA's and Mistral's linear modules have none, so each gets one (where the
base has one, d is added to it, which is the same as training it). PEFT lacks the method. Tensors are called as the
biases of a checkpoint, "model.layers.0.self_attn.q_proj.bias". A merged model has biases: `attention_bias` and `mlp_bias` of
LLaMA's config; Mistral's has no such fields, and `merge` says what it does about that.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from qtjax.models import Edits, LinearEdit
from qtjax.overlays.base import Base, Context, Method
from qtjax.overlays.fields import Targeted, read_fields, to_peft
from qtjax.overlays.leaves import Leaf
from qtjax.overlays.sites import Spec, claims, linears_of, resolve_sites
from qtjax.tree import Tree, flatten, unflatten


@dataclass(frozen=True)
class BitfitFields(Targeted):
    """target_modules: the linear modules that get a bias; layers_to_transform: layer indices or None for all."""


def _read(base: Base, fields: Mapping[str, Any], strict: bool) -> Spec:
    settings = read_fields("bitfit", BitfitFields, fields, base.linears)
    return Spec(settings, resolve_sites(base, settings, strict))


def _leaves(spec: Spec) -> list[Leaf]:
    leaves = []
    for site in spec.sites:
        linear = site.linear
        keys = tuple(f"{linear.module(n)}.bias" if hit else None for n, hit in enumerate(site.hits))
        shapes = tuple((linear.outputs,) if hit else None for hit in site.hits)
        leaves.append(Leaf(f"{linear.path}/bias", shapes, ("out",), keys, module=linear.path))
    return leaves


def _expand(spec: Spec, params: Tree, frozen: Tree, context: Context) -> Edits:
    del frozen, context
    flat = flatten(params)
    paths = [site.linear.path for site in spec.sites]
    return Edits(unflatten({f"{path}/edit": LinearEdit(bias=flat[f"{path}/bias"]) for path in paths}))


METHOD = Method(
    fields=BitfitFields,
    read=_read,
    leaves=_leaves,
    expand=_expand,
    to_peft=lambda spec: {"peft_type": "QTJAX_BITFIT", **to_peft(spec.fields)},
    claims=claims("QTJAX_BITFIT"),
    linears=linears_of,
    in_peft=False,
)
