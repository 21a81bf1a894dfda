"""The pure functions of one optimizer step: place scores, decide, accumulate gradients, update.

B rows, L slots per row, N samples of the scoring batch, T slots per sample. Token arrays stand at the TARGET position:
`weights[b, t]` belongs to `input_ids[b, t]`, which the hidden state at t - 1 predicts.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import Array
from jax.sharding import Mesh

from qtjax import models
from qtjax.config import PruneSection
from qtjax.pruning import select_samples, select_tokens, spearman
from qtjax.scoring import head_loss, sample_scores
from qtjax.training.optimizer import global_norm, passed
from qtjax.training.state import Subject, TrainState
from qtjax.tree import Tree

Rows = dict[str, Array]


class Decision(NamedTuple):
    """Stage 1 and 2 for one scoring batch; per-sample arrays [N], `tokens` bool [N, T], scalars.

    perplexity, entropy (nats), count (targets); keep, quadrant (0, 2, 3, 4), median_quadrant (0..4), supplement;
    tokens: the targets that stay in the loss (none of a dropped sample), kept_tokens their number; level (0-1) and
    spearman (-1..1).
    """

    perplexity: Array
    entropy: Array
    count: Array
    keep: Array
    quadrant: Array
    median_quadrant: Array
    supplement: Array
    tokens: Array
    kept_tokens: Array
    level: Array
    spearman: Array


def decide(
    prune: PruneSection, token_nll: Array, token_entropy: Array, targets: Array, closing: Array, valid: Array
) -> Decision:
    """Q-Tuning's two stages (arXiv 2509.23873, Algorithm 1 and eq. 7) over the global scoring batch.

    Args: token_nll, token_entropy float32 [N, T] in nats; targets, closing bool [N, T]; valid bool [N], False = padding.
    """
    scores = sample_scores(token_nll, token_entropy, targets)
    choice = select_samples(
        scores.perplexity, scores.entropy, keep=prune.sample_keep, policy=prune.policy,
        supplement=prune.supplement, valid=valid,
    )  # fmt: skip
    tokens = targets & choice.keep[:, None]
    if prune.token_pruner != "none":
        chosen = select_tokens(
            token_nll, targets, keep=prune.token_keep, neighbor_weight=prune.neighbor_weight, neighbors=prune.neighbors,
            protect=closing if prune.protect_eos else None,
        )  # fmt: skip
        tokens &= chosen | (choice.quadrant != 2)[:, None]
    return Decision(
        scores.perplexity, scores.entropy, scores.count, choice.keep, choice.quadrant, choice.median_quadrant,
        choice.supplement, tokens, tokens.sum(axis=1), choice.level, spearman(scores.perplexity, scores.entropy, valid),
    )  # fmt: skip


def place(nll: Array, entropy: Array, row_nll: Array, row_entropy: Array, sample: Array, slot: Array) -> tuple[Array, Array]:
    """Writes token scores of packed rows [R, L] to where their samples have them in nll and entropy [N, T].

    Args: sample, slot int32 [R, L]: row and column in [N, T], the whole samples' own slots; sample -1: padding, left out.
    """
    sample = jnp.where(sample < 0, nll.shape[0], sample)  # past the end is dropped; -1 would be the last row
    return nll.at[sample, slot].set(row_nll, mode="drop"), entropy.at[sample, slot].set(row_entropy, mode="drop")


def loss_sum(subject: Subject, mesh: Mesh, trainable: Tree, frozen: Tree, rows: Rows, rng: Array | None) -> Array:
    """sum(weights * nll) over a packed microbatch, float32 nats.

    rows: input_ids, position_ids, segment_ids, task_ids int32 [B, L]; weights float32 [B, L] at target positions, 0 in slot 0.
    """
    params, overlay = subject.join(trainable, frozen)
    hidden = models.hidden_states(
        subject.config, params, rows["input_ids"], position_ids=rows["position_ids"], segment_ids=rows["segment_ids"],
        overlay=overlay, task_ids=rows["task_ids"], rng=rng,
    )  # fmt: skip
    labels, weights = (jnp.roll(rows[name], -1, axis=1) for name in ("input_ids", "weights"))
    hidden, kernel, layout = models.readout(subject.config, params, hidden, overlay, rows["task_ids"], rng)
    return head_loss(hidden, kernel, labels, weights, layout=layout, mesh=mesh)


def accumulate(
    subject: Subject, mesh: Mesh, trainable: Tree, frozen: Tree, gradients: Tree, loss: Array, rows: Rows, rng: Array | None
) -> tuple[Tree, Array]:
    """Adds one microbatch's gradient (float32) and loss sum; nothing is divided until the whole step is known."""
    value, gradient = jax.value_and_grad(lambda t: loss_sum(subject, mesh, t, frozen, rows, rng))(trainable)
    return jax.tree.map(lambda total, g: total + g.astype(total.dtype), gradients, gradient), loss + value


def update(
    subject: Subject, optimizer: optax.GradientTransformation, state: TrainState, gradients: Tree, targets: Array
) -> tuple[TrainState, dict[str, Any]]:
    """One optimizer step on gradients summed over the whole step and divided by its number of kept targets.

    An overlay's penalty joins here, once a step and not once a microbatch, and so does its rule after the step.
    """
    gradients = jax.tree.map(lambda g, p: (g / targets).astype(p.dtype), gradients, state.trainable)
    measured = {}
    if subject.penalised:
        measured["penalty"], own = jax.value_and_grad(subject.penalty)(state.trainable)
        gradients = jax.tree.map(jnp.add, gradients, own)
    measured["grad_norm"] = global_norm(gradients)
    changes, moments = optimizer.update(gradients, state.optimizer, state.trainable)
    trainable, method = subject.after_step(optax.apply_updates(state.trainable, changes), state.method, gradients)
    return TrainState(trainable, moments, method), measured


def skip(subject: Subject, state: TrainState) -> TrainState:
    """A step of the run without any target: nothing is learned, but it counts.

    What is planned by the number of steps goes on: the learning rate, and an overlay's schedule of ranks or gates, which
    would otherwise never come to its end. Moments, averages and weight decay wait for the next gradient.
    """
    trainable, method = subject.after_step(state.trainable, state.method, None)
    return TrainState(trainable, passed(state.optimizer), method)
