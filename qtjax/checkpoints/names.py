"""One bijective table between the parameter tree and the names of Hugging Face checkpoints.

A leaf of the tree is addressed by its path; leaves under "layers/" are stacked on axis 0, so that one leaf stands for
N tensors of a checkpoint. Linear kernels are (in, out) in the tree and in Flax files, (out, in) in torch's files.

    tree                                     Hugging Face (torch)                        Flax msgpack
    layers/self_attn/q_proj/kernel [N,in,out] model.layers.{i}.self_attn.q_proj.weight    model/layers/{i}/self_attn/q_proj/kernel
    embed_tokens/embedding [V,D]              model.embed_tokens.weight                   model/embed_tokens/embedding
    lm_head/kernel [D,V]                      lm_head.weight                              lm_head/kernel
"""

import re
from collections.abc import Mapping
from typing import Any, NamedTuple

from qtjax.tree import flatten

ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
MLP = ("gate_proj", "up_proj", "down_proj")

# (module in the tree, module in torch); "{i}" is the layer. Everything below is derived from these two tables.
_MODULES: tuple[tuple[str, str], ...] = (
    ("embed_tokens", "model.embed_tokens"),
    ("layers/input_layernorm", "model.layers.{i}.input_layernorm"),
    *((f"layers/self_attn/{m}", f"model.layers.{{i}}.self_attn.{m}") for m in ATTENTION),
    ("layers/post_attention_layernorm", "model.layers.{i}.post_attention_layernorm"),
    *((f"layers/mlp/{m}", f"model.layers.{{i}}.mlp.{m}") for m in MLP),
    ("norm", "model.norm"),
    ("lm_head", "lm_head"),
)
_LINEAR = frozenset(tree for tree, _ in _MODULES if tree.endswith("_proj") or tree == "lm_head")
_TO_TORCH = dict(_MODULES)
_TO_TREE = {torch: tree for tree, torch in _MODULES}
_LAYER = re.compile(r"^model\.layers\.(0|[1-9][0-9]*)\.")


class Place(NamedTuple):
    """Where a tensor of a checkpoint lives in the tree."""

    path: str  # leaf, "layers/self_attn/q_proj/kernel"
    layer: int | None  # index on axis 0 of a stacked leaf; None for a leaf outside "layers/"
    transpose: bool  # the stored matrix is (out, in) where the tree has (in, out)


def hf_module(path: str, layer: int | None = None) -> str:
    """("layers/mlp/up_proj", 3) -> "model.layers.3.mlp.up_proj". Raises KeyError for an unknown module."""
    return _TO_TORCH[path].replace("{i}", str(layer))


def tree_module(name: str) -> tuple[str, int | None] | None:
    """"model.layers.3.mlp.up_proj" -> ("layers/mlp/up_proj", 3); None if the table has no such module."""
    found = _LAYER.match(name)
    layer = int(found[1]) if found else None
    path = _TO_TREE.get(_LAYER.sub("model.layers.{i}.", name))
    return None if path is None or path.startswith("layers/") != (layer is not None) else (path, layer)


def hf_name(path: str, layer: int | None = None) -> str:
    """Name of the torch tensor of a leaf: ("norm/weight",) -> "model.norm.weight"."""
    module, leaf = path.rsplit("/", 1)
    return f"{hf_module(module, layer)}.{'bias' if leaf == 'bias' else 'weight'}"


def flax_name(path: str, layer: int | None = None) -> str:
    """Name in transformers' Flax files, joined by "/": ("norm/weight",) -> "model/norm/weight"."""
    module, leaf = path.rsplit("/", 1)
    return f"{hf_module(module, layer).replace('.', '/')}/{leaf}"


def place(name: str) -> Place | None:
    """The inverse of `hf_name`; None for a tensor that the table does not know."""
    module, _, leaf = name.rpartition(".")
    found = tree_module(module)
    if found is None or leaf not in ("weight", "bias"):
        return None
    path, layer = found
    if leaf == "bias":
        return Place(f"{path}/bias", layer, False) if path.startswith("layers/") and path in _LINEAR else None
    if path == "embed_tokens":
        return Place(f"{path}/embedding", None, False)
    return Place(f"{path}/kernel", layer, True) if path in _LINEAR else Place(f"{path}/weight", layer, False)


def places(tree: Mapping[str, Any]) -> dict[str, Place]:
    """{torch name: place} of every tensor that a checkpoint of this tree holds, in the order of the model.

    Args:
      tree: nested dict whose leaves have `.shape` (arrays or shape structs); axis 0 of "layers/" leaves is N.
    """
    flat = flatten(tree)
    order = {module: i for i, (module, _) in enumerate(_MODULES)}
    paths = sorted(flat, key=lambda path: order[path.rsplit("/", 1)[0]])
    stacked = [path for path in paths if path.startswith("layers/")]
    before = [path for path in paths if path.startswith("embed_tokens/")]
    after = [path for path in paths if path not in stacked and path not in before]
    layers = flat[stacked[0]].shape[0] if stacked else 0
    names = [hf_name(path) for path in before]
    names += [hf_name(path, i) for i in range(layers) for path in stacked]
    names += [hf_name(path) for path in after]
    return {name: place(name) for name in names}


def stored_shape(leaf_shape: tuple[int, ...], where: Place) -> tuple[int, ...]:
    """Shape of the torch tensor of a leaf of the tree: without the layer axis, matrices turned to (out, in)."""
    shape = tuple(leaf_shape) if where.layer is None else tuple(leaf_shape[1:])
    return shape[::-1] if where.transpose else shape


def from_flax_name(name: str) -> str | None:
    """"model/layers/3/mlp/up_proj/kernel" -> "model.layers.3.mlp.up_proj.weight"; None if the table has no such leaf."""
    module, _, leaf = name.rpartition("/")
    candidate = f"{module.replace('/', '.')}.{'bias' if leaf == 'bias' else 'weight'}"
    found = place(candidate)
    return candidate if found is not None and flax_name(found.path, found.layer) == name else None
