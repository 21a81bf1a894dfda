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
from qtjax.parallel import replicated
from qtjax.pruning import Candidates, SampleChoice, Targets, choose_tokens, sample_pruner, spearman
from qtjax.scoring import head_loss_and_nll, sample_scores
from qtjax.training.optimizer import global_norm, passed
from qtjax.training.pruners import pruners, token_scope
from qtjax.training.state import Subject, TrainState
from qtjax.tree import Tree

Rows = dict[str, Array]
_PRUNERS = 0x9E3779B9  # apart from the steps' own numbers, from which dropout draws
Scores = tuple[Array, ...]  # float32 [N, T], by Pruners.signals


class Decision(NamedTuple):
    """Stage 1 and 2 for one scoring batch; per-sample arrays [N], `tokens` bool [N, T], scalars.

    perplexity, entropy (nats), NaN where nothing was scored; count (targets); eligible, keep, weight (factor on the
    sample's loss), quadrant (0, 2, 3, 4), median_quadrant (0..4), supplement; tokens: the targets that stay in the loss
    (none of a dropped sample), kept_tokens their number; level (0-1) and spearman (-1..1).
    """

    perplexity: Array
    entropy: Array
    count: Array
    eligible: Array
    keep: Array
    weight: Array
    quadrant: Array
    median_quadrant: Array
    supplement: Array
    tokens: Array
    kept_tokens: Array
    level: Array
    spearman: Array


def choose(prune: PruneSection, samples: Rows, key: Array, mesh: Mesh | None = None) -> SampleChoice:
    """Stage 1, done by every device on its own. Args: samples: as `gather_samples` gives them; others as in `decide`."""
    candidates = Candidates(*(samples[name] for name in ("perplexity", "entropy", "count", "valid")), _draws(key, 0, samples["index"]))
    options: dict[str, Any] = {"policy": prune.policy, "supplement": prune.supplement, "corners": prune.corners}
    if "planned" in samples:
        options |= {"planned_keep": samples["planned"] > 0, "planned_weight": samples["planned"]}
    pruner = sample_pruner(prune.sample_pruner)
    choice = pruner.choose(candidates, prune.sample_keep, **{name: options[name] for name in pruner.options})
    # Said of what comes out too, or XLA cuts the sorts by row because the tokens are, and gathers after each.
    return choice if mesh is None else jax.lax.with_sharding_constraint(choice, replicated(mesh))


def gather_samples(batch: Rows, perplexity: Array | None = None, entropy: Array | None = None, mesh: Mesh | None = None) -> Rows:
    """What stage 1 knows, whole on every device: perplexity and entropy float32 [N] (None: NaN), count int32 [N], and of
    `decide`'s batch valid, index and planned.

    A sample is five or six numbers; they are packed into one array, so that one all-gather brings them all.
    """
    count = batch["targets"].sum(axis=1, dtype=jnp.int32)
    perplexity, entropy = (jnp.full(count.shape, jnp.nan) if each is None else each for each in (perplexity, entropy))
    known = {name: batch[name] for name in ("valid", "index", "planned") if name in batch}
    columns = {"perplexity": perplexity, "entropy": entropy, "count": count} | known
    if mesh is None:
        return columns
    bits = [x.astype(jnp.int32) if x.dtype == bool else jax.lax.bitcast_convert_type(x, jnp.int32) for x in columns.values()]
    whole = jax.lax.with_sharding_constraint(jnp.stack(bits), replicated(mesh))
    return {
        name: row != 0 if x.dtype == bool else jax.lax.bitcast_convert_type(row, x.dtype) for (name, x), row in zip(columns.items(), whole)
    }


def choose_early(prune: PruneSection, batch: Rows, key: Array, *, mesh: Mesh | None = None) -> Array:
    """bool [N], stage 1 of a sample pruner that needs no scores."""
    return choose(prune, gather_samples(batch, mesh=mesh), key, mesh).keep


def decide(prune: PruneSection, scores: dict[str, Array], batch: Rows, key: Array, *, mesh: Mesh | None = None) -> Decision:
    """Both stages over the global scoring batch: of Q-Tuning arXiv 2509.23873, Algorithm 1 and eq. 7.

    Token scores stay on the devices that hold their rows; only a token pruner whose budget is one for the whole batch
    (token-cleaning) brings them together.

    Args:
      scores: float32 [N, T] by signal: nll and entropy in nats, attention (a rating, high is good) where the token
        pruner asks for it; {} where neither pruner needs any.
      batch: targets, closing bool [N, T]; valid bool [N], False = padding; index int32 [N], the sample's place in the
        data set; planned float32 [N], InfoBatch's weights; reference float32 [N, T], nll under the reference model.
      key: uint32 [2], the step's own: a sample's draws depend on it and on the sample's index, not on its place.
      mesh: what the rows [N, ...] are cut over; None: one device.
    """
    with_scores, targets = pruners(prune), batch["targets"]
    measured = sample_scores(scores["nll"], scores["entropy"], targets)[:2] if with_scores.scores else ()
    samples = gather_samples(batch, *measured, mesh=mesh)
    choice = choose(prune, samples, key, mesh)
    perplexity, entropy = samples["perplexity"], samples["entropy"]
    if with_scores.early:
        perplexity, entropy = (jnp.where(choice.keep, each, jnp.nan) for each in (perplexity, entropy))
    tokens = targets & choice.keep[:, None]
    if prune.token_pruner != "none":
        scope = token_scope(prune, with_scores.sample.quadrants)
        pruned = choice.keep & {"q2": choice.quadrant == 2, "q2+q4": choice.quadrant > 0, "kept": choice.keep}[scope]
        rated = Targets(
            scores.get("nll", jnp.zeros(targets.shape)), targets & pruned[:, None], _draws(key, 1, batch["index"]),
            batch.get("reference"), scores.get("attention"),
        )  # fmt: skip
        options = {"neighbor_weight": prune.neighbor_weight, "neighbors": prune.neighbors}
        chosen = choose_tokens(
            prune.token_pruner, rated, prune.token_keep, protect=batch["closing"] if prune.protect_eos else None,
            **{name: options[name] for name in with_scores.token.options},
        )  # fmt: skip
        tokens &= chosen | ~pruned[:, None]
    return Decision(
        perplexity, entropy, samples["count"], choice.eligible, choice.keep, choice.weight, choice.quadrant, choice.median_quadrant,
        choice.supplement, tokens, tokens.sum(axis=1), choice.level, spearman(perplexity, entropy, samples["valid"]),
    )  # fmt: skip


def step_key(seed: int, step: int) -> Array:
    """uint32 [2], what the pruners of optimizer step number step + 1 draw from."""
    return jax.random.key_data(jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), _PRUNERS), step))


def _draws(key: Array, stage: int, index: Array) -> Array:
    own = jax.random.fold_in(jax.random.wrap_key_data(key), stage)
    return jax.vmap(lambda i: jax.random.fold_in(own, i))(index.astype(jnp.uint32))


def place(scores: Scores, row_scores: Scores, sample: Array, slot: Array) -> Scores:
    """Writes token scores of packed rows [R, L] to where their samples have them in `scores` [N, T].

    Args: sample, slot int32 [R, L]: row and column in [N, T], the whole samples' own slots; sample -1: padding, left out.
    """
    sample = jnp.where(sample < 0, scores[0].shape[0], sample)  # past the end is dropped; -1 would be the last row
    return tuple(old.at[sample, slot].set(new, mode="drop") for old, new in zip(scores, row_scores))


def loss_sum(
    subject: Subject, mesh: Mesh, loss: str, trainable: Tree, frozen: Tree, rows: Rows, rng: Array | None
) -> tuple[Array, Array]:
    """(sum(weights * loss) over a packed microbatch, float32; the tokens' plain nll float32 [B, L] at target positions).

    loss: train.loss. rows: input_ids, position_ids, segment_ids, task_ids int32 [B, L]; weights float32 [B, L] at target
    positions, 0 in slot 0; outputs [N, B, L, D], where what the layers give is known (prune.reuse_forward).
    """
    params, overlay = subject.join(trainable, frozen)
    hidden = models.hidden_states(
        subject.config, params, rows["input_ids"], position_ids=rows["position_ids"], segment_ids=rows["segment_ids"],
        overlay=overlay, task_ids=rows["task_ids"], rng=rng, outputs=rows.get("outputs"),
    )  # fmt: skip
    labels, weights = (jnp.roll(rows[name], -1, axis=1) for name in ("input_ids", "weights"))
    hidden, kernel, layout = models.readout(subject.config, params, hidden, overlay, rows["task_ids"], rng)
    total, nll = head_loss_and_nll(hidden, kernel, labels, weights, loss=loss, layout=layout, mesh=mesh)
    return total, jnp.roll(nll, 1, axis=1)


def accumulate(
    subject: Subject, mesh: Mesh, loss: str, trainable: Tree, frozen: Tree, gradients: Tree, total: Array, rows: Rows, rng: Array | None
) -> tuple[Tree, Array, Array]:
    """Adds one microbatch's gradient (float32) and loss sum; nothing is divided until the whole step is known.

    Returns: (gradients, total, the tokens' nll [B, L] as `loss_sum` gives it).
    """
    run = jax.value_and_grad(lambda t: loss_sum(subject, mesh, loss, t, frozen, rows, rng), has_aux=True)
    (value, nll), gradient = run(trainable)
    return jax.tree.map(lambda old, g: old + g.astype(old.dtype), gradients, gradient), total + value, nll


def update(
    subject: Subject, optimizer: optax.GradientTransformation, state: TrainState, gradients: Tree, targets: Array
) -> tuple[TrainState, dict[str, Any]]:
    """One optimizer step on gradients summed over the whole step and divided by `targets`, float32 []: the sum of its kept targets' weights.

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
