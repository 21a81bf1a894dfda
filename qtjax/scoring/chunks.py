"""What the fused head's two loops share: which slots count, in which order, and a chunk's logits.

Shape letters: T token slots, V vocabulary, D model width, c chunk.

Both list the slots that count (true mask, nonzero weight) and `walk` that list `chunk` slots at a time, a number of
times known only at run time: the cost is that of the real targets, not of the padded shape, while shapes stay static.

On a mesh the axes that do not shard the batch cut the vocabulary: a device holds the kernel's own columns, [D, V / devices], and
maxima, sums and the label's logit are put together chunk by chunk. Below, V is what one device holds.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh, PartitionSpec

from qtjax.errors import QtjaxError

LAYOUTS = ("dv", "vd")
BATCH_AXES = ("data", "fsdp")


class Plan(NamedTuple):
    """What is static about one call; hashable, because jit and custom_vjp key on it."""

    chunk: int | None
    layout: str
    mesh: Mesh | None
    batch_axes: tuple[str, ...]

    @property
    def split_axes(self) -> tuple[str, ...]:
        """Mesh axes of more than one device that do not shard the batch; they cut the vocabulary."""
        if self.mesh is None:
            return ()
        return tuple(a for a in self.mesh.axis_names if a not in self.batch_axes and self.mesh.shape[a] > 1)

    @property
    def kernel_spec(self) -> PartitionSpec:
        """How the kernel lies: its vocabulary axis over `split_axes`, whole along the model's width."""
        return PartitionSpec(None, self.split_axes) if self.layout == "dv" else PartitionSpec(self.split_axes)

    def largest(self, value: jax.Array) -> jax.Array:
        """The largest over the devices that cut the vocabulary."""
        return lax.pmax(value, self.split_axes) if self.split_axes else value

    def total(self, values: Any) -> Any:
        """The sums over the devices that cut the vocabulary."""
        return lax.psum(values, self.split_axes) if self.split_axes else values


def make_plan(chunk: int | None, layout: str, mesh: Mesh | None, batch_axes: tuple[str, ...]) -> Plan:
    """The static side of a call, checked. Raises QtjaxError for an impossible chunk, layout or mesh axis."""
    if chunk is not None and (isinstance(chunk, bool) or not isinstance(chunk, int) or chunk < 1):
        raise QtjaxError(f"chunk = {chunk!r}: is a number of tokens, an integer of 1 or more; None chooses by the model's width")
    if layout not in LAYOUTS:
        raise QtjaxError(f"layout = {layout!r}: must be 'dv' (kernel [D, V]) or 'vd' (kernel [V, D], a tied embedding)")
    if mesh is not None:
        missing = [a for a in batch_axes if a not in mesh.axis_names]
        if missing:
            raise QtjaxError(f"batch_axes = {batch_axes}: the mesh has no axis {missing[0]!r}; its axes are {mesh.axis_names}")
        if mesh.size == 1:
            mesh = None
    return Plan(chunk, layout, mesh, tuple(batch_axes) if mesh is not None else ())


def check_shapes(plan: Plan, hidden: jax.Array, kernel: jax.Array, **per_token: jax.Array) -> None:
    """Raises QtjaxError where the kernel, the per-token arrays [T] or [B, L] or the mesh do not fit `hidden`."""
    kernel_shape = kernel.shape if plan.layout == "dv" else kernel.shape[::-1]
    if kernel.ndim != 2 or kernel_shape[0] != hidden.shape[-1]:
        expected = "[D, V]" if plan.layout == "dv" else "[V, D]"
        raise QtjaxError(
            f"kernel has shape {kernel.shape} but hidden has width {hidden.shape[-1]}: must be {expected} for"
            f" layout={plan.layout!r}; pass the other layout, or the head of this model"
        )
    for name, value in per_token.items():
        if value.shape != hidden.shape[:-1]:
            raise QtjaxError(f"{name} has shape {value.shape}: must be {hidden.shape[:-1]}, one entry per row of hidden")
    if plan.mesh is not None:
        devices = math.prod(plan.mesh.shape[a] for a in plan.batch_axes)
        if hidden.shape[0] % devices:
            raise QtjaxError(
                f"hidden has {hidden.shape[0]} rows: must be a multiple of {devices}, the devices along"
                f" {plan.batch_axes}; pad the batch"
            )
        ways = math.prod(plan.mesh.shape[a] for a in plan.split_axes)
        if kernel_shape[1] % ways:
            raise QtjaxError(
                f"kernel has shape {kernel.shape}: its vocabulary of {kernel_shape[1]} must be a multiple of {ways}, the devices along"
                f" {plan.split_axes}; use fewer"
            )


def chunk_for(width: int) -> int:
    """Tokens whose logits exist at one time, unless the caller says: a power of two from 256 to 2048, the least that is not below D.

    At D tokens the logits are as large as the kernel's own gradient, which training holds anyway; fewer would read and write that
    gradient too often beside what the matrix units do in between, and more would win nothing.
    """
    return min(2048, max(256, 1 << (width - 1).bit_length()))


def walk(wanted_T: jax.Array, plan: Plan, width: int, body: Callable[[jax.Array, Any], Any], carry: Any) -> Any:
    """carry after body(slots [c], carry) for this device's wanted slots, in order, the out-of-range slot T as padding at the end.

    Chunk after chunk; on a device alone the rest a quarter of one at a time, so that few padding slots are multiplied: a launch on a
    small device has a handful of chunks, and half of one wasted would be a tenth of the whole.
    """
    slots = wanted_T.shape[0]
    chunk = min(plan.chunk or chunk_for(width), slots)
    sizes = [chunk, chunk // 4] if chunk % 4 == 0 and plan.mesh is None else [chunk]
    least = sizes[-1]
    # Longer by one piece: XLA knows that a slice as long as its array depends on no turn, and would take a loop's products out of it,
    # to be computed whether it turns or not. On a mesh it may: a loop of one turn that is none lets the kernel's gradient be scattered.
    room = -(-slots // least) * least + (least if plan.mesh is None else 0)
    order = jnp.nonzero(wanted_T, size=room, fill_value=slots)[0].astype(jnp.int32)
    left = (jnp.sum(order < slots, dtype=jnp.int32) + least - 1) // least  # in pieces of the least size
    if plan.split_axes:  # the loop's collectives: every device turns as often as the others
        left = lax.pmax(left, plan.batch_axes)
    done = jnp.int32(0)
    for size in sizes:
        turns = left // (size // least)
        one = lambda i, carry, done=done, size=size: body(lax.dynamic_slice(order, (done * least + i * size,), (size,)), carry)  # noqa: E731
        carry = lax.fori_loop(0, turns, one, carry)
        done, left = done + turns * (size // least), left % (size // least)
    return carry


def rows_at(array: jax.Array, index_c: jax.Array) -> jax.Array:
    """Rows [c, ...] of `array`; zeros where the index lies past the end (the work list's padding)."""
    return array.at[index_c].get(mode="fill", fill_value=0)


def logits(hidden_cD: jax.Array, kernel: jax.Array, layout: str) -> jax.Array:
    """[c, V] float32 from operands in their common dtype."""
    operand = jnp.promote_types(hidden_cD.dtype, kernel.dtype)
    contract = 0 if layout == "dv" else 1
    return lax.dot_general(
        hidden_cD.astype(operand), kernel.astype(operand), (((1,), (contract,)), ((), ())), preferred_element_type=jnp.float32
    )


def at_label(labels_c: jax.Array, logits_cV: jax.Array, plan: Plan) -> jax.Array:
    """int32 [c]: the label's column among this device's, outside 0..V-1 where another device holds it."""
    return labels_c - lax.axis_index(plan.split_axes) * logits_cV.shape[1] if plan.split_axes else labels_c


def label_logit(logits_cV: jax.Array, labels_c: jax.Array, plan: Plan) -> jax.Array:
    """The label's logit; NaN for a label outside the vocabulary, so that bad data cannot pass for a score."""
    vocab, column_c = logits_cV.shape[1], at_label(labels_c, logits_cV, plan)
    here = (column_c >= 0) & (column_c < vocab)
    picked = jnp.take_along_axis(logits_cV, jnp.clip(column_c, 0, vocab - 1)[:, None], axis=1)[:, 0]
    found, picked = plan.total((here.astype(jnp.int32), jnp.where(here, picked, 0)))
    return jnp.where(found > 0, picked, jnp.nan)
