"""Which samples and which tokens to train on: pure functions of scores, with exact budgets and static shapes."""

from qtjax.pruning.samples import SampleChoice, select_samples, spearman
from qtjax.pruning.tokens import select_tokens, token_criterion

__all__ = ["SampleChoice", "select_samples", "select_tokens", "spearman", "token_criterion"]
