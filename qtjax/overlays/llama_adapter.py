"""LLaMA-Adapter (Zhang et al. 2023, arXiv 2303.16199): in the last layers, heads also read a trained prompt, through a gate.

y = y + g softmax(q k_p^T / sqrt(C)) v_p before o_proj, with k_p, v_p = k_proj(prompt), v_proj(prompt) without rotary
positions, q with them, and a softmax of its own. Gate g starts at zero, so that a fresh overlay is the base; the prompt
[adapter_len, D] ~ N(0, 1). No token is put before the row: positions, windows and packing are as without it.

gate="peft": one scalar a layer. gate="tanh_per_head": tanh of one value a head, as the paper's own code has it; PEFT
cannot read that, and the folder then holds our file alone. Layers without a prompt are zero in both arrays.

PEFT adds the output of o_proj for the prompt by itself, and so o_proj's bias a second time; with gate="peft" we do too,
which matters only where the base has one (attention_bias), and there a fresh adapter differs from the base. PEFT derives
the number of kv heads from D / (K C), which is wrong for models with C != D / H; here they are the model's.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp

from qtjax.models import AttentionEdit, Edits
from qtjax.overlays.base import Base, Context, Method
from qtjax.overlays.fields import read_fields, require, setting
from qtjax.overlays.leaves import Leaf, normal, zeros
from qtjax.overlays.sites import claims, needs
from qtjax.tree import Tree

# adapter_config.json of the gates that PEFT has not: it then refuses the folder instead of misreading it.
_PEFT, _OURS = "ADAPTION_PROMPT", "LLAMA_ADAPTER"


@dataclass(frozen=True)
class LlamaAdapterFields:
    """adapter_len: prompt tokens; adapter_layers: how many of the last layers have them (None: all; the paper, 30 of 32)."""

    adapter_len: int = setting(10, "int>0")
    adapter_layers: int | None = setting(None, "int>0")
    gate: str = setting("peft", "choice", ("peft", "tanh_per_head"))


@dataclass(frozen=True)
class LlamaAdapterSpec:
    """Settings, and of the base: layers N, width D, heads H, and whether o_proj has a bias."""

    fields: LlamaAdapterFields
    layers: int
    width: int
    heads: int
    biased: bool

    @property
    def hits(self) -> tuple[bool, ...]:
        """Which of the N layers have a prompt."""
        return tuple(n >= self.layers - self.fields.adapter_layers for n in range(self.layers))


def _read(base: Base, given: Mapping[str, Any], strict: bool) -> LlamaAdapterSpec:
    if not strict:
        needs(given, "adapter_len", "adapter_layers", method="LLaMA-Adapter")
    inert = {"target_modules": (None, "self_attn")}
    settings = read_fields("llama_adapter", LlamaAdapterFields, given, base.linears, inert=inert)
    config = base.config
    if settings.adapter_layers is None:
        settings = LlamaAdapterFields(settings.adapter_len, config.num_hidden_layers, settings.gate)
    count = settings.adapter_layers
    require(count <= config.num_hidden_layers, "adapter_layers", count, f"the model has {config.num_hidden_layers} layers")
    biased = "layers/self_attn/o_proj/bias" in base.leaves
    return LlamaAdapterSpec(settings, config.num_hidden_layers, config.hidden_size, config.num_attention_heads, biased)


def _leaves(spec: LlamaAdapterSpec) -> list[Leaf]:
    gates = 1 if spec.fields.gate == "peft" else spec.heads

    def leaf(name: str, shape: tuple[int, ...], axes: tuple[str | None, ...], **more: Any) -> Leaf:
        shapes = tuple(shape if hit else None for hit in spec.hits)
        key = "base_model.model.model.layers.{}.self_attn." + name
        return Leaf(f"layers/self_attn/{name}", shapes, axes, tuple(key.format(n) for n in range(spec.layers)), **more)

    packed = {"to_peft": lambda x: x[None], "from_peft": lambda x: x[0]}
    return [
        leaf("adaption_prompt", (spec.fields.adapter_len, spec.width), (None, "embed"), init=normal(1.0), **packed),
        leaf("adaption_gate", (gates,), (None,), init=zeros),
    ]


def _expand(spec: LlamaAdapterSpec, params: Tree, frozen: Tree, context: Context) -> Edits:
    del frozen, context
    own, ours = params["layers"]["self_attn"], spec.fields.gate == "tanh_per_head"
    alone = jnp.asarray(spec.hits, jnp.float32) if spec.biased and not ours else None
    edit = AttentionEdit(prompt=own["adaption_prompt"], gate=own["adaption_gate"], tanh=ours, alone=alone)
    return Edits({"layers": {"self_attn": {"attention": edit}}})


def _file(spec: LlamaAdapterSpec, params: Tree, frozen: Tree) -> dict[str, Any] | None:
    del params, frozen
    return None if spec.fields.gate == "peft" else {}


def _to_peft(spec: LlamaAdapterSpec) -> dict[str, Any]:
    own = spec.fields
    fields = {"adapter_len": own.adapter_len, "adapter_layers": own.adapter_layers, "target_modules": "self_attn"}
    return {"peft_type": _PEFT, **fields} if own.gate == "peft" else {"peft_type": _OURS, **fields, "gate": own.gate}


METHOD = Method(
    fields=LlamaAdapterFields,
    read=_read,
    leaves=_leaves,
    expand=_expand,
    to_peft=_to_peft,
    claims=claims(_PEFT, _OURS),
    unmergeable="its prompt is read by attention, it is no weight",
    file=_file,
)
