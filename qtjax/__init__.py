"""qtjax: supervised fine-tuning in JAX with joint sample and token pruning (Q-Tuning, arXiv 2509.23873)."""

import importlib
from typing import Any

# Where each public name lives; imported when it is first asked for, so that a door need not wait for what it does not use.
_HOMES = {
    "qtjax.checkpoints": (
        "add_sparse_delta", "adapter_state_dict", "load_adapter", "load_pretrained",
        "load_sparse_delta", "save_adapter", "save_pretrained", "save_sparse_delta",
    ),
    "qtjax.models": ("ModelConfig", "apply"),
    "qtjax.overlays": ("Overlay", "calibration_error", "fit_laplace", "init_overlay", "merge", "predictive"),
    "qtjax.pruning": ("select_samples", "select_tokens"),
    "qtjax.scoring": ("EUScores",),
    "qtjax.training.score": ("eu_scores",),
}
__all__ = sorted(name for names in _HOMES.values() for name in names)


def __getattr__(name: str) -> Any:
    for home, names in _HOMES.items():
        if name in names:
            globals()[name] = found = getattr(importlib.import_module(home), name)
            return found
    raise AttributeError(f"module 'qtjax' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
