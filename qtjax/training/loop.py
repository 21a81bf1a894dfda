"""The bilevel loop: score a batch under the current weights, choose samples and tokens, train on what is left.

Owns clocks, files and logs; everything numeric is in step.py. One call of `step` is one optimizer step.
"""

import math
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from qtjax.config import Config
from qtjax.data.dataset import TokenizedDataset
from qtjax.data.iterate import BatchPlan
from qtjax.parallel import agree_sums, all_rows, everywhere, local_rows, rows_on_device
from qtjax.training.batch import Microbatch, Prepared, ScoringBatch, microbatches, read_batch, survivors, whole_samples
from qtjax.training.clock import CLOCKS, Clock
from qtjax.training.counts import choices, count
from qtjax.training.finite import finite_sums, refuse_nan
from qtjax.training.kept import Kept
from qtjax.training.programs import Programs
from qtjax.training.pruners import EpochPlan, pruners
from qtjax.training.score_store import ScoreStore
from qtjax.training.state import TrainState
from qtjax.training.step import Decision, Scores, step_key
from qtjax.tree import Tree


@dataclass(frozen=True)
class Scored:
    """A batch with its scores (() without a scoring pass) and decision (None for full data) launched, maybe not there yet.

    outputs: with prune.reuse_forward what the layers gave in each launch of its scoring pass, [N, R, L, D]; `gradients` takes them.
    """

    prepared: Prepared
    scores: Scores
    decision: Decision | None
    outputs: list[jax.Array] = field(default_factory=list)


@dataclass(frozen=True)
class Chosen:
    """What a step trains on: the survivors packed, what all hosts together counted, and the sum of the kept targets' weights."""

    scored: Scored
    parts: list[Microbatch]
    counts: dict[str, int]
    divisor: float


class Loop:
    """State and programs of one run.

    Args: shapes: the ladder of global rows per launch; schedule: learning rate by optimizer step; last: optimizer steps of
    the run; reference float32 [total]: the data set's nll under a reference model, where a token pruner compares with it;
    stored float32 [signals, total]: prune.score_model's scores of the data set.
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
        last: int,
        reference: np.ndarray | None = None,
        stored: np.ndarray | None = None,
    ):
        self.config, self.mesh, self.dataset, self.plan, self.programs = config, mesh, dataset, plan, programs
        self.state, self.frozen, self.shapes, self.row_length, self.schedule = state, frozen, shapes, row_length, schedule
        self.pruners, self.reference = pruners(config.prune), reference
        self.lag = config.prune.score_lag if self.pruners.scores else 0
        self.warmup = min(math.ceil(config.prune.warmup_fraction * last - 1e-9), last - 1)
        self.epochs = None
        if self.pruners.by_epoch:
            self.epochs = EpochPlan(len(dataset), plan.steps_per_epoch, last, config.prune, config.train.seed)
        self.store = None
        if stored is not None or config.prune.score_every > 1:
            first = -(-self.warmup // plan.steps_per_epoch)
            self.store = ScoreStore(dataset, self.pruners.signals, config.prune.score_every, plan.steps_per_epoch, first, stored)
        self.samples = self._padded(plan.batch_size // plan.process_count)
        self.key = jax.random.key(config.train.seed)
        self._thread = ThreadPoolExecutor(1)
        self._next: tuple[int, Future] | None = None
        self.following: Chosen | None = None  # the next step's work, chosen on older weights
        self.clock = Clock()  # the last step's

    def _padded(self, count: int) -> int:
        ways = self.mesh.shape["data"] * self.mesh.shape["fsdp"] // jax.process_count() or 1
        return -(-count // ways) * ways

    def prepare(self, step: int) -> Prepared:
        return self._packed(self._read(step), step)

    def _read(self, step: int) -> ScoringBatch:
        indices = self.plan.batch(step)
        indices = np.concatenate([indices, np.full(self.samples - len(indices), -1, np.int64)])
        return read_batch(self.dataset, indices, self.config.data.max_length, self.reference)

    def _packed(self, batch: ScoringBatch, step: int) -> Prepared:
        scoring = self.pack(whole_samples(batch)) if self._passes(step) and not self.pruners.early else []
        return Prepared(batch, scoring)

    def _passes(self, step: int) -> bool:
        """Whether this step runs a scoring pass."""
        return self.pruners.scores and step >= self.warmup and (self.store is None or self.store.passes(step))

    def pack(self, samples: list, weight: np.ndarray | None = None) -> list[Microbatch]:
        return microbatches(samples, self.shapes, self.row_length, jax.process_count(), weight, self.programs.max_segments)

    def _prepared(self, step: int, last: int) -> Prepared:
        """This step's batch, and the next one's on its way; on several hosts, which agree on its rows, it is read ahead and packed here."""
        alone = jax.process_count() == 1
        ahead = self.prepare if alone else self._read
        ready = self._next[1] if self._next and self._next[0] == step else self._thread.submit(ahead, step)
        found = ready.result()
        self._next = (step + 1, self._thread.submit(ahead, step + 1)) if step + 1 < last else None
        return found if alone else self._packed(found, step)

    def token_scores(self, prepared: Prepared) -> tuple[Scores, list[jax.Array]]:
        """The pruners' signals [N, T] of the global batch under the current weights, and `Scored.outputs`: launched, not waited for.

        They stay on the device all the way to the decision: by way of the host, the decision could only be launched once
        they are there, behind whatever was launched in the meantime.
        """
        scores = self.programs.unscored()
        first, outputs = jax.process_index() * self.samples, []
        for part in prepared.scoring:
            rows = rows_on_device(self.mesh, part.rows)
            own = self.programs.score[part.size](self.state.trainable, self.frozen, rows)
            if self.config.prune.reuse_forward:
                *own, given = own
                outputs.append(given)
            sample = np.where(part.sample < 0, -1, part.sample + first)
            where = rows_on_device(self.mesh, {"sample": sample})["sample"]
            scores = self.programs.place[part.size](scores, tuple(own), where, rows["position_ids"])
        return scores, outputs

    def decide(self, batch: ScoringBatch, scores: Scores, step: int) -> Decision:
        """Both stages over the global batch; launched, not waited for."""
        return self.programs.decide(dict(zip(self.pruners.signals, scores)), *self._given(batch, step))

    def score(self, prepared: Prepared, step: int) -> Scored:
        """The scores that the pruners need under the current weights, then both stages, over the global batch."""
        if self.epochs is not None:
            self.epochs.at(step)  # plans where an epoch begins, in a warm-up too
        if not self.pruners.decides or step < self.warmup:
            return Scored(prepared, (), None)
        prepared = self._chosen_early(prepared, step)
        scores: Scores = ()
        outputs: list[jax.Array] = []
        if self._passes(step):
            scores, outputs = self.token_scores(prepared)
        elif self.store is not None:
            scores = tuple(rows_on_device(self.mesh, self.store.read(prepared.batch)).values())
        return Scored(prepared, scores, self.decide(prepared.batch, scores, step), outputs)

    def _chosen_early(self, prepared: Prepared, step: int) -> Prepared:
        """With a sample pruner that needs no scores, the scoring pass of what it keeps only."""
        if not (self.pruners.early and self._passes(step)):
            return prepared
        keep = np.asarray(self.programs.choose(*self._given(prepared.batch, step)))
        own = keep[jax.process_index() * self.samples :][: self.samples]
        return Prepared(prepared.batch, self.pack(whole_samples(prepared.batch, own)))

    def _given(self, batch: ScoringBatch, step: int) -> tuple[dict[str, jax.Array], jax.Array]:
        """What the decision of a step knows beside scores: the batch on the device, and the step's key."""
        rows = {"targets": batch.targets, "closing": batch.closing, "valid": batch.valid, "index": batch.indices.astype(np.int32)}
        if self.epochs is not None:
            rows["planned"] = np.where(batch.valid, self.epochs.at(step)[np.maximum(batch.indices, 0)], np.float32(0))
        if batch.reference is not None:
            rows["reference"] = batch.reference
        key = step_key(self.config.train.seed, step)
        return rows_on_device(self.mesh, rows), everywhere(self.mesh, key)

    def gradients(self, parts: list[Microbatch], step: int, scored: Scored | None = None) -> tuple[Tree, jax.Array]:
        """Summed gradients and loss of a step's microbatches; InfoBatch learns each sample's loss.

        scored: what they are the survivors of; its outputs are used up, so that the update has their memory.
        """
        gradients, loss = self.programs.zeros()
        outputs = list(scored.outputs) if scored else []
        if scored:
            scored.outputs.clear()
        kept = Kept(self.programs, self.mesh, scored.prepared.scoring, outputs, self.samples) if outputs else None
        run = self.programs.backward if outputs else self.programs.accumulate
        self.trained_nll: list[jax.Array] = []
        for i, part in enumerate(parts):
            key = None
            if self.programs.uses_rng:
                raw = jax.random.key_data(jax.random.fold_in(jax.random.fold_in(self.key, step), i))
                key = everywhere(self.mesh, raw)
            rows = rows_on_device(self.mesh, part.rows)
            if kept:
                rows["outputs"] = kept.of(part)
            gradients, loss, nll = run[part.size](self.state.trainable, self.frozen, gradients, loss, rows, key)
            if self.epochs is not None:
                self.trained_nll.append(nll)
        return gradients, loss

    def step(self, step: int, last: int) -> tuple[dict[str, Any], dict[str, np.ndarray] | None]:
        """Optimizer step number step + 1 (`step` done so far, `last` in all).

        With prune.score_lag 1 the next batch is launched for scoring first, on the weights that this step is about to
        update: the device has its decision before it is done training, and the host packs in the meantime.
        Returns: (metrics, EU record columns or None for full data).
        Raises QtjaxError when the loss is not finite; the state is then not to be saved.
        """
        clock = self.clock = Clock()
        chosen, self.following = self.following, None
        if chosen is None:
            assert not (self.lag and step > self.warmup), f"step {step + 1}: the scores of the step before are gone"
            chosen = self._choose(self._launch(step, last, clock), clock)
        decision, counts = chosen.scored.decision, chosen.counts
        if self.pruners.scores and decision is not None:
            refuse_nan(step, decision, self.pruners.early)
        ahead = self._launch(step + 1, last, clock) if self.lag and step + 1 < last else None
        sums = self._train(chosen, step)
        clock.lap("train")
        if ahead:
            self.following = self._choose(ahead, clock)
        loss, measured = finite_sums(step, sums, chosen.divisor)
        if self.epochs is not None and sums is not None:
            self.epochs.record(*self._sample_losses(chosen))
        clock.lap("train")
        metrics = {"step": step + 1, "epoch": step // self.plan.steps_per_epoch, "loss": loss}
        metrics |= {"learning_rate": float(self.schedule(step)), "skipped": int(sums is None)} | measured
        metrics |= counts | choices(decision, counts)
        metrics["fill"] = counts["trained_tokens"] / counts["trained_slots"] if counts["trained_slots"] else 0.0
        metrics |= {f"seconds_{name}": clock.seconds[name] for name in CLOCKS}
        columns = None if decision is None else self._records(chosen.scored.prepared.batch, decision, metrics["epoch"])
        return metrics, columns

    def _launch(self, step: int, last: int, clock: Clock) -> Scored:
        """The batch of a step, its scoring launched on the weights as they are now."""
        prepared = self._prepared(step, last)
        clock.lap("pack")
        scored = self.score(prepared, step)
        clock.lap("score")
        return scored

    def _choose(self, scored: Scored, clock: Clock) -> Chosen:
        """Waits for the decision and packs its survivors."""
        batch, decision = scored.prepared.batch, scored.decision
        tokens, weight = batch.targets, None
        if decision is not None:
            tokens = local_rows(jax.block_until_ready(decision).tokens)
            weight = np.asarray(decision.weight)
            if self.store is not None and scored.prepared.scoring:
                self.store.record(batch, [local_rows(each) for each in scored.scores])
            clock.lap("score")
        own = None if weight is None else weight[jax.process_index() * self.samples :][: self.samples]
        parts = self.pack(survivors(batch, tokens, self.config.prune), own)
        counts = agree_sums(count(scored.prepared, tokens, parts))
        clock.lap("pack")
        divisor = counts["kept_tokens"] if weight is None else float(np.dot(weight.astype(np.float64), np.asarray(decision.kept_tokens)))
        return Chosen(scored, parts, counts, divisor)

    def _train(self, chosen: Chosen, step: int) -> tuple[jax.Array, dict[str, jax.Array]] | None:
        """Launches gradients and update; (summed loss, what `update` measured), or None where there is no target."""
        if not chosen.counts["kept_tokens"]:
            self.state = self.programs.skip(self.state)
            return None
        gradients, loss = self.gradients(chosen.parts, step, chosen.scored)
        divisor = everywhere(self.mesh, np.float32(chosen.divisor))
        self.state, measured = self.programs.update(self.state, gradients, divisor)
        return loss, measured

    def _sample_losses(self, chosen: Chosen) -> tuple[np.ndarray, np.ndarray]:
        """(index in the data set, -1: none; mean nll float32 in nats) of the samples that this step trained on."""
        indices = chosen.scored.prepared.batch.indices
        sums, targets = np.zeros((2, len(indices)))
        for part, nll in zip(chosen.parts, self.trained_nll):
            there = part.rows["weights"] > 0
            owner = part.sample[there]
            sums += np.bincount(owner, local_rows(nll)[there].astype(np.float64), len(indices))
            targets += np.bincount(owner, minlength=len(indices))
        known = targets > 0
        means = np.where(known, sums / np.maximum(targets, 1), 0).astype(np.float32)
        return all_rows(np.where(known, indices, -1)), all_rows(means)

    def pending(self) -> dict[str, Any] | None:
        """What a checkpoint needs beside the state: with prune.score_lag 1 the next batch's signals, float32 [B, T], whose
        weights are gone (without the padding to the number of devices, so that any mesh can read them); InfoBatch's memory; the
        scores that prune.score_every keeps. All of it numpy, the same on every process: it never lies on a device.
        """
        out: dict[str, Any] = {}
        if self.following is not None and self.following.scored.decision is not None:
            own = self.plan.batch_size // self.plan.process_count
            parts = (all_rows(local_rows(each)[:own]) for each in self.following.scored.scores)
            out |= dict(zip(self.pruners.signals, parts))
        return jax.tree.map(np.array, out | self._kept()) or None  # a copy: what is kept goes on changing while it is written

    def pending_shape(self, step: int, last: int) -> dict[str, Any] | None:
        """Arrays of the shapes and types of what `pending` holds after `step` of `last` steps."""
        out: dict[str, Any] = {}
        if self.lag and self.warmup <= step < last:
            out |= dict.fromkeys(self.pruners.signals, np.zeros((self.plan.batch_size, self.config.data.max_length), np.float32))
        return out | self._kept() or None

    def _kept(self) -> dict[str, Any]:
        plan = {} if self.epochs is None else {"epochs": self.epochs.tree()}
        scores = {} if self.store is None else self.store.tree()
        return plan | ({"store": scores} if scores else {})

    def resume(self, step: int, last: int, pending: dict[str, Any] | None) -> None:
        """Goes on after `step` steps with what `pending` gave then; `state` is set by the caller."""
        pending = dict(pending or {})
        if self.epochs is not None:
            self.epochs.restore(pending.pop("epochs"))
        if "store" in pending:
            self.store.restore(pending.pop("store"))
        if not pending:
            return
        prepared, clock = self._chosen_early(self._prepared(step, last), step), Clock()
        own = self.plan.batch_size // self.plan.process_count
        whole = {name: np.zeros(prepared.batch.targets.shape, np.float32) for name in self.pruners.signals}
        for name, each in whole.items():
            each[:own] = np.asarray(pending[name])[self.plan.process_index * own :][:own]
        scores = tuple(rows_on_device(self.mesh, whole).values())
        self.following = self._choose(Scored(prepared, scores, self.decide(prepared.batch, scores, step)), clock)

    def _records(self, batch: ScoringBatch, decision: Decision, epoch: int) -> dict[str, Any]:
        """EU record columns of the global batch, padding as row -1."""
        rows = np.where(batch.valid, self.dataset.row_index[np.maximum(batch.indices, 0)], -1)
        names = (
            "perplexity", "entropy", "count", "quadrant", "median_quadrant", "keep", "supplement", "kept_tokens",
        )  # fmt: skip
        return {"epoch": epoch, "row": all_rows(rows)} | {n: np.asarray(getattr(decision, n)) for n in names}

    def close(self) -> None:
        self._thread.shutdown(cancel_futures=True)
