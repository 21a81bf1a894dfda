"""Prefix tuning (Li & Liang 2021, arXiv 2101.00190): P trained keys and values before every row's own, in every layer.

Keys as they are, without rotary positions; the row's positions start at P. They obey a sliding window like tokens at
positions 0..P-1, as in transformers: queries beyond it never see them. Flat: one [P, 2 N K C] array, N(0, 1) as in PEFT,
read as [P, N, (key, value), K, C]. With prefix_projection: Linear(K C, h)-Tanh-Linear(h, 2 N K C) of an embedding [P, K C],
once a step, in float32. init_weights="zero" starts from zero keys and values, which still take their share of every softmax.

PEFT stores the flat array in both cases and drops the network. We store both, and training goes on from ours; a folder
with PEFT's file alone becomes a flat prefix, which is served and trained as such.
"""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
from jax import Array

from qtjax.models import AttentionEdit, Edits
from qtjax.overlays.base import Base, Context, Method
from qtjax.overlays.fields import setting, to_peft
from qtjax.overlays.leaves import Leaf, normal, zeros
from qtjax.overlays.sites import claims
from qtjax.overlays.tokens import Sizes, TokenFields, dense, dense_leaves, described, read_tokens, whole
from qtjax.tree import Tree


@dataclass(frozen=True)
class PrefixFields(TokenFields):
    """prefix_projection: by a network of width encoder_hidden_size (default K C); init_weights: None or "zero"."""

    prefix_projection: bool = setting(False, "bool")
    encoder_hidden_size: int | None = setting(None, "int>0")
    init_weights: str | None = setting(None, "choice", (None, "zero"))


@dataclass(frozen=True)
class PrefixSpec:
    """Settings by PEFT's names, and the sizes of the kv heads."""

    fields: PrefixFields
    sizes: Sizes


def _read(base: Base, given: Mapping[str, Any], strict: bool) -> PrefixSpec:
    settings, sizes = read_tokens("prefix", PrefixFields, base, given, strict, keys_and_values=True)
    if settings.encoder_hidden_size is None:
        settings = dataclasses.replace(settings, encoder_hidden_size=sizes.token_dim)
    return PrefixSpec(settings, sizes)


def _leaves(spec: PrefixSpec) -> list[Leaf]:
    fields, width = spec.fields, spec.sizes.token_dim
    count, hidden, flat = fields.num_virtual_tokens, fields.encoder_hidden_size, 2 * spec.sizes.num_layers * width
    zero = fields.init_weights == "zero"
    # All of 2 N K C divides wherever K C does, so that it is cut like the keys and values.
    if not fields.prefix_projection:
        init = zeros if zero else normal(1.0)
        return [whole("prompt_embeddings", (count, flat), (None, "kv_heads"), "prompt_embeddings", init)]
    last = dense_leaves("transform/2", "prompt_encoder.transform.2", hidden, flat, (None, "kv_heads"))
    return [
        whole("embedding", (count, width), (None, "kv_heads"), "prompt_encoder.embedding.weight", normal(1.0)),
        *dense_leaves("transform/0", "prompt_encoder.transform.0", width, hidden, ("kv_heads", None)),
        *(dataclasses.replace(leaf, init=zeros) if zero else leaf for leaf in last),
    ]


def _flat(spec: PrefixSpec, params: Tree) -> Array:
    """[P, 2 N K C], float32."""
    if not spec.fields.prefix_projection:
        return params["prompt_embeddings"]
    return dense(params["transform"]["2"], jnp.tanh(dense(params["transform"]["0"], params["embedding"])))


def _expand(spec: PrefixSpec, params: Tree, frozen: Tree, context: Context) -> Edits:
    del frozen, context
    sizes, count = spec.sizes, spec.fields.num_virtual_tokens
    heads, layers = sizes.num_attention_heads, sizes.num_layers
    keys_and_values = _flat(spec, params).reshape(count, layers, 2, heads, sizes.token_dim // heads)
    k, v = (jnp.moveaxis(keys_and_values[:, :, n], 0, 1) for n in (0, 1))
    return Edits({"layers": {"self_attn": {"attention": AttentionEdit(prefix_k=k, prefix_v=v)}}}, prefix=count)


def _file(spec: PrefixSpec, params: Tree, frozen: Tree) -> dict[str, Any] | None:
    del frozen
    return {"prompt_embeddings": _flat(spec, params)} if spec.fields.prefix_projection else None


def _from_file(spec: PrefixSpec, tensors: Mapping[str, Any]) -> tuple[PrefixSpec, Tree, Tree]:
    flat = dataclasses.replace(spec.fields, prefix_projection=False)
    prefix = jnp.asarray(tensors["prompt_embeddings"], jnp.float32)
    return dataclasses.replace(spec, fields=flat), {"prompt_embeddings": prefix}, {}


METHOD = Method(
    fields=PrefixFields,
    read=_read,
    leaves=_leaves,
    expand=_expand,
    to_peft=lambda spec: {"peft_type": "PREFIX_TUNING", **to_peft(spec.fields), **described(spec.sizes)},
    claims=claims("PREFIX_TUNING"),
    unmergeable="a prefix is keys and values before the row's own, no weight",
    file=_file,
    from_file=_from_file,
)
