"""The device mesh (data, fsdp, tensor) and how trees lie on it."""

import math
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from qtjax.config import MeshSection
from qtjax.errors import QtjaxError
from qtjax.tree import Tree, flatten, unflatten

AXES = ("data", "fsdp", "tensor")
BATCH_AXES = ("data", "fsdp")

# Which mesh axis each logical axis of a leaf is cut along; "layers" stays whole because the scan walks it.
_RULES: dict[str | None, str | None] = {
    "vocab": "tensor",
    "heads": "tensor",
    "kv_heads": "tensor",
    "mlp": "tensor",
    "embed": "fsdp",
    "layers": None,
    None: None,
}


def make_mesh(section: MeshSection, devices: list[Any] | None = None) -> Mesh:
    """Mesh with axes (data, fsdp, tensor) over all devices; data = -1 takes what remains. JAX has those of a process side by side.

    Args: devices: of a machine that is not here; None: all that this run has.
    Raises QtjaxError when the product is not the number of devices, naming the axis and what it could be, and when a row would lie on
    devices of several processes, each of which reads rows of its own.
    """
    here = devices is None
    devices = jax.devices() if here else devices
    left = len(devices)
    for axis in ("tensor", "fsdp"):
        ways = getattr(section, axis)
        if left % ways:
            whose = f"the {left} device{'s' * (left > 1)}" + (f" that mesh.tensor = {section.tensor} leaves" if axis == "fsdp" and section.tensor > 1 else "")
            fitting = ", ".join(str(w) for w in range(1, left + 1) if left % w == 0)
            raise QtjaxError(f"mesh.{axis} = {ways}: does not divide {whose}; values that do: {fitting}")
        left //= ways
    own = of_one_process(devices)
    if here and own % section.tensor:
        raise QtjaxError(
            f"mesh.tensor = {section.tensor}: does not divide the {own} device{'s' * (own > 1)} of each process, which reads whole rows; values"
            f" that do: {', '.join(str(w) for w in range(1, own + 1) if own % w == 0)}"
        )
    if section.data not in (-1, left):
        raise QtjaxError(
            f"mesh.data = {section.data}: {len(devices)} devices with mesh.fsdp = {section.fsdp} and mesh.tensor = {section.tensor} leave {left};"
            " set it to that, or to -1 for whatever is left"
        )
    return Mesh(np.asarray(devices).reshape(left, section.fsdp, section.tensor), AXES)


def of_one_process(devices: Sequence[Any]) -> int:
    """How many devices a process has."""
    return sum(device.process_index == devices[0].process_index for device in devices)


def batch_size(mesh: Mesh) -> int:
    """How many ways the batch dimension is cut."""
    return mesh.shape["data"] * mesh.shape["fsdp"]


def replicated(mesh: Mesh) -> NamedSharding:
    """A whole copy on every device."""
    return NamedSharding(mesh, P())


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Rows over (data, fsdp), everything else whole."""
    return NamedSharding(mesh, P(BATCH_AXES))


def mesh_axis(name: str | None) -> str | None:
    """The mesh axis that a logical axis is cut along, None for one that stays whole."""
    return _RULES[name]


def tree_shardings(mesh: Mesh, axes: Tree, shapes: Tree) -> Tree:
    """NamedSharding per leaf from its logical axis names.

    Args: axes: tree of tuples of logical names; shapes: a tree of the same paths with `.shape`.
    Raises QtjaxError naming the leaf, dimension and mesh axis where the mesh does not divide the model.
    """
    names, leaves = flatten(axes), flatten(shapes)
    out = {}
    for path, leaf in leaves.items():
        spec = [_RULES[name] for name in names[path]]
        for dim, axis in enumerate(spec):
            ways = mesh.shape[axis] if axis else 1
            if leaf.shape[dim] % ways:
                fitting = [w for w in range(1, ways + 1) if leaf.shape[dim] % w == 0 and mesh.size % w == 0]
                raise QtjaxError(
                    f"mesh.{axis} = {ways}: does not divide dimension {dim} of {path}, {leaf.shape[dim]};"
                    f" values that do: {', '.join(map(str, fitting))}"
                )
        while spec and spec[-1] is None:
            spec.pop()
        out[path] = NamedSharding(mesh, P(*spec))
    return unflatten(out)


def rows_on_device(mesh: Mesh, arrays: dict[str, np.ndarray]) -> dict[str, jax.Array]:
    """This process's rows as global arrays sharded over (data, fsdp); the rows of all processes together are the batch."""
    sharding = batch_sharding(mesh)
    return {name: jax.make_array_from_process_local_data(sharding, array) for name, array in arrays.items()}


def everywhere(mesh: Mesh, value: Any) -> jax.Array:
    """A whole copy on every device of a number or array that all processes have alike; unlike `device_put` it does not wait for them
    to compare, nor for a device that has yet to compute it."""
    return jax.make_array_from_callback(np.shape(value), replicated(mesh), lambda _: value)


def round_up(count: int, multiple: int) -> int:
    """The smallest multiple of `multiple` that is at least `count`."""
    return math.ceil(count / multiple) * multiple
