"""Which attention a run really takes: what cuDNN's is told of its rows, and what the run says before it starts."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from qtjax.data.packing import pack
from qtjax.models import Edits, kernel_for, takes_runs
from qtjax.overlays import Overlay
from qtjax.training.state import Subject


MOST = 16  # samples of a row that the kernel is told of; with 64 it takes as long as with a mask (docs/performance.md)
HOPPER = 9  # compute capability
_LOSS = 1.03  # rows that holding no more samples may make of one
_SHARE = 16  # a sixteenth of the device's memory for the kernel's workspace
_OFFSETS = (0, 11, 1)  # the JAX before which offsets of keys are wrong where query heads share them


def with_segments(subject: Subject, mesh: Mesh, lengths: np.ndarray, row_length: int, rows: int, keep: float = 1.0) -> Subject:
    """The subject, its config saying how many samples a row may hold where cuDNN's kernel can be told of them (models/packed.py).

    That is on one Hopper GPU (it has been run on no other), for rows of samples alone. The kernel is compiled for a number of samples and takes
    time and memory for every one, there or not: as compiled for an H200 with grouped heads 8 bytes of each, slot and column of the queries,
    and in every layer 4 bytes of each, slot and head.

    Args: lengths: of all samples, in tokens; rows: of the largest launch; keep: the least share of its tokens that dropping some leaves a sample.
    """
    config, device = subject.config, mesh.devices.flat[0]
    if mesh.size > 1 or capability(device) // 1 != HOPPER or not takes_runs(config.replace(max_segments=1), row_length) or _among_others(subject):
        return subject
    most = segments_for(lengths, row_length, keep)
    told = config.replace(max_segments=most)
    kept = config.num_hidden_layers if config.remat in ("none", "dots") else 1  # layers whose sums wait for the backward pass
    workspace = (most + 1) * rows * row_length * config.num_attention_heads * (8 * config.head_dim + 4 * kept)
    memory = (device.memory_stats() or {}).get("bytes_limit") or 0
    wrong = config.num_key_value_heads < config.num_attention_heads and jax.__version_info__ < _OFFSETS
    return subject if most > 1 and (wrong or workspace > memory / _SHARE) else replace(subject, config=told)


def segments_for(lengths: np.ndarray, row_length: int, keep: float = 1.0) -> int:
    """The fewest samples of a row, a power of two, by which rows are hardly more than without that bound, pruned or not; 0: more than MOST.

    Args: as `with_segments`.
    """
    some = np.asarray(lengths)[:: max(1, -(-len(lengths) // 512))]
    cases = [(some, len(pack(some, row_length))) for some in (some, np.ceil(keep * some).astype(int))]
    for most in (1, 2, 4, 8, MOST):
        if all(len(pack(some, row_length, most)) <= _LOSS * rows for some, rows in cases):
            return most
    return 0


def capability(device: jax.Device) -> float:
    """Of an NVIDIA GPU; 0 of anything else."""
    try:
        return float(getattr(device, "compute_capability", 0))
    except ValueError:  # "gfx90a"
        return 0.0


def _among_others(subject: Subject) -> bool:
    """Whether something stands in every row beside its samples."""
    edits = None if subject.overlay is None else edits_of(subject.overlay)
    return edits is not None and bool(edits.ahead or edits.prefix)


def attention_said(subject: Subject, mesh: Mesh, shapes: tuple[int, ...], row_length: int, rater: str) -> str:
    """One clause: the kernel of the platform, or plain attention and why. Args: shapes: global rows of launches; rater: "" for none."""
    config, overlay = subject.config, subject.overlay
    with jax.set_mesh(mesh):
        taken = {kernel_for(config, rows, row_length) for rows in shapes}
    if overlay is not None and edits_of(overlay).ahead:
        return "xla" + (f", since {config.attention} takes no virtual tokens" if config.attention != "xla" else "")
    if taken != {config.attention}:
        return f"xla, since {config.attention} does not take rows of {row_length} with {config.num_key_value_heads} key heads of {config.head_dim} on this mesh"
    if takes_runs(config, row_length):
        return f"cudnn, by sample, at most {config.max_segments} in a row" + (f"; scoring by mask, since {rater} reads the weights" if rater else "")
    if config.attention == "cudnn":
        return "cudnn, by mask"
    return config.attention + (f"; scoring xla, since {rater} reads the weights" if rater and config.attention != "xla" else "")


def edits_of(overlay: Overlay) -> Edits:
    """In shapes, what an overlay changes: virtual tokens, or a prefix's, before every row among it."""
    return jax.eval_shape(lambda given: given.expand(None, jnp.zeros(1, jnp.int32)), overlay)
