"""Which attention a run really takes, said before it starts."""

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from qtjax.models import Edits, ModelConfig, kernel_for, segments_for, takes_runs
from qtjax.overlays import Overlay
from qtjax.training.state import Subject


def with_segments(config: ModelConfig, mesh: Mesh, lengths: np.ndarray, row_length: int, keep: float = 1.0) -> ModelConfig:
    """The config by which cuDNN's kernel is told of samples, on one GPU of Hopper's kind or later.

    Args: lengths: of all samples, in tokens; keep: the least share of its tokens that pruning leaves a sample.
    """
    capability = str(getattr(mesh.devices.flat[0], "compute_capability", "0"))
    if config.attention != "cudnn" or mesh.size > 1 or float(capability) < 9:
        return config
    return config.replace(max_segments=segments_for(lengths.mean(), keep * lengths.min(), row_length))


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
        return f"cudnn, by sample, at most {config.max_segments} in a row"
    if config.attention == "cudnn":
        return "cudnn, by mask"
    return config.attention + (f"; scoring xla, since {rater} reads the weights" if rater and config.attention != "xla" else "")


def edits_of(overlay: Overlay) -> Edits:
    """In shapes, what an overlay changes: virtual tokens, or a prefix's, before every row among it."""
    return jax.eval_shape(lambda given: given.expand(None, jnp.zeros(1, jnp.int32)), overlay)
