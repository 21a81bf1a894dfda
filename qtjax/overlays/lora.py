"""LoRA (Hu et al. 2021, arXiv 2106.09685): y = x W + s (dropout(x) A) B, with A [in, R] random and B [R, out] zero.

s = lora_alpha / r, or lora_alpha / sqrt(r) with use_rslora (Kalajdzievski 2023, arXiv 2312.03732). Fields, names and
defaults of meaning are those of PEFT. Ranks may differ by module and layer (rank_pattern, layers_to_transform): the
factors of all layers are stacked at the largest rank and padded with zeros. The padding stays zero without a mask: the
gradient of a column of A is proportional to the matching row of B and the other way round.
"""

import math
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from qtjax.errors import QtjaxError
from qtjax.models import Edits, LinearEdit
from qtjax.overlays.base import Base, Context, Method
from qtjax.overlays.fields import Targeted, read_fields, setting, to_peft
from qtjax.overlays.leaves import Init, Leaf, transposed, uniform, zeros
from qtjax.overlays.sites import claims, linears_of, needs, resolve_sites
from qtjax.overlays.targets import Linear, check_patterns, pattern_value
from qtjax.tree import Tree, flatten, unflatten

# Fields of LoraConfig (peft 0.21) whose only supported values are listed; they are checked, never ignored.
_INERT: dict[str, tuple[Any, ...]] = {
    "lora_bias": (False, None),
    "use_dora": (False, None),
    "use_qalora": (False, None),
    "use_bdlora": (False, None),
    "ensure_weight_tying": (False, None),
    "layer_replication": (None, []),
    "trainable_token_indices": (None, [], {}),
    "target_parameters": (None, []),
    "alora_invocation_tokens": (None, []),
    "loftq_config": (None, {}),
    "megatron_config": (None, {}),
}  # fmt: skip

# Initialisations that leave the base weights alone, so that an adapter made with them means what its file says.
_SAFE_INITS = (True, False, "gaussian", "orthogonal")


@dataclass(frozen=True)
class LoraFields(Targeted):
    """r: rank; scale lora_alpha / r; lora_dropout: fraction [0, 1) of the side path's input dropped in training.

    target_modules: a regex or a sorted tuple of names; rank_pattern, alpha_pattern: (regex, value) pairs, first match
    wins; layers_to_transform: layer indices or None for all.
    """

    r: int = setting(8, "int>0")
    lora_alpha: float = setting(16.0, "number")
    lora_dropout: float = setting(0.0, "[0,1)")
    use_rslora: bool = setting(False, "bool")
    rank_pattern: tuple[tuple[str, int], ...] = setting((), "pattern:int>0")
    alpha_pattern: tuple[tuple[str, float], ...] = setting((), "pattern:number")
    init_lora_weights: bool | str = setting(True, "choice", _SAFE_INITS)


@dataclass(frozen=True)
class LoraSite:
    """One stacked module: its sizes, and rank and scale of each of the N layers (rank 0: the layer is not edited)."""

    linear: Linear
    ranks: tuple[int, ...]
    scales: tuple[float, ...]

    @property
    def rank(self) -> int:
        return max(self.ranks)


@dataclass(frozen=True)
class LoraSpec:
    """LoRA's settings by PEFT's names, and what they mean for one base model."""

    fields: LoraFields
    sites: tuple[LoraSite, ...]

    @property
    def linears(self) -> tuple[Linear, ...]:
        return tuple(site.linear for site in self.sites)


def lora_sites(base: Base, settings: LoraFields, strict: bool) -> tuple[LoraSite, ...]:
    """Targets with ranks and scales. Raises QtjaxError for a rank above a matrix's own and patterns that match nothing."""
    sites = []
    for linear, hits in ((site.linear, site.hits) for site in resolve_sites(base, settings, strict)):
        ranks, scales = [], []
        for n, hit in enumerate(hits):
            rank = pattern_value(settings.rank_pattern, linear.module(n), settings.r, "rank_pattern") if hit else 0
            alpha = pattern_value(settings.alpha_pattern, linear.module(n), settings.lora_alpha, "alpha_pattern")
            limit = min(linear.inputs, linear.outputs)
            if rank > limit:
                raise QtjaxError(
                    f"r = {rank}: {linear.module(n)} is {linear.inputs} x {linear.outputs}, so its rank is at most"
                    f" {limit}; lower r, or set rank_pattern for {linear.name!r}"
                )
            ranks.append(rank)
            scales.append(float(alpha) / (math.sqrt(rank) if settings.use_rslora else rank) if hit else 0.0)
        sites.append(LoraSite(linear, tuple(ranks), tuple(scales)))
    if strict:
        modules = [site.linear.module(n) for site in sites for n, rank in enumerate(site.ranks) if rank]
        check_patterns(settings.rank_pattern, modules, "rank_pattern")
        check_patterns(settings.alpha_pattern, modules, "alpha_pattern")
    return tuple(sites)


def _read(base: Base, fields: Mapping[str, Any], strict: bool) -> LoraSpec:
    if not strict:
        needs(fields, "r", "lora_alpha", "target_modules", method="LoRA")
    settings = read_fields(
        "lora", LoraFields, fields, base.linears, inert=_INERT, descriptive=("megatron_core", "qalora_group_size")
    )
    if strict and settings.init_lora_weights not in (True, "gaussian"):
        raise QtjaxError(f"init_lora_weights = {settings.init_lora_weights!r}: must be True or 'gaussian'")
    return LoraSpec(settings, lora_sites(base, settings, strict))


def _down_init(site: LoraSite, kind: bool | str) -> Init:
    """A ~ U(+-1/sqrt(in)), which is torch's kaiming_uniform(a=sqrt(5)), or N(0, 1/r) ("gaussian")."""
    if kind != "gaussian":
        return uniform(1 / math.sqrt(site.linear.inputs))
    std = 1 / np.maximum(np.asarray(site.ranks, np.float32), 1)
    return lambda key, shape, base: jax.random.normal(key, shape, jnp.float32) * std[:, None, None]


def lora_leaves(spec: LoraSpec) -> list[Leaf]:
    """lora_A [in, r] and lora_B [r, out]; PEFT stores torch's layouts, [r, in] and [out, r]."""
    leaves = []
    for site in spec.sites:
        linear, ranks = site.linear, site.ranks
        for name, shapes, axes, init in (
            ("lora_A", [(linear.inputs, r) for r in ranks], ("in", None), _down_init(site, spec.fields.init_lora_weights)),
            ("lora_B", [(r, linear.outputs) for r in ranks], (None, "out"), zeros),
        ):
            keys = tuple(f"base_model.model.{linear.module(n)}.{name}.weight" if r else None for n, r in enumerate(ranks))
            shapes = tuple(shape if r else None for shape, r in zip(shapes, ranks))
            leaves.append(Leaf(f"{linear.path}/{name}", shapes, axes, keys, init, linear.path, **transposed()))
    return leaves


def lora_edits(spec: LoraSpec, params: Tree, rng: Array | None) -> dict[str, LinearEdit]:
    """{module path: the side path} with the scale in `up`, which costs least."""
    flat, edits = flatten(params), {}
    rate = spec.fields.lora_dropout
    for site in spec.sites:
        path, layers = site.linear.path, site.linear.layers
        up = flat[f"{path}/lora_B"]
        scale = jnp.asarray(site.scales, up.dtype)[:, None, None]
        keys = None
        if rng is not None and rate > 0:
            keys = jax.random.split(jax.random.fold_in(rng, zlib.crc32(path.encode())), layers)
        edits[path] = LinearEdit(down=flat[f"{path}/lora_A"], up=up * scale, dropout_key=keys, dropout_rate=rate)
    return edits


def _expand(spec: LoraSpec, params: Tree, frozen: Tree, context: Context) -> Edits:
    del frozen
    return Edits(unflatten({f"{path}/edit": edit for path, edit in lora_edits(spec, params, context.rng).items()}))


def _to_peft(spec: LoraSpec) -> dict[str, Any]:
    off = {"bias": "none", "fan_in_fan_out": False, "lora_bias": False, "modules_to_save": None, "layers_pattern": None}
    return {"peft_type": "LORA", **to_peft(spec.fields), **off, "use_dora": False}


METHOD = Method(
    fields=LoraFields,
    read=_read,
    leaves=lora_leaves,
    expand=_expand,
    to_peft=_to_peft,
    claims=claims("LORA", use_dora=False, qtjax_method=False),
    linears=linears_of,
    draws=lambda spec: spec.fields.lora_dropout > 0,
)
