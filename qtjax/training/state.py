"""What training changes (the state) and what it only reads (the frozen part)."""

from dataclasses import dataclass
from typing import Any

import jax
import optax
from jax.sharding import Mesh

from qtjax import models
from qtjax.overlays import Overlay, overlay_axes
from qtjax.parallel import param_shardings, replicated, tree_shardings
from qtjax.tree import Tree, flatten


@dataclass(frozen=True)
class TrainState:
    """trainable: the parameter tree, or an overlay's trainable tree. optimizer: optax state over it."""

    trainable: Tree
    optimizer: Any


jax.tree_util.register_dataclass(TrainState, data_fields=["trainable", "optimizer"], meta_fields=[])


@dataclass(frozen=True)
class Subject:
    """What is being trained: without an overlay the parameters themselves, else the overlay over frozen parameters."""

    config: models.ModelConfig
    overlay: Overlay | None

    def split(self, params: Tree) -> tuple[Tree, Tree]:
        """(trainable, frozen) of a fresh model."""
        if self.overlay is None:
            return params, {}
        return self.overlay.params, {"params": params, "overlay": self.overlay.frozen}

    def join(self, trainable: Tree, frozen: Tree) -> tuple[Tree, Overlay | None]:
        """(params, overlay) as the model takes them."""
        if self.overlay is None:
            return trainable, None
        return frozen["params"], self.overlay.replace(params=trainable, frozen=frozen["overlay"])

    def frozen_shardings(self, mesh: Mesh) -> Tree:
        """NamedSharding per frozen leaf, in the structure that `split` returns."""
        if self.overlay is None:
            return {}
        own = tree_shardings(mesh, overlay_axes(self.overlay, self.config).frozen, self.overlay.frozen)
        return {"params": param_shardings(self.config, mesh), "overlay": own}

    def shardings(self, mesh: Mesh) -> Tree:
        """NamedSharding per trainable leaf; an overlay's leaves follow their base leaves."""
        if self.overlay is None:
            return param_shardings(self.config, mesh)
        return tree_shardings(mesh, overlay_axes(self.overlay, self.config).params, self.overlay.params)


def init_state(subject: Subject, mesh: Mesh, trainable: Tree, optimizer: optax.GradientTransformation) -> TrainState:
    """The state on the mesh; moments lie as their parameters do."""
    shardings = subject.shardings(mesh)
    trainable = jax.tree.map(lambda leaf, sharding: jax.device_put(leaf, sharding), trainable, shardings)
    out = optimizer_shardings(optimizer, trainable, shardings, mesh)
    return TrainState(trainable, jax.jit(optimizer.init, out_shardings=out)(trainable))


def optimizer_shardings(optimizer: optax.GradientTransformation, trainable: Tree, shardings: Tree, mesh: Mesh) -> Any:
    """Shardings of the optax state: a subtree shaped like the trainables lies as they do, scalars are replicated."""
    return optax.tree.map_params(
        optimizer,
        lambda _, sharding: sharding,
        jax.eval_shape(optimizer.init, trainable),
        shardings,
        transform_non_params=lambda _: replicated(mesh),
    )


def count_parameters(tree: Tree) -> int:
    """Number of values in all leaves."""
    return sum(int(leaf.size) for leaf in flatten(tree).values())
