"""A run in shapes and shardings only, and the memory of its programs on each device, as their compiler reports it."""

import contextlib
import math
import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from qtjax import models
from qtjax.config import Config
from qtjax.models import ModelConfig
from qtjax.parallel import batch_size, make_mesh, param_shardings, round_up
from qtjax.planning.collectives import Collective, collectives
from qtjax.training.ladder import cut, ladder
from qtjax.training.memory import shortage
from qtjax.training.optimizer import make_optimizer
from qtjax.training.programs import outputs_shape, program_jobs
from qtjax.training.setup import check_overlay
from qtjax.training.state import Subject, TrainState, state_shardings
from qtjax.tree import Tree, flatten


@dataclass(frozen=True)
class Need:
    """Bytes on each device while a program runs. arguments: what it is given; temporaries: its own, and results that take nobody's
    place; beside: what lies there meanwhile. total: all of it. moved: its collectives, None where they were not read or
    cannot be, or the compiler refused the program for its memory."""

    arguments: int
    temporaries: int
    beside: int
    moved: list[Collective] | None
    refused: bool = False

    @property
    def total(self) -> int:
        return self.arguments + self.temporaries + self.beside


@dataclass(frozen=True)
class AbstractRun:
    """A run in shapes and shardings only."""

    subject: Subject
    state: TrainState
    frozen: Tree
    optimizer: Any


def abstract_run(config: Config, shape: ModelConfig, mesh: Mesh, steps: int = 1000) -> AbstractRun:
    """What `training.setup.start` makes, without a weight.

    Args: shape: of the model, as its config.json says. Raises QtjaxError as it does, for a mesh that does not divide the model too.
    """
    m = config.model
    shape = shape.replace(
        dtype=m.dtype, param_dtype=m.param_dtype, remat=m.remat, unroll_layers=models.unrolled(shape, m.unroll_layers),
        quantization=m.quantized, attention=_kernel(mesh, m.dtype),
    )  # fmt: skip
    subject = Subject(shape, None if config.overlay.method == "none" else check_overlay(config, shape, steps))
    params = _laid(models.abstract_params(shape), param_shardings(shape, mesh))
    trainable, frozen = subject.split(params)
    optimizer = make_optimizer(config.train, steps, subject.decayed(), subject.rates())
    out = state_shardings(subject, mesh, trainable, optimizer)
    trainable = _laid(trainable, out.trainable)
    moments = _laid(jax.eval_shape(optimizer.init, trainable), out.optimizer)
    method = _laid(jax.eval_shape(subject.method_state, trainable), out.method)
    return AbstractRun(subject, TrainState(trainable, moments, method), _laid(frozen, subject.frozen_shardings(mesh)), optimizer)


def _kernel(mesh: Mesh, dtype: str) -> str:
    """What a run would use; cuDNN's kernels cannot be compiled without a GPU, so that plain attention stands for them."""
    kernel = models.kernel_of(mesh.devices.flat[0].platform, dtype)
    return "xla" if kernel == "cudnn" else kernel


def _laid(shapes: Tree, shardings: Tree) -> Tree:
    return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, shardings)


def on_device(tree: Tree) -> int:
    """Bytes of a tree's shards on one device."""
    return sum(int(np.prod(x.sharding.shard_shape(x.shape), dtype=np.int64)) * _itemsize(x.dtype) for x in jax.tree.leaves(tree))


def _itemsize(dtype: Any) -> float:
    return 0.5 if "int4" in str(dtype) else np.dtype(dtype).itemsize


# Programs that gather or scatter on the SparseCores of v5p and v6e cannot be read (jaxlib 0.10.2, libtpu 0.0.52: "async-update instruction
# should have 1 operands but sees 4"). Without, counts by hand hold, as they do on v4 and v5e (tests/planning/test_tpu.py).
_WITHOUT_OFFLOADING = {"xla_tpu_enable_offloading_scatter_to_sparsecore": "false", "xla_tpu_offload_gather_to_sparsecore": "false"}


def need_of(job: Callable[..., Any], mesh: Mesh, given: int, beside: int, *, read: bool = True) -> Need:
    """Compiles one job of `training.programs.program_jobs`, and again where the first program can be weighed but not read.

    Args: given, beside: bytes on each device that it is given, and not given; read: look for what moves.
    """
    try:
        compiled = _compile(job, mesh)
    except jax.errors.JaxRuntimeError as error:
        missing = shortage(str(error))
        if missing is None or missing.kind != "program":
            raise
        return Need(min(given, missing.needed), max(missing.needed - given, 0), beside, None, refused=True)
    memory = compiled.memory_analysis()
    extra = max(memory.output_size_in_bytes - memory.alias_size_in_bytes, 0)
    moved = _moved(compiled, mesh) if read else None
    if read and moved is None and mesh.devices.flat[0].platform == "tpu":
        with contextlib.suppress(jax.errors.JaxRuntimeError):  # an option that this compiler has not, or more memory than there is
            moved = _moved(_compile(job, mesh, _WITHOUT_OFFLOADING), mesh)
    return Need(memory.argument_size_in_bytes, memory.temp_size_in_bytes + extra, beside, moved)


def _compile(job: Callable[..., Any], mesh: Mesh, options: dict[str, str] | None = None) -> Any:
    with jax.set_mesh(mesh), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Error (reading|writing) persistent compilation cache")  # programs without a device are not kept
        return job(options)


def _moved(compiled: Any, mesh: Mesh) -> list[Collective] | None:
    """None where the program cannot be read."""
    try:
        with _silent():
            text = compiled.as_text()
    except jax.errors.JaxRuntimeError:
        return None
    return None if text is None else collectives(text, mesh.size)


@dataclass(frozen=True)
class Held:
    """Bytes on each device that a run keeps: weights that are trained, their moments, their gradients, weights that are not."""

    trained: int
    moments: int
    gradients: int
    frozen: int

    @property
    def total(self) -> int:
        return self.trained + self.moments + self.gradients + self.frozen


def held_by(run: AbstractRun) -> Held:
    """Counted from shapes and shardings; nothing is compiled."""
    gradients = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, "float32", sharding=x.sharding), run.state.trainable)
    trees = (run.state.trainable, (run.state.optimizer, run.state.method), gradients, run.frozen)
    return Held(*map(on_device, trees))


@dataclass(frozen=True)
class Weighed:
    """A run on a mesh of devices that are not here. rows: of its largest launch; length: of a row; needs: of "scoring" (where samples
    are scored), "training" (gradients of one launch), "backward" (the same with the scoring pass kept) and "update"."""

    mesh: Mesh
    run: AbstractRun
    held: Held
    rows: int
    length: int
    needs: dict[str, Need]

    @property
    def worst(self) -> int:
        """Bytes on each device while the largest program runs."""
        return max(need.total for need in self.needs.values())


def weigh(config: Config, shape: ModelConfig, devices: Sequence[Any], enough: float = math.inf, *, read: bool = True) -> Weighed:
    """Compiles the run's programs, the largest launch of each, one after the other.

    Args: shape: the model's; enough: bytes of a device; of programs that follow one which needs more, none is compiled; read: look for
    what moves.
    """
    mesh = make_mesh(config.mesh, list(devices))
    run = abstract_run(config, shape, mesh)
    held = held_by(run)
    ways = batch_size(mesh)
    rows = ladder(config.train.rows, ways, 1)[0]
    length = config.row_length
    jobs = program_jobs(
        run.subject, mesh, config.prune, config.train.loss, run.optimizer, run.state, run.frozen, shapes=(rows,), row_length=length,
        samples=round_up(config.prune.batch_size, ways), max_length=config.data.max_length,
    )  # fmt: skip
    weights, needs = held.trained + held.frozen, {}
    outputs = 0
    if config.prune.reuse_forward:  # at most: no launch holds fewer samples than rows
        kept = sum(cut(config.prune.batch_size, ladder(config.train.rows, ways, config.train.shapes)))
        outputs = on_device(outputs_shape(run.subject.config, mesh, kept, length))
    for name, job, given, beside in (
        ("training", f"accumulate {rows}", weights + held.gradients, held.moments),  # the largest first
        ("backward", f"backward {rows}", weights + held.gradients, held.moments + outputs),
        ("scoring", f"score {rows}", weights, held.moments + outputs),
        ("update", "update", held.trained + held.moments + held.gradients, held.frozen),
    ):
        if job not in jobs:
            continue
        needs[name] = need_of(jobs[job], mesh, given, beside, read=read)
        if needs[name].total > enough:
            break
    order = ("scoring", "training", "backward", "update")
    return Weighed(mesh, run, held, rows, length, {name: needs[name] for name in order if name in needs})


@contextlib.contextmanager
def _silent() -> Iterator[None]:
    """Without standard error: a compiler that cannot print its program prints a stack instead."""
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)


def leaves_by_path(tree: Tree) -> list[tuple[str, str, int]]:
    """(path, shape and what cuts it, "2048/t2 x 512/f8" along tensor and fsdp, bytes on each device) of every leaf."""
    return [(path, _cuts(array), on_device(array)) for path, leaf in flatten(tree).items() for array in jax.tree.leaves(leaf)]


def _cuts(array: jax.ShapeDtypeStruct) -> str:
    axes = (*array.sharding.spec, *[None] * (array.ndim - len(array.sharding.spec)))
    ways = [array.sharding.mesh.shape[axis] if axis else 1 for axis in axes]
    return " x ".join(f"{size}/{axis[0]}{cut}" if cut > 1 else str(size) for size, axis, cut in zip(array.shape, axes, ways)) or "one number"
