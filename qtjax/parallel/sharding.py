"""Where a model's parameters lie on the mesh."""

from typing import Any

from jax.sharding import Mesh

from qtjax import models
from qtjax.parallel.mesh import mesh_axis, tree_shardings
from qtjax.tree import Tree, flatten, unflatten


def param_shardings(config: models.ModelConfig, mesh: Mesh) -> Tree:
    """NamedSharding for every leaf of the parameter tree; QtjaxError where the mesh does not divide the model."""
    axes, shapes = models.logical_axes(config), models.abstract_params(config)
    shardings, names = flatten(tree_shardings(mesh, axes, shapes)), flatten(axes)
    for path, leaf in flatten(shapes).items():
        if isinstance(leaf, models.Quantized):
            shardings[path] = _packed(mesh, leaf, names[path])
    return unflatten(shardings)


def _packed(mesh: Mesh, leaf: models.Quantized, names: tuple[str | None, ...]) -> models.Quantized:
    """A record of shardings. An axis is cut as the matrix's is where that leaves whole blocks on each device, else kept whole:
    nf4 of a matrix whose `in` 64 does not divide has blocks across rows and lies whole on every device."""
    arrays, axes = {}, leaf.axes(names)
    kept = [_divides(mesh, leaf, axes, dim) for dim in range(leaf.ndim)]

    def one(array: Any, own: tuple[str | None, ...] | None) -> Any:
        if array is None:
            return None
        own = tuple(name if dim >= len(kept) or kept[dim] else None for dim, name in enumerate(own))
        return tree_shardings(mesh, {"x": own}, {"x": array})["x"]

    for name in ("codes", "scale", "nested", "offset"):
        arrays[name] = one(getattr(leaf, name), getattr(axes, name))
    return leaf.like(**arrays)


def _divides(mesh: Mesh, leaf: models.Quantized, axes: models.Quantized, dim: int) -> bool:
    for array, own in ((leaf.codes, axes.codes), (leaf.scale, axes.scale)):
        axis = mesh_axis(own[dim])
        if axis and array.shape[dim] % mesh.shape[axis]:
            return False
    return True
