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
from qtjax.training.batch import Microbatch, ScoringBatch, microbatches, read_batch, survivors, whole_samples
from qtjax.training.programs import Programs
from qtjax.training.state import TrainState
from qtjax.training.step import Decision
from qtjax.tree import Tree

Scores = tuple[jax.Array, jax.Array]  # token nll, entropy
# Where a step's seconds go.
CLOCKS = ("score", "pack", "train")


@dataclass(frozen=True)
class Prepared:
    """What needs no weights: read and packed ahead of time, in a thread."""

    batch: ScoringBatch
    scoring: list[Microbatch]


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
        self.samples = self._padded(plan.batch_size // plan.process_count)
        self.key = jax.random.key(config.train.seed)
        self._thread = ThreadPoolExecutor(1)
        self._next: tuple[int, Future] | None = None

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
            sample = np.where(part.sample < 0, -1, part.sample + first).astype(np.int32)
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

        Returns: (metrics, EU record columns or None without scoring).
        Raises QtjaxError when the loss is not finite; the state is then not to be saved.
        """
        clock = _Clock()
        prepared = self._prepared(step, last)
        clock.lap("pack")
        decision, columns = None, None
        if self.prunes:
            decision = jax.block_until_ready(self.score(prepared))
            unusable = np.asarray(decision.count > 0) & np.isnan(np.asarray(decision.entropy))
            if unusable.any():
                raise _diverged(step, f"the scores of {unusable.sum()} samples are NaN")
            tokens = local_rows(self.mesh, decision.tokens)
            clock.lap("score")
        else:
            tokens = prepared.batch.targets
        parts = self.pack(survivors(prepared.batch, tokens, self.config.prune))
        counts = agree_sums(_counts(prepared, tokens, parts))
        targets = counts["kept_tokens"]
        clock.lap("pack")
        norm, loss = 0.0, 0.0
        if targets:
            total, loss_sum = self.gradients(parts, step)
            divisor = jax.device_put(np.float32(targets), replicated(self.mesh))
            self.state, measured = self.programs.update(self.state, total, divisor)
            loss, norm = float(loss_sum) / targets, float(measured["grad_norm"])
            if not (np.isfinite(loss) and np.isfinite(norm)):
                raise _diverged(step, f"loss {loss}, gradient norm {norm}")
        clock.lap("train")
        metrics = {"step": step + 1, "epoch": step // self.plan.steps_per_epoch, "loss": loss}
        metrics |= {"learning_rate": float(self.schedule(step)), "grad_norm": norm, "skipped": int(not targets)}
        metrics |= counts | _choices(decision, counts)
        metrics["fill"] = counts["trained_tokens"] / counts["trained_slots"] if counts["trained_slots"] else 0.0
        metrics |= {f"seconds_{name}": clock.seconds[name] for name in CLOCKS}
        if decision is not None:
            columns = self._records(prepared.batch, decision, metrics["epoch"])
        return metrics, columns

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
    def __init__(self) -> None:
        self.seconds = dict.fromkeys(CLOCKS, 0.0)
        self._at = time.perf_counter()

    def lap(self, name: str) -> None:
        now = time.perf_counter()
        self.seconds[name] += now - self._at
        self._at = now


def _counts(prepared: Prepared, tokens: np.ndarray, parts: list[Microbatch]) -> dict[str, int]:
    """What this process counts in a step: samples, targets, closing tokens of kept samples, tokens and slots launched."""
    batch, kept = prepared.batch, tokens.any(axis=1)
    closing = batch.closing & batch.targets & kept[:, None]
    return {
        "samples": int(batch.valid.sum()),
        "kept_samples": int(kept.sum()),
        "target_tokens": int(batch.targets.sum()),
        "kept_tokens": int(tokens.sum()),
        "closing_tokens": int(closing.sum()),
        "closing_pruned": int((closing & ~tokens).sum()),
        "scored_tokens": sum(part.tokens for part in prepared.scoring),
        "trained_tokens": sum(part.tokens for part in parts),
        "trained_slots": sum(part.sample.size for part in parts),
    }


def _choices(decision: Decision | None, counts: dict[str, int]) -> dict[str, Any]:
    """What stage 1 chose over the global batch: eligible, kept per quadrant, supplement by median quadrant."""
    if decision is None:
        return {"eligible": counts["samples"]}
    keep, supplement, quadrant, median = (
        np.asarray(x) for x in (decision.keep, decision.supplement, decision.quadrant, decision.median_quadrant)
    )
    placed = keep & ~supplement
    out: dict[str, Any] = {"eligible": int((median > 0).sum()), "kept_samples": int(keep.sum())}
    out |= {f"kept_q{q}": int((placed & (quadrant == q)).sum()) for q in (2, 3, 4)}
    out["supplement"] = int(supplement.sum())
    out |= {f"supplement_median_q{q}": int((supplement & (median == q)).sum()) for q in (1, 2, 3, 4)}
    return out | {"level": _finite(decision.level), "spearman": _finite(decision.spearman)}


def _diverged(step: int, what: str) -> QtjaxError:
    return QtjaxError(
        f"step {step + 1}: {what}: training diverged, or the model overflows its dtype; the last checkpoint is whole. Try a"
        " lower train.learning_rate, train.clip_norm 1.0, more warm-up, or model.dtype float32"
    )


def _finite(value: Any) -> float | None:
    value = float(value)
    return value if np.isfinite(value) else None
