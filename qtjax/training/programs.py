"""Every compiled program of a run, compiled before the first step: after that a new shape is an error, not a stall."""

import gc
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from qtjax import models
from qtjax.config import PruneSection
from qtjax.parallel import batch_sharding, batch_size, replicated
from qtjax.training.memory import COMPILING
from qtjax.training.pruners import Pruners, pruners
from qtjax.training.reuse import carry, check_reuse
from qtjax.training.score import kept_rows, rated_rows, score_rows
from qtjax.training.state import Subject, TrainState, described, state_shardings
from qtjax.training.step import Decision, accumulate, choose_early, decide, place, skip, update
from qtjax.tree import Tree

Shapes = Any  # a tree of jax.ShapeDtypeStruct
_TRACING = threading.Lock()  # flax changes a module's class while it builds one: two threads at once, now and then one fails


def rows_shape(mesh: Mesh, rows: int, length: int) -> dict[str, jax.ShapeDtypeStruct]:
    """Shapes of one packed microbatch of `rows` x `length` slots, sharded by row."""
    kinds = {name: jnp.int32 for name in ("input_ids", "position_ids", "segment_ids", "task_ids")} | {"weights": jnp.float32}
    sharding = batch_sharding(mesh)
    return {name: jax.ShapeDtypeStruct((rows, length), kind, sharding=sharding) for name, kind in kinds.items()}


def outputs_shape(config: models.ModelConfig, mesh: Mesh, rows: int, length: int) -> jax.ShapeDtypeStruct:
    """What the layers give for `rows` x `length` slots, whole on every device: only `tensor` may cut the work."""
    shape = (config.num_hidden_layers, rows, length, config.hidden_size)
    return jax.ShapeDtypeStruct(shape, jnp.dtype(config.dtype), sharding=replicated(mesh))


def batch_shape(mesh: Mesh, samples: int, length: int, needs: Pruners) -> dict[str, jax.ShapeDtypeStruct]:
    """Shapes of what `decide` knows of a scoring batch beside its scores."""
    by_row = batch_sharding(mesh)
    kinds = {"targets": bool, "closing": bool} | ({"reference": jnp.float32} if needs.reference else {})
    out = {name: jax.ShapeDtypeStruct((samples, length), kind, sharding=by_row) for name, kind in kinds.items()}
    flat = {"valid": bool, "index": jnp.int32} | ({"planned": jnp.float32} if needs.by_epoch else {})
    return out | {name: jax.ShapeDtypeStruct((samples,), kind, sharding=by_row) for name, kind in flat.items()}


def _score(subject: Subject, mesh: Mesh, rater: str, int8: bool, keep: bool, trainable: Tree, frozen: Tree, rows: dict[str, jax.Array]):
    params, overlay = subject.join(trainable, frozen)
    params = models.int8_layers(params) if int8 else params
    given = (subject.config, params, overlay, rows | {"loss_mask": rows["weights"] > 0})
    if rater:
        return rated_rows(*given, rater, mesh, rows["task_ids"])
    return (kept_rows if keep else score_rows)(*given, mesh, rows["task_ids"])


def _in_dtype(config: models.ModelConfig, dtype: str, mesh: Mesh) -> models.ModelConfig:
    """The config in another compute dtype, with that one's kernel where it had its own dtype's."""
    kernel = partial(models.kernel_of, mesh.devices.flat[0].platform)
    return config.replace(dtype=dtype, attention=kernel(dtype) if config.attention == kernel(config.dtype) else config.attention)


def _draws(subject: Subject) -> bool:
    return subject.overlay is not None and subject.overlay.draws


def program_jobs(
    subject: Subject,
    mesh: Mesh,
    prune: PruneSection,
    loss: str,
    optimizer: optax.GradientTransformation,
    state: TrainState,
    frozen: Tree,
    *,
    shapes: tuple[int, ...],
    row_length: int,
    samples: int,
    max_length: int,
) -> dict[str, Callable[..., Any]]:
    """{name: a call that compiles it, under `jax.set_mesh(mesh)`} of what `Programs` holds, "accumulate 8" by microbatch rows.

    A call may be given compiler options, {name: value}.

    Args: state, frozen: arrays, or jax.ShapeDtypeStruct with shardings, for devices that need not be here.
    """
    check_reuse(prune, subject.overlay, batch_size(mesh))
    everywhere, by_row = replicated(mesh), batch_sharding(mesh)
    state, frozen = described(state), described(frozen)
    trainable = state.trainable
    after = state_shardings(subject, mesh, trainable, optimizer)
    shardings = after.trainable
    gradients = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, jnp.float32, sharding=x.sharding), trainable)
    scalar = jax.ShapeDtypeStruct((), jnp.float32, sharding=everywhere)
    key = jax.ShapeDtypeStruct((2,), jnp.uint32, sharding=everywhere) if _draws(subject) else None
    jobs: dict[str, Callable[..., Any]] = {}
    needs = pruners(prune)
    scoring = subject
    if prune.score_dtype not in ("", "int8"):
        scoring = replace(subject, config=_in_dtype(subject.config, prune.score_dtype, mesh))

    def job(name: str, function: Callable, *arguments: Shapes, **options: Any) -> None:
        def compiled(compiler_options: dict[str, str] | None = None) -> Any:
            with _TRACING:
                lowered = jax.jit(function, **options).lower(*arguments)
            return lowered.compile(compiler_options)

        jobs[name] = compiled

    for rows in shapes:
        packed = rows_shape(mesh, rows, row_length)
        if needs.passes:
            scored = partial(_score, scoring, mesh, needs.token.rater, prune.score_dtype == "int8", prune.reuse_forward)
            results = (by_row, by_row, everywhere) if prune.reuse_forward else by_row
            job(f"score {rows}", scored, trainable, frozen, packed, out_shardings=results)
        if prune.reuse_forward:
            outputs = partial(outputs_shape, subject.config, mesh, length=row_length)
            job(f"unknown {rows}", partial(_zeros, outputs(rows)), out_shardings=everywhere)
            for scored_rows in shapes:
                place_of = packed["position_ids"]
                job(
                    f"carry {scored_rows} {rows}", carry, outputs(rows), outputs(scored_rows), place_of, place_of,
                    donate_argnums=(0,), out_shardings=everywhere,
                )  # fmt: skip
            job(
                f"backward {rows}", partial(_accumulate, subject, mesh, loss), trainable, frozen, gradients, scalar,
                packed | {"outputs": outputs(rows)}, key, donate_argnums=(2, 3), out_shardings=(shardings, everywhere, by_row),
            )  # fmt: skip
        job(
            f"accumulate {rows}", partial(_accumulate, subject, mesh, loss), trainable, frozen, gradients, scalar, packed, key,
            donate_argnums=(2, 3), out_shardings=(shardings, everywhere, by_row),
        )  # fmt: skip
    real = jax.ShapeDtypeStruct((samples, max_length), jnp.float32, sharding=by_row)
    signals = (real,) * len(needs.signals)
    if needs.passes:
        job("unscored", lambda: tuple(jnp.zeros(x.shape, x.dtype) for x in signals), out_shardings=by_row)
        for rows in shapes:
            slots = rows_shape(mesh, rows, row_length)
            job(
                f"place {rows}", place, signals, (slots["weights"],) * len(signals), slots["position_ids"], slots["position_ids"],
                donate_argnums=(0,), out_shardings=by_row,
            )  # fmt: skip
    if needs.decides:
        batch = batch_shape(mesh, samples, max_length, needs)
        step_key = jax.ShapeDtypeStruct((2,), jnp.uint32, sharding=everywhere)
        if needs.early and needs.passes:
            job("choose", partial(choose_early, prune, mesh=mesh), batch, step_key, out_shardings=everywhere)
        out = Decision(*[everywhere] * len(Decision._fields))._replace(tokens=by_row)
        job("decide", partial(decide, prune, mesh=mesh), dict(zip(needs.signals, signals)), batch, step_key, out_shardings=out)

    def zeros() -> tuple[Tree, jax.Array]:
        return jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), trainable), jnp.float32(0)

    job("zeros", zeros, out_shardings=(shardings, everywhere))
    job(
        "update", partial(update, subject, optimizer), state, gradients, scalar,
        donate_argnums=(0,), out_shardings=(after, everywhere),
    )  # fmt: skip
    job("skip", partial(skip, subject), state, donate_argnums=(0,), out_shardings=after)
    return jobs


class Programs:
    """The compiled functions of the loop, by microbatch rows where that varies; rows may hold max_segments samples, 0: any number.

    score[rows](trainable, frozen, rows) -> `Pruners.signals`, each [rows, L], and with prune.reuse_forward the layers' outputs
    unscored() -> the signals [N, T], all 0;  place[rows](signals, signals of rows, sample, slot) -> signals
    choose(batch, key) -> bool [N], where samples are chosen without scores;  decide(scores, batch, key) -> Decision
    zeros() -> (gradients, loss);  accumulate[rows](trainable, frozen, gradients, loss, rows, rng) -> (gradients, loss, nll)
    with prune.reuse_forward: unknown[rows]() -> outputs of 0;  carry[scored rows, rows](outputs, scored outputs, row, slot) -> outputs;
    backward[rows], accumulate of rows with "outputs"
    update(state, gradients, targets) -> (state, metrics);  skip(state) -> state, where there is no target
    """

    def __init__(self, subject: Subject, mesh: Mesh, *arguments: Any, shapes: tuple[int, ...], on_done: Callable[[str], None] = lambda name: None, **sizes: int):
        """Compiles all of `program_jobs`, whose arguments these are; on_done hears the name of each that is ready."""
        jobs = program_jobs(subject, mesh, *arguments, shapes=shapes, **sizes)

        def compile_one(name: str) -> Any:
            try:
                with jax.set_mesh(mesh):
                    done = jobs[name]()
            except jax.errors.JaxRuntimeError as error:
                error.add_note(COMPILING + name)
                raise
            on_done(name)
            return done

        with _uncollected(), ThreadPoolExecutor(2) as pool:  # XLA compiles outside Python's lock
            compiled = dict(zip(jobs, pool.map(compile_one, jobs)))
        self.count, self.max_segments = len(compiled), subject.config.max_segments
        self.uses_rng = _draws(subject)
        self.score = {rows: compiled[f"score {rows}"] for rows in shapes if f"score {rows}" in compiled}
        self.accumulate = {rows: compiled[f"accumulate {rows}"] for rows in shapes}
        self.unknown, self.backward = (
            {rows: compiled[f"{name} {rows}"] for rows in shapes if f"{name} {rows}" in compiled} for name in ("unknown", "backward")
        )
        self.carry = {(a, b): compiled[f"carry {a} {b}"] for a in shapes for b in shapes if f"carry {a} {b}" in compiled}
        self.place = {rows: compiled[f"place {rows}"] for rows in shapes if f"place {rows}" in compiled}
        self.unscored, self.choose, self.decide = (compiled.get(name) for name in ("unscored", "choose", "decide"))
        self.zeros, self.update, self.skip = compiled["zeros"], compiled["update"], compiled["skip"]


@contextmanager
def _uncollected() -> Iterator[None]:
    """Python's garbage collector off: a trace makes a million objects and hardly a cycle, and the collector goes through all of them
    time and again, an eighth of the seconds that compiling from a warm cache takes."""
    on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if on:
            gc.enable()


def _zeros(shape: jax.ShapeDtypeStruct) -> jax.Array:
    return jnp.zeros(shape.shape, shape.dtype)


def _accumulate(subject, mesh, loss, trainable, frozen, gradients, total, rows, key):
    rng = None if key is None else jax.random.wrap_key_data(key)
    return accumulate(subject, mesh, loss, trainable, frozen, gradients, total, rows, rng)
