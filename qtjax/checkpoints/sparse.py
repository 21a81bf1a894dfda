"""DiffPruning's product as a small file: the few values by which the tuned model differs from its base."""

from collections.abc import Mapping
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from safetensors.numpy import save

from qtjax.atomic import disk_errors, write_atomic
from qtjax.checkpoints.adapters import host_array, read_safetensors
from qtjax.errors import QtjaxError, near_names
from qtjax.models import Quantized
from qtjax.overlays import Overlay
from qtjax.overlays.diffprune import is_projected, sparse_delta
from qtjax.overlays.targets import linear_modules
from qtjax.parallel import wait_for_all
from qtjax.tree import Tree, flatten, unflatten

SparseDelta = Mapping[str, tuple[np.ndarray, np.ndarray]]


def save_sparse_delta(path: str | Path, overlay: Overlay) -> None:
    """Writes a safetensors file: for every edited weight NAME (Hugging Face's), NAME.indices int32 [2, n], rows (out) and
    columns (in), and NAME.values float32 [n].

    On several hosts every process must call it; process 0 writes, and none returns before the file stands. Raises
    QtjaxError for another method than diffprune, for a difference that is not projected yet (all of it would be in the
    file), and if the disk refuses; an earlier file is then left as it was.
    """
    overlay = overlay.replace(params=jax.tree.map(host_array, overlay.params))
    delta = sparse_delta(overlay)
    if not is_projected(overlay):
        count = sum(len(values) for _, values in delta.values())
        raise QtjaxError(
            f"sparse delta: the difference is not projected yet, {count:,} values are open; train on to project_at of the run, or"
            " save the adapter"
        )
    tensors = {}
    for name, (indices, values) in delta.items():
        tensors[f"{name}.indices"], tensors[f"{name}.values"] = np.ascontiguousarray(indices), np.ascontiguousarray(values)
    if jax.process_index() == 0:
        with disk_errors(Path(path).parent, "making the folder"):
            Path(path).parent.mkdir(parents=True, exist_ok=True)
        write_atomic(Path(path), save(tensors, metadata={"format": "pt"}))
    wait_for_all(f"save_sparse_delta {Path(path).name}")


def load_sparse_delta(path: str | Path) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """The file of `save_sparse_delta`: {weight: (indices int32 [2, n], values float32 [n])}.

    Raises QtjaxError for a file that is missing or corrupt, and for tensors that are no such pairs.
    """
    tensors = read_safetensors(Path(path))
    names = sorted({name.rsplit(".", 1)[0] for name in tensors})
    delta = {}
    for name in names:
        indices, values = tensors.get(f"{name}.indices"), tensors.get(f"{name}.values")
        fits = indices is not None and values is not None and values.ndim == 1 and indices.shape == (2, len(values))
        if not fits or indices.dtype != np.int32 or values.dtype != np.float32:
            raise QtjaxError(f"{path}: {name!r} must be {name}.indices, int32 [2, n], and {name}.values, float32 [n]")
        delta[name] = (indices, values)
    return delta


def add_sparse_delta(params: Tree, delta: SparseDelta) -> Tree:
    """The base with the difference added in float32, each leaf in its own dtype; leaves that do not change are shared.

    Raises QtjaxError for a weight that the tree has not or holds quantised, and for an index outside it.
    """
    leaves = dict(flatten(params))
    places = {f"{linear.module(n)}.weight": (linear, n) for linear in linear_modules(params) for n in range(linear.layers)}
    for name, (indices, values) in delta.items():
        if name not in places:
            raise QtjaxError(f"sparse delta: {name!r} is no linear module of this model{near_names(name, places)}")
        linear, layer = places[name]
        sizes = np.array([[linear.outputs], [linear.inputs]])
        if np.any(indices < 0) or np.any(indices >= sizes):
            raise QtjaxError(
                f"sparse delta: an index of {name!r} is outside {linear.outputs} x {linear.inputs}; it is for another base"
            )
        kernel = leaves[f"{linear.path}/kernel"]
        if isinstance(kernel, Quantized):
            raise QtjaxError(f"sparse delta: {name!r} is quantised ({kernel.kind}) here; load the base without quantization")
        rows, columns = indices
        changed = jnp.asarray(kernel[layer, columns, rows], jnp.float32) + values
        leaves[f"{linear.path}/kernel"] = kernel.at[layer, columns, rows].set(changed.astype(kernel.dtype))
    return unflatten(leaves)
