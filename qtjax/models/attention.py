"""Rotary positions, who may see whom, and attention itself.

B batch, L query slots, S key slots, H query heads, K key/value heads, C head dim.
"""

import math

import jax
import jax.numpy as jnp
from jax import Array

from qtjax.models.config import ModelConfig, RopeScaling


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


def attend(q_BLHC: Array, k_BSKC: Array, v_BSKC: Array, mask_B1LS: Array) -> Array:
    """Softmax attention, float32 statistics; a query that sees nothing gets a finite average. Returns [B, L, H, C]."""
    return jax.nn.dot_product_attention(q_BLHC, k_BSKC, v_BSKC, mask=mask_B1LS, implementation="xla")


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
