"""Floating-point operations of a step, counted from the model's shape."""

from typing import NamedTuple

from qtjax.config import Config
from qtjax.models import ModelConfig


class StepWork(NamedTuple):
    """Of one optimizer step: slots scored and trained on, and the FLOPs of each (recomputation under remat not counted)."""

    scored: float
    trained: float
    score_flops: float
    train_flops: float


def forward_flops(config: ModelConfig, tokens: float, length: int) -> float:
    """Two for every weight that a token meets, and attention over `length` slots without the saving of the causal mask.

    As in PaLM, arXiv 2204.02311, appendix B.
    """
    d, heads, kv = config.hidden_size, config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
    layer = d * (2 * heads + 2 * kv) + 3 * d * config.intermediate_size
    attention = 2 * length * heads
    return 2 * tokens * (config.num_hidden_layers * (layer + attention) + d * config.vocab_size)


def step_work(config: Config, model: ModelConfig, tokens_per_sample: float, length: int, passes: bool, prunes: bool) -> StepWork:
    """Args: tokens_per_sample: mean; length: of a row; passes: whether samples are scored; prunes: whether some are dropped.

    Full fine-tuning costs three forwards for a trained token, an overlay over frozen weights two.
    """
    scored = config.prune.batch_size * tokens_per_sample if passes else 0.0
    trained = config.prune.batch_size * tokens_per_sample * (config.prune.sample_keep if prunes else 1.0)
    times = 3 if config.overlay.method == "none" else 2
    return StepWork(scored, trained, forward_flops(model, scored, length), times * forward_flops(model, trained, length))
