"""A whole run, from a config to its run folder: load, resume, measure the base, train, measure again, export, report."""

import contextlib
import hashlib
import signal
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from rich.console import Console

from qtjax import evals
from qtjax.checkpoints import read_config, resolve_folder
from qtjax.checkpoints.run_state import RunState
from qtjax.config import Config
from qtjax.data.dataset import TokenizedDataset
from qtjax.data.iterate import BatchPlan
from qtjax.data.prepare import keep_training_data
from qtjax.data.tokenizer import check_vocabulary, load_tokenizer
from qtjax.errors import QtjaxError
from qtjax.models import ModelConfig, check_task_ids
from qtjax.overlays import method_named
from qtjax.parallel import agree_max, batch_size, first_alone, make_mesh, round_up
from qtjax.report.progress import TrainingProgress
from qtjax.training.kernels import attention_said, with_segments
from qtjax.training.ladder import ladder
from qtjax.training.loop import Loop
from qtjax.training.optimizer import learning_rate_schedule
from qtjax.training.programs import Programs
from qtjax.training.pruners import pruners
from qtjax.training.reference import check_other_model, other_model_scores
from qtjax.training.reuse import check_reuse
from qtjax.training.run_folder import RunFolder
from qtjax.training.setup import check_overlay, checkpoint_tree, from_checkpoint, load_model, start
from qtjax.training.state import Subject, described
from qtjax.tree import Tree


class Interrupted(KeyboardInterrupt):
    """Asked to stop (Ctrl-C, SIGTERM); the checkpoint of the last finished step is written."""


@dataclass
class Session:
    """One process's part of a run: everything loaded and compiled, the state restored."""

    config: Config
    mesh: Mesh
    tokenizer: Any
    dataset: TokenizedDataset
    subject: Subject
    held_out: evals.HeldOut | None
    loop: Loop
    checkpoints: RunState
    step: int
    total_steps: int
    seconds: dict[str, float]

    def close(self) -> None:
        """Waits for the last checkpoint and lets go of threads and files."""
        self.loop.close()
        self.checkpoints.close()


def total_steps(config: Config, plan: BatchPlan) -> int:
    """Optimizer steps of the run: ceil(epochs x steps per epoch), or train.max_steps if that is fewer."""
    steps = int(np.ceil(config.train.epochs * plan.steps_per_epoch - 1e-9))
    return min(steps, config.train.max_steps) if config.train.max_steps else steps


def open_session(config: Config, folder: RunFolder, console: Console) -> Session:
    """Loads data and model, compiles every program, restores the newest whole checkpoint and cuts the records back to it."""
    begin = time.perf_counter()
    mesh = make_mesh(config.mesh)
    needs = pruners(config.prune)
    tokenizer = load_tokenizer(config.model.path)
    others = [("prune.reference_model", needs.reference, ""), ("prune.score_model", needs.stored, needs.token.rater)]
    for field, used, _ in others:
        if used:
            check_other_model(config, field, tokenizer)
    shape = read_config(resolve_folder(config.model.path))
    check_fit(config, shape)
    if config.prune.reuse_forward:
        check_reuse(config.prune, None if config.overlay.method == "none" else check_overlay(config, shape), batch_size(mesh))
    dataset = _training_data(config, folder, tokenizer)
    check_tasks(config, shape, dataset)
    console.print(f"data    {dataset.stats.line()}", highlight=False, soft_wrap=True)
    check_vocabulary(tokenizer, shape.vocab_size, dataset.input_ids)
    held_out = _held_out(config, folder, shape, tokenizer)
    row_length = config.row_length
    plan = BatchPlan(
        len(dataset), config.prune.batch_size, config.train.seed, jax.process_index(), jax.process_count()
    )
    steps = total_steps(config, plan)
    reference, stored = (
        other_model_scores(config, field, dataset, mesh, folder.path, rater) if used else None for field, used, rater in others
    )
    model = load_model(config, mesh, steps)
    state, frozen, optimizer = start(config, mesh, model, steps)
    # A masked sample ends behind its last kept target, seldom far before its end.
    keep = config.prune.token_keep if config.prune.mode == "drop" and config.prune.token_pruner != "none" else 1.0
    shapes = ladder(config.train.rows, batch_size(mesh), config.train.shapes)
    subject = with_segments(model.subject.shapes(), mesh, dataset.lengths, row_length, max(shapes), keep)
    del model  # its weights are the state's, and go with it
    loaded = time.perf_counter()
    samples = round_up(config.prune.batch_size, batch_size(mesh))
    quiet = contextlib.nullcontext(_Silent())  # without a terminal a spinner leaves blank lines
    with console.status("compiling") if console.is_terminal else quiet as status:
        programs = Programs(
            subject, mesh, config.prune, config.train.loss, optimizer, state, frozen, shapes=shapes, row_length=row_length,
            samples=samples, max_length=config.data.max_length, on_done=lambda name: status.update(f"compiling: {name} done"),
        )  # fmt: skip
    schedule = jax.jit(learning_rate_schedule(config.train, steps))
    schedule(0)  # compiled here, not in the first step
    compiled = time.perf_counter()
    console.print(
        f"model   {config.model.path}: {shape.num_hidden_layers} layers, width {shape.hidden_size};"
        f" rows {' or '.join(map(str, shapes))} x {row_length}; {programs.count} programs compiled in {compiled - loaded:.0f} s;"
        f" attention: {attention_said(subject, mesh, shapes, row_length, needs.token.rater)}",
        highlight=False, soft_wrap=True,
    )
    loop = Loop(
        config, mesh, dataset, plan, programs, state, frozen, shapes=shapes, row_length=row_length,
        schedule=schedule, last=steps,
        reference=None if reference is None else reference.scores[0], stored=None if stored is None else stored.scores,
    )  # fmt: skip
    del state  # the loop's alone: a checkpoint takes its place
    checkpoints = RunState(folder.checkpoints, config.train.keep_checkpoints)
    step = _resume(loop, steps, checkpoints, folder, dataset, console)
    others_seconds = sum(found.seconds for found in (reference, stored) if found is not None)
    seconds = {"load": loaded - begin, "compile": compiled - loaded, "other_models": others_seconds}
    return Session(config, mesh, tokenizer, dataset, subject, held_out, loop, checkpoints, step, steps, seconds)


def _training_data(config: Config, folder: RunFolder, tokenizer: Any) -> TokenizedDataset:
    """Made by the first process, or by an earlier start of the run; all read the same files."""
    kept = first_alone("prepare the data", lambda: keep_training_data(config.data, tokenizer, folder.tokens).name)
    return TokenizedDataset.load(folder.tokens / kept)


def _held_out(config: Config, folder: RunFolder, shape: ModelConfig, tokenizer: Any) -> evals.HeldOut | None:
    """Held-out data, read before the model so that a mistake in it costs nothing."""
    if not config.data.eval_path and not config.data.eval_fraction:
        return None
    tasks = ("loss", "exact_match") if config.eval.generate_samples else ("loss",)
    return evals.load_held_out(config, shape, tokenizer, tasks, scratch=folder.tokens)


def check_fit(config: Config, shape: ModelConfig) -> None:
    """Raises QtjaxError for what would train and be wrong in silence."""
    if config.data.max_length > shape.max_position_embeddings:
        raise QtjaxError(
            f"data.max_length = {config.data.max_length}: the model {config.model.path!r} has"
            f" {shape.max_position_embeddings} positions (max_position_embeddings); lower it to that"
        )
    if config.overlay.method == "none" and config.overlay.path:
        raise QtjaxError(
            f"overlay.path = {config.overlay.path!r}: overlay.method = 'none' trains all parameters and puts no adapter over them; set overlay.method"
            " to the adapter's, or merge it first (python -m qtjax.export)"
        )
    if config.overlay.method != "none":  # a mistake in the overlay's settings costs nothing yet
        overlay = check_overlay(config, shape)
        if overlay.tasks > 1 and not config.data.task_column:
            raise QtjaxError(
                f"data.task_column = '': {config.overlay.method} is set up for {overlay.tasks} tasks; name the column that says each row's"
                " task, or set up one task"
            )
    if config.overlay.method == "none" and config.model.quantization != "none":
        raise QtjaxError(
            f"model.quantization = {config.model.quantization!r}: full-parameter training cannot update quantised kernels; set it"
            " to none, or train an overlay (overlay.method lora or qlora)"
        )
    if config.prune.score_dtype == "int8" and config.model.quantization != "none":
        raise QtjaxError(
            f"prune.score_dtype = 'int8': the kernels are packed as {config.model.quantization} already; leave it out, or set"
            " model.quantization to none"
        )
    if config.overlay.method == "none" and config.model.param_dtype != "float32":
        raise QtjaxError(
            f"model.param_dtype = {config.model.param_dtype!r}: full-parameter training keeps float32 parameters, since small"
            " updates vanish in 16 bits; set it to float32 (model.dtype may be bfloat16), or use an overlay"
        )


def check_tasks(config: Config, shape: ModelConfig, dataset: TokenizedDataset) -> None:
    """Raises QtjaxError when the data hold a task that the overlay has no place for."""
    if config.overlay.method != "none":
        overlay = check_overlay(config, shape)
        check_task_ids(overlay.tasks, dataset.task_ids, dataset.task_ids.shape)


def check_data(folder: Path, config: Config, dataset: TokenizedDataset, meta: Mapping[str, Any]) -> None:
    """Raises QtjaxError when `dataset` is not what the run began with; meta: what a checkpoint of it says."""
    if meta["data"] != dataset.fingerprint:
        raise QtjaxError(
            f"{folder}: data.path = {config.data.path!r} holds other samples than when this run began; put the old"
            " data back, or choose another run.folder"
        )


def base_fingerprint(config: Config, frozen: Tree) -> str:
    """SHA-256 over a sum of the bits of every frozen leaf that comes from a file, the same on every mesh; "" without one. An overlay
    resumes only on its own base."""
    if not frozen:
        return ""
    if not config.overlay.path and not method_named(config.overlay.method).in_parts:
        frozen = frozen["params"]  # what an overlay made of them is rounded elsewhere on another mesh

    def total(x: jax.Array) -> jax.Array:
        if jnp.issubdtype(x.dtype, jnp.floating):
            x = jax.lax.bitcast_convert_type(x, f"uint{8 * x.dtype.itemsize}")
        return jnp.sum(x.astype(jnp.uint32), dtype=jnp.uint32)  # modulo 2^32: in any order

    sums = jax.jit(lambda tree: jax.tree.map(total, tree))(frozen)
    return hashlib.sha256(np.asarray(jax.tree.leaves(sums), np.uint32).tobytes()).hexdigest()


def _resume(
    loop: Loop, last: int, checkpoints: RunState, folder: RunFolder, dataset: TokenizedDataset, console: Console
) -> int:
    if checkpoints.latest() is None:
        folder.cut_back(0)
        return 0
    fresh = described(loop.state)
    loop.state = None  # two states need not have room at once
    found = checkpoints.restore(checkpoint_tree(fresh), pending=lambda step: loop.pending_shape(step, last))
    check_data(folder.path, loop.config, dataset, found.meta)
    if found.meta["base"] != base_fingerprint(loop.config, loop.frozen):
        raise QtjaxError(
            f"{folder.path}: model.path = {loop.config.model.path!r} holds other weights than when this run began; put the old"
            " ones back, or choose another run.folder"
        )
    loop.state = from_checkpoint(fresh, found.state)
    loop.resume(found.step, last, found.pending)
    folder.cut_back(found.step)
    checkpoints.forget(found.skipped)
    if found.skipped:
        console.print(
            f"resume  skipped unreadable checkpoints of steps {', '.join(map(str, found.skipped))} ({found.reason}); they are set aside as"
            " checkpoints/STEP.unreadable", highlight=False, soft_wrap=True,
        )  # fmt: skip
    console.print(f"resume  from step {found.step}{''.join(f'; {said}' for said in folder.moved)}", highlight=False, soft_wrap=True)
    return found.step


def train_steps(session: Session, folder: RunFolder, *, quiet: bool = False) -> None:
    """The remaining optimizer steps; records and checkpoints on the way. Raises Interrupted after a clean stop."""
    loop, last = session.loop, session.total_steps
    every = session.config.train.checkpoint_every
    meta = {"data": session.dataset.fingerprint, "base": base_fingerprint(session.config, loop.frozen), "total_steps": last}
    with (
        contextlib.ExitStack() as ending,
        stop_requested() as stop,
        TrainingProgress(last, start=session.step, quiet=quiet) as progress,
    ):
        ending.callback(session.checkpoints.wait)  # whatever ends the loop, a save under way is finished
        while session.step < last:
            metrics, records = loop.step(session.step, last)
            session.step += 1
            folder.log_step(session.step, {k: v for k, v in metrics.items() if k != "step"})
            if records is not None:
                folder.log_samples(session.step, records)
            progress.update(session.step, metrics)
            stopping = bool(agree_max(len(stop)))  # read once: a signal may come between two looks, and to one process only
            if session.step % every == 0 or session.step == last or stopping:
                folder.flush()  # records first: a checkpoint never claims a step that they lack
                session.checkpoints.save(session.step, checkpoint_tree(loop.state), meta, loop.pending())
            if stopping:
                raise Interrupted(f"stopped after step {session.step} of {last}")


class _Silent:
    """Stands in for a spinner where there is no terminal."""

    def update(self, text: str) -> None:
        """Says nothing."""


@contextlib.contextmanager
def stop_requested() -> Iterator[list[int]]:
    """A list that becomes non-empty on the first SIGINT or SIGTERM; the second acts at once."""
    asked: list[int] = []

    def handle(number: int, _: Any) -> None:
        if asked:
            raise KeyboardInterrupt
        asked.append(number)
        print("\nstopping after this step; once more to stop at once", file=sys.stderr, flush=True)

    try:
        before = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    except ValueError:  # not the main thread (a notebook's worker): signals are somebody else's
        before = {}
    try:
        yield asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


__all__ = ["Interrupted", "Session", "check_data", "check_fit", "open_session", "stop_requested", "total_steps", "train_steps"]
