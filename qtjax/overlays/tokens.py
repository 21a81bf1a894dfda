"""What the methods with virtual tokens share: their sizes in adapter_config.json, and arrays that no layer owns."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from qtjax.errors import QtjaxError
from qtjax.overlays.base import Base
from qtjax.overlays.fields import read_fields, require, setting
from qtjax.overlays.leaves import Init, Leaf, Shape, uniform
from qtjax.overlays.sites import needs

# Fields that follow from the base model: PEFT writes them, and they must be those of this one.
_DERIVED = ("token_dim", "num_attention_heads", "num_layers")


@dataclass(frozen=True)
class TokenFields:
    """num_virtual_tokens: P. PEFT has no default; 20 is what its documentation uses."""

    num_virtual_tokens: int = setting(20, "int>0")


@dataclass(frozen=True)
class Sizes:
    """PEFT's names: token_dim the width that heads divide, num_attention_heads, num_layers; of the base model."""

    token_dim: int
    num_attention_heads: int
    num_layers: int


def read_tokens(
    method: str,
    cls: type,
    base: Base,
    given: Mapping[str, Any],
    strict: bool,
    *,
    keys_and_values: bool = False,
    inert: Mapping[str, tuple[Any, ...]] | None = None,
    descriptive: tuple[str, ...] = (),
) -> tuple[Any, Sizes]:
    """(settings, sizes) of a method with virtual tokens. keys_and_values: they are those of the K kv heads, not embeddings.

    Raises QtjaxError as read_fields does, and for sizes that are another model's.
    """
    config = base.config
    if not strict:
        needs(given, "num_virtual_tokens", method=method)
    inert = {"num_transformer_submodules": (None, 1)} | dict(inert or {})
    settings = read_fields(method, cls, given, base.linears, inert=inert, descriptive=(*_DERIVED, *descriptive))
    heads = config.num_key_value_heads if keys_and_values else config.num_attention_heads
    width = heads * config.head_dim if keys_and_values else config.hidden_size
    sizes = Sizes(width, heads, config.num_hidden_layers)
    for name in _DERIVED if keys_and_values else ("token_dim", "num_layers"):
        own, value = getattr(sizes, name), given.get(name)
        # A caller may give PEFT's fields for a prefix as they are before PEFT rewrites them to the kv heads'.
        unwritten = strict and {"token_dim": config.hidden_size, "num_attention_heads": config.num_attention_heads}.get(name)
        fits = value in (None, own) or value == unwritten
        require(fits, name, value, f"this base model has {own}; it is for another base")
    return settings, sizes


def described(sizes: Sizes) -> dict[str, Any]:
    """The sizes as adapter_config.json holds them."""
    own = {name: getattr(sizes, name) for name in _DERIVED}
    return own | {"num_transformer_submodules": 1, "modules_to_save": None}


def whole(path: str, shape: Shape, axes: tuple[str | None, ...], key: str, init: Init, **more: Any) -> Leaf:
    """A leaf that exists once, called `key` in PEFT's file or in ours."""
    return Leaf(path, (shape,), axes, (key,), init, stacked=False, **more)


def dense_leaves(path: str, key: str, inputs: int, outputs: int, axes: tuple[str | None, str | None]) -> list[Leaf]:
    """weight [in, out] and bias [out] of a torch Linear, with its initialisation: both U(+-1/sqrt(in))."""
    init = uniform(inputs**-0.5)
    flip = {"to_peft": lambda x: x.T, "from_peft": lambda x: x.T}
    return [
        whole(f"{path}/weight", (inputs, outputs), axes, f"{key}.weight", init, **flip),
        whole(f"{path}/bias", (outputs,), axes[1:], f"{key}.bias", init),
    ]


def dense(layer: Mapping[str, Array], x: Array) -> Array:
    """x W + b in float32, exact on every device: the encoders are small and what they give is stored."""
    return exact(x, layer["weight"]) + layer["bias"]


def exact(a: Array, b: Array) -> Array:
    """a @ b without reduced precision."""
    return jnp.matmul(jnp.asarray(a, jnp.float32), jnp.asarray(b, jnp.float32), precision=jax.lax.Precision.HIGHEST)


def embeddings_of(base: Mapping[str, Any], ids: Array) -> Array:
    """Rows of the base model's embedding table, float32 [n, D]. Raises QtjaxError where only shapes were given."""
    table = base.get("embed_tokens/embedding")
    if table is None or isinstance(table, jax.ShapeDtypeStruct):
        raise QtjaxError(
            "prompt_tuning_init: starts from the base model's embeddings: give init_overlay its params, or use 'RANDOM'"
        )
    return jnp.take(jnp.asarray(table), ids, axis=0).astype(jnp.float32)
