"""The decoder behind one door: plain parameter trees and pure functions."""

from qtjax.models.api import (
    abstract_params, apply, hidden_states, init_params, kept_hidden_states, logical_axes, logits, rated_hidden_states, readout,
)  # fmt: skip
from qtjax.models.attention import kernel_for, kernel_of, takes_runs
from qtjax.models.config import ModelConfig, RopeScaling, unrolled
from qtjax.models.edits import AttentionEdit, EmbeddingEdit, Edits, LinearEdit, NormEdit, combine_trees
from qtjax.models.generate import generate
from qtjax.models.int8 import int8_layers
from qtjax.models.passes import segments
from qtjax.models.ratings import RATERS
from qtjax.models.virtual import check_task_ids
from qtjax.models.quantized import KINDS, Quantized, is_quantized_path, quantize

__all__ = [
    "AttentionEdit",
    "Edits",
    "EmbeddingEdit",
    "KINDS",
    "LinearEdit",
    "ModelConfig",
    "NormEdit",
    "Quantized",
    "RATERS",
    "RopeScaling",
    "abstract_params",
    "apply",
    "check_task_ids",
    "combine_trees",
    "generate",
    "hidden_states",
    "init_params",
    "int8_layers",
    "is_quantized_path",
    "kept_hidden_states",
    "kernel_for",
    "kernel_of",
    "logical_axes",
    "logits",
    "quantize",
    "rated_hidden_states",
    "readout",
    "segments",
    "takes_runs",
    "unrolled",
]
