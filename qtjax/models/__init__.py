"""The decoder behind one door: plain parameter trees and pure functions."""

from qtjax.models.api import abstract_params, apply, head, head_kernel, hidden_states, init_params, logical_axes, segments
from qtjax.models.config import ModelConfig, RopeScaling
from qtjax.models.edits import LinearEdit
from qtjax.models.generate import generate

__all__ = [
    "LinearEdit",
    "ModelConfig",
    "RopeScaling",
    "abstract_params",
    "apply",
    "generate",
    "head",
    "head_kernel",
    "hidden_states",
    "init_params",
    "logical_axes",
    "segments",
]
