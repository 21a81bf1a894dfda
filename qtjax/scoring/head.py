"""The fused head, scoring: nll and entropy of every target without ever holding a [T, V] array.

Peak extra memory is one [c, V] float32 array. Shape letters: T token slots, V vocabulary, D model width, c chunk.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh, PartitionSpec

from qtjax.scoring.chunks import BATCH_AXES, Plan, check_shapes, label_logit, logits, make_plan, rows_at, walk


def _nll_and_entropy(logits_cV: jax.Array, labels_c: jax.Array, plan: Plan) -> tuple[jax.Array, jax.Array]:
    """With z = logits - max and Z = sum exp z:  nll = log Z - z_label,  H = log Z - sum(z exp z) / Z."""
    top_c = plan.largest(jnp.max(logits_cV, axis=1))
    z_cV = logits_cV - top_c[:, None]
    e_cV = jnp.exp(z_cV)
    # One reduction with two results: two separate sums make XLA keep exp(z) and z as arrays of their own (3x the memory).
    total_c, moment_c = lax.reduce(
        (e_cV, e_cV * z_cV), (jnp.float32(0), jnp.float32(0)), lambda a, b: (a[0] + b[0], a[1] + b[1]), (1,)
    )
    total_c, moment_c = plan.total((total_c, moment_c))
    log_total_c = jnp.log(total_c)
    nll_c = log_total_c - (label_logit(logits_cV, labels_c, plan) - top_c)
    return nll_c, log_total_c - moment_c / total_c


def _local_scores(plan: Plan, hidden_TD, kernel, labels_T, mask_T) -> tuple[jax.Array, jax.Array]:
    def body(index_c, carry):
        logits_cV = logits(rows_at(hidden_TD, index_c), kernel, plan.layout)
        scores = _nll_and_entropy(logits_cV, rows_at(labels_T, index_c), plan)
        return tuple(old.at[index_c].set(new, mode="drop") for old, new in zip(carry, scores))

    zeros = jnp.zeros(mask_T.shape, jnp.float32)
    return walk(mask_T, plan, hidden_TD.shape[1], body, (zeros, zeros))


@functools.partial(jax.jit, static_argnames=("chunk", "layout", "mesh", "batch_axes"))
def token_scores(
    hidden: jax.Array,
    kernel: jax.Array,
    labels: jax.Array,
    mask: jax.Array,
    *,
    chunk: int | None = None,
    layout: str = "dv",
    mesh: Mesh | None = None,
    batch_axes: tuple[str, ...] = BATCH_AXES,
) -> tuple[jax.Array, jax.Array]:
    """nll and predictive entropy of every target, forward only (Q-Tuning, arXiv 2509.23873, eq. 4 and 5).

    Args:
      hidden: [T, D] any float dtype; row t is the state that predicts labels[t] (the caller shifts).
      kernel: the head, [D, V]; with layout="vd" [V, D]: a tied embedding as it is stored. Passing `embedding.T` instead
        costs a copy of the embedding. Operands of two dtypes are promoted to the wider one.
      labels: int [T]; read only where mask is True; a label outside 0..V-1 there gives NaN.
      mask: bool [T], True on targets. hidden is not read where it is False (it may hold NaN).
      chunk: tokens whose logits exist at one time; None: `chunk_for` the width.
      mesh, batch_axes: with a mesh, T is sharded over batch_axes (T must be a multiple of their devices) and the kernel's
        vocabulary over the other axes (V must be a multiple of theirs); along D the kernel is gathered.
    Returns: (nll, entropy), float32 [T], nats; 0 where mask is False. Statistics are float32 whatever the operands.
    Raises: QtjaxError for shapes that do not fit, an unknown layout or mesh axis.
    """
    plan = make_plan(chunk, layout, mesh, batch_axes)
    check_shapes(plan, hidden, kernel, labels=labels, mask=mask)
    if mask.size == 0:
        return jnp.zeros(mask.shape, jnp.float32), jnp.zeros(mask.shape, jnp.float32)
    local = functools.partial(_local_scores, plan)
    if plan.mesh is not None:
        rows = PartitionSpec(plan.batch_axes)
        local = jax.shard_map(
            local, mesh=plan.mesh, in_specs=(rows, plan.kernel_spec, rows, rows), out_specs=(rows, rows), check_vma=False
        )
    return local(hidden, kernel, labels, mask)
