"""X-LoRA's experts: adapters that a run trains before the overlay that mixes them."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.console import Console

from qtjax.checkpoints import is_adapter_folder
from qtjax.config import Config, override
from qtjax.errors import QtjaxError
from qtjax.overlays import method_named
from qtjax.training.setup import expert_folders, own_settings


def missing_experts(config: Config) -> list[Path]:
    """The run's own experts that are not trained yet; [] for an overlay that is not made of other adapters, or was made before."""
    if config.overlay.method == "none" or config.overlay.path or not method_named(config.overlay.method).in_parts:
        return []
    inside = Path(config.run.folder)
    return [Path(p) for p in expert_folders(config) if Path(p).is_relative_to(inside) and not is_adapter_folder(p)]


def train_experts(config: Config, console: Console, train: Callable[[Config], Any]) -> None:
    """Trains them one after another, LoRA on every N-th row each, as runs of their own in <run folder>/experts; resumes.

    Args: train(config): runs an experiment to its end and exports its adapter.
    """
    if config.data.part:
        raise QtjaxError(f"data.part = {config.data.part!r}: the experts are trained on parts of the rows already; leave it empty")
    count, r = len(expert_folders(config)), own_settings(config.overlay.fields).get("r", config.overlay.r)
    for path in missing_experts(config):
        number = int(path.parent.name) + 1
        console.print(f"expert  {number} of {count}: LoRA on every {count}. row", highlight=False)
        changes = {
            "overlay.method": "lora", "overlay.fields": "", "overlay.r": r, "data.part": f"{number}/{count}",
            "run.folder": str(path.parent), "run.export": True, "run.tensorboard": False, "train.compare_full_data": 0,
            "eval.generate_samples": 0,
        }  # fmt: skip
        train(override(config, changes))
