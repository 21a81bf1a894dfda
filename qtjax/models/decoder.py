"""One decoder for LLaMA 2/3, SmolLM2 and Mistral, in Flax Linen; everything outside this room sees dicts and functions.

B batch, L length, V vocab, D model, H query heads, K key/value heads, C head dim, F ffn, N layers, S cache slots.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec as P

from qtjax.models.attention import Segments, attend, before, prompted, rope_tables, rotate
from qtjax.models.config import ModelConfig
from qtjax.models.edits import AttentionEdit, combine
from qtjax.models.packed import Runs
from qtjax.models.products import product
from qtjax.models.ratings import Plan, attention_paid

Cache = tuple[Array, Array]
Rate = Callable[[Array, Array, Array], Array]  # (q, k, mask) -> rating

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


def _leaf(module: nn.Module, name: str, init: Any, shape: tuple[int, ...]) -> Any:
    """A parameter as it is stored: one that is given may also be a quantised record, which `param` would refuse."""
    if module.has_variable("params", name):
        return module.get_variable("params", name)
    return module.param(name, init, shape, jnp.dtype(module.config.param_dtype))


def _edit(module: nn.Module, name: str = "edit") -> Any:
    """What the overlay says about this place, or None."""
    own = module.get_variable("overlay", name) if module.has_variable("overlay", name) else None
    shared = module.get_variable("shared", name) if module.has_variable("shared", name) else None
    if own is None or shared is None:
        return shared if own is None else own
    return combine(own, shared, name)


class RMSNorm(nn.Module):
    config: ModelConfig

    @nn.compact
    def __call__(self, x: Array) -> Array:
        weight = _leaf(self, "weight", nn.initializers.ones, (x.shape[-1],))
        edit = _edit(self)
        weight = weight if edit is None else edit.of(weight)
        return _normed(x, weight, self.config.rms_norm_eps)


# The backward pass forms what follows again from its inputs: cheaper than writing and reading five arrays of a layer's size each.
@partial(jax.checkpoint, prevent_cse=False, static_argnums=2)
def _normed(x: Array, weight: Array, eps: float) -> Array:
    x32 = x.astype(jnp.float32)
    normed = x32 * jax.lax.rsqrt(jnp.mean(x32 * x32, axis=-1, keepdims=True) + eps)
    return (normed * weight.astype(jnp.float32)).astype(x.dtype)


@partial(jax.checkpoint, prevent_cse=False, static_argnums=0)
def _gated(activation: str, gate: Array, up: Array) -> Array:
    # In float32, which fuses into one pass and rounds once instead of three times in 16 bits.
    return (_ACTIVATIONS[activation](gate.astype(jnp.float32)) * up.astype(jnp.float32)).astype(gate.dtype)


class Linear(nn.Module):
    """x @ kernel + bias, plus what an overlay adds at this path."""

    config: ModelConfig
    features: int
    use_bias: bool = False

    @nn.compact
    def __call__(self, x: Array) -> Array:
        normal = nn.initializers.normal(self.config.initializer_range)
        kernel = _leaf(self, "kernel", normal, (x.shape[-1], self.features))
        bias = _leaf(self, "bias", nn.initializers.zeros, (self.features,)) if self.use_bias else None
        edit = _edit(self)
        if edit is not None:
            return edit(x, kernel, bias)
        y = product(x, kernel)
        return y if bias is None else y + bias.astype(x.dtype)


class Attention(nn.Module):
    config: ModelConfig

    @nn.compact
    def __call__(
        self, x: Array, rope: tuple[Array, Array], mask: Array | Segments | Runs, cache: Cache | None, slot: Array | int, rate: Rate | None
    ) -> tuple[Array, Cache | None, Array | None]:
        c = self.config
        heads, kv_heads, dim = c.num_attention_heads, c.num_key_value_heads, c.head_dim

        def split(y: Array, count: int) -> Array:
            return y.reshape(*y.shape[:-1], count, dim)

        q_proj, k_proj, v_proj = (
            Linear(c, count * dim, c.attention_bias, name=f"{name}_proj")
            for name, count in (("q", heads), ("k", kv_heads), ("v", kv_heads))
        )
        q, k, v = split(q_proj(x), heads), split(k_proj(x), kv_heads), split(v_proj(x), kv_heads)
        q, k = rotate(q, *rope), rotate(k, *rope)
        if cache is not None:
            k = jax.lax.dynamic_update_slice_in_dim(cache[0], k, slot, axis=1)
            v = jax.lax.dynamic_update_slice_in_dim(cache[1], v, slot, axis=1)
            cache = (k, v)
        edit: AttentionEdit | None = _edit(self, "attention")
        if edit is not None and edit.prefix_k is not None:
            k, v = (before(prefix, own) for prefix, own in ((edit.prefix_k, k), (edit.prefix_v, v)))
        rating = None if rate is None else rate(q, k, mask)
        y, o_proj = attend(c, q, k, v, mask), Linear(c, c.hidden_size, c.attention_bias, name="o_proj")
        if edit is None or edit.prompt is None:
            return o_proj(y.reshape(*x.shape[:2], heads * dim)), cache, rating
        prompt = edit.prompt.astype(x.dtype)[None]
        more = prompted(q, split(k_proj(prompt), kv_heads), split(v_proj(prompt), kv_heads), edit.gate, edit.tanh)
        y, more = (part.reshape(*x.shape[:2], heads * dim) for part in (y, more))
        if edit.alone is None:
            return o_proj(y + more), cache, rating
        return o_proj(y) + edit.alone.astype(x.dtype) * o_proj(more), cache, rating


class MLP(nn.Module):
    config: ModelConfig

    @nn.compact
    def __call__(self, x: Array) -> Array:
        c = self.config
        gate = Linear(c, c.intermediate_size, c.mlp_bias, name="gate_proj")(x)
        up = Linear(c, c.intermediate_size, c.mlp_bias, name="up_proj")(x)
        return Linear(c, c.hidden_size, c.mlp_bias, name="down_proj")(_gated(c.hidden_act, gate, up))


@jax.custom_vjp
def _instead(x: Array, known: Array) -> Array:
    """`known`, what `x` would be: nobody reads x, so that XLA computes none of it; the gradient is x's."""
    return known


_instead.defvjp(lambda x, known: (known, None), lambda _, slope: (slope, None))


class Layer(nn.Module):
    config: ModelConfig

    @nn.compact
    def __call__(
        self,
        x: Array,
        cache: Cache | None,
        rates: Array | None,
        rope: tuple[Array, Array],
        mask: Array | Segments | Runs,
        slot: Array | int,
        plan: Plan | None,
    ) -> tuple[Array, tuple[Cache | None, Array | None]]:
        c = self.config
        x = checkpoint_name(x, "layer_input")
        rate = None if plan is None else partial(attention_paid, plan, rates, x)
        normed = RMSNorm(c, name="input_layernorm")(x)
        y, cache, rating = Attention(c, name="self_attn")(normed, rope, mask, cache, slot, rate)
        x = x + y
        x = x + MLP(c, name="mlp")(RMSNorm(c, name="post_attention_layernorm")(x))
        return self._known(keep_batch_sharded(x)), (cache, rating)

    def _known(self, x: Array) -> Array:
        """The layer's output: written down where the pass is to be kept, taken from an earlier pass where one is given."""
        if self.is_mutable_collection("known"):
            self.put_variable("known", "output", x)
        elif self.has_variable("known", "output"):
            x = _instead(x, self.get_variable("known", "output"))
        return x


class Embedding(nn.Module):
    config: ModelConfig

    @nn.compact
    def __call__(self, input_ids: Array) -> Array:
        c = self.config
        normal = nn.initializers.normal(c.initializer_range)
        dtype, edit = jnp.dtype(c.dtype), _edit(self)
        table = self.param("embedding", normal, (c.vocab_size, c.hidden_size), jnp.dtype(c.param_dtype))
        table = table if edit is None or edit.table is None else edit.table
        x = jnp.take(table.astype(dtype), input_ids, axis=0, mode="clip")
        if edit is not None and edit.down is not None:
            x += jnp.take(edit.down.astype(dtype), input_ids, axis=0, mode="clip") @ edit.up.astype(dtype)
        return x


class Head(nn.Module):
    """Declares the untied head's kernel [D, V]; the product itself belongs to whoever needs logits or losses."""

    config: ModelConfig

    @nn.compact
    def __call__(self) -> Array:
        c = self.config
        normal = nn.initializers.normal(c.initializer_range)
        return self.param("kernel", normal, (c.hidden_size, c.vocab_size), jnp.dtype(c.param_dtype))


_policies = jax.checkpoint_policies
_NAMES = ("product", "attention")  # 16-bit products (products.py), what a kernel's backward pass starts from (blocks.py, splash.py)


def _of_cudnn(primitive: Any, *_: Any, **__: Any) -> bool:
    """The same of cuDNN's kernel, whose outputs JAX gives no name: averages, and the logs of their sums."""
    return primitive.name == "dot_product_attention_fwd_wrapper"


# What a layer keeps for its backward pass beside its input; the rest is computed again.
_REMAT = {
    "dots": _policies.save_from_both_policies(
        _policies.dots_with_no_batch_dims_saveable, _policies.save_from_both_policies(_policies.save_only_these_names(*_NAMES), _of_cudnn)
    ),
    "full": None,
    "offload": _policies.save_and_offload_only_these_names(
        names_which_can_be_saved=[], names_which_can_be_offloaded=["layer_input"], offload_src="device", offload_dst="pinned_host"
    ),
}


def _scanned_layers(config: ModelConfig) -> Any:
    layer = Layer
    if config.remat != "none":
        # Unrolled, XLA would find that both passes compute the same, and keep it.
        layer = nn.remat(Layer, policy=_REMAT[config.remat], prevent_cse=config.unroll_layers)
    return nn.scan(
        layer,
        variable_axes={"params": 0, "overlay": 0, "known": 0},
        variable_broadcast="shared",
        split_rngs={"params": True},
        in_axes=(0, 0, nn.broadcast, nn.broadcast, nn.broadcast, nn.broadcast),
        out_axes=0,
        length=config.num_hidden_layers,
        unroll=config.num_hidden_layers if config.unroll_layers else 1,
    )


class Decoder(nn.Module):
    config: ModelConfig

    @nn.compact
    def __call__(
        self,
        input_ids: Array,
        position_ids: Array,
        mask: Array | Segments | Runs,
        cache: Cache | None = None,
        slot: Array | int = 0,
        virtual: Array | None = None,
        plan: Plan | None = None,
    ) -> tuple[Array, Cache | None, Array | None]:
        """Final-norm hidden states [B, P + L, D] in the compute dtype, the cache with the new keys and values, the rating.

        Args: input_ids int32 [B, L]; virtual: embeddings [P, D] or [B, P, D] put before them (P = 0 without);
        position_ids int32 [B, P + L]; mask bool [B, 1, P + L, S], or Segments or Runs of rows alone; cache k, v [N, B, S, K, C]; slot: where in the cache
        the first of these tokens goes; plan: who is rated, float32 [B, P + L] (None without).
        """
        c = self.config
        x = Embedding(c, name="embed_tokens")(input_ids)
        x = keep_batch_sharded(x if virtual is None else before(virtual, x))
        rope = rope_tables(c, position_ids)
        rates = None if plan is None else plan.layers
        x, (cache, ratings) = _scanned_layers(c)(c, name="layers")(x, cache, rates, rope, mask, slot, plan)
        if not c.tie_word_embeddings:
            Head(c, name="lm_head")()
        return RMSNorm(c, name="norm")(x), cache, None if ratings is None else ratings.sum(axis=0)
