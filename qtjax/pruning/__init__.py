"""Which samples and which tokens to train on: pure functions of scores, with exact budgets and static shapes."""

from qtjax.pruning.base import Candidates, SampleChoice, SamplePruner, Targets, TokenPruner
from qtjax.pruning.infobatch import INITIAL_SCORE, anneals, epoch_choice
from qtjax.pruning.registry import SAMPLE_PRUNERS, TOKEN_PRUNERS, choose_tokens, sample_pruner, token_pruner
from qtjax.pruning.samples import select_samples, spearman
from qtjax.pruning.tokens import select_tokens, token_criterion

__all__ = [
    "INITIAL_SCORE",
    "SAMPLE_PRUNERS",
    "TOKEN_PRUNERS",
    "Candidates",
    "SampleChoice",
    "SamplePruner",
    "Targets",
    "TokenPruner",
    "anneals",
    "choose_tokens",
    "epoch_choice",
    "sample_pruner",
    "select_samples",
    "select_tokens",
    "spearman",
    "token_criterion",
    "token_pruner",
]
