"""Attention on a TPU: the splash kernel that JAX brings, with segments and sliding window. B batch, L length, H and K heads, C head dim."""

import jax
from jax import Array

BLOCK = 512  # slots a kernel block holds at most: the size that MaxText and the kernel's own tuning tables use
_LANES = 128


def splash_takes(length: int) -> bool:
    """Whether the kernel takes rows of so many slots: whole lanes of 128."""
    return length % _LANES == 0


def splash(
    q_BLHC: Array, k_BLKC: Array, v_BLKC: Array, segment_BL: Array, first_BL: Array, sliding_window: int | None, interpret: bool = False
) -> Array:
    """As `blocks.blockwise`; padding (segment 0) sees padding. interpret: runs anywhere, slowly, for tests."""
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernels
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

    _, length, heads, dim = q_BLHC.shape
    block = next(size for size in (BLOCK, 256, _LANES) if length % size == 0)
    sizes = kernels.BlockSizes(**{name: block for name in (
        "block_q", "block_kv", "block_kv_compute", "block_q_dkv", "block_kv_dkv", "block_kv_dkv_compute", "block_q_dq", "block_kv_dq",
    )})  # fmt: skip
    one = masks.CausalMask((length, length))
    if sliding_window is not None:
        one = masks.LocalMask((length, length), (sliding_window - 1, 0), 0)
    kernel = kernels.make_splash_mha(
        masks.MultiHeadMask([one] * heads), block_sizes=sizes, head_shards=1, q_seq_shards=1, interpret=interpret,
        residual_checkpoint_name="attention",
    )  # fmt: skip

    def row(q_HLC: Array, k_KLC: Array, v_KLC: Array, segment_L: Array) -> Array:
        return kernel(q_HLC, k_KLC, v_KLC, kernels.SegmentIds(segment_L, segment_L))

    q, k, v = (x.transpose(0, 2, 1, 3) for x in (q_BLHC * dim**-0.5, k_BLKC, v_BLKC))
    return jax.vmap(row)(q.astype(q_BLHC.dtype), k, v, segment_BL).transpose(0, 2, 1, 3)
