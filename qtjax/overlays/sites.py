"""What most methods share: settings with targets, resolved to the linear modules and layers that they edit."""

import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from qtjax.errors import QtjaxError
from qtjax.overlays.base import Base, Claims
from qtjax.overlays.fields import Named, Targeted
from qtjax.overlays.leaves import Leaf, Shape
from qtjax.overlays.targets import Linear, resolve


@dataclass(frozen=True)
class Site:
    """One stacked module, and in which of its N layers it is edited."""

    linear: Linear
    hits: tuple[bool, ...]

    def keys(self, suffix: str) -> tuple[str | None, ...]:
        """PEFT's tensor name in each layer, "base_model.model.model.layers.3.self_attn.q_proj." + suffix."""
        prefix = "base_model.model."
        return tuple(f"{prefix}{self.linear.module(n)}.{suffix}" if hit else None for n, hit in enumerate(self.hits))

    def leaf(self, name: str, shape: Shape, axes: tuple[str | None, ...], key: str, **more: Any) -> Leaf:
        """A leaf "<module>/name" of one shape in all edited layers, called `key` in PEFT's file."""
        shapes = tuple(shape if hit else None for hit in self.hits)
        return Leaf(f"{self.linear.path}/{name}", shapes, axes, self.keys(key), module=self.linear.path, **more)

    def elsewhere(self, values: Array, neutral: float) -> Array:
        """`values` [N, ...] with `neutral` in the layers that are not edited, where a stored array is zero."""
        if all(self.hits):
            return values
        return jnp.where(np.reshape(self.hits, (-1, *[1] * (values.ndim - 1))), values, neutral)


@dataclass(frozen=True)
class Spec:
    """Settings by PEFT's names, and the sites that they mean for one base model."""

    fields: Any
    sites: tuple[Site, ...]

    @property
    def linears(self) -> tuple[Linear, ...]:
        return tuple(site.linear for site in self.sites)


def resolve_sites(
    base: Base, settings: Named, strict: bool, ends: bool = False, saved: Sequence[str] = ()
) -> tuple[Site, ...]:
    """The targets of `settings` in the model's order, embedding and head last. Raises QtjaxError as targets.resolve does.

    Args: ends: the method can edit the embedding and the head; saved: modules_to_save, which are no targets.
    """
    linears = base.linears
    chosen = resolve(
        settings.target_modules,
        linears,
        exclude_modules=settings.exclude_modules,
        layers_to_transform=settings.layers_to_transform if isinstance(settings, Targeted) else None,
        strict=strict,
        ends=base.ends if ends else (),
        saved=saved,
    )
    places = (*linears, *base.ends) if ends else linears
    return tuple(Site(linear, chosen[linear.path]) for linear in places if linear.path in chosen)


def layer_keys(rng: Array, linear: Linear) -> Array:
    """One key for each layer of a module, its own among all modules: what it draws in a training step."""
    return jax.random.split(jax.random.fold_in(rng, zlib.crc32(linear.path.encode())), linear.layers)


def linears_of(spec: Spec) -> Sequence[Linear]:
    """`Method.linears` of a Spec."""
    return spec.linears


def needs(peft_config: Mapping[str, Any], *names: str, method: str) -> None:
    """Raises QtjaxError when a field without which an adapter cannot be read is missing."""
    for name in names:
        if peft_config.get(name) is None:
            raise QtjaxError(f"{name}: is missing, and a {method} adapter cannot be read without it")


def claims(*types: str, **fields: Any) -> Claims:
    """`Method.claims` by peft_type and fields; without types no folder is the method's."""
    return Claims(types, tuple(fields.items()))
