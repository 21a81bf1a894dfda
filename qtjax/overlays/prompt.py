"""Prompt tuning (Lester et al. 2021, arXiv 2104.08691): P trained embeddings before every row; nothing else changes.

x = [p; E[ids]]; the row's positions start after p, no loss falls on it and no logits come out of it.

Initial values, as in PEFT: "RANDOM" is N(0, 1), torch's default for an embedding. That is large (LLaMA's own embeddings
have a deviation near 0.02), so that a fresh prompt disturbs the model; "SAMPLE_VOCAB" starts from the embeddings of
random tokens and "TEXT" from those of `prompt_tuning_init_ids`, repeated or cut to P. PEFT takes a text and a tokenizer
for the latter; here the text is tokenized by the caller. Once trained, how a prompt began has no meaning: an adapter
that began with "TEXT" is written as "RANDOM", since PEFT would ask for the tokenizer again.
"""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from qtjax.models import Edits
from qtjax.overlays.base import Base, Context, Method
from qtjax.overlays.fields import require, setting, to_peft
from qtjax.overlays.leaves import Init, Leaf, normal
from qtjax.overlays.sites import claims
from qtjax.overlays.tokens import Sizes, TokenFields, described, embeddings_of, read_tokens, whole
from qtjax.tree import Tree

TEXT_FIELDS = ("prompt_tuning_init_text", "tokenizer_name_or_path", "tokenizer_kwargs")


@dataclass(frozen=True)
class PromptFields(TokenFields):
    """prompt_tuning_init: see the head of the file; prompt_tuning_init_ids: the token ids of "TEXT", ours alone."""

    prompt_tuning_init: str = setting("RANDOM", "choice", ("RANDOM", "SAMPLE_VOCAB", "TEXT"))
    prompt_tuning_init_ids: tuple[int, ...] | None = setting(None, "ids")


@dataclass(frozen=True)
class PromptSpec:
    """Settings by PEFT's names and the base model's sizes."""

    fields: PromptFields
    sizes: Sizes


def refuse_text(given: Mapping[str, Any], remedy: str) -> None:
    """Refuses the fields with which PEFT would read a tokenizer."""
    for name in TEXT_FIELDS:
        require(given.get(name) is None, name, given.get(name), f"texts are not tokenized here; {remedy}")


def _read(base: Base, given: Mapping[str, Any], strict: bool) -> PromptSpec:
    if strict:
        refuse_text(given, "give prompt_tuning_init='TEXT' and the text's token ids as prompt_tuning_init_ids")
    settings, sizes = read_tokens("prompt", PromptFields, base, given, strict, descriptive=() if strict else TEXT_FIELDS)
    ids, kind, vocabulary = settings.prompt_tuning_init_ids, settings.prompt_tuning_init, base.config.vocab_size
    if not strict:
        return PromptSpec(dataclasses.replace(settings, prompt_tuning_init="RANDOM" if kind == "TEXT" else kind), sizes)
    name = "prompt_tuning_init_ids"
    require((kind == "TEXT") == bool(ids), name, ids, f"goes with 'TEXT', got prompt_tuning_init = {kind!r}")
    require(all(i < vocabulary for i in ids or ()), name, ids, f"the vocabulary has {vocabulary} tokens")
    return PromptSpec(settings, sizes)


def _init(fields: PromptFields, vocabulary_of: str = "embed_tokens/embedding") -> Init:
    def from_tokens(key: Array, shape: tuple[int, ...], base: Mapping[str, Any]) -> Array:
        if fields.prompt_tuning_init == "TEXT":
            return embeddings_of(base, jnp.asarray(np.resize(fields.prompt_tuning_init_ids, shape[0]), jnp.int32))
        return embeddings_of(base, jax.random.randint(key, shape[:1], 0, base[vocabulary_of].shape[0]))

    return normal(1.0) if fields.prompt_tuning_init == "RANDOM" else from_tokens


def prompt_leaf(sizes: Sizes, count: int, init: Init) -> Leaf:
    """The prompt [P, D] as PEFT's file holds it."""
    return whole("prompt_embeddings", (count, sizes.token_dim), (None, "embed"), "prompt_embeddings", init)


def _leaves(spec: PromptSpec) -> list[Leaf]:
    return [prompt_leaf(spec.sizes, spec.fields.num_virtual_tokens, _init(spec.fields))]


def _expand(spec: PromptSpec, params: Tree, frozen: Tree, context: Context) -> Edits:
    del spec, frozen, context
    return Edits({}, virtual=params["prompt_embeddings"][None])


def _to_peft(spec: PromptSpec) -> dict[str, Any]:
    fields = to_peft(spec.fields)
    del fields["prompt_tuning_init_ids"]
    kind = "SAMPLE_VOCAB" if spec.fields.prompt_tuning_init == "SAMPLE_VOCAB" else "RANDOM"
    fields |= dict.fromkeys(TEXT_FIELDS) | {"prompt_tuning_init": kind}
    return {"peft_type": "PROMPT_TUNING", **fields, **described(spec.sizes)}


METHOD = Method(
    fields=PromptFields,
    read=_read,
    leaves=_leaves,
    expand=_expand,
    to_peft=_to_peft,
    claims=claims("PROMPT_TUNING"),
    unmergeable="a prompt is tokens before the row, no weight",
)
