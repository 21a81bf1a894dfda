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

from qtjax import models
from qtjax.errors import QtjaxError
from qtjax.overlays.base import Method
from qtjax.overlays.lora_fields import LoraFields, read_fields
from qtjax.overlays.targets import Linear, check_patterns, linear_modules, pattern_value, resolve
from qtjax.tree import Tree, flatten, unflatten


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


def _spec(base: Tree, fields: LoraFields, strict: bool) -> LoraSpec:
    linears = linear_modules(base)
    chosen = resolve(
        fields.target_modules,
        linears,
        exclude_modules=fields.exclude_modules,
        layers_to_transform=fields.layers_to_transform,
        strict=strict,
    )
    sites = []
    for linear in (linear for linear in linears if linear.path in chosen):
        ranks, scales = [], []
        for n, hit in enumerate(chosen[linear.path]):
            rank = pattern_value(fields.rank_pattern, linear.module(n), fields.r, "rank_pattern") if hit else 0
            alpha = pattern_value(fields.alpha_pattern, linear.module(n), fields.lora_alpha, "alpha_pattern")
            limit = min(linear.inputs, linear.outputs)
            if rank > limit:
                raise QtjaxError(
                    f"r = {rank}: {linear.module(n)} is {linear.inputs} x {linear.outputs}, so its rank is at most"
                    f" {limit}; lower r, or set rank_pattern for {linear.name!r}"
                )
            ranks.append(rank)
            scales.append(float(alpha) / (math.sqrt(rank) if fields.use_rslora else rank) if hit else 0.0)
        sites.append(LoraSite(linear, tuple(ranks), tuple(scales)))
    if strict:
        modules = [site.linear.module(n) for site in sites for n, rank in enumerate(site.ranks) if rank]
        check_patterns(fields.rank_pattern, modules, "rank_pattern")
        check_patterns(fields.alpha_pattern, modules, "alpha_pattern")
    return LoraSpec(fields, tuple(sites))


def _columns(site: LoraSite) -> np.ndarray:
    """bool [N, R]: which of the stacked ranks are real."""
    return np.arange(site.rank) < np.asarray(site.ranks)[:, None]


def _init(base: Tree, key: Array, fields: Mapping[str, Any]) -> tuple[LoraSpec, Tree, Tree]:
    """A ~ U(+-1/sqrt(in)), which is torch's kaiming_uniform(a=sqrt(5)), or N(0, 1/r) ("gaussian"); B = 0."""
    settings = read_fields({"target_modules": "all-linear", "r": 8, "lora_alpha": 16.0, **fields}, linear_modules(base))
    if settings.init_lora_weights not in (True, "gaussian"):
        raise QtjaxError(f"init_lora_weights = {settings.init_lora_weights!r}: must be True or 'gaussian'")
    spec = _spec(base, settings, strict=True)
    shapes, params = flatten(_abstract(spec)[0]), {}
    for site in spec.sites:
        linear = site.linear
        own = jax.random.fold_in(key, zlib.crc32(linear.path.encode()))
        shape = shapes[f"{linear.path}/lora_A"].shape
        if settings.init_lora_weights is True:
            bound = 1 / math.sqrt(linear.inputs)
            down = jax.random.uniform(own, shape, jnp.float32, -bound, bound)
        else:
            std = 1 / np.maximum(np.asarray(site.ranks, np.float32), 1)
            down = jax.random.normal(own, shape, jnp.float32) * std[:, None, None]
        params[f"{linear.path}/lora_A"] = jnp.where(_columns(site)[:, None, :], down, 0)
        params[f"{linear.path}/lora_B"] = jnp.zeros(shapes[f"{linear.path}/lora_B"].shape, jnp.float32)
    return spec, unflatten(params), {}


def _sites(spec: LoraSpec, params: Tree, frozen: Tree, rng: Array | None) -> Tree:
    del frozen
    flat, edits = flatten(params), {}
    rate = spec.fields.lora_dropout
    for site in spec.sites:
        path, layers = site.linear.path, site.linear.layers
        up = flat[f"{path}/lora_B"]
        scale = jnp.asarray(site.scales, up.dtype)[:, None, None]
        keys = None
        if rng is not None and rate > 0:
            keys = jax.random.split(jax.random.fold_in(rng, zlib.crc32(path.encode())), layers)
        edits[f"{path}/edit"] = models.LinearEdit(
            down=flat[f"{path}/lora_A"], up=up * scale, dropout_key=keys, dropout_rate=rate
        )
    return unflatten(edits)


def _axes(spec: LoraSpec, base_axes: Mapping[str, tuple]) -> tuple[Tree, Tree]:
    axes = {}
    for site in spec.sites:
        layers, inputs, outputs = base_axes[f"{site.linear.path}/kernel"]
        axes[f"{site.linear.path}/lora_A"] = (layers, inputs, None)
        axes[f"{site.linear.path}/lora_B"] = (layers, None, outputs)
    return unflatten(axes), {}


def _count(spec: LoraSpec) -> int:
    return sum(sum(site.ranks) * (site.linear.inputs + site.linear.outputs) for site in spec.sites)


def _abstract(spec: LoraSpec) -> tuple[Tree, Tree]:
    shapes = {}
    for site in spec.sites:
        linear = site.linear
        shapes[f"{linear.path}/lora_A"] = (linear.layers, linear.inputs, site.rank)
        shapes[f"{linear.path}/lora_B"] = (linear.layers, site.rank, linear.outputs)
    return unflatten({path: jax.ShapeDtypeStruct(shape, jnp.float32) for path, shape in shapes.items()}), {}


def _claims(peft_config: Mapping[str, Any]) -> bool:
    return peft_config.get("peft_type") == "LORA"


def _from_peft(base: Tree, peft_config: Mapping[str, Any]) -> LoraSpec:
    for field in ("r", "lora_alpha", "target_modules"):
        if peft_config.get(field) is None:
            raise QtjaxError(f"{field}: is missing, and a LoRA adapter cannot be read without it")
    return _spec(base, read_fields(peft_config, linear_modules(base)), strict=False)


def _to_peft(spec: LoraSpec) -> dict[str, Any]:
    return {"peft_type": "LORA", **spec.fields.to_peft()}


def _keys(site: LoraSite, layer: int) -> tuple[str, str]:
    prefix = f"base_model.model.{site.linear.module(layer)}"
    return f"{prefix}.lora_A.weight", f"{prefix}.lora_B.weight"


def _tensors(spec: LoraSpec, params: Tree, frozen: Tree) -> dict[str, Any]:
    """PEFT stores torch layouts: lora_A.weight [r, in], lora_B.weight [out, r]; unedited layers are not written."""
    del frozen
    flat, tensors = flatten(params), {}
    for site in spec.sites:
        down, up = flat[f"{site.linear.path}/lora_A"], flat[f"{site.linear.path}/lora_B"]
        for n, rank in enumerate(site.ranks):
            if rank:
                key_a, key_b = _keys(site, n)
                tensors[key_a], tensors[key_b] = down[n, :, :rank].T, up[n, :rank, :].T
    return tensors


def _trees(spec: LoraSpec, tensors: Mapping[str, Any]) -> tuple[Tree, Tree]:
    params = {}
    for site in spec.sites:
        linear = site.linear
        down = np.zeros((linear.layers, linear.inputs, site.rank), np.float32)
        up = np.zeros((linear.layers, site.rank, linear.outputs), np.float32)
        for n, rank in enumerate(site.ranks):
            if rank:
                key_a, key_b = _keys(site, n)
                down[n, :, :rank], up[n, :rank, :] = tensors[key_a].T, tensors[key_b].T
        params[f"{linear.path}/lora_A"], params[f"{linear.path}/lora_B"] = jnp.asarray(down), jnp.asarray(up)
    return unflatten(params), {}


METHOD = Method(
    init=_init,
    sites=_sites,
    axes=_axes,
    count=_count,
    abstract=_abstract,
    claims=_claims,
    from_peft=_from_peft,
    to_peft=_to_peft,
    tensors=_tensors,
    trees=_trees,
    draws=lambda spec: spec.fields.lora_dropout > 0,
)
