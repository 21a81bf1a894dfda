"""Tensors of a checkpoint -> the parameter tree, one leaf at a time, each leaf straight to its devices."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from qtjax.checkpoints.names import Place, places, stored_shape
from qtjax.errors import QtjaxError
from qtjax.models import Quantized, quantize
from qtjax.tree import Tree, describe_difference, flatten, unflatten

Index = tuple[slice, ...]


@dataclass(frozen=True)
class StoredTensor:
    """A tensor that still lies in a file; `read(index)` gives that part of it as a numpy array."""

    shape: tuple[int, ...]
    read: Callable[[Index], np.ndarray]
    transposed: bool = True  # matrices are (out, in), as torch stores them; False: (in, out) already


def assemble(
    stored: Mapping[str, StoredTensor], abstract: Tree, where: str, shardings: Tree | None = None
) -> Tree:
    """Builds the tree; host memory holds one leaf (one shard of a leaf, with shardings) beside what was built.

    Args:
      stored: {Hugging Face name: tensor}. abstract: tree of shape structs whose dtype each leaf is cast to; a `Quantized`
        of them is packed layer by layer, so that no more than one layer's matrix exists unpacked.
      where: the checkpoint, for messages. shardings: a tree of jax.sharding.Sharding like `abstract`; None puts every
        leaf on the default device.
    Raises QtjaxError listing missing, unknown and mis-shaped tensors.
    """
    wanted = places(abstract)
    leaves = flatten(abstract)
    turned = next(iter(stored.values())).transposed if stored else True
    expected = {
        name: jax.ShapeDtypeStruct(stored_shape(leaves[p.path].shape, p._replace(transpose=p.transpose and turned)), np.uint8)
        for name, p in wanted.items()
    }
    difference = describe_difference(expected, stored)
    if difference:
        raise QtjaxError(f"{where}: the tensors do not fit config.json: {difference}")
    pieces: dict[str, list[tuple[StoredTensor, Place]]] = {}
    for name, p in wanted.items():
        pieces.setdefault(p.path, []).append((stored[name], p))
    flat_shardings = flatten(shardings) if shardings is not None else {}
    # Waited for one by one: copies to devices run behind, and on a busy machine several host leaves would be alive.
    return unflatten(
        {path: jax.block_until_ready(_leaf(pieces[path], struct, flat_shardings.get(path))) for path, struct in leaves.items()}
    )


def _leaf(pieces: list[tuple[StoredTensor, Place]], struct: jax.ShapeDtypeStruct, sharding: Any) -> jax.Array:
    pieces = sorted(pieces, key=lambda piece: piece[1].layer or 0)
    if isinstance(struct, Quantized):
        return _packed_leaf(pieces, struct, sharding)
    parts: dict[tuple[tuple[int, int], ...], np.ndarray] = {}

    def part(index: Index) -> np.ndarray:
        # Devices that hold the same part (replication) share one read.
        bounds = tuple(s.indices(size)[:2] for s, size in zip(index, struct.shape))
        if bounds not in parts:
            parts[bounds] = _read(pieces, tuple(slice(*b) for b in bounds), struct.dtype)
        return parts[bounds]

    if sharding is None:
        return jax.device_put(part(tuple(slice(0, size) for size in struct.shape)))
    return jax.make_array_from_callback(struct.shape, sharding, part)


def _packed_leaf(pieces: list[tuple[StoredTensor, Place]], struct: Quantized, sharding: Quantized | None) -> Quantized:
    whole = tuple(slice(0, size) for size in struct.shape)
    host = jax.tree.map(lambda x: np.empty(x.shape, x.dtype), struct)
    for n in range(struct.shape[0]):
        matrix = _read(pieces, (slice(n, n + 1), *whole[1:]), struct.dtype)[0]
        packed = quantize(matrix, struct.kind)
        jax.tree.map(lambda target, value: target.__setitem__(n, np.asarray(value)), host, packed)
    if sharding is None:
        return jax.tree.map(jax.device_put, host)
    return jax.tree.map(lambda x, where: jax.make_array_from_callback(x.shape, where, lambda index: x[index]), host, sharding)


def _read(pieces: list[tuple[StoredTensor, Place]], index: Index, dtype: np.dtype) -> np.ndarray:
    out = np.empty(tuple(s.stop - s.start for s in index), dtype)
    stacked = pieces[0][1].layer is not None
    inner = index[1:] if stacked else index
    targets = zip(pieces[index[0]], out) if stacked else [(pieces[0], out)]
    for (tensor, place), target in targets:
        turn = place.transpose and tensor.transposed
        values = tensor.read(inner[::-1] if turn else inner)
        # The assignment casts and transposes in one pass, without a copy in between.
        target[...] = values.T if turn else values
    return out
