"""What the pruners decide about a whole dataset under one set of weights, batch by batch as the first epoch of training would."""

import dataclasses
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from qtjax.config import Config, PruneSection
from qtjax.data.dataset import TokenizedDataset
from qtjax.data.iterate import BatchPlan
from qtjax.errors import QtjaxError
from qtjax.evals.rows import scored_rows
from qtjax.models import ModelConfig
from qtjax.training.batch import ScoringBatch, read_batch, whole_samples
from qtjax.training.pruners import Pruners, pruners
from qtjax.training.step import Decision, choose_early, decide, step_key
from qtjax.tree import Tree


class Decided(NamedTuple):
    """One batch: its number (0, 1, ...), its samples, nll and entropy float32 [B, T] (nats; 0 where not scored), the decision."""

    step: int
    batch: ScoringBatch
    nll: np.ndarray
    entropy: np.ndarray
    decision: Decision


_OF_TRAINING = ("score_lag", "reuse_forward", "score_every", "score_dtype", "score_model", "warmup_fraction")


def check_offline(prune: PruneSection) -> Pruners:
    """The config's pruners, without what only training has. Raises QtjaxError as `pruners`, and for infobatch, which needs an epoch of training."""
    needs = pruners(as_it_is(prune))
    if needs.by_epoch:
        raise QtjaxError(
            "prune.sample_pruner = 'infobatch': decides by the losses of the epoch before, which only training has; take"
            " infobatch-budget, which decides within a batch"
        )
    return needs


def as_it_is(prune: PruneSection) -> PruneSection:
    """The section without what only training has: here the model itself scores everything, exactly."""
    return dataclasses.replace(prune, **{name: getattr(PruneSection(), name) for name in _OF_TRAINING})


def left_out(prune: PruneSection) -> str:
    """One line that names the settings given that do nothing here; "" where there are none."""
    given = [f"prune.{name}" for name in _OF_TRAINING if getattr(prune, name) != getattr(PruneSection(), name)]
    return f"{', '.join(given)}: of training only; here the model scores everything itself, as it is" if given else ""


_choose = partial(jax.jit, static_argnums=0)(choose_early)
_decide = partial(jax.jit, static_argnums=0)(decide)


def decisions(
    config: Config,
    model_config: ModelConfig,
    params: Tree,
    dataset: TokenizedDataset,
    *,
    overlay: Any = None,
    mesh: Mesh | None = None,
    reference: np.ndarray | None = None,
    first: int = 0,
    score_all: bool = False,
    progress: Callable[[int], None] | None = None,
) -> Iterator[Decided]:
    """Decides the batches of the first epoch in order, from number `first` on.

    Args: reference float32 [total]: as in `read_batch`. score_all: score also what the pruners need no scores of.
      progress: called with the number of samples of each batch.
    Raises QtjaxError as `check_offline`.
    """
    prune, needs = as_it_is(config.prune), check_offline(config.prune)
    plan = BatchPlan(len(dataset), prune.batch_size, config.train.seed)
    for step in range(first, plan.steps_per_epoch):
        batch = read_batch(dataset, plan.global_batch(step), config.data.max_length, reference)
        given = {"targets": batch.targets, "closing": batch.closing, "valid": batch.valid, "index": batch.indices.astype(np.int32)}
        given |= {} if batch.reference is None else {"reference": batch.reference}
        key = step_key(config.train.seed, step)
        keep = np.asarray(_choose(prune, given, key)) if needs.early and not score_all else None
        signals = np.zeros((3, *batch.targets.shape), np.float32)
        if needs.scores or score_all:
            launches = scored_rows(
                model_config, params, whole_samples(batch, keep), row_length=config.row_length, rows=config.train.rows,
                overlay=overlay, mesh=mesh, rater=needs.token.rater,
            )  # fmt: skip
            for packed, scored in launches:
                there = packed.loss_mask
                for out, scores in zip(signals, scored):
                    out[packed.sample[there], packed.position_ids[there]] = scores[there]
        names = needs.signals
        decision = _decide(prune, dict(zip(names, signals)), given, key)
        yield Decided(step, batch, signals[0], signals[1], jax.tree.map(np.asarray, decision))
        if progress:
            progress(int(batch.valid.sum()))


__all__ = ["Decided", "check_offline", "decisions", "left_out"]
