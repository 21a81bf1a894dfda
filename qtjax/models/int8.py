"""Products in eight bits, for passes without a gradient: a scoring pass that may be a little off.

Weights by column and activations by token, each with its own scale of absmax / 127, are formed anew in the pass itself: the weights change
with every step. Matrix units run int8 at up to twice the rate of bfloat16. Embedding, head, norms, attention and softmax stay as they are.
"""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

from qtjax.models.quantized import is_quantized_path
from qtjax.tree import Tree, flatten, unflatten


@dataclass(frozen=True)
class Int8:
    """A kernel [..., in, out]: codes int8, scale float32 [..., 1, out]."""

    codes: Array
    scale: Array

    @property
    def shape(self) -> tuple[int, ...]:
        """[..., in, out]"""
        return self.codes.shape

    def dequantize(self, dtype: Any) -> Array:
        """The matrix that it stands for."""
        return (self.codes * self.scale).astype(dtype)

    def times(self, x: Array) -> Array:
        """x [..., in] times the matrix, in x's dtype, from an int32 product."""
        codes, scale = _rounded(x.reshape(-1, x.shape[-1]), axis=1)
        sums = lax.dot_general(codes, self.codes, (((1,), (0,)), ((), ())), preferred_element_type=jnp.int32)
        return (sums * (scale * self.scale)).astype(x.dtype).reshape(*x.shape[:-1], self.shape[-1])


jax.tree_util.register_dataclass(Int8, data_fields=["codes", "scale"], meta_fields=[])


def int8_layers(params: Tree) -> Tree:
    """The parameter tree with the layers' kernels as Int8; jit-able."""
    leaves = flatten(params)
    return unflatten({path: Int8(*_rounded(leaf, axis=-2)) if is_quantized_path(path) else leaf for path, leaf in leaves.items()})


def _rounded(x: Array, axis: int) -> tuple[Array, Array]:
    """(int8 codes, float32 scale) with one scale along `axis`; zeros stay zeros."""
    x = x.astype(jnp.float32)
    scale = jnp.max(jnp.abs(x), axis=axis, keepdims=True) / 127
    return jnp.round(x / jnp.where(scale > 0, scale, 1)).astype(jnp.int8), scale
