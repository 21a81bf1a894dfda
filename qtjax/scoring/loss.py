"""The fused head, training: the weighted loss and its gradients without ever holding a [B, L, V] array.

Peak extra memory is one [c, V] float32 array and, when the kernel is trained, its float32 gradient.
Shape letters: B batch, L length, T = B * L, V vocabulary, D model width, c chunk.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh, PartitionSpec

from qtjax.scoring.chunks import BATCH_AXES, Plan, check_shapes, label_logit, logits, make_plan, rows_at, work_list


def _local_loss(plan: Plan, wants: tuple[bool, bool, bool], hidden_BLD, kernel, labels_BL, weights_BL) -> tuple[Any, ...]:
    """(loss, dhidden, dkernel, dweights), each gradient float32, or None where `wants` says so."""
    want_hidden, want_kernel, want_weights = wants
    width = hidden_BLD.shape[-1]
    hidden_TD, labels_T, weights_T = hidden_BLD.reshape(-1, width), labels_BL.reshape(-1), weights_BL.reshape(-1)
    weights_T = weights_T.astype(jnp.float32)
    order, trips, chunk = work_list(weights_T != 0, plan)
    in_kernel = 1 if plan.layout == "dv" else 0  # the kernel's vocabulary axis

    def body(i, carry):
        loss, dhidden, dkernel, nlls = carry
        index_c = lax.dynamic_slice(order, (i * chunk,), (chunk,))
        hidden_cD, labels_c, weights_c = rows_at(hidden_TD, index_c), rows_at(labels_T, index_c), rows_at(weights_T, index_c)
        logits_cV = logits(hidden_cD, kernel, plan.layout)
        top_c = jnp.max(logits_cV, axis=1)
        log_total_c = jnp.log(jnp.sum(jnp.exp(logits_cV - top_c[:, None]), axis=1))
        nll_c = log_total_c - (label_logit(logits_cV, labels_c) - top_c)
        # Padding slots carry weight 0 and a finite nll (hidden 0: log V), so they add exactly nothing.
        loss = loss + jnp.sum(weights_c * nll_c)
        if want_hidden or want_kernel:
            operand = jnp.promote_types(hidden_cD.dtype, kernel.dtype)
            hit_cV = lax.broadcasted_iota(jnp.int32, logits_cV.shape, 1) == labels_c[:, None]
            slope_cV = (jnp.exp(logits_cV - (top_c + log_total_c)[:, None]) - hit_cV).astype(operand)
        # The weight goes on the narrow factor ([c, D], not [c, V]) and in float32, so that half precision does not
        # flush probabilities times 1/N to zero.
        if want_hidden:
            dims = (((1,), (in_kernel,)), ((), ()))
            step = lax.dot_general(slope_cV, kernel.astype(operand), dims, preferred_element_type=jnp.float32)
            dhidden = dhidden.at[index_c].set(weights_c[:, None] * step, mode="drop")
        if want_kernel:
            weighed_cD = (weights_c[:, None] * hidden_cD).astype(operand)
            pair = (weighed_cD, slope_cV) if plan.layout == "dv" else (slope_cV, weighed_cD)
            dkernel = dkernel + lax.dot_general(*pair, (((0,), (0,)), ((), ())), preferred_element_type=jnp.float32)
        if want_weights:
            nlls = nlls.at[index_c].set(nll_c, mode="drop")
        return loss, dhidden, dkernel, nlls

    start = (
        jnp.float32(0),
        jnp.zeros(hidden_TD.shape, jnp.float32) if want_hidden else None,
        jnp.zeros(kernel.shape, jnp.float32) if want_kernel else None,
        jnp.zeros(weights_T.shape, jnp.float32) if want_weights else None,
    )
    loss, dhidden, dkernel, nlls = lax.fori_loop(0, trips, body, start)
    if plan.mesh is not None:
        everywhere = plan.batch_axes + plan.split_axes
        loss, dkernel = lax.psum((loss, dkernel), everywhere)
        if plan.split_axes:
            dhidden, nlls = lax.psum((dhidden, nlls), plan.split_axes)
    return (
        loss,
        dhidden.reshape(hidden_BLD.shape) if want_hidden else None,
        dkernel,
        nlls.reshape(weights_BL.shape) if want_weights else None,
    )


@functools.partial(jax.jit, static_argnums=(0, 1))
def _run_loss(plan: Plan, wants: tuple[bool, bool, bool], hidden, kernel, labels, weights) -> tuple[Any, ...]:
    local = functools.partial(_local_loss, plan, wants)
    if plan.mesh is not None:
        rows, whole = PartitionSpec(plan.batch_axes), PartitionSpec()
        local = jax.shard_map(
            local, mesh=plan.mesh, in_specs=(rows, whole, rows, rows), out_specs=(whole, rows, whole, rows), check_vma=False
        )
    return local(hidden, kernel, labels, weights)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _loss(plan: Plan, dtypes: tuple[Any, Any, Any], hidden, kernel, labels, weights) -> jax.Array:
    return _run_loss(plan, (False, False, False), hidden, kernel, labels, weights)[0]


def _loss_forward(plan: Plan, dtypes: tuple[Any, Any, Any], hidden, kernel, labels, weights):
    # symbolic_zeros=True says which operands are differentiated: a frozen head (LoRA) saves a third of the matmuls.
    wants = (hidden.perturbed, kernel.perturbed, weights.perturbed)
    loss, *gradients = _run_loss(plan, wants, hidden.value, kernel.value, labels.value, weights.value)
    return loss, tuple(gradients)


def _loss_backward(plan: Plan, dtypes: tuple[Any, Any, Any], gradients, cotangent):
    if isinstance(cotangent, jax.custom_derivatives.SymbolicZero):
        return None, None, None, None
    dhidden, dkernel, dweights = (
        None if gradient is None else (cotangent * gradient).astype(dtype) for gradient, dtype in zip(gradients, dtypes)
    )
    return dhidden, dkernel, None, dweights


_loss.defvjp(_loss_forward, _loss_backward, symbolic_zeros=True)


def head_loss(
    hidden: jax.Array,
    kernel: jax.Array,
    labels: jax.Array,
    weights: jax.Array,
    *,
    chunk: int = 256,
    layout: str = "dv",
    mesh: Mesh | None = None,
    batch_axes: tuple[str, ...] = BATCH_AXES,
) -> jax.Array:
    """sum(weights * nll), the training loss before division by the step's number of targets.

    Reverse-mode differentiable once in hidden, kernel and weights: the gradients are formed in the forward pass while
    each chunk's logits exist (three matmuls in all, two when the kernel is not differentiated), so jvp and second
    derivatives are not available. Keep it outside jax.checkpoint: there is nothing left to save, and all would run twice.

    Args:
      hidden: [B, L, D] any float dtype; slot (b, l) is the state that predicts labels[b, l] (the caller shifts).
      kernel: [D, V], or [V, D] with layout="vd" (a tied embedding as stored, without a transposed copy of it or of its
        gradient).
      labels: int [B, L]; read only where the weight is nonzero; a label outside 0..V-1 there makes the loss NaN.
      weights: float [B, L]; 0 where a slot is no target (hidden is not read there). Its gradient is the nll where it is
        nonzero and 0 elsewhere.
      chunk: tokens whose logits exist at one time.
      mesh, batch_axes: with a mesh, B is sharded over batch_axes (B must be a multiple of their devices); the kernel is
        gathered, its gradient summed over all devices.
    Returns: float32 scalar, nats; 0 with zero gradients when there is no target. The kernel's gradient is accumulated
      in float32 and returned in the kernel's dtype.
    Raises: QtjaxError for shapes that do not fit, an unknown layout or mesh axis.
    """
    plan = make_plan(chunk, layout, mesh, batch_axes)
    check_shapes(plan, hidden, kernel, labels=labels, weights=weights)
    if weights.size == 0:
        return jnp.float32(0)
    return _loss(plan, (hidden.dtype, kernel.dtype, weights.dtype), hidden, kernel, labels, weights)
