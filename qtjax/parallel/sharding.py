"""Where a model's parameters lie on the mesh."""

from jax.sharding import Mesh

from qtjax import models
from qtjax.parallel.mesh import tree_shardings
from qtjax.tree import Tree


def param_shardings(config: models.ModelConfig, mesh: Mesh) -> Tree:
    """NamedSharding for every leaf of the parameter tree; QtjaxError where the mesh does not divide the model."""
    return tree_shardings(mesh, models.logical_axes(config), models.abstract_params(config))
