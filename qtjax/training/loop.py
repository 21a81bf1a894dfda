"""The bilevel loop: score a batch under the current weights, choose samples and tokens, train on what is left.

Owns clocks, files and logs; everything numeric is in step.py. One call of `step` is one optimizer step.
"""

import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from qtjax.config import Config
from qtjax.data.dataset import TokenizedDataset
from qtjax.data.iterate import BatchPlan
from qtjax.errors import QtjaxError
from qtjax.parallel import agree_sums, all_rows, local_rows, replicated, rows_on_device
from qtjax.training.batch import Microbatch, Prepared, ScoringBatch, microbatches, read_batch, survivors, whole_samples
from qtjax.training.counts import choices, count
from qtjax.training.programs import Programs
from qtjax.training.state import TrainState
from qtjax.training.step import Decision
from qtjax.tree import Tree

Scores = tuple[jax.Array, jax.Array]  # token nll, entropy
# Where a step's seconds go.
CLOCKS = ("score", "pack", "train")


@dataclass(frozen=True)
class Scored:
    """A batch with its scores and decision launched, maybe not there yet; None without scoring."""

    prepared: Prepared
    scores: Scores | None
    decision: Decision | None


@dataclass(frozen=True)
class Chosen:
    """What a step trains on: the survivors packed, and what all hosts together counted."""

    scored: Scored
    parts: list[Microbatch]
    counts: dict[str, int]


class Loop:
    """State and programs of one run.

    Args: shapes: the ladder of global rows per launch; schedule: learning rate by optimizer step.
    """

    def __init__(
        self,
        config: Config,
        mesh: Mesh,
        dataset: TokenizedDataset,
        plan: BatchPlan,
        programs: Programs,
        state: TrainState,
        frozen: Tree,
        *,
        shapes: tuple[int, ...],
        row_length: int,
        schedule: Callable[[int], Any],
    ):
        self.config, self.mesh, self.dataset, self.plan, self.programs = config, mesh, dataset, plan, programs
        self.state, self.frozen, self.shapes, self.row_length, self.schedule = state, frozen, shapes, row_length, schedule
        self.prunes = config.prune.sample_pruner != "none"
        self.lag = config.prune.score_lag if self.prunes else 0
        self.samples = self._padded(plan.batch_size // plan.process_count)
        self.key = jax.random.key(config.train.seed)
        self._thread = ThreadPoolExecutor(1)
        self._next: tuple[int, Future] | None = None
        self.following: Chosen | None = None  # the next step's work, chosen on older weights

    def _padded(self, count: int) -> int:
        ways = self.mesh.shape["data"] * self.mesh.shape["fsdp"] // jax.process_count() or 1
        return -(-count // ways) * ways

    def prepare(self, step: int) -> Prepared:
        indices = self.plan.batch(step)
        indices = np.concatenate([indices, np.full(self.samples - len(indices), -1, np.int64)])
        batch = read_batch(self.dataset, indices, self.config.data.max_length)
        scoring = self.pack(whole_samples(batch)) if self.prunes else []
        return Prepared(batch, scoring)

    def pack(self, samples: list) -> list[Microbatch]:
        return microbatches(samples, self.shapes, self.row_length, jax.process_count())

    def _prepared(self, step: int, last: int) -> Prepared:
        """This step's batch, and the next one's on its way; on several hosts packing needs agreement, so it is done here."""
        if jax.process_count() > 1:
            return self.prepare(step)
        ready = self._next[1] if self._next and self._next[0] == step else self._thread.submit(self.prepare, step)
        prepared = ready.result()
        self._next = (step + 1, self._thread.submit(self.prepare, step + 1)) if step + 1 < last else None
        return prepared

    def token_scores(self, prepared: Prepared) -> Scores:
        """Token nll and entropy [N, T] of the global batch under the current weights: launched, not waited for.

        They stay on the device all the way to the decision: by way of the host, the decision could only be launched once
        they are there, behind whatever was launched in the meantime.
        """
        scores = self.programs.unscored()
        first = jax.process_index() * self.samples
        for part in prepared.scoring:
            rows = rows_on_device(self.mesh, part.rows)
            own = self.programs.score[part.size](self.state.trainable, self.frozen, rows)
            sample = np.where(part.sample < 0, -1, part.sample + first)
            where = rows_on_device(self.mesh, {"sample": sample})["sample"]
            scores = self.programs.place[part.size](*scores, *own, where, rows["position_ids"])
        return scores

    def decide(self, batch: ScoringBatch, scores: Scores) -> Decision:
        """Both stages over the global batch; launched, not waited for."""
        masks = rows_on_device(self.mesh, {"targets": batch.targets, "closing": batch.closing, "valid": batch.valid})
        return self.programs.decide(*scores, *masks.values())

    def score(self, prepared: Prepared) -> Decision:
        """EU scores of every sample under the current weights, then both stages, over the global batch."""
        return self.decide(prepared.batch, self.token_scores(prepared))

    def gradients(self, parts: list[Microbatch], step: int) -> tuple[Tree, jax.Array]:
        """Summed gradients and loss of a step's microbatches."""
        gradients, loss = self.programs.zeros()
        for i, part in enumerate(parts):
            key = None
            if self.programs.uses_rng:
                raw = jax.random.key_data(jax.random.fold_in(jax.random.fold_in(self.key, step), i))
                key = jax.device_put(raw, replicated(self.mesh))
            rows = rows_on_device(self.mesh, part.rows)
            gradients, loss = self.programs.accumulate[part.size](
                self.state.trainable, self.frozen, gradients, loss, rows, key
            )
        return gradients, loss

    def step(self, step: int, last: int) -> tuple[dict[str, Any], dict[str, np.ndarray] | None]:
        """Optimizer step number step + 1 (`step` done so far, `last` in all).

        With prune.score_lag 1 the next batch is launched for scoring first, on the weights that this step is about to
        update: the device has its decision before it is done training, and the host packs in the meantime.
        Returns: (metrics, EU record columns or None without scoring).
        Raises QtjaxError when the loss is not finite; the state is then not to be saved.
        """
        clock = _Clock()
        chosen, self.following = self.following, None
        if chosen is None:
            assert not (self.lag and step), f"step {step + 1}: the scores of the step before are gone"
            chosen = self._choose(self._launch(step, last, clock), clock)
        decision, counts = chosen.scored.decision, chosen.counts
        _refuse_nan(step, decision)
        ahead = self._launch(step + 1, last, clock) if self.lag and step + 1 < last else None
        sums = self._train(chosen, step)
        clock.lap("train")
        if ahead:
            self.following = self._choose(ahead, clock)
        loss, measured = _finite_sums(step, sums, counts["kept_tokens"])
        clock.lap("train")
        metrics = {"step": step + 1, "epoch": step // self.plan.steps_per_epoch, "loss": loss}
        metrics |= {"learning_rate": float(self.schedule(step)), "skipped": int(sums is None)} | measured
        metrics |= counts | choices(decision, counts)
        metrics["fill"] = counts["trained_tokens"] / counts["trained_slots"] if counts["trained_slots"] else 0.0
        metrics |= {f"seconds_{name}": clock.seconds[name] for name in CLOCKS}
        columns = None if decision is None else self._records(chosen.scored.prepared.batch, decision, metrics["epoch"])
        return metrics, columns

    def _launch(self, step: int, last: int, clock: "_Clock") -> Scored:
        """The batch of a step, its scoring launched on the weights as they are now."""
        prepared = self._prepared(step, last)
        clock.lap("pack")
        if not self.prunes:
            return Scored(prepared, None, None)
        scores = self.token_scores(prepared)
        scored = Scored(prepared, scores, self.decide(prepared.batch, scores))
        clock.lap("score")
        return scored

    def _choose(self, scored: Scored, clock: "_Clock") -> Chosen:
        """Waits for the decision and packs its survivors."""
        batch, tokens = scored.prepared.batch, scored.prepared.batch.targets
        if scored.decision is not None:
            tokens = local_rows(self.mesh, jax.block_until_ready(scored.decision).tokens)
            clock.lap("score")
        parts = self.pack(survivors(batch, tokens, self.config.prune))
        counts = agree_sums(count(scored.prepared, tokens, parts))
        clock.lap("pack")
        return Chosen(scored, parts, counts)

    def _train(self, chosen: Chosen, step: int) -> tuple[jax.Array, dict[str, jax.Array]] | None:
        """Launches gradients and update; (summed loss, what `update` measured), or None where there is no target."""
        if not chosen.counts["kept_tokens"]:
            self.state = self.programs.skip(self.state)
            return None
        gradients, loss = self.gradients(chosen.parts, step)
        divisor = jax.device_put(np.float32(chosen.counts["kept_tokens"]), replicated(self.mesh))
        self.state, measured = self.programs.update(self.state, gradients, divisor)
        return loss, measured

    def pending(self) -> dict[str, jax.Array] | None:
        """What a checkpoint needs beside the state with prune.score_lag 1: the next batch's token scores, float32 [B, T].

        The weights that gave them are gone. Without the padding to the number of devices, so that any mesh can read them.
        """
        if self.following is None:
            return None
        own = self.plan.batch_size // self.plan.process_count
        parts = (all_rows(local_rows(self.mesh, each)[:own]) for each in self.following.scored.scores)
        return {name: jax.device_put(each, replicated(self.mesh)) for name, each in zip(("nll", "entropy"), parts)}

    def pending_shape(self, step: int, last: int) -> dict[str, jax.ShapeDtypeStruct] | None:
        """What `pending` holds after `step` of `last` steps."""
        if not self.lag or step >= last:
            return None
        shape = (self.plan.batch_size, self.config.data.max_length)
        return dict.fromkeys(("nll", "entropy"), jax.ShapeDtypeStruct(shape, np.float32, sharding=replicated(self.mesh)))

    def resume(self, step: int, last: int, pending: dict[str, jax.Array] | None) -> None:
        """Goes on after `step` steps with what `pending` gave then; `state` is set by the caller."""
        if pending is None:
            return
        prepared, clock = self._prepared(step, last), _Clock()
        own = self.plan.batch_size // self.plan.process_count
        whole = {name: np.zeros(prepared.batch.targets.shape, np.float32) for name in pending}
        for name, each in pending.items():
            whole[name][:own] = np.asarray(each)[self.plan.process_index * own :][:own]
        scores = tuple(rows_on_device(self.mesh, whole)[name] for name in ("nll", "entropy"))
        self.following = self._choose(Scored(prepared, scores, self.decide(prepared.batch, scores)), clock)

    def _records(self, batch: ScoringBatch, decision: Decision, epoch: int) -> dict[str, Any]:
        """EU record columns of the global batch, padding as row -1."""
        rows = np.where(batch.valid, self.dataset.row_index[np.maximum(batch.indices, 0)], -1)
        names = (
            "perplexity", "entropy", "count", "quadrant", "median_quadrant", "keep", "supplement", "kept_tokens",
        )  # fmt: skip
        return {"epoch": epoch, "row": all_rows(rows)} | {n: np.asarray(getattr(decision, n)) for n in names}

    def close(self) -> None:
        self._thread.shutdown(cancel_futures=True)


class _Clock:
    """The host's wall clock, cut at every change of what it does or waits for, so that the parts add up to the step.

    With score_lag 1 the device trains while the host packs, or while it waits for the next batch's scores: time that
    both share goes to packing or scoring, and "train" is what is left to wait for afterwards.
    """

    def __init__(self) -> None:
        self.seconds = dict.fromkeys(CLOCKS, 0.0)
        self._at = time.perf_counter()

    def lap(self, name: str) -> None:
        now = time.perf_counter()
        self.seconds[name] += now - self._at
        self._at = now


def _refuse_nan(step: int, decision: Decision | None) -> None:
    if decision is None:
        return
    unusable = (np.asarray(decision.count) > 0) & np.isnan(np.asarray(decision.entropy))
    if unusable.any():
        raise _diverged(step, f"the scores of {unusable.sum()} samples are NaN")


def _finite_sums(step: int, sums: tuple[jax.Array, dict[str, jax.Array]] | None, targets: int) -> tuple[float, dict[str, float]]:
    """(mean loss, gradient norm and an overlay's penalty by name), waited for; zeros for a step that was skipped."""
    if sums is None:
        return 0.0, {"grad_norm": 0.0}
    loss, measured = float(sums[0]) / targets, {name: float(value) for name, value in sums[1].items()}
    if not np.isfinite([loss, *measured.values()]).all():
        raise _diverged(step, f"loss {loss}, gradient norm {measured['grad_norm']}")
    return loss, measured


def _diverged(step: int, what: str) -> QtjaxError:
    return QtjaxError(
        f"step {step + 1}: {what}: training diverged, or the model overflows its dtype; the last checkpoint is whole. Try a"
        " lower train.learning_rate, train.clip_norm 1.0, more warm-up, or model.dtype float32"
    )
