"""Every compiled program of a run, compiled before the first step: after that a new shape is an error, not a stall."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from qtjax.config import PruneSection
from qtjax.parallel import batch_sharding, replicated
from qtjax.training.score import score_rows
from qtjax.training.state import Subject, TrainState, state_shardings
from qtjax.training.step import Decision, accumulate, decide, place, skip, update
from qtjax.tree import Tree

Shapes = Any  # a tree of jax.ShapeDtypeStruct


def rows_shape(mesh: Mesh, rows: int, length: int) -> dict[str, jax.ShapeDtypeStruct]:
    """Shapes of one packed microbatch of `rows` x `length` slots, sharded by row."""
    kinds = {name: jnp.int32 for name in ("input_ids", "position_ids", "segment_ids", "task_ids")} | {"weights": jnp.float32}
    sharding = batch_sharding(mesh)
    return {name: jax.ShapeDtypeStruct((rows, length), kind, sharding=sharding) for name, kind in kinds.items()}


def _score(subject: Subject, mesh: Mesh, trainable: Tree, frozen: Tree, rows: dict[str, jax.Array]):
    params, overlay = subject.join(trainable, frozen)
    return score_rows(subject.config, params, overlay, rows | {"loss_mask": rows["weights"] > 0}, mesh, rows["task_ids"])


class Programs:
    """The compiled functions of the loop, by microbatch rows where that varies.

    score[rows](trainable, frozen, rows) -> token nll, entropy [rows, L]
    unscored() -> token nll, entropy [N, T], all 0;  place[rows](nll, entropy, *scores of rows, sample, slot) -> the two
    decide(token_nll, token_entropy, targets, closing, valid) -> Decision
    zeros() -> (gradients, loss);  accumulate[rows](trainable, frozen, gradients, loss, rows, rng) -> (gradients, loss)
    update(state, gradients, targets) -> (state, metrics);  skip(state) -> state, where there is no target
    """

    def __init__(
        self,
        subject: Subject,
        mesh: Mesh,
        prune: PruneSection,
        optimizer: optax.GradientTransformation,
        state: TrainState,
        frozen: Tree,
        *,
        shapes: tuple[int, ...],
        row_length: int,
        samples: int,
        max_length: int,
        on_done: Callable[[str], None] = lambda name: None,
    ):
        everywhere, by_row = replicated(mesh), batch_sharding(mesh)
        abstract = partial(jax.tree.map, lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding))
        trainable, frozen = abstract(state.trainable), abstract(frozen)
        state = TrainState(trainable, abstract(state.optimizer), abstract(state.method))
        after = state_shardings(subject, mesh, trainable, optimizer)
        shardings = after.trainable
        gradients = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, jnp.float32, sharding=x.sharding), trainable)
        scalar = jax.ShapeDtypeStruct((), jnp.float32, sharding=everywhere)
        uses_rng = subject.overlay is not None and subject.overlay.draws
        key = jax.ShapeDtypeStruct((2,), jnp.uint32, sharding=everywhere) if uses_rng else None
        jobs: dict[str, Callable[[], Any]] = {}

        def job(name: str, function: Callable, *arguments: Shapes, **options: Any) -> None:
            jobs[name] = lambda: jax.jit(function, **options).lower(*arguments).compile()

        for rows in shapes:
            packed = rows_shape(mesh, rows, row_length)
            if prune.sample_pruner != "none":
                job(f"score {rows}", partial(_score, subject, mesh), trainable, frozen, packed, out_shardings=by_row)
            job(
                f"accumulate {rows}", partial(_accumulate, subject, mesh), trainable, frozen, gradients, scalar, packed, key,
                donate_argnums=(2, 3), out_shardings=(shardings, everywhere),
            )  # fmt: skip
        if prune.sample_pruner != "none":
            per_token = [jax.ShapeDtypeStruct((samples, max_length), d, sharding=by_row) for d in (jnp.float32, bool)]
            job("unscored", lambda: (jnp.zeros((samples, max_length)),) * 2, out_shardings=by_row)
            for rows in shapes:
                slots = rows_shape(mesh, rows, row_length)
                job(
                    f"place {rows}", place, *per_token[:1] * 2, *[slots["weights"]] * 2, *[slots["position_ids"]] * 2,
                    donate_argnums=(0, 1), out_shardings=by_row,
                )  # fmt: skip
            out = Decision(*[everywhere] * len(Decision._fields))._replace(tokens=by_row)
            valid = jax.ShapeDtypeStruct((samples,), bool, sharding=by_row)
            real, flag = per_token
            job("decide", partial(decide, prune), real, real, flag, flag, valid, out_shardings=out)

        def zeros() -> tuple[Tree, jax.Array]:
            return jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), trainable), jnp.float32(0)

        job("zeros", zeros, out_shardings=(shardings, everywhere))
        job(
            "update", partial(update, subject, optimizer), state, gradients, scalar,
            donate_argnums=(0,), out_shardings=(after, everywhere),
        )  # fmt: skip
        job("skip", partial(skip, subject), state, donate_argnums=(0,), out_shardings=after)

        def compile_one(name: str) -> Any:
            with jax.set_mesh(mesh):
                done = jobs[name]()
            on_done(name)
            return done

        with ThreadPoolExecutor(2) as pool:  # XLA compiles outside Python's lock
            compiled = dict(zip(jobs, pool.map(compile_one, jobs)))
        self.count = len(compiled)
        self.uses_rng = uses_rng
        self.score = {rows: compiled[f"score {rows}"] for rows in shapes if f"score {rows}" in compiled}
        self.accumulate = {rows: compiled[f"accumulate {rows}"] for rows in shapes}
        self.place = {rows: compiled[f"place {rows}"] for rows in shapes if f"place {rows}" in compiled}
        self.unscored, self.decide = compiled.get("unscored"), compiled.get("decide")
        self.zeros, self.update, self.skip = compiled["zeros"], compiled["update"], compiled["skip"]


def _accumulate(subject, mesh, trainable, frozen, gradients, loss, rows, key):
    rng = None if key is None else jax.random.wrap_key_data(key)
    return accumulate(subject, mesh, trainable, frozen, gradients, loss, rows, rng)
