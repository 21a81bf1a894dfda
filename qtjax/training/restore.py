"""A run folder back to a model: for export, evaluation and generation after training."""

from pathlib import Path

import jax
from jax.sharding import Mesh, NamedSharding

from qtjax import models
from qtjax.checkpoints.run_state import RunState
from qtjax.config import Config, MeshSection, run_config
from qtjax.data.prepare import training_data
from qtjax.data.tokenizer import load_tokenizer
from qtjax.errors import QtjaxError
from qtjax.overlays import Overlay, field_names, method_named
from qtjax.parallel import make_mesh
from qtjax.training.calibration import fit_posterior
from qtjax.training.memory import shortage
from qtjax.training.run import check_data
from qtjax.training.setup import check_overlay, load_model, split
from qtjax.tree import Tree


def run_mesh(section: MeshSection) -> Mesh:
    """The mesh that a run had, or data parallel over all devices where they are others than the run's."""
    try:
        return make_mesh(section)
    except QtjaxError:
        return make_mesh(MeshSection())


def load_run(
    folder: str | Path, *, posterior: bool = False
) -> tuple[Config, models.ModelConfig, Tree, Overlay | None]:
    """The newest checkpoint of a run, on its own mesh where the devices allow it, else data parallel.

    Args: posterior: where the method has one, fit it to the run's training data, as the run does after its last step; it is
      not part of the checkpoints.
    Returns: (Config, ModelConfig, params, overlay or None), config.run.folder being `folder`. Raises QtjaxError when the
      folder is no run folder, holds no readable checkpoint or one that the devices cannot hold, and for a posterior when the data are no
      longer the run's.
    """
    folder = Path(folder)
    config = run_config(folder)
    mesh = run_mesh(config.mesh)
    model = load_model(config, mesh)
    subject, (trainable, frozen) = model.subject.shapes(), split(model, mesh)
    target = jax.tree.map(_described, trainable, subject.shardings(mesh))
    del model, trainable  # the weights before training need no room beside those after it
    checkpoints = RunState(folder / "checkpoints", config.train.keep_checkpoints)
    try:
        found = checkpoints.restore({"trainable": target}, part=True)  # the moments would take twice the room of the rest
    except jax.errors.JaxRuntimeError as error:
        if (missing := shortage(str(error))) is None:
            raise
        raise QtjaxError(f"{folder}: out of memory while its checkpoint is read: {missing}; use more devices, or larger ones") from None
    checkpoints.close()
    if found is None:
        raise QtjaxError(f"{folder}: no checkpoint yet; train for at least train.checkpoint_every steps first")
    params, overlay = subject.join(found.state["trainable"], frozen)
    if overlay is not None and not config.overlay.path and "total_step" in field_names(overlay.method):  # its schedule counts the run's steps
        steps = int(found.meta.get("total_steps", 0))
        overlay = overlay.replace(spec=check_overlay(config, subject.config, steps).spec)
    if posterior and overlay is not None and method_named(overlay.method).posterior:
        dataset = training_data(config.data, load_tokenizer(config.model.path))
        check_data(folder, config, dataset, found.meta)
        overlay, _ = fit_posterior(subject.config, params, overlay, dataset)
    return config, subject.config, params, overlay


def _described(leaf: jax.Array, sharding: NamedSharding) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)
