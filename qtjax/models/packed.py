"""Attention on a Hopper GPU, run by run: cuDNN's kernel told where the samples of a packed row begin.

Told by a mask, [B, L, L], it computes all of a row and reads the mask in every layer: 1.5 to 2 times the seconds of a plain causal kernel
where a row is one sample, and more where it is several (docs/performance.md). B batch, L length, M runs, H and K heads, C head dim.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array


class Runs(NamedTuple):
    """Every run of slots of one segment, padding's too, in the order of a row: int32 [B, M], -1 beyond the last.

    M = 1: each row is one sample, and padding after it, which causality keeps from being seen.
    """

    start: Array
    length: Array


def runs(segment_BL: Array, most: int) -> tuple[Runs, Array]:
    """(the runs of each row of at most `most` samples and then padding, bool [B]: whether it is such a row)."""
    batch, length = segment_BL.shape
    begins = jnp.pad(segment_BL[:, 1:] != segment_BL[:, :-1], ((0, 0), (1, 0)), constant_values=True)
    real = segment_BL != 0
    fits = ((begins & real).sum(axis=1) <= most) & ~(real[:, 1:] & ~real[:, :-1]).any(axis=1)
    if most == 1:
        whole = jnp.full((batch, 1), length, jnp.int32)
        return Runs(jnp.zeros_like(whole), whole), fits
    start = jax.vmap(lambda row: jnp.nonzero(row, size=most + 1, fill_value=length)[0])(begins).astype(jnp.int32)
    stop = jnp.pad(start[:, 1:], ((0, 0), (0, 1)), constant_values=length)
    there = start < length
    return Runs(jnp.where(there, start, -1), jnp.where(there, stop - start, -1)), fits


def by_runs(q_BLHC: Array, k_BLKC: Array, v_BLKC: Array, given: Runs) -> Array:
    """Softmax attention of every slot to those of its own run that are not later. [B, L, H, C], differentiable."""
    if given.start.shape[1] == 1:
        return jax.nn.dot_product_attention(q_BLHC, k_BLKC, v_BLKC, is_causal=True, implementation="cudnn")
    from jax._src.cudnn import fused_attention_stablehlo as cudnn  # jax.nn's door to it takes no offsets

    offsets = jnp.pad(given.start, ((0, 0), (0, 1)), constant_values=-1)
    return cudnn.dot_product_attention(
        q_BLHC, k_BLKC, v_BLKC, q_seqlen=given.length, kv_seqlen=given.length, q_offsets=offsets, kv_offsets=offsets,
        scale=q_BLHC.shape[-1] ** -0.5, mask_type=cudnn.MaskType.PADDING_CAUSAL,
    )  # fmt: skip
