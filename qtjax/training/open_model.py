"""Whatever a user calls a model, opened for evaluation, scoring or generation: run folder, adapter, HF folder, hub name."""

from typing import Any, NamedTuple

from jax.sharding import Mesh

from qtjax.checkpoints import is_adapter_folder, load_adapter, load_pretrained
from qtjax.config import MeshSection, ModelSection, is_run_folder
from qtjax.data.templates import resolve_template
from qtjax.data.tokenizer import load_tokenizer
from qtjax.errors import QtjaxError
from qtjax.models import ModelConfig
from qtjax.overlays import Overlay
from qtjax.parallel import make_mesh
from qtjax.training.restore import load_run, run_mesh
from qtjax.tree import Tree


class Opened(NamedTuple):
    """`name` says in a few words what was opened."""

    config: ModelConfig
    params: Tree
    overlay: Overlay | None
    tokenizer: Any
    name: str


def open_mesh(section: MeshSection, checkpoint: str) -> Mesh:
    """The mesh of a config; a run trained on other devices than there are here is opened data parallel."""
    return run_mesh(section) if checkpoint and is_run_folder(checkpoint) else make_mesh(section)


def open_model(model: ModelSection, checkpoint: str = "", *, adapter: str = "", mesh: Mesh | None = None) -> Opened:
    """Opens a model with its tokenizer.

    Args:
      model: the config's section; its dtypes hold for everything but a run, which keeps its own.
      checkpoint: run folder (its newest checkpoint), PEFT adapter (its base is model.path), HF folder or hub name; empty:
        model.path as it is.
      adapter: PEFT folder put over the model. mesh: where parameters are sharded; a run lies on all devices.
    Raises QtjaxError: what load_run, load_pretrained and load_adapter raise; an adapter over a run that has one.
    """
    template = "auto"
    overlay, base, name = None, checkpoint or model.path, checkpoint or model.path
    if checkpoint and is_adapter_folder(checkpoint):
        if adapter:
            raise QtjaxError(f"{checkpoint} is an adapter itself; give its base as the model and one adapter")
        adapter, base, name = checkpoint, model.path, f"{model.path} + {checkpoint}"
    elif adapter:
        name = f"{base} + {adapter}"
    if is_run_folder(base):
        run, config, params, overlay = load_run(base)
        base, template = run.model.path, run.data.chat_template
    else:
        config, params = load_pretrained(
            base, model.dtype, mesh=mesh, param_dtype=model.param_dtype, random_init=model.random_init and not checkpoint,
            quantization=model.quantized,
        )  # fmt: skip
    if adapter:
        if overlay is not None:
            raise QtjaxError(f"{checkpoint}: this run trained an adapter of its own; a second one cannot be put over it")
        overlay = load_adapter(adapter, config, params)
    tokenizer = load_tokenizer(base)
    if template not in ("auto", "none"):  # a run is asked as it was trained
        tokenizer.chat_template = str(resolve_template(tokenizer, template))
    return Opened(config, params, overlay, tokenizer, name)
