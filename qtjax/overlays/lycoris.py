"""What LoHa and LoKr share: settings, rank and scale of each layer, and LyCORIS' two kinds of dropout."""

from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax import Array

from qtjax.overlays.base import Base
from qtjax.overlays.fields import Targeted, setting
from qtjax.overlays.leaves import Init, Leaf, Shape, transposed
from qtjax.overlays.sites import Site, Spec, layer_keys, resolve_sites
from qtjax.overlays.targets import check_patterns, pattern_value

# Of PEFT's fields: convolutions do not occur here.
INERT = {"use_effective_conv2d": (False, True, None)}


@dataclass(frozen=True)
class LycorisFields(Targeted):
    """r: rank; scale alpha / r. rank_dropout: fraction of the outputs of a module that its delta leaves alone in a
    training step; module_dropout: fraction of the modules that are left alone whole, their deltas not rescaled."""

    r: int = setting(8, "int>0")
    alpha: float = setting(8.0, "number")
    rank_dropout: float = setting(0.0, "[0,1)")
    module_dropout: float = setting(0.0, "[0,1)")
    rank_pattern: tuple[tuple[str, int], ...] = setting((), "pattern:int>0")
    alpha_pattern: tuple[tuple[str, float], ...] = setting((), "pattern:number")


@dataclass(frozen=True)
class RankedSite(Site):
    """A site with the rank and scale of each layer, 0 where it is not edited."""

    ranks: tuple[int, ...]
    scales: tuple[float, ...]

    def factor(
        self, name: str, shape: Callable[[int], Shape | None], init: Init, axes: tuple[str | None, str | None] = (None, None)
    ) -> Leaf:
        """A matrix "<module>/name" whose shape follows from the layer's rank (None: that layer has none); the file holds
        it transposed."""
        shapes = tuple(shape(r) if r else None for r in self.ranks)
        return Leaf(f"{self.linear.path}/{name}", shapes, axes, self.keys(name), init, self.linear.path, **transposed())

    def scaled(self, factor: Array) -> Array:
        """factor [N, ...] times each layer's scale."""
        return factor * jnp.asarray(self.scales, factor.dtype).reshape(-1, *[1] * (factor.ndim - 1))


def ranked_sites(base: Base, settings: LycorisFields, strict: bool) -> tuple[RankedSite, ...]:
    """The targets with each layer's rank and scale. Raises QtjaxError for patterns that match nothing."""
    sites = []
    for site in resolve_sites(base, settings, strict):
        modules = [site.linear.module(n) for n in range(site.linear.layers)]
        ranks = tuple(
            pattern_value(settings.rank_pattern, module, settings.r, "rank_pattern") if hit else 0
            for module, hit in zip(modules, site.hits)
        )
        scales = tuple(
            pattern_value(settings.alpha_pattern, module, settings.alpha, "alpha_pattern") / rank if rank else 0.0
            for module, rank in zip(modules, ranks)
        )
        sites.append(RankedSite(site.linear, site.hits, ranks, scales))
    if strict:
        edited = [site.linear.module(n) for site in sites for n, hit in enumerate(site.hits) if hit]
        check_patterns(settings.rank_pattern, edited, "rank_pattern")
        check_patterns(settings.alpha_pattern, edited, "alpha_pattern")
    return tuple(sites)


def draws(spec: Spec) -> bool:
    """Whether a training step draws anything."""
    return spec.fields.rank_dropout > 0 or spec.fields.module_dropout > 0


def kept_outputs(spec: Spec, site: RankedSite, rng: Array | None, rescale: bool) -> Array | None:
    """Factor [N, out] of a delta's outputs for this step: 0 where dropped; with `rescale` the kept ones have mean 1 in
    each module, as in PEFT (which divides by zero when none is kept; here that module is left alone)."""
    if rng is None or not draws(spec):
        return None
    outputs, settings = site.linear.outputs, spec.fields

    def one(key: Array) -> Array:
        of_outputs, of_module = jax.random.split(key)
        keep = jax.random.bernoulli(of_outputs, 1 - settings.rank_dropout, (outputs,)).astype(jnp.float32)
        keep = keep / jnp.maximum(keep.mean(), 1 / outputs) if rescale else keep
        return keep * jax.random.bernoulli(of_module, 1 - settings.module_dropout)

    return jax.vmap(one)(layer_keys(rng, site.linear))
