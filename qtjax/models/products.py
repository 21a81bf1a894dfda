"""Products of activations and kernels: plain, quantised, in eight bits, in sixteen.

T = B L slots in one axis.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.ad_checkpoint import checkpoint_name


def as_array(leaf: Any, dtype: Any) -> Array:
    """A kernel leaf as an array: quantised leaves are dequantised."""
    return leaf.dequantize(dtype) if hasattr(leaf, "dequantize") else leaf.astype(dtype)


def product(x: Array, kernel: Any, delta: Callable[[], Array] | None = None) -> Array:
    """x (W + delta). What is formed for it (a dequantised W, the sum) is formed again in the backward pass, not kept."""
    if delta is None and hasattr(kernel, "times"):
        return kernel.times(x)
    if delta is None and not hasattr(kernel, "dequantize"):
        return matmul(x, kernel.astype(x.dtype))
    return _formed(x, kernel, delta)


def matmul(x: Array, w: Array) -> Array:
    """x @ w over one long axis: of [B, L, D] a CPU's backward pass would write a transposed copy, and what fuses into it slowly.

    w [in, out]; or [B, in, out], a matrix for each row, where that does not hold.
    """
    if w.ndim > 2:
        return x @ w
    flat = x.reshape(-1, x.shape[-1])
    y = flat @ w if x.dtype == jnp.float32 else _half(flat, w)
    return y.reshape(*x.shape[:-1], w.shape[-1])


@jax.custom_vjp
def _half(x: Array, w: Array) -> Array:
    """x [T, in] @ w [in, out] in 16 bits. Named, since a remat policy cannot see the product inside."""
    return checkpoint_name(_product16(x, w, (1, 0)), "product")


def _product16(a: Array, b: Array, contract: tuple[int, int]) -> Array:
    """A CPU's matrix units give float32, and rounding that is twice as fast as XLA's own 16-bit product; elsewhere plain, since sums
    over devices would move as float32."""
    dims = (((contract[0],), (contract[1],)), ((), ()))
    rounded = lambda a, b: lax.dot_general(a, b, dims, preferred_element_type=jnp.float32).astype(a.dtype)  # noqa: E731
    return lax.platform_dependent(a, b, cpu=rounded, default=lambda a, b: lax.dot_general(a, b, dims))


def _half_forward(x: Array, w: Array) -> tuple[Array, tuple[Array, Array]]:
    return checkpoint_name(_product16(x, w, (1, 0)), "product"), (x, w)


def _half_backward(kept: tuple[Array, Array], dy: Array) -> tuple[Array, Array]:
    x, w = kept
    return _product16(dy, w, (1, 1)), _product16(x, dy, (0, 0))


_half.defvjp(_half_forward, _half_backward)


@jax.checkpoint
def _formed(x: Array, kernel: Any, delta: Callable[[], Array] | None) -> Array:
    w = as_array(kernel, x.dtype)
    return matmul(x, w if delta is None else w + delta().astype(x.dtype))


@jax.checkpoint
def through(x: Array, delta: Callable[[], Array]) -> Array:
    """x delta, the delta formed again in the backward pass."""
    return matmul(x, delta().astype(x.dtype))
