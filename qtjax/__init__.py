"""qtjax: supervised fine-tuning in JAX with joint sample and token pruning (Q-Tuning, arXiv 2509.23873)."""

from qtjax.checkpoints import adapter_state_dict, load_adapter, load_pretrained, save_adapter, save_pretrained
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
    "apply",
    "calibration_error",
    "eu_scores",
    "fit_laplace",
    "init_overlay",
    "load_adapter",
    "load_pretrained",
    "merge",
    "predictive",
    "save_adapter",
    "save_pretrained",
    "select_samples",
    "select_tokens",
]
