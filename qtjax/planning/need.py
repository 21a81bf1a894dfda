"""Memory of a run's programs on each device, as their compiler reports it."""

import contextlib
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from qtjax import models
from qtjax.checkpoints import read_config, resolve_folder
from qtjax.config import Config
from qtjax.parallel import param_shardings
from qtjax.planning.collectives import Collective, collectives
from qtjax.training.optimizer import make_optimizer
from qtjax.training.setup import check_overlay
from qtjax.training.state import Subject, TrainState, state_shardings
from qtjax.tree import Tree, flatten


@dataclass(frozen=True)
class Need:
    """Bytes on each device while a program runs. arguments: what it is given; temporaries: its own, and results that take nobody's
    place; beside: what lies there meanwhile. total: all of it. moved: its collectives, None where the compiler refused the program for
    its memory, or cannot print it."""

    arguments: int
    temporaries: int
    beside: int
    moved: list[Collective] | None

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


def abstract_run(config: Config, mesh: Mesh, steps: int = 1000) -> AbstractRun:
    """What `training.setup.start` makes, without a weight. Raises QtjaxError as it does, for a mesh that does not divide the model too."""
    m = config.model
    shape = read_config(resolve_folder(m.path)).replace(
        dtype=m.dtype, param_dtype=m.param_dtype, remat=m.remat, unroll_layers=m.unroll_layers,
        quantization=None if m.quantization == "none" else m.quantization, attention=_kernel(mesh, m.dtype),
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


# "Used 121.50G of 15.75G hbm": all of it; "required for HLO temporaries (16.88G) exceeds": without what the program is given.
_USED = re.compile(r"Used ([\d.]+)([KMG]) of")
_TEMPORARIES = re.compile(r"HLO temporaries \(([\d.]+)([KMG])\) exceeds")


def needs_of(jobs: Mapping[str, Any], mesh: Mesh, given: Mapping[str, int], beside: Mapping[str, int]) -> dict[str, Need]:
    """Compiles each job. Args: given, beside: {job: bytes on each device that it is given, and not given}."""
    out = {}
    for name, job in jobs.items():
        try:
            with jax.set_mesh(mesh):
                compiled = job()
        except jax.errors.JaxRuntimeError as error:
            text = str(error)
            if "RESOURCE_EXHAUSTED" not in text:
                raise
            used, extra = _USED.search(text), _TEMPORARIES.search(text)
            if not (used or extra):
                raise
            number, unit = (used or extra).groups()
            size = int(float(number) * {"K": 2**10, "M": 2**20, "G": 2**30}[unit])
            out[name] = Need(0 if used else given[name], size, beside[name], None)
            continue
        memory = compiled.memory_analysis()
        extra = max(memory.output_size_in_bytes - memory.alias_size_in_bytes, 0)
        try:
            with _silent():
                moved = collectives(compiled.as_text())
        except jax.errors.JaxRuntimeError:  # some compilers cannot print what they made
            moved = None
        out[name] = Need(memory.argument_size_in_bytes, memory.temp_size_in_bytes + extra, beside[name], moved)
    return out


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


def leaves_by_path(tree: Tree) -> list[tuple[str, tuple[int, ...], str, int]]:
    """(path, shape, partition, bytes on each device) of every leaf."""
    rows = []
    for path, leaf in flatten(tree).items():
        for array in jax.tree.leaves(leaf):
            rows.append((path, tuple(array.shape), str(tuple(array.sharding.spec)), on_device(array)))
    return rows
