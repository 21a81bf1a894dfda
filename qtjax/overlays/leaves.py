"""An overlay's arrays as one table: shape, sharding, initial value and PEFT name of each, and what follows from it.

A method lists its leaves; trees, shapes, axes, counts and PEFT's tensors all come from that list. Arrays that exist once
per layer are stacked on axis 0; layers of unequal shapes are padded with zeros to the largest, and layers that are not
edited are zero. A method's arithmetic must keep that padding without effect.
"""

import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from qtjax.tree import Tree, flatten, unflatten

Shape = tuple[int, ...]
# init(key, shape, base): the stacked array [N, ...]; base is {path: array} of the base model.
Init = Callable[[Array, Shape, Mapping[str, Any]], Array]


def zeros(key: Array, shape: Shape, base: Mapping[str, Any]) -> Array:
    """float32 zeros."""
    del key, base
    return jnp.zeros(shape, jnp.float32)


def filled(value: float) -> Init:
    """float32, all `value`."""
    return lambda key, shape, base: jnp.full(shape, value, jnp.float32)


def normal(std: float) -> Init:
    """N(0, std^2), float32."""
    return lambda key, shape, base: jax.random.normal(key, shape, jnp.float32) * std


def uniform(bound: float) -> Init:
    """U(-bound, bound), float32."""
    return lambda key, shape, base: jax.random.uniform(key, shape, jnp.float32, -bound, bound)


def kaiming(*fans: int) -> Init:
    """U(+-1/sqrt(fan)), which is torch's kaiming_uniform_(a=sqrt(5)); one fan, or one a layer (0 where there is none)."""
    bounds = 1 / np.sqrt(np.maximum(np.asarray(fans, np.float32), 1))

    def init(key: Array, shape: Shape, base: Mapping[str, Any]) -> Array:
        del base
        return jax.random.uniform(key, shape, jnp.float32, -1, 1) * bounds.reshape(-1, *[1] * (len(shape) - 1))

    return init


@dataclass(frozen=True)
class Leaf:
    """One array of an overlay.

    path: "layers/self_attn/q_proj/lora_A" in the overlay's trees.
    shapes: one per layer, None for a layer without it; of an array outside the layers, exactly one (stacked False).
    axes: logical axis of each dimension of one layer; "in" and "out" stand for those of the kernel at `module`.
    keys: PEFT's name for each layer, None where no tensor of its own stands in the file.
    module: tree path of the linear module that it belongs to, for "in" and "out".
    to_peft, from_peft: one layer's array to the layout in the file and back: transposes and reshapes only, for numpy
      and traced arrays alike.
    trained: False puts it among the frozen arrays. init: its first value; of a frozen array without keys also its value
      when an adapter is read.
    """

    path: str
    shapes: tuple[Shape | None, ...]
    axes: tuple[str | None, ...]
    keys: tuple[str | None, ...]
    init: Init = zeros
    module: str = ""
    to_peft: Callable[[Any], Any] = lambda x: x
    from_peft: Callable[[Any], Any] = lambda x: x
    trained: bool = True
    stacked: bool = True
    dtype: Any = jnp.float32

    @property
    def shape(self) -> Shape:
        """The stored array's: the largest of all layers, with the layer axis in front if stacked."""
        present = [s for s in self.shapes if s is not None]
        largest = tuple(max(sizes) for sizes in zip(*present)) if present else ()
        return (len(self.shapes), *largest) if self.stacked else largest

    @property
    def size(self) -> int:
        """Values in all layers, padding left out."""
        return sum(int(np.prod(s, dtype=np.int64)) for s in self.shapes if s is not None)

    def part(self, stored: Any, layer: int) -> Any:
        """One layer's own array, without padding."""
        own = stored[layer] if self.stacked else stored
        return own[tuple(slice(size) for size in self.shapes[layer])]

    def mask(self) -> np.ndarray | None:
        """bool of `shape`, False on padding; None without padding."""
        if all(s == self.shapes[0] and s is not None for s in self.shapes):
            return None
        real = np.zeros(self.shape, bool)
        for n, s in enumerate(self.shapes):
            if s is not None:
                real[(n, *(slice(size) for size in s))] = True
        return real

    def unpadded(self, stored: Array) -> Array:
        """`stored` with padding that is zero and gets no gradient, where the arithmetic alone would give it one."""
        real = self.mask()
        return stored if real is None else jnp.where(real, stored, 0)


def transposed(leaf_kwargs: dict[str, Any] | None = None, **more: Any) -> dict[str, Any]:
    """Keyword arguments of a Leaf that the file holds transposed."""
    return {"to_peft": lambda x: x.T, "from_peft": lambda x: x.T, **(leaf_kwargs or {}), **more}


def column() -> dict[str, Any]:
    """Keyword arguments of a vector [n] that the file holds as [n, 1]."""
    return {"to_peft": lambda x: x[:, None], "from_peft": lambda x: x[:, 0]}


def row() -> dict[str, Any]:
    """Keyword arguments of a vector [n] that the file holds as [1, n]."""
    return {"to_peft": lambda x: x[None], "from_peft": lambda x: x[0]}


def split(leaves: Sequence[Leaf], values: Mapping[str, Any]) -> tuple[Tree, Tree]:
    """{path: value} as (trainable tree, frozen tree)."""
    return tuple(unflatten({leaf.path: values[leaf.path] for leaf in leaves if leaf.trained is kind}) for kind in (True, False))


def initial(leaves: Sequence[Leaf], key: Array, base: Mapping[str, Any]) -> tuple[Tree, Tree]:
    """(trainable, frozen) at step 0; each draw depends on the key and the leaf's path, not on the other leaves."""
    return split(leaves, {leaf.path: initial_value(leaf, key, base) for leaf in leaves})


def initial_value(leaf: Leaf, key: Array, base: Mapping[str, Any]) -> Array:
    """One leaf at step 0, its padding zero."""
    value = leaf.init(jax.random.fold_in(key, zlib.crc32(leaf.path.encode())), leaf.shape, base).astype(leaf.dtype)
    real = leaf.mask()
    return value if real is None else jnp.where(real, value, 0)


def abstract(leaves: Sequence[Leaf]) -> tuple[Tree, Tree]:
    """(trainable, frozen) as jax.ShapeDtypeStruct leaves."""
    return split(leaves, {leaf.path: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for leaf in leaves})


def axes(leaves: Sequence[Leaf], base_axes: Mapping[str, tuple]) -> tuple[Tree, Tree]:
    """(trainable, frozen) as tuples of logical axis names, "in" and "out" resolved by the base kernel's own."""
    out = {}
    for leaf in leaves:
        names = dict(zip(("in", "out"), base_axes[f"{leaf.module}/kernel"][-2:])) if leaf.module else {}
        own = tuple(names.get(axis, axis) for axis in leaf.axes)
        out[leaf.path] = ("layers", *own) if leaf.stacked else own
    return split(leaves, out)


def tensors(leaves: Sequence[Leaf], params: Tree, frozen: Tree) -> dict[str, Any]:
    """{PEFT key: array in the file's layout}; padding and unedited layers are left out."""
    values, out = flatten(params) | flatten(frozen), {}
    for leaf in leaves:
        for n, (key, shape) in enumerate(zip(leaf.keys, leaf.shapes)):
            if key is not None and shape is not None:
                out[key] = leaf.to_peft(leaf.part(values[leaf.path], n))
    return out


def trees(leaves: Sequence[Leaf], found: Mapping[str, Any]) -> tuple[Tree, Tree]:
    """(trainable, frozen) of PEFT's tensors: the inverse of `tensors`. Frozen arrays without keys are made anew."""
    values = {}
    for leaf in leaves:
        if not leaf.trained and not any(leaf.keys):
            values[leaf.path] = initial_value(leaf, jax.random.key(0), {})
            continue
        stored = np.zeros(leaf.shape, np.float32 if leaf.dtype == jnp.float32 else leaf.dtype)
        for n, (key, shape) in enumerate(zip(leaf.keys, leaf.shapes)):
            if shape is not None:
                place = tuple(slice(size) for size in shape)
                stored[(n, *place) if leaf.stacked else place] = leaf.from_peft(np.asarray(found[key]))
        values[leaf.path] = jnp.asarray(stored)
    return split(leaves, values)
