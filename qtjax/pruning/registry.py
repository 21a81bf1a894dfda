"""Every sample pruner and every token pruner by its name. All sample pruners pair with all token pruners."""

from collections.abc import Mapping
from functools import partial

import jax
import jax.numpy as jnp

from qtjax.errors import QtjaxError, near_names
from qtjax.pruning import orders, rates
from qtjax.pruning.base import SamplePruner, Targets, TokenPruner
from qtjax.pruning.infobatch import choose_planned
from qtjax.pruning.infobatch_budget import choose_by_loss_and_fill
from qtjax.pruning.lowest import keep_lowest
from qtjax.pruning.samples import choose_by_quadrant

_Q_TUNING = "Q-Tuning, arXiv 2509.23873"


def _first(order: orders.Order, scores: bool, source: str) -> SamplePruner:
    return SamplePruner(partial(orders.choose_first, order=order, scores=scores), scores, True, False, source)


SAMPLE_PRUNERS: dict[str, SamplePruner] = {
    "none": SamplePruner(orders.choose_all, False, False, False, "full data"),
    "random": _first(orders.at_random, False, f"{_Q_TUNING}, baseline"),
    "longest": _first(orders.longest, False, f"{_Q_TUNING}, baseline (its table: the longest are kept)"),
    "shortest": _first(orders.shortest, False, f"{_Q_TUNING}, baseline (its prose: the longest are removed)"),
    "entropy": _first(orders.highest_entropy, True, f"{_Q_TUNING}, baseline (the highest are kept)"),
    "perplexity-low": _first(orders.lowest_perplexity, True, f"{_Q_TUNING}, baseline"),
    "perplexity-middle": _first(orders.middle_perplexity, True, f"{_Q_TUNING}, baseline"),
    "perplexity-high": _first(orders.highest_perplexity, True, f"{_Q_TUNING}, baseline"),
    "infobatch": SamplePruner(
        choose_planned, False, False, False, "InfoBatch, arXiv 2303.04947 and its authors' code",
        frozenset({"planned_keep", "planned_weight"}),
    ),
    "infobatch-budget": SamplePruner(
        choose_by_loss_and_fill, True, True, False, "InfoBatch, arXiv 2303.04947, adapted to exact budgets within a batch"
    ),
    "q-tuning": SamplePruner(
        choose_by_quadrant, True, True, True, f"{_Q_TUNING}, Algorithm 1", frozenset({"policy", "supplement", "corners"})
    ),
}  # fmt: skip

_SCORES = frozenset({"scores"})
_ATTENTION = frozenset({"attention"})
_EXCESS = frozenset({"scores", "reference"})

TOKEN_PRUNERS: dict[str, TokenPruner] = {
    "none": TokenPruner(rates.rate_equal, frozenset(), "all targets", exact=False),
    "random": TokenPruner(rates.rate_random, frozenset(), f"{_Q_TUNING}, baseline"),
    "perplexity": TokenPruner(rates.rate_perplexity, _SCORES, f"{_Q_TUNING}, baseline (eq. 7 with lambda = 0)"),
    "fastv": TokenPruner(rates.rate_attention, _ATTENTION, "FastV, arXiv 2403.06764, adapted to text", rater="fastv"),
    "sparsevlm": TokenPruner(
        rates.rate_attention, _ATTENTION, "SparseVLM, arXiv 2410.04417, adapted to text", rater="sparsevlm"
    ),
    "rho-1": TokenPruner(rates.rate_excess_loss, _EXCESS, "Rho-1, arXiv 2404.07965 (share per sample)"),
    "token-cleaning": TokenPruner(
        rates.rate_excess_loss, _EXCESS, "Token Cleaning, arXiv 2502.01968 (share over the batch)", whole_batch=True
    ),
    "q-tuning": TokenPruner(
        rates.rate_neighborhood, _SCORES, f"{_Q_TUNING}, eq. 7", options=frozenset({"neighbor_weight", "neighbors"})
    ),
}


def _named(kind: str, name: str, known: Mapping):
    if name not in known:
        raise QtjaxError(f"{kind} pruner {name!r}: must be one of {', '.join(known)}{near_names(str(name), known)}")
    return known[name]


def sample_pruner(name: str) -> SamplePruner:
    """The sample pruner of that name. Raises: QtjaxError with near names if there is none."""
    return _named("sample", name, SAMPLE_PRUNERS)


def token_pruner(name: str) -> TokenPruner:
    """The token pruner of that name. Raises: QtjaxError with near names if there is none."""
    return _named("token", name, TOKEN_PRUNERS)


def choose_tokens(
    pruner_name: str, targets: Targets, keep: float, protect: jax.Array | None = None, **options
) -> jax.Array:
    """bool [B, L], the targets that stay, a subset of targets.mask.

    max(1, floor(keep * |T| + 1e-6)) of each row's |T| targets, the lowest-rated; or, of a pruner with `whole_batch`, that
    share of all targets together. Ties: the earlier row, the earlier token. A rate that is not finite comes last.
    Under jit the name, keep and options that are names are Python values; a change of keep alone does not recompile.

    Args:
      pruner_name: of TOKEN_PRUNERS. targets: mask holds the targets of the samples to prune only.
      keep: fraction (0, 1] of the targets; checked, not used by "none".
      protect: bool [B, L], targets that must stay. They count against the budget; where there are more of them than it
        holds, all of them are kept and nothing else.
      options: the pruner's own.
    Raises: QtjaxError for an unknown name, keep outside (0, 1], what the pruner needs and is not given, unequal shapes.
    """
    pruner = token_pruner(pruner_name)
    mask = jnp.asarray(targets.mask) != 0
    if mask.ndim != 2:
        raise QtjaxError(f"mask has shape {mask.shape}: must be [B, L]")
    rate = pruner.rate(targets._replace(mask=mask), **options)
    # A pruner without a budget goes this way too, so that what is wrong in its arguments is said all the same.
    kept = keep_lowest(rate, mask, keep, protect, pruner.whole_batch)
    return kept if pruner.exact else mask
