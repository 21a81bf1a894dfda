"""One decoder for LLaMA 2/3, SmolLM2 and Mistral, in Flax Linen; everything outside this room sees dicts and functions.

B batch, L length, V vocab, D model, H query heads, K key/value heads, C head dim, F ffn, N layers, S cache slots.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array
from jax.sharding import PartitionSpec as P

from qtjax.models.attention import attend, rope_tables, rotate
from qtjax.models.config import ModelConfig

Cache = tuple[Array, Array]

_ACTIVATIONS = {
    "silu": jax.nn.silu,
    "relu": jax.nn.relu,
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
    "gelu_pytorch_tanh": lambda x: jax.nn.gelu(x, approximate=True),
    "gelu_new": lambda x: jax.nn.gelu(x, approximate=True),
}


def keep_batch_sharded(x: Array) -> Array:
    """Activations stay sharded by batch over (data, fsdp); without it XLA may shard them by weight under fsdp."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1 or not {"data", "fsdp"} <= set(mesh.axis_names):
        return x
    if x.shape[0] % (mesh.shape["data"] * mesh.shape["fsdp"]) or mesh.manual_axes:
        return x
    return jax.lax.with_sharding_constraint(x, P(("data", "fsdp"), *[None] * (x.ndim - 1)))


class RMSNorm(nn.Module):
    config: ModelConfig

    @nn.compact
    def __call__(self, x: Array) -> Array:
        weight = self.param("weight", nn.initializers.ones, (x.shape[-1],), jnp.dtype(self.config.param_dtype))
        x32 = x.astype(jnp.float32)
        normed = x32 * jax.lax.rsqrt(jnp.mean(x32 * x32, axis=-1, keepdims=True) + self.config.rms_norm_eps)
        return (normed * weight.astype(jnp.float32)).astype(x.dtype)


class Linear(nn.Module):
    """x @ kernel + bias, plus what an overlay adds at this path."""

    config: ModelConfig
    features: int
    use_bias: bool = False

    @nn.compact
    def __call__(self, x: Array) -> Array:
        param_dtype = jnp.dtype(self.config.param_dtype)
        normal = nn.initializers.normal(self.config.initializer_range)
        y = x @ self.param("kernel", normal, (x.shape[-1], self.features), param_dtype).astype(x.dtype)
        if self.use_bias:
            y += self.param("bias", nn.initializers.zeros, (self.features,), param_dtype).astype(x.dtype)
        if self.has_variable("overlay", "edit"):
            y += self.get_variable("overlay", "edit").side(x)
        return y


class Attention(nn.Module):
    config: ModelConfig

    @nn.compact
    def __call__(self, x: Array, rope: tuple[Array, Array], mask: Array, cache: Cache | None, slot: Array | int):
        c = self.config
        heads, kv_heads, dim = c.num_attention_heads, c.num_key_value_heads, c.head_dim

        def project(name: str, count: int) -> Array:
            y = Linear(c, count * dim, c.attention_bias, name=name)(x)
            return y.reshape(*x.shape[:2], count, dim)

        q, k, v = project("q_proj", heads), project("k_proj", kv_heads), project("v_proj", kv_heads)
        q, k = rotate(q, *rope), rotate(k, *rope)
        if cache is not None:
            k = jax.lax.dynamic_update_slice_in_dim(cache[0], k, slot, axis=1)
            v = jax.lax.dynamic_update_slice_in_dim(cache[1], v, slot, axis=1)
            cache = (k, v)
        y = attend(q, k, v, mask).reshape(*x.shape[:2], heads * dim)
        return Linear(c, c.hidden_size, c.attention_bias, name="o_proj")(y), cache


class MLP(nn.Module):
    config: ModelConfig

    @nn.compact
    def __call__(self, x: Array) -> Array:
        c = self.config
        gate = Linear(c, c.intermediate_size, c.mlp_bias, name="gate_proj")(x)
        up = Linear(c, c.intermediate_size, c.mlp_bias, name="up_proj")(x)
        return Linear(c, c.hidden_size, c.mlp_bias, name="down_proj")(_ACTIVATIONS[c.hidden_act](gate) * up)


class Layer(nn.Module):
    config: ModelConfig

    @nn.compact
    def __call__(self, x: Array, cache: Cache | None, rope: tuple[Array, Array], mask: Array, slot: Array | int):
        c = self.config
        y, cache = Attention(c, name="self_attn")(RMSNorm(c, name="input_layernorm")(x), rope, mask, cache, slot)
        x = x + y
        x = x + MLP(c, name="mlp")(RMSNorm(c, name="post_attention_layernorm")(x))
        return keep_batch_sharded(x), cache


class Embedding(nn.Module):
    config: ModelConfig

    @nn.compact
    def __call__(self, input_ids: Array) -> Array:
        c = self.config
        normal = nn.initializers.normal(c.initializer_range)
        table = self.param("embedding", normal, (c.vocab_size, c.hidden_size), jnp.dtype(c.param_dtype))
        return jnp.take(table.astype(jnp.dtype(c.dtype)), input_ids, axis=0, mode="clip")


class Head(nn.Module):
    """Declares the untied head's kernel [D, V]; the product itself belongs to whoever needs logits or losses."""

    config: ModelConfig

    @nn.compact
    def __call__(self) -> Array:
        c = self.config
        normal = nn.initializers.normal(c.initializer_range)
        return self.param("kernel", normal, (c.hidden_size, c.vocab_size), jnp.dtype(c.param_dtype))


def _scanned_layers(config: ModelConfig) -> Any:
    layer = Layer
    if config.remat != "none":
        policy = None if config.remat == "full" else jax.checkpoint_policies.dots_with_no_batch_dims_saveable
        layer = nn.remat(Layer, policy=policy, prevent_cse=False)
    return nn.scan(
        layer,
        variable_axes={"params": 0, "overlay": 0},
        split_rngs={"params": True},
        in_axes=(0, nn.broadcast, nn.broadcast, nn.broadcast),
        out_axes=0,
        length=config.num_hidden_layers,
        unroll=config.num_hidden_layers if config.unroll_layers else 1,
    )


class Decoder(nn.Module):
    config: ModelConfig

    @nn.compact
    def __call__(
        self, input_ids: Array, position_ids: Array, mask: Array, cache: Cache | None = None, slot: Array | int = 0
    ) -> tuple[Array, Cache | None]:
        """Final-norm hidden states [B, L, D] in the compute dtype, and the cache with the new keys and values.

        Args: input_ids, position_ids int32 [B, L]; mask bool [B, 1, L, S]; cache k, v [N, B, S, K, C]; slot: where in
        the cache the first of these tokens goes.
        """
        c = self.config
        x = keep_batch_sharded(Embedding(c, name="embed_tokens")(input_ids))
        rope = rope_tables(c, position_ids)
        x, cache = _scanned_layers(c)(c, name="layers")(x, cache, rope, mask, slot)
        if not c.tie_word_embeddings:
            Head(c, name="lm_head")()
        return RMSNorm(c, name="norm")(x), cache
