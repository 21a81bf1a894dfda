"""modules_to_save: full trainable copies of modules beside an adapter, which stand in the place of the base's own.

PEFT matches a name with `endswith` and no dot, so "norm" is every norm of the model and "head" is lm_head. Copied are
weights of linear modules, norms, the embedding and the head; a copy of a tied head or embedding leaves the other side as
it is. A module of several parts ("mlp") is refused: name its parts.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax.numpy as jnp
from jax import Array

from qtjax.errors import QtjaxError, near_names
from qtjax.models import EmbeddingEdit, LinearEdit, NormEdit
from qtjax.overlays.base import Base, base_array
from qtjax.overlays.leaves import Leaf, transposed
from qtjax.tree import Tree, flatten

_NORMS = ("input_layernorm", "post_attention_layernorm")


@dataclass(frozen=True)
class Saved:
    """One module copied: its tree path, its base leaf's last name, one layer's shape, and in which layers."""

    path: str
    leaf: str
    shape: tuple[int, ...]
    hits: tuple[bool, ...]

    @property
    def stacked(self) -> bool:
        return self.path.startswith("layers/")

    def module(self, layer: int) -> str:
        """HF's name of it."""
        if self.stacked:
            return f"model.layers.{layer}." + self.path.removeprefix("layers/").replace("/", ".")
        return "lm_head" if self.path == "lm_head" else f"model.{self.path}"


def _copyable(base: Base) -> list[Saved]:
    """Everything that can be copied, in the model's order."""
    embed, head = base.ends
    width, count = embed.outputs, base.linears[0].layers
    return [
        Saved("embed_tokens", "embedding", (embed.inputs, width), (True,)),
        *(Saved(f"layers/{name}", "weight", (width,), (True,) * count) for name in _NORMS),
        *(Saved(one.path, "kernel", (one.inputs, one.outputs), (True,) * count) for one in base.linears),
        Saved("norm", "weight", (width,), (True,)),
        Saved("lm_head", "kernel", (width, head.outputs), (True,)),
    ]


def _containers(count: int) -> list[str]:
    """HF modules that a name can hit and that are no single weight."""
    parts = ("", ".self_attn", ".mlp", ".mlp.act_fn")
    layers = [f"model.layers.{n}{part}" for n in range(count) for part in parts]
    return ["model", "model.layers", "model.rotary_emb", *layers]


def resolve_saved(base: Base, names: Sequence[str], strict: bool) -> tuple[Saved, ...]:
    """The modules that `names` hit. Raises QtjaxError for one that cannot be copied, and, if strict, that hits nothing."""
    if not names:
        return ()

    def hit(module: str) -> bool:
        return any(module.endswith(name) for name in names)

    copyable, out = _copyable(base), []
    modules = [one.module(n) for one in copyable for n in range(len(one.hits))]
    for name in names:
        whole = [module for module in _containers(base.linears[0].layers) if module.endswith(name)]
        if whole:
            raise QtjaxError(f"modules_to_save: {name!r} matches {whole[0]!r}, which is not one weight; name its parts")
        if strict and not any(module.endswith(name) for module in modules):
            known = sorted({module.rsplit(".", 1)[-1] for module in modules})
            near = near_names(name, known)
            raise QtjaxError(f"modules_to_save: {name!r} matches no module{near}; known: {', '.join(known)}")
    for one in copyable:
        hits = tuple(hit(one.module(n)) for n in range(len(one.hits)))
        if any(hits):
            if f"{one.path}/bias" in base.leaves:
                raise QtjaxError(
                    f"modules_to_save = {list(names)}: {one.module(hits.index(True))} has a bias, whose copy is not supported"
                )
            out.append(Saved(one.path, one.leaf, one.shape, hits))
    return tuple(out)


def check_apart(saved: Sequence[Saved], edited: set[str]) -> None:
    """Raises QtjaxError for a module (HF's name) that is both copied and edited."""
    for one in saved:
        for n, hit in enumerate(one.hits):
            if hit and one.module(n) in edited:
                raise QtjaxError(
                    f"modules_to_save: {one.module(n)} is a target of the adapter as well; it can only be one of them"
                )


def saved_leaves(saved: Sequence[Saved]) -> list[Leaf]:
    """One array a module, "<module>/saved", that starts as the base's own."""
    out = []
    for one in saved:
        axes = {"embedding": ("vocab", "embed"), "weight": (None,), "kernel": ("in", "out")}[one.leaf]
        axes = ("embed", "vocab") if one.path == "lm_head" else axes
        keys = tuple(f"base_model.model.{one.module(n)}.weight" if hit else None for n, hit in enumerate(one.hits))
        out.append(Leaf(
            f"{one.path}/saved", tuple(one.shape if hit else None for hit in one.hits), axes, keys, partial(_copy, one),
            module=one.path if axes == ("in", "out") else "", stacked=one.stacked,
            **(transposed() if one.leaf == "kernel" else {}),
        ))  # fmt: skip
    return out


def _copy(one: Saved, key: Array, shape: tuple[int, ...], base: Any) -> Array:
    del key, shape
    if one.path == "lm_head" and "lm_head/kernel" not in base:
        return base_array(base, "embed_tokens/embedding").T
    return base_array(base, f"{one.path}/{one.leaf}")


def saved_edits(saved: Sequence[Saved], params: Tree) -> dict[str, Any]:
    """{path of the edit: record} of the copies."""
    flat, out = flatten(params), {}
    for one in saved:
        value = flat[f"{one.path}/saved"]
        here = None if all(one.hits) else jnp.asarray(one.hits)
        if one.leaf == "embedding":
            out["embed_tokens/edit"] = EmbeddingEdit(table=value)
        elif one.leaf == "weight":
            out[f"{one.path}/edit"] = NormEdit(value, here)
        else:
            out[f"{one.path}/edit"] = LinearEdit(kernel=value, here=here)
    return out
