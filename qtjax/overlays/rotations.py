"""Orthogonal blocks: Cayley maps of skew-symmetric matrices and products with block-diagonal matrices, for OFT and BOFT.

Everything that makes a rotation is float32 at full matrix-product precision; b is a block's size, J the number of blocks.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

_product = partial(jnp.matmul, precision=jax.lax.Precision.HIGHEST)


def skew(upper: Array, size: int) -> Array:
    """Skew-symmetric [..., b, b] from its upper triangle, row by row: [..., b (b - 1) / 2]."""
    rows, columns = np.triu_indices(size, 1)
    half = jnp.zeros((*upper.shape[:-1], size, size), upper.dtype).at[..., rows, columns].set(upper)
    return half - jnp.swapaxes(half, -1, -2)


def cayley(q: Array) -> Array:
    """(I - Q)(I + Q)^-1 of skew-symmetric Q [..., b, b]: orthogonal, about I - 2 Q."""
    one = jnp.eye(q.shape[-1], dtype=q.dtype)
    return jnp.linalg.solve(one + q, one - q)  # the two factors commute


def cayley_neumann(q: Array, terms: int) -> Array:
    """The series of (I + Q)(I - Q)^-1 broken off after `terms` terms: I + 2 Q + 2 Q^2 + ... + Q^(terms - 1).

    About I + 2 Q: against `cayley` it turns the other way. It is orthogonal only as far as the series has converged.
    As in PEFT the last coefficient is 1, of 2 terms it is 2, and 3 terms are 4.
    """
    total = jnp.eye(q.shape[-1], dtype=q.dtype) + 2 * q
    if terms == 2:
        return total
    power = q
    for _ in range(2, max(terms, 4) - 1):
        power = _product(power, q)
        total += 2 * power
    return total + _product(power, q)


def rotate_blocks(blocks: Array, x: Array) -> Array:
    """x blockdiag(R_1 ... R_J): x [..., J b], blocks [J, b, b], or [1, b, b] for one that is repeated. In x's dtype."""
    size = blocks.shape[-1]
    grid = x.reshape(*x.shape[:-1], -1, size)
    exact = partial(jnp.einsum, precision=jax.lax.Precision.HIGHEST)
    if blocks.shape[0] == 1:
        turned = exact("...jb,bc->...jc", grid, blocks[0].astype(x.dtype))
    else:
        turned = exact("...jb,jbc->...jc", grid, blocks.astype(x.dtype))
    return turned.reshape(x.shape)


def dropped(key: Array, blocks: Array, rate: float) -> Array:
    """Blocks [..., J, b, b], each of them the identity with probability `rate` (multiplicative dropout)."""
    gone = jax.random.bernoulli(key, rate, blocks.shape[:-2])[..., None, None]
    return jnp.where(gone, jnp.eye(blocks.shape[-1], dtype=blocks.dtype), blocks)
