"""Which attention a run really takes, said before it starts."""

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from qtjax.models import Edits, kernel_for
from qtjax.overlays import Overlay
from qtjax.training.state import Subject


def attention_said(subject: Subject, mesh: Mesh, shapes: tuple[int, ...], row_length: int, rater: str) -> str:
    """One clause: the kernel of the platform, or plain attention and why. Args: shapes: global rows of launches; rater: "" for none."""
    config, overlay = subject.config, subject.overlay
    with jax.set_mesh(mesh):
        taken = {kernel_for(config, rows, row_length) for rows in shapes}
    if overlay is not None and edits_of(overlay).ahead:
        return "xla" + (f", since {config.attention} takes no virtual tokens" if config.attention != "xla" else "")
    if taken != {config.attention}:
        return f"xla, since {config.attention} does not take rows of {row_length} with {config.num_key_value_heads} key heads of {config.head_dim} on this mesh"
    return config.attention + (f"; scoring xla, since {rater} reads the weights" if rater and config.attention not in ("xla", "cudnn") else "")


def edits_of(overlay: Overlay) -> Edits:
    """In shapes, what an overlay changes: virtual tokens, or a prefix's, before every row among it."""
    return jax.eval_shape(lambda given: given.expand(None, jnp.zeros(1, jnp.int32)), overlay)
