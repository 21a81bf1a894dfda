"""What training changes (the state) and what it only reads (the frozen part)."""

from dataclasses import dataclass, field, replace
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding

from qtjax import models
from qtjax.overlays import Method, Overlay, method_named, overlay_axes
from qtjax.parallel import param_shardings, replicated, tree_shardings
from qtjax.tree import Tree, flatten


@dataclass(frozen=True)
class TrainState:
    """trainable: the parameter tree, or an overlay's trainable tree. optimizer: optax state over it. method: what the
    overlay's own rule after each step keeps, {} for most."""

    trainable: Tree
    optimizer: Any
    method: Tree = field(default_factory=dict)


jax.tree_util.register_dataclass(TrainState, data_fields=["trainable", "optimizer", "method"], meta_fields=[])


@dataclass(frozen=True)
class Subject:
    """What is being trained: without an overlay the parameters themselves, else the overlay over frozen parameters."""

    config: models.ModelConfig
    overlay: Overlay | None

    def shapes(self) -> "Subject":
        """The same without the overlay's arrays, of which `join` has others."""
        return replace(self, overlay=jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), self.overlay))

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

    @property
    def _method(self) -> Method | None:
        return None if self.overlay is None else method_named(self.overlay.method)

    @property
    def penalised(self) -> bool:
        """Whether the overlay adds a penalty to the loss."""
        return self._method is not None and self._method.penalty is not None

    def penalty(self, trainable: Tree) -> jax.Array:
        """The overlay's penalty, float32 in nats."""
        return self.overlay.replace(params=trainable).penalty()

    def method_state(self, trainable: Tree) -> Tree:
        """What the overlay's rule after a step keeps, before the first: its own arrays and the number of steps done."""
        if self._method is None or self._method.after_step is None:
            return {}
        return {"step": jnp.int32(0), "own": self._method.state(self.overlay.spec, trainable)}

    def after_step(self, trainable: Tree, method: Tree, gradients: Tree | None) -> tuple[Tree, Tree]:
        """The overlay's rule after a step of the run, where it has one; gradients None: the step had no target."""
        if not method:
            return trainable, method
        step = method["step"] + 1
        trainable, own = self._method.after_step(self.overlay.spec, trainable, method["own"], gradients, step)
        return trainable, {"step": step, "own": own}

    def rates(self) -> dict[str, float]:
        """{leaf path: factor on the learning rate}, for the trained leaves that have one of their own."""
        if self._method is None:
            return {}
        own = self._method.rates(self.overlay.spec)
        paths = flatten(self.overlay.params)
        return {path: own[name] for path in paths if (name := path.rsplit("/", 1)[-1]) in own}

    def decayed(self) -> dict[str, bool]:
        """{leaf path: whether weight decay touches it}: matrices, not vectors; one layer's shape counts."""
        if self._method is None:
            return {path: path.rsplit("/", 1)[-1] not in ("weight", "bias") for path in flatten(models.abstract_params(self.config))}
        leaves = self._method.leaves(self.overlay.spec)
        return {leaf.path: len(leaf.shape) - leaf.stacked >= 2 for leaf in leaves if leaf.trained}


def described(tree: Any) -> Any:
    """Shape, dtype and sharding of every array of a tree, or of what describes one, as jax.ShapeDtypeStruct."""
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), tree)


def init_state(subject: Subject, mesh: Mesh, trainable: Tree, optimizer: optax.GradientTransformation) -> TrainState:
    """The state on the mesh; what stands beside a parameter lies as it does."""
    out = state_shardings(subject, mesh, trainable, optimizer)
    trainable = jax.tree.map(lambda leaf, sharding: jax.device_put(leaf, sharding), trainable, out.trainable)
    method = jax.jit(subject.method_state, out_shardings=out.method)(trainable)
    return TrainState(trainable, jax.jit(optimizer.init, out_shardings=out.optimizer)(trainable), method)


def state_shardings(subject: Subject, mesh: Mesh, trainable: Tree, optimizer: optax.GradientTransformation) -> TrainState:
    """NamedSharding per leaf of the state, before and after a step. Args: trainable: arrays or shapes."""
    own = subject.shardings(mesh)
    moments = _optimizer_shardings(optimizer, trainable, own, mesh)
    return TrainState(own, moments, _method_shardings(jax.eval_shape(subject.method_state, trainable), trainable, own, mesh))


def _method_shardings(method: Tree, trainable: Tree, shardings: Tree, mesh: Mesh) -> Tree:
    """An array of a trainable's shape, under its path (of several, the longest), lies as it does; all others are replicated.

    "own/exp_avg_ipt/layers/self_attn/q_proj/lora_A" stands beside "layers/self_attn/q_proj/lora_A"; in a stack
    "own/adalora/exp_avg_ipt/layers/..." beside "adalora/layers/...": the parts of one path in order, among those of the other.
    """
    shapes, own = flatten(trainable), flatten(shardings)

    def beside(path: tuple[Any, ...], leaf: Any) -> NamedSharding:
        names = [str(key.key) for key in path]
        found = [p for p, x in shapes.items() if x.shape == leaf.shape and _in_order(p.split("/"), names)]
        return own[max(found, key=len)] if found else replicated(mesh)

    return jax.tree_util.tree_map_with_path(beside, method)


def _in_order(few: list[str], many: list[str]) -> bool:
    rest = iter(many)
    return few[-1] == many[-1] and all(name in rest for name in few)


def _optimizer_shardings(optimizer: optax.GradientTransformation, trainable: Tree, shardings: Tree, mesh: Mesh) -> Any:
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
