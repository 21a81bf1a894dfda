"""Rotary positions, who may see whom, and attention itself.

B batch, L query slots, S key slots, H query heads, K key/value heads, C head dim.
"""

import math
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.sharding import PartitionSpec as P

from qtjax.models.blocks import blockwise
from qtjax.models.config import ModelConfig, RopeScaling
from qtjax.models.packed import Runs, by_runs
from qtjax.models.splash import splash, splash_takes


def rope_frequencies(head_dim: int, theta: float, scaling: RopeScaling | None) -> Array:
    """Inverse frequencies [C/2], float32, radians per position.

    "llama3" keeps short wavelengths, divides long ones by `factor` and blends between (Llama 3.1 model card; the
    same bands as transformers' `_compute_llama3_parameters`).
    """
    inverse = 1.0 / (theta ** (jnp.arange(0, head_dim, 2, dtype=jnp.float32) / head_dim))
    if scaling is None:
        return inverse
    if scaling.rope_type == "linear":
        return inverse / scaling.factor
    wavelength = 2 * math.pi / inverse
    original = scaling.original_max_position_embeddings
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    blend = (original / wavelength - low) / (high - low)
    smooth = (1 - blend) * inverse / scaling.factor + blend * inverse
    scaled = jnp.where(wavelength > original / low, inverse / scaling.factor, smooth)
    return jnp.where(wavelength < original / high, inverse, scaled)


def rope_tables(config: ModelConfig, position_ids: Array) -> tuple[Array, Array]:
    """cos and sin [B, L, 1, C/2], float32, for position_ids [B, L]."""
    frequencies = rope_frequencies(config.head_dim, config.rope_theta, config.rope_scaling)
    angles = position_ids.astype(jnp.float32)[..., None, None] * frequencies
    return jnp.cos(angles), jnp.sin(angles)


def rotate(x_BLHC: Array, cos: Array, sin: Array) -> Array:
    """Rotates pairs (c, c + C/2), the half-split layout of Hugging Face's checkpoints."""
    first, second = jnp.split(x_BLHC.astype(jnp.float32), 2, axis=-1)
    rotated = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return rotated.astype(x_BLHC.dtype)


def visible(
    query_slots: Array, key_slots: Array, query_segments: Array, key_segments: Array, sliding_window: int | None
) -> Array:
    """bool [B, 1, L, S]: a query sees keys of its own nonzero segment, not later than itself, within the window.

    Args: slots int [L] and [S] (positions in the row: the window counts slots), segments int [B, L] and [B, S].
    """
    distance = query_slots[:, None] - key_slots[None, :]
    near = distance >= 0
    if sliding_window is not None:
        near &= distance < sliding_window
    same = (query_segments[:, :, None] == key_segments[:, None, :]) & (key_segments != 0)[:, None, :]
    return (near[None] & same)[:, None]


class Segments(NamedTuple):
    """Who sees whom, where a kernel can tell from the row alone: a slot sees its own nonzero segment up to itself, within the window.

    segment int32 [B, L], 0 for padding; first int32 [B, L], the first slot of a slot's segment.
    """

    segment: Array
    first: Array


KERNELS = {"cpu": "blocks", "gpu": "cudnn", "cuda": "cudnn", "tpu": "splash"}


def kernel_of(platform: str, dtype: str) -> str:
    """ModelConfig.attention for devices of a platform: "blocks" on a CPU, "cudnn" on NVIDIA (16 bits), "splash" on TPU, else "xla"."""
    kernel = KERNELS.get(platform, "xla")
    return "xla" if kernel == "cudnn" and dtype == "float32" else kernel


def by_segments(config: ModelConfig, batch: int, length: int) -> bool:
    """Whether config.attention is a kernel that takes `Segments` of such rows, on the mesh that is set."""
    if config.attention not in ("blocks", "splash"):
        return False
    if config.attention == "splash" and not splash_takes(length):
        return False
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return config.attention == "blocks" or jax.device_count() == 1  # XLA cannot cut a TPU kernel by itself
    if mesh.size == 1:
        return True
    if not {"data", "fsdp", "tensor"} <= set(mesh.axis_names) or mesh.manual_axes:
        return False
    ways = mesh.shape["data"] * mesh.shape["fsdp"]
    return not (batch % ways or config.num_key_value_heads % mesh.shape["tensor"])


def kernel_for(config: ModelConfig, batch: int, length: int) -> str:
    """The kernel that rows [batch, length] really take on the mesh that is set: config.attention, or "xla" where that takes no such rows.

    With virtual tokens, a prefix or a rating it is always "xla" (but "cudnn" stays with a rating, whose weights are formed beside it).
    """
    if config.attention == "cudnn":
        return "cudnn" if _cudnn_takes(config.head_dim, length) else "xla"
    return config.attention if by_segments(config, batch, length) else "xla"


def takes_runs(config: ModelConfig, length: int) -> bool:
    """Whether rows of so many slots go to cuDNN run by run: `max_segments` of them at most, and no window that cuts a row."""
    whole = config.sliding_window is None or config.sliding_window >= length
    return config.attention == "cudnn" and config.max_segments > 0 and whole and _cudnn_takes(config.head_dim, length)


def _cudnn_takes(head_dim: int, length: int) -> bool:
    """Whether cuDNN's fused kernel takes rows of so many slots, backward pass included, on any NVIDIA GPU that has it."""
    return head_dim <= 128 and head_dim % 8 == 0 and length % 2 == 0


def attend(config: ModelConfig, q_BLHC: Array, k_BSKC: Array, v_BSKC: Array, sight: Array | Segments | Runs) -> Array:
    """Softmax attention, float32 statistics; a query that sees nothing gets a finite average. Returns [B, L, H, C].

    Args: sight: bool [B, 1, L, S], or `Segments` or `Runs` where `by_segments` or `takes_runs` says so.
    """
    if isinstance(sight, Runs):
        return by_runs(q_BLHC, k_BSKC, v_BSKC, sight)
    if not isinstance(sight, Segments):
        length, dim = q_BLHC.shape[1], q_BLHC.shape[3]
        whole = length == k_BSKC.shape[1]  # nobody sees what comes later
        fused = config.attention == "cudnn" and whole and _cudnn_takes(dim, length)
        return jax.nn.dot_product_attention(
            q_BLHC, k_BSKC, v_BSKC, mask=sight, is_causal=fused, implementation="cudnn" if fused else "xla"
        )
    kernel: Any = partial(blockwise if config.attention == "blocks" else splash, sliding_window=config.sliding_window)
    mesh = jax.sharding.get_abstract_mesh()
    if not mesh.empty and mesh.size > 1:  # each device its own rows and heads
        rows, heads = P(("data", "fsdp")), P(("data", "fsdp"), None, "tensor")
        kernel = jax.shard_map(kernel, in_specs=(heads, heads, heads, rows, rows), out_specs=heads, check_vma=False)
    return kernel(q_BLHC, k_BSKC, v_BSKC, sight.segment, sight.first)


def before(first: Array, rows: Array) -> Array:
    """[P, ...] or [B, P, ...] put before rows [B, L, ...] along axis 1, in the rows' dtype."""
    first = first if first.ndim == rows.ndim else first[None]
    return jnp.concatenate([jnp.broadcast_to(first, (rows.shape[0], *first.shape[1:])).astype(rows.dtype), rows], axis=1)


def prompted(q_BLHC: Array, k_1PKC: Array, v_1PKC: Array, gate: Array, tanh: bool) -> Array:
    """What heads read from a prompt with a softmax of its own, times the gate [1] or [H] (LLaMA-Adapter). [B, L, H, C]."""
    k, v = (jnp.broadcast_to(x, (q_BLHC.shape[0], *x.shape[1:])) for x in (k_1PKC, v_1PKC))
    y = jax.nn.dot_product_attention(q_BLHC, k, v, implementation="xla")
    gate = jnp.tanh(gate) if tanh else gate
    return y * gate.astype(y.dtype)[:, None]
