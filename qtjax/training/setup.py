"""From a config to everything a run needs: mesh, model, overlay, optimizer, and where each array lies."""

from dataclasses import dataclass
from typing import Any

import jax
from jax.sharding import Mesh

from qtjax import models
from qtjax.checkpoints import load_pretrained
from qtjax.config import Config
from qtjax.overlays import Overlay, init_overlay
from qtjax.training.optimizer import make_optimizer
from qtjax.training.state import Subject, TrainState, init_state
from qtjax.tree import Tree


@dataclass(frozen=True)
class Model:
    """The model as loaded: nothing trained yet."""

    subject: Subject
    params: Tree

    @property
    def config(self) -> models.ModelConfig:
        return self.subject.config


def load_model(config: Config, mesh: Mesh) -> Model:
    """Checkpoint and overlay of a config, on the mesh. Raises QtjaxError as load_pretrained and init_overlay do."""
    m = config.model
    key = jax.random.key(config.train.seed)
    model_config, params = load_pretrained(
        m.path, m.dtype, mesh=mesh, param_dtype=m.param_dtype, random_init=m.random_init, key=jax.random.fold_in(key, 1),
        quantization=None if m.quantization == "none" else m.quantization,
    )  # fmt: skip
    model_config = model_config.replace(remat=m.remat, unroll_layers=m.unroll_layers)
    return Model(Subject(model_config, new_overlay(config, model_config, params, jax.random.fold_in(key, 2))), params)


def new_overlay(config: Config, model_config: models.ModelConfig, params: Tree, key: jax.Array) -> Overlay | None:
    """The overlay that the config names, None for full-parameter training."""
    fields = {name: value for name, value in config.to_dict()["overlay"].items() if name != "method"}
    method = config.overlay.method
    return None if method == "none" else init_overlay(method, model_config, params, key, **fields)


def start(config: Config, mesh: Mesh, model: Model, total_steps: int) -> tuple[TrainState, Tree, Any]:
    """(state, frozen, optimizer) of step 0, on the mesh."""
    optimizer = make_optimizer(config.train, total_steps)
    trainable, frozen = model.subject.split(model.params)
    frozen = jax.tree.map(jax.device_put, frozen, model.subject.frozen_shardings(mesh))
    return init_state(model.subject, mesh, trainable, optimizer), frozen, optimizer


def checkpoint_tree(state: TrainState) -> dict[str, Any]:
    """What a checkpoint holds: only what training changes; a frozen base is read again from its own folder."""
    return {"trainable": state.trainable, "optimizer": _plain(state.optimizer)}


def from_checkpoint(state: TrainState, tree: dict[str, Any]) -> TrainState:
    """The inverse of `checkpoint_tree`, in the structure of `state`."""
    leaves = jax.tree.leaves(tree["optimizer"])
    return TrainState(tree["trainable"], jax.tree.unflatten(jax.tree.structure(state.optimizer), leaves))


def _plain(optimizer_state: Any) -> list[Any]:
    """The optax state's leaves in order: independent of how optax nests and names its tuples."""
    return jax.tree.leaves(optimizer_state)


__all__ = ["Model", "checkpoint_tree", "from_checkpoint", "load_model", "new_overlay", "start"]
