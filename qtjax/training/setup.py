"""From a config to everything a run needs: mesh, model, overlay, optimizer, and where each array lies."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from qtjax import models
from qtjax.checkpoints import load_adapter, load_pretrained
from qtjax.config import Config, OverlaySection
from qtjax.errors import QtjaxError, near_names
from qtjax.overlays import Overlay, abstract_overlay, field_names, init_overlay, method_named
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


def load_model(config: Config, mesh: Mesh, total_steps: int = 0) -> Model:
    """Checkpoint and overlay of a config, on the mesh.

    Args: total_steps: for overlays whose schedule counts them; 0: nothing will be trained. Raises QtjaxError as load_pretrained and init_overlay do.
    """
    m = config.model
    key = jax.random.key(config.train.seed)
    model_config, params = load_pretrained(
        m.path, m.dtype, mesh=mesh, param_dtype=m.param_dtype, random_init=m.random_init, key=jax.random.fold_in(key, 1),
        quantization=m.quantized,
    )  # fmt: skip
    model_config = model_config.replace(remat=m.remat, unroll_layers=models.unrolled(model_config, m.unroll_layers))
    overlay = new_overlay(config, model_config, params, jax.random.fold_in(key, 2), total_steps)
    return Model(Subject(model_config, overlay), params)


def new_overlay(
    config: Config, model_config: models.ModelConfig, params: Tree, key: jax.Array, total_steps: int
) -> Overlay | None:
    """The overlay that the config names, None for full-parameter training."""
    method = config.overlay.method
    if method == "none":
        return None
    if config.overlay.path:
        return _continued(config.overlay, model_config, params)
    fields = overlay_fields(config.overlay, total_steps)
    if method_named(method).in_parts:
        if not isinstance(fields.get("adapters"), list):  # trained by this run, with these settings
            fields = {name: value for name, value in fields.items() if name not in ("r", "lora_alpha", "target_modules")}
        fields["adapters"] = [load_adapter(path, model_config, params) for path in expert_folders(config)]
    return init_overlay(method, model_config, params, key, **fields)


def _continued(section: OverlaySection, model_config: models.ModelConfig, params: Tree | None) -> Overlay:
    """The adapter that overlay.path holds. Raises QtjaxError when it is of another method or settings are given beside it."""
    beside = [*_given(section), *(["fields"] if section.fields else [])]
    if beside:
        raise QtjaxError(f"overlay.{beside[0]} = {getattr(section, beside[0])!r}: the adapter in overlay.path has its own settings; leave it out")
    loaded, wanted = load_adapter(section.path, model_config, params), method_named(section.method)
    if loaded.method != section.method:
        if wanted.leaves is not method_named(loaded.method).leaves or wanted.expand is not method_named(loaded.method).expand:
            raise QtjaxError(f"overlay.path = {section.path!r}: holds a {loaded.method} adapter; set overlay.method to {loaded.method}")
        loaded = loaded.replace(method=section.method)  # qlora is lora over a quantised base
    return loaded


def check_overlay(config: Config, shape: models.ModelConfig, total_steps: int = 0) -> Overlay:
    """The config's overlay with shapes only. Raises QtjaxError for a mistake in its settings, before anything is loaded."""
    if config.overlay.path:
        return _continued(config.overlay, shape, None)
    fields = overlay_fields(config.overlay, total_steps)
    if method_named(config.overlay.method).in_parts:
        fields["adapters"] = len(expert_folders(config))
    return abstract_overlay(config.overlay.method, shape.replace(quantization=config.model.quantized), **fields)


def expert_folders(config: Config) -> list[str]:
    """The folders of the adapters that the overlay is made of: those that overlay.fields lists (adapters=["a","b"]), or
    those that the run trains first (adapters=N, 3 by itself)."""
    given = own_settings(config.overlay.fields).get("adapters", 3)
    if isinstance(given, list) and given and all(isinstance(path, str) for path in given):
        return given
    if not isinstance(given, int) or isinstance(given, bool) or given < 1:
        raise QtjaxError(
            f'overlay.fields: adapters = {given!r}: must be how many experts to train first, or their folders: adapters=["a","b"]'
        )
    return [str(Path(config.run.folder) / "experts" / str(i) / "model") for i in range(given)]


def overlay_fields(section: OverlaySection, total_steps: int) -> dict[str, Any]:
    """The method's settings as the config gives them; what stays at 0 or empty is left to the method's own defaults.

    A method whose schedule counts steps (a field total_step) is told the run's number. Raises QtjaxError for a name
    that the method does not know, with near names, and for text in overlay.fields that is no name=value.
    """
    known = field_names(section.method) + (section.method.split("+") if "+" in section.method else [])
    given = _given(section) | own_settings(section.fields)
    for name in given:
        if name not in known:
            raise QtjaxError(f"overlay: {section.method} has no field {name!r}{near_names(name, known)}; it has {', '.join(known)}")
    return ({"total_step": total_steps} if "total_step" in known else {}) | given


def _given(section: OverlaySection) -> dict[str, Any]:
    """The settings that have a knob of their own, where they are not left to the method."""
    left = OverlaySection()
    names = ("r", "lora_alpha", "lora_dropout", "target_modules")
    return {name: getattr(section, name) for name in names if getattr(section, name) != getattr(left, name)}


def own_settings(text: str) -> dict[str, Any]:
    """overlay.fields: 'a=1 b=[2, 3] c=text' -> {"a": 1, "b": [2, 3], "c": "text"}; a value is JSON, or text up to a blank."""
    out, rest = {}, text.strip()
    while rest:
        name, equals, rest = rest.partition("=")
        if not equals or not name.strip().isidentifier():
            raise QtjaxError(f"overlay.fields = {text!r}: {name.strip()!r} is no name=value; write 'init_r=12 target_r=8'")
        try:
            value, end = json.JSONDecoder().raw_decode(rest)
        except ValueError:
            end = 0
        if not end or rest[end : end + 1].strip():  # no JSON, or only its beginning is
            value, end = rest.split(" ", 1)[0], len(rest.split(" ", 1)[0])
        out[name.strip()], rest = value, rest[end:].strip()
    return out


def split(model: Model, mesh: Mesh) -> tuple[Tree, Tree]:
    """(trainable, frozen) as loaded, the frozen part on the mesh."""
    trainable, frozen = model.subject.split(model.params)
    return trainable, jax.tree.map(jax.device_put, frozen, model.subject.frozen_shardings(mesh))


def start(config: Config, mesh: Mesh, model: Model, total_steps: int) -> tuple[TrainState, Tree, Any]:
    """(state, frozen, optimizer) of step 0, on the mesh."""
    optimizer = make_optimizer(config.train, total_steps, model.subject.decayed(), model.subject.rates())
    trainable, frozen = split(model, mesh)
    return init_state(model.subject, mesh, trainable, optimizer), frozen, optimizer


def checkpoint_tree(state: TrainState) -> dict[str, Any]:
    """What a checkpoint holds: only what training changes; a frozen base is read again from its own folder."""
    tree = {"trainable": state.trainable, "optimizer": _plain(state.optimizer)}
    return tree | ({"method": state.method} if state.method else {})


def from_checkpoint(state: TrainState, tree: dict[str, Any]) -> TrainState:
    """The inverse of `checkpoint_tree`, in the structure of `state`."""
    leaves = jax.tree.leaves(tree["optimizer"])
    optimizer = jax.tree.unflatten(jax.tree.structure(state.optimizer), leaves)
    return TrainState(tree["trainable"], optimizer, tree.get("method", {}))


def _plain(optimizer_state: Any) -> list[Any]:
    """The optax state's leaves in order: independent of how optax nests and names its tuples."""
    return jax.tree.leaves(optimizer_state)


__all__ = [
    "Model", "check_overlay", "checkpoint_tree", "expert_folders", "from_checkpoint", "load_model", "new_overlay", "overlay_fields",
    "own_settings", "split", "start",
]  # fmt: skip
