"""What the config's two pruners need, and InfoBatch's memory: the one pruner that decides by epoch and not by batch."""

from dataclasses import dataclass
from typing import Any

import numpy as np

from qtjax.config import PruneSection
from qtjax.errors import QtjaxError
from qtjax.pruning import INITIAL_SCORE, SamplePruner, TokenPruner, anneals, epoch_choice, sample_pruner, token_pruner


@dataclass(frozen=True)
class Pruners:
    """The two stages of a config.

    decides: there is anything to prune. scores: a forward pass comes before training. early: the samples are chosen
    without scores, so that only the chosen ones are scored. signals: what the forward pass gives for every target.
    passes: the forward pass is the run's own; False where prune.score_model has scored everything before.
    """

    sample: SamplePruner
    token: TokenPruner
    decides: bool
    by_epoch: bool
    stored: bool = False

    @property
    def passes(self) -> bool:
        return self.scores and not self.stored

    @property
    def early(self) -> bool:
        return not self.sample.scores

    @property
    def scores(self) -> bool:
        return self.sample.scores or bool(self.token.needs)

    @property
    def signals(self) -> tuple[str, ...]:
        if not self.scores:
            return ()
        return ("nll", "entropy", "attention") if self.token.rater else ("nll", "entropy")

    @property
    def reference(self) -> bool:
        """Whether the tokens' nll under a reference model is needed."""
        return "reference" in self.token.needs


def pruners(prune: PruneSection) -> Pruners:
    """The pruners that a config names. Raises QtjaxError for settings that do not go together."""
    sample, token = sample_pruner(prune.sample_pruner), token_pruner(prune.token_pruner)
    decides = (prune.sample_pruner, prune.token_pruner) != ("none", "none")
    out = Pruners(sample, token, decides, prune.sample_pruner == "infobatch", bool(prune.score_model))
    if prune.token_scope in ("q2", "q2+q4") and not sample.quadrants:
        raise QtjaxError(
            f"prune.token_scope = {prune.token_scope!r}: the sample pruner {prune.sample_pruner!r} has no quadrants, so that no token"
            " would be pruned; set it to auto or kept"
        )
    if out.reference and not prune.reference_model:
        raise QtjaxError(
            f"prune.reference_model = '': the token pruner {prune.token_pruner!r} compares with a reference model; name its folder"
        )
    if prune.reference_model and not out.reference:
        raise QtjaxError(
            f"prune.reference_model = {prune.reference_model!r}: the token pruner {prune.token_pruner!r} uses none; leave it out, or"
            " choose rho-1 or token-cleaning"
        )
    _check_scoring(prune, out)
    if prune.warmup_fraction and not decides:
        raise QtjaxError(f"prune.warmup_fraction = {prune.warmup_fraction}: nothing is pruned after it; set it to 0")
    if prune.score_lag and out.by_epoch:
        raise QtjaxError("prune.score_lag = 1: infobatch plans an epoch by the losses of the one before; set it to 0")
    return out


def _check_scoring(prune: PruneSection, out: Pruners) -> None:
    """Raises QtjaxError for ways of scoring that do not go together, or that nothing would use."""
    ways = {"score_every": prune.score_every if prune.score_every > 1 else 0, "score_dtype": prune.score_dtype, "score_model": prune.score_model}
    given = [name for name, value in ways.items() if value]
    if given and not out.scores:
        raise QtjaxError(f"prune.{given[0]} = {ways[given[0]]!r}: the pruners chosen use no scores; leave it out")
    if prune.score_model and (len(given) > 1 or prune.score_lag):
        other = next((name for name in given if name != "score_model"), "score_lag")
        raise QtjaxError(f"prune.score_model and prune.{other}: that model scores everything once before training; leave one of them out")
    if prune.score_every > 1 and out.early and prune.sample_pruner != "none":
        raise QtjaxError(
            f"prune.score_every = {prune.score_every}: {prune.sample_pruner} chooses other samples in every epoch and only those are scored;"
            " set it to 1"
        )


def token_scope(prune: PruneSection, quadrants: bool) -> str:
    """prune.token_scope with "auto" resolved: the paper's Q2 where samples have quadrants, else every kept sample."""
    if prune.token_scope != "auto":
        return prune.token_scope
    return "q2" if quadrants else "kept"


class EpochPlan:
    """InfoBatch (arXiv 2303.04947): which samples an epoch trains on and how much they weigh, by their last losses.

    scores float32 [n]: a sample's mean nll (nats) when it was last trained on. weight float32 [n]: this epoch's, 0 where
    it drops the sample. All of it is in the checkpoint, because the scores that a plan was made by change under way.
    """

    def __init__(self, count: int, steps_per_epoch: int, last: int, prune: PruneSection, seed: int):
        self.steps_per_epoch, self.epochs, self.prune, self.seed = steps_per_epoch, last / steps_per_epoch, prune, seed
        self.scores, self.weight, self.epoch = np.full(count, INITIAL_SCORE, np.float32), np.ones(count, np.float32), -1

    def at(self, step: int) -> np.ndarray:
        """float32 [n], the weights of the epoch that `step` (0, 1, ...) belongs to."""
        epoch = step // self.steps_per_epoch
        if epoch != self.epoch:
            self.epoch, self.weight = epoch, np.ones_like(self.weight)
            if not anneals(epoch, self.epochs, self.prune.infobatch_anneal):
                _, self.weight = epoch_choice(self.scores, self.seed, epoch, self.prune.infobatch_fraction)
        return self.weight

    def record(self, index: np.ndarray, loss: np.ndarray) -> None:
        """The losses of samples just trained on; index -1: none."""
        self.scores[index[index >= 0]] = loss[index >= 0]

    def tree(self) -> dict[str, np.ndarray]:
        return {"scores": self.scores.copy(), "weight": self.weight.copy(), "epoch": np.int32(self.epoch)}

    def restore(self, tree: dict[str, Any]) -> None:
        """Goes on with what `tree` gave."""
        self.scores, self.weight = (np.array(tree[name], np.float32) for name in ("scores", "weight"))
        self.epoch = int(tree["epoch"])
