"""Laplace-LoRA (Yang et al. 2023, arXiv 2308.13111): a Gaussian posterior over a trained LoRA's matrices.

Training, saving and serving are lora's; afterwards `posterior.fit_laplace` puts Kronecker factors of the curvature among the
frozen arrays, and `posterior.predictive` reads them. The precision of one LoRA matrix is

    Lambda = A (x) S + prior_precision I,    A = mean over tokens of a a^T,    S = sum over rows and tokens of g H g^T,

with a the matrix's input and g H g^T the generalised Gauss-Newton of the softmax over the answer classes: K-FAC over weight
sharing, "expand" (Eschenhagen et al. 2023, arXiv 2311.00636). H = diag(p) - p p^T is taken exactly, one backward pass a class.
PEFT has no such method; its folder is written as LORA, with the factors in qtjax_trainable.safetensors beside it.
Where public code differs we keep the textbook: sums over the data with scale N in both factors, no sampled labels, every
real token instead of the last slot (so the padding side plays no part), |theta|^2 in the evidence.
"""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from qtjax.errors import QtjaxError
from qtjax.models import Edits
from qtjax.overlays import leaves as table
from qtjax.overlays import lora
from qtjax.overlays.base import Base, Context, Method
from qtjax.overlays.fields import read_fields, setting
from qtjax.overlays.leaves import Leaf
from qtjax.overlays.lora import LoraFields, LoraSpec
from qtjax.overlays.sites import claims
from qtjax.tree import Tree

_NAME = {"qtjax_method": "laplace"}  # tells the folder from a plain LoRA's; PEFT ignores it


@dataclass(frozen=True)
class PriorFields:
    """prior_precision: 1 / variance of the prior over every LoRA weight. fitted: whether the posterior's factors are there."""

    prior_precision: float = setting(1.0, "number>0")
    fitted: bool = setting(False, "bool")


@dataclass(frozen=True)
class LaplaceFields(LoraFields, PriorFields):
    """LoRA's settings and the prior's."""


@dataclass(frozen=True)
class LaplaceSpec:
    """The LoRA's spec and the prior's settings."""

    lora: LoraSpec
    prior: PriorFields

    @property
    def linears(self) -> Any:
        return self.lora.linears


def _read(base: Base, fields: Mapping[str, Any], strict: bool) -> LaplaceSpec:
    own = {name: fields[name] for name in ("prior_precision", "fitted") if name in fields}
    rest = {name: value for name, value in fields.items() if name not in own and name not in _NAME}
    prior = read_fields("laplace", PriorFields, own)
    if strict and prior.fitted:
        raise QtjaxError("fitted = True: is set by fit_laplace, after training; leave it out")
    settings = [f.name for f in dataclasses.fields(PriorFields)]
    return LaplaceSpec(plain(lora.read_lora(base, rest, strict, method="laplace", also=settings), "laplace"), prior)


def plain(spec: LoraSpec, who: str) -> LoraSpec:
    """The spec, if it is low-rank side paths at linear modules of the layers alone, which is all that `who` understands."""
    for holds, what in (
        (spec.subtracts, f"init_lora_weights = {spec.fields.init_lora_weights!r}"),
        (spec.fields.init_lora_weights == "orthogonal", "init_lora_weights = 'orthogonal'"),
        (spec.saved or spec.copies, "modules_to_save"),
        (any(not site.linear.path.startswith("layers/") for site in spec.sites), "target_modules with the embedding or the head"),
    ):
        if holds:
            raise QtjaxError(f"{what}: is not supported by {who}, which takes plain LoRA of the layers' linear modules")
    return spec


def _leaves(spec: LaplaceSpec) -> list[Leaf]:
    return [*lora.METHOD.leaves(spec.lora), *(factor_leaves(spec) if spec.prior.fitted else ())]


def factor_leaves(spec: LaplaceSpec) -> list[Leaf]:
    """"<matrix>_in" [in, in] and "<matrix>_out" [out, out], symmetric, for the two matrices of every site."""
    leaves = []
    for site in spec.lora.sites:
        linear = site.linear
        for name, sizes, axes in (
            ("lora_A_in", [linear.inputs] * linear.layers, ("in", None)),
            ("lora_A_out", site.ranks, (None, None)),
            ("lora_B_in", site.ranks, (None, None)),
            ("lora_B_out", [linear.outputs] * linear.layers, ("out", None)),
        ):
            shapes = tuple((size, size) if rank else None for size, rank in zip(sizes, site.ranks))
            keys = tuple(f"base_model.model.{linear.module(n)}.laplace.{name}" if r else None for n, r in enumerate(site.ranks))
            leaves.append(Leaf(f"{linear.path}/{name}", shapes, axes, keys, module=linear.path, trained=False))
    return leaves


def _expand(spec: LaplaceSpec, params: Tree, frozen: Tree, context: Context) -> Edits:
    return lora.METHOD.expand(spec.lora, params, frozen, context)


def _file(spec: LaplaceSpec, params: Tree, frozen: Tree) -> dict[str, Any]:
    """PEFT's file: the LoRA's mean alone."""
    return table.tensors(lora.METHOD.leaves(spec.lora), params, frozen)


def _from_file(spec: LaplaceSpec, tensors: Mapping[str, Any]) -> tuple[LaplaceSpec, Tree, Tree]:
    """Without the factors' file what is left is a LoRA whose posterior is not fitted."""
    unfitted = PriorFields(spec.prior.prior_precision)
    return LaplaceSpec(spec.lora, unfitted), *table.trees(lora.METHOD.leaves(spec.lora), tensors)


def _to_peft(spec: LaplaceSpec) -> dict[str, Any]:
    own = {"prior_precision": spec.prior.prior_precision, "fitted": spec.prior.fitted}
    return {**lora.METHOD.to_peft(spec.lora), **_NAME, **own}


METHOD = Method(
    fields=LaplaceFields,
    read=_read,
    leaves=_leaves,
    expand=_expand,
    to_peft=_to_peft,
    claims=claims("LORA", **_NAME),
    linears=lambda spec: spec.linears,
    draws=lambda spec: lora.METHOD.draws(spec.lora),
    file=_file,
    from_file=_from_file,
    posterior=True,
    alone="its posterior is fitted over the LoRA by itself",
)
