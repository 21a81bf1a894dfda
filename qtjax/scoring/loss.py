"""The fused head, training: the weighted loss and its gradients without ever holding a [B, L, V] array.

Peak extra memory is one [c, V] float32 array and, when the kernel is trained, its float32 gradient.
Shape letters: B batch, L length, T = B * L, V vocabulary, D model width, c chunk.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh, PartitionSpec

from qtjax.errors import QtjaxError, near_names
from qtjax.scoring.chunks import BATCH_AXES, Plan, at_label, check_shapes, label_logit, logits, make_plan, rows_at, walk
from qtjax.scoring.factors import FACTORS, LARGEST, LOSSES


class _Call(NamedTuple):
    """What is static about one loss; hashable."""

    plan: Plan
    loss: str
    want_nll: bool
    dtypes: tuple[Any, Any, Any]  # of hidden, kernel, weights


def _local_loss(call: _Call, wants: tuple[bool, bool, bool], hidden_BLD, kernel, labels_BL, weights_BL) -> tuple[Any, ...]:
    """(loss, nll, dhidden, dkernel, dweights), all float32; None what neither `call` nor `wants` asks for."""
    plan, factor = call.plan, FACTORS[call.loss]
    want_hidden, want_kernel, want_weights = wants
    want_nll = call.want_nll or want_weights
    width = hidden_BLD.shape[-1]
    hidden_TD, labels_T, weights_T = hidden_BLD.reshape(-1, width), labels_BL.reshape(-1), weights_BL.reshape(-1)
    weights_T = weights_T.astype(jnp.float32)
    in_kernel = 1 if plan.layout == "dv" else 0  # the kernel's vocabulary axis

    def body(index_c, carry):
        loss, nlls, factors, dhidden, dkernel = carry
        hidden_cD, labels_c, weights_c = rows_at(hidden_TD, index_c), rows_at(labels_T, index_c), rows_at(weights_T, index_c)
        logits_cV = logits(hidden_cD, kernel, plan.layout)
        top_c = plan.largest(jnp.max(logits_cV, axis=1))
        log_total_c = jnp.log(plan.total(jnp.sum(jnp.exp(logits_cV - top_c[:, None]), axis=1)))
        nll_c = log_total_c - (label_logit(logits_cV, labels_c, plan) - top_c)
        if factor is not None:
            factor_c = factor(_largest(logits_cV, plan), nll_c)
            weights_c = weights_c * factor_c
        # Padding slots carry weight 0 and a finite nll (hidden 0: log V), so they add exactly nothing.
        loss = loss + jnp.sum(weights_c * nll_c)
        if want_hidden or want_kernel:
            operand = jnp.promote_types(hidden_cD.dtype, kernel.dtype)
            hit_cV = lax.broadcasted_iota(jnp.int32, logits_cV.shape, 1) == at_label(labels_c, logits_cV, plan)[:, None]
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
        if want_nll:
            nlls = nlls.at[index_c].set(nll_c, mode="drop")
        if want_weights and factor is not None:
            factors = factors.at[index_c].set(factor_c, mode="drop")
        return loss, nlls, factors, dhidden, dkernel

    start = (
        jnp.float32(0),
        jnp.zeros(weights_T.shape, jnp.float32) if want_nll else None,
        jnp.zeros(weights_T.shape, jnp.float32) if want_weights and factor is not None else None,
        jnp.zeros(hidden_TD.shape, jnp.float32) if want_hidden else None,
        jnp.zeros(kernel.shape, jnp.float32) if want_kernel else None,
    )
    loss, nlls, factors, dhidden, dkernel = walk(weights_T != 0, plan, width, body, start)
    if plan.mesh is not None:
        loss, dkernel = lax.psum((loss, dkernel), plan.batch_axes)
        dhidden = plan.total(dhidden)
    nlls = nlls.reshape(weights_BL.shape) if want_nll else None
    return (
        loss,
        nlls if call.want_nll else None,
        dhidden.reshape(hidden_BLD.shape) if want_hidden else None,
        dkernel,
        (nlls if factors is None else nlls * factors.reshape(weights_BL.shape)) if want_weights else None,
    )


def _largest(logits_cV: jax.Array, plan: Plan) -> jax.Array:
    """What a factor reads: all logits, or of a cut vocabulary each device's largest, which hold the largest of all."""
    if not plan.split_axes:
        return logits_cV
    return lax.all_gather(lax.top_k(logits_cV, min(LARGEST, logits_cV.shape[1]))[0], plan.split_axes, axis=1, tiled=True)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _run_loss(call: _Call, wants: tuple[bool, bool, bool], hidden, kernel, labels, weights) -> tuple[Any, ...]:
    plan = call.plan
    local = functools.partial(_local_loss, call, wants)
    if plan.mesh is not None:
        rows, whole = PartitionSpec(plan.batch_axes), PartitionSpec()
        specs = {"in_specs": (rows, plan.kernel_spec, rows, rows), "out_specs": (whole, rows, rows, plan.kernel_spec, rows)}
        local = jax.shard_map(local, mesh=plan.mesh, **specs, check_vma=False)
    return local(hidden, kernel, labels, weights)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _loss(call: _Call, hidden, kernel, labels, weights) -> tuple[jax.Array, jax.Array | None]:
    return _run_loss(call, (False, False, False), hidden, kernel, labels, weights)[:2]


def _loss_forward(call: _Call, hidden, kernel, labels, weights):
    # symbolic_zeros=True says which operands are differentiated: a frozen head (LoRA) saves a third of the matmuls.
    wants = (hidden.perturbed, kernel.perturbed, weights.perturbed)
    loss, nll, *gradients = _run_loss(call, wants, hidden.value, kernel.value, labels.value, weights.value)
    return (loss, nll), tuple(gradients)


def _loss_backward(call: _Call, gradients, cotangents):
    cotangent, _ = cotangents  # the nll is behind stop_gradient
    if isinstance(cotangent, jax.custom_derivatives.SymbolicZero):
        return None, None, None, None
    dhidden, dkernel, dweights = (
        None if gradient is None else (cotangent * gradient).astype(dtype) for gradient, dtype in zip(gradients, call.dtypes)
    )
    return dhidden, dkernel, None, dweights


_loss.defvjp(_loss_forward, _loss_backward, symbolic_zeros=True)


def _checked(hidden, kernel, labels, weights, loss: str, want_nll: bool, plan: Plan) -> tuple[jax.Array, jax.Array | None]:
    """(loss, nll or None) of arguments that are looked at first."""
    if loss not in LOSSES:
        raise QtjaxError(f"loss = {loss!r}: must be one of {', '.join(LOSSES)}{near_names(str(loss).lower(), LOSSES)}")
    check_shapes(plan, hidden, kernel, labels=labels, weights=weights)
    if weights.size == 0:
        return jnp.float32(0), jnp.zeros(weights.shape, jnp.float32) if want_nll else None
    call = _Call(plan, loss, want_nll, (hidden.dtype, kernel.dtype, weights.dtype))
    return _loss(call, hidden, kernel, labels, weights)


def head_loss(
    hidden: jax.Array,
    kernel: jax.Array,
    labels: jax.Array,
    weights: jax.Array,
    *,
    loss: str = "plain",
    chunk: int | None = None,
    layout: str = "dv",
    mesh: Mesh | None = None,
    batch_axes: tuple[str, ...] = BATCH_AXES,
) -> jax.Array:
    """sum(weights * factor * nll), the training loss before division by the step's number of targets.

    loss names the factor, a constant to differentiation, float32 whatever the operands (qtjax/scoring/factors.py cites
    and compares): "plain" 1; "dft" the label's probability exp(-nll); "eaft" the entropy of the 20 largest logits / 3.

    Reverse-mode differentiable once in hidden, kernel and weights: the gradients are formed in the forward pass while
    each chunk's logits exist (three matmuls in all, two when the kernel is not differentiated), so jvp and second
    derivatives are not available. Keep it outside jax.checkpoint: there is nothing left to save, and all would run twice.

    Args:
      hidden: [B, L, D] any float dtype; slot (b, l) is the state that predicts labels[b, l] (the caller shifts).
      kernel: [D, V], or [V, D] with layout="vd" (a tied embedding as stored, without a transposed copy of it or of its
        gradient).
      labels: int [B, L]; read only where the weight is nonzero; a label outside 0..V-1 there makes the loss NaN.
      weights: float [B, L]; 0 where a slot is no target (hidden is not read there). Its gradient is factor * nll where
        it is nonzero and 0 elsewhere.
      loss: one of LOSSES.
      chunk: tokens whose logits exist at one time; None: `chunk_for` the width.
      mesh, batch_axes: with a mesh, B is sharded over batch_axes (B must be a multiple of their devices) and the kernel's
        vocabulary over the other axes (V must be a multiple of theirs); along D the kernel is gathered.
    Returns: float32 scalar, nats; 0 with zero gradients when there is no target. The kernel's gradient is accumulated
      in float32 and returned in the kernel's dtype.
    Raises: QtjaxError for shapes that do not fit, an unknown loss, layout or mesh axis.
    """
    return _checked(hidden, kernel, labels, weights, loss, False, make_plan(chunk, layout, mesh, batch_axes))[0]


def head_loss_and_nll(
    hidden: jax.Array,
    kernel: jax.Array,
    labels: jax.Array,
    weights: jax.Array,
    *,
    loss: str = "plain",
    chunk: int | None = None,
    layout: str = "dv",
    mesh: Mesh | None = None,
    batch_axes: tuple[str, ...] = BATCH_AXES,
) -> tuple[jax.Array, jax.Array]:
    """head_loss and, from the same pass, each target's nll: what jax.value_and_grad(..., has_aux=True) takes.

    Arguments and errors as head_loss. Returns: (head_loss, nll); nll float32 [B, L], nats, unweighted and without the
    loss's factor, 0 where the weight is 0; nothing flows back through it. On a mesh it is sharded over batch_axes.
    """
    total, nll = _checked(hidden, kernel, labels, weights, loss, True, make_plan(chunk, layout, mesh, batch_axes))
    return total, lax.stop_gradient(nll)
