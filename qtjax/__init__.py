"""qtjax: supervised fine-tuning in JAX with joint sample and token pruning (Q-Tuning, arXiv 2509.23873)."""

from qtjax.checkpoints import (
    add_sparse_delta, adapter_state_dict, load_adapter, load_pretrained, load_sparse_delta, save_adapter, save_pretrained,
    save_sparse_delta,
)  # fmt: skip
from qtjax.models import ModelConfig, apply
from qtjax.overlays import Overlay, calibration_error, fit_laplace, init_overlay, merge, predictive
from qtjax.pruning import select_samples, select_tokens
from qtjax.scoring import EUScores
from qtjax.training.score import eu_scores

__all__ = [
    "EUScores",
    "ModelConfig",
    "Overlay",
    "adapter_state_dict",
    "add_sparse_delta",
    "apply",
    "calibration_error",
    "eu_scores",
    "fit_laplace",
    "init_overlay",
    "load_adapter",
    "load_pretrained",
    "load_sparse_delta",
    "merge",
    "predictive",
    "save_adapter",
    "save_pretrained",
    "save_sparse_delta",
    "select_samples",
    "select_tokens",
]
