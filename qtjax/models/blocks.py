"""Attention on a CPU: a block of queries of one head at a time, only the keys that it can see, backward pass included.

On a CPU softmax(q k') of whole rows is bound by memory: [B, H, L, L] is written and read several times. Here [R, S'] of one block
stays in cache, and what causality, the segments of a packed row or the sliding window hide is not computed.

B batch, L length, H query heads, K key/value heads, G = H / K, C head dim, Q queries of a block, R = G Q its rows, S' the keys it reads.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.ad_checkpoint import checkpoint_name

BLOCK = 64  # slots; larger ones multiply more hidden pairs where rows hold several samples, smaller ones are all overhead
_HIDDEN = -1e30  # finite, so that a query that sees nothing (padding) gets a finite average


class _Shape(NamedTuple):
    """What is static of one call: window in slots or None, block in slots."""

    window: int | None
    block: int


def blockwise(q_BLHC: Array, k_BLKC: Array, v_BLKC: Array, segment_BL: Array, first_BL: Array, sliding_window: int | None) -> Array:
    """Softmax attention of every slot to the slots of its own nonzero segment that are not later, within the window.

    Args: segment int [B, L], 0 for padding; first int [B, L]: the first slot of a slot's segment (`first_slots`).
    Returns: [B, L, H, C] in q's dtype, statistics float32; once differentiable in q, k, v. The scores of one block exist at a
    time, in the backward pass too, which forms them again from q, k and each row's log of its sum.
    """
    length = q_BLHC.shape[1]
    block = min(BLOCK, length)
    pad = -length % block
    if pad:  # padded slots are of segment 0: nobody sees them
        q_BLHC, k_BLKC, v_BLKC = (jnp.pad(x, ((0, 0), (0, pad), (0, 0), (0, 0))) for x in (q_BLHC, k_BLKC, v_BLKC))
        segment_BL = jnp.pad(segment_BL, ((0, 0), (0, pad)))
        first_BL = jnp.concatenate([first_BL, jnp.broadcast_to(jnp.arange(length, length + pad), (len(first_BL), pad))], axis=1)
    reach = jnp.minimum(first_BL, jnp.arange(length + pad))
    if sliding_window is not None:
        reach = jnp.maximum(reach, jnp.arange(length + pad) - sliding_window + 1)
    lowest = reach.reshape(len(reach), -1, block).min(axis=2) // block  # the first key block that each block of queries reads
    out = _attend(_Shape(sliding_window, block), q_BLHC, k_BLKC, v_BLKC, segment_BL, lowest.astype(jnp.int32))
    return out[:, :length]


def first_slots(segment_BL: Array) -> Array:
    """int32 [B, L]: the first slot of the row that holds each slot's segment; a padding slot stands for itself."""
    slots = jnp.arange(segment_BL.shape[1])
    first = jnp.argmax(segment_BL[:, :, None] == segment_BL[:, None, :], axis=-1)
    return jnp.where(segment_BL != 0, first, slots).astype(jnp.int32)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(shape: _Shape, q, k, v, segment, lowest):
    return _forward(shape, q, k, v, segment, lowest)[0]


class _Heads:
    """Arrays of a call laid out by (batch, key/value head), so that loops walk whole heads; [B K, blocks, G Q, C] for queries."""

    def __init__(self, shape: _Shape, q: Array, k: Array):
        self.block = shape.block
        (self.batch, self.length, self.heads, self.dim), self.kv_heads = q.shape, k.shape[2]
        self.blocks, self.group = self.length // self.block, self.heads // self.kv_heads

    def queries(self, x_BLHC: Array) -> Array:
        """[B K, blocks, G Q, C]"""
        dim = x_BLHC.shape[-1]
        x = x_BLHC.reshape(self.batch, self.blocks, self.block, self.kv_heads, self.group, dim).transpose(0, 3, 1, 4, 2, 5)
        return x.reshape(self.batch * self.kv_heads, self.blocks, self.group * self.block, dim)

    def rows(self, x: Array) -> Array:
        """The inverse of `queries`."""
        x = x.reshape(self.batch, self.kv_heads, self.blocks, self.group, self.block, -1).transpose(0, 2, 4, 1, 3, 5)
        return x.reshape(self.batch, self.length, self.heads, -1)

    def keys(self, x_BLKC: Array) -> Array:
        """[B K, L, C]"""
        return x_BLKC.transpose(0, 2, 1, 3).reshape(-1, self.length, self.dim)

    def lying(self, x_BLKC: Array) -> Array:
        """[B K, C, L]: of products with a narrow C, a CPU is several times slower at those that read it the other way."""
        return x_BLKC.transpose(0, 2, 3, 1).reshape(-1, self.dim, self.length)

    def slots(self, x: Array) -> Array:
        """[B K, C, L] back to [B, L, K, C]."""
        return x.reshape(self.batch, self.kv_heads, self.dim, self.length).transpose(0, 3, 1, 2)

    def each(self, x: Array) -> Array:
        """[B, ...] repeated for every key/value head: [B K, ...]."""
        return jnp.repeat(x, self.kv_heads, axis=0)


def _choose(block: int, blocks: int, i: Array, lowest: Array, run: Callable[..., Any], *carry: Any) -> Any:
    """run(first slot, number of slots, *carry) over the fewest compiled key extents that hold blocks lowest..i."""
    extents = _extents(blocks)
    which = sum((i + 1 - lowest > extent).astype(jnp.int32) for extent in extents[:-1])
    branches = [
        lambda *carry, extent=extent: run(jnp.maximum(i + 1 - extent, 0) * block, extent * block, *carry)
        for extent in extents
    ]
    return lax.switch(which, branches, *carry) if len(branches) > 1 else branches[0](*carry)


def _extents(blocks: int) -> list[int]:
    """Key extents, in blocks, that are compiled: 1, 2, 3, 5, 8, ..., so that few programs serve long rows and little is read in vain."""
    out, extent, following = [], 1, 2
    while extent < blocks:
        out.append(extent)
        extent, following = following, extent + following
    return [*out, blocks]


def _product(a: Array, b: Array) -> Array:
    """a @ b, float32."""
    return lax.dot_general(a, b, (((1,), (0,)), ((), ())), preferred_element_type=jnp.float32)


def _scores(shape: _Shape, q_RC: Array, k_CS: Array, queries: tuple[Array, Array], keys: tuple[Array, Array]) -> Array:
    """float32 [R, S'], `_HIDDEN` where a query does not see a key; queries and keys are (segments, slots) of their sides."""
    scores = _product(q_RC, k_CS) * q_RC.shape[-1] ** -0.5
    (own, at), (theirs, slot) = queries, keys
    distance = at[:, None] - slot[None, :]
    sees = (distance >= 0) & (own[:, None] == theirs[None, :]) & (theirs != 0)[None, :]
    if shape.window is not None:
        sees &= distance < shape.window
    return jnp.where(jnp.tile(sees, (len(q_RC) // shape.block, 1)), scores, _HIDDEN)


def _forward(shape: _Shape, q, k, v, segment, lowest):
    # What depends on segments alone is the same in every layer, and differentiating a loop over layers would take it out of the loop: what
    # each query of each head sees, [B, H, L, S'] for every extent. Tied to the queries it stays where it is formed and used.
    q, segment, lowest = lax.optimization_barrier((q, segment, lowest))
    heads = _Heads(shape, q, k)
    given = (heads.queries(q), heads.lying(k), heads.keys(v), heads.each(segment), heads.each(lowest))
    out, log_sum = lax.map(partial(_head, shape), given)
    # Named, so that a remat policy can keep these two and need not run the loop again.
    out, log_sum = checkpoint_name(heads.rows(out), "attention"), checkpoint_name(log_sum, "attention")
    return out, (q, k, v, segment, lowest, out, log_sum)


# jit here and below: one trace for all programs of a run, whatever their rows.
@partial(jax.jit, static_argnums=0)
def _head(shape: _Shape, given):
    """One key/value head of one row: its queries' averages and the logs of their sums, block after block."""
    queries_n, k_CL, v_LC, segment_L, lowest_n = given
    blocks = len(queries_n)

    def block(given):
        i, q_RC, low = given

        def run(begin, size):
            k_CS, v_SC = _cut(k_CL, begin, size, 1), _cut(v_LC, begin, size, 0)
            scores = _scores(shape, q_RC, k_CS, *_who(i, begin, size, shape.block, segment_L))
            top = scores.max(axis=1, keepdims=True)
            p = jnp.exp(scores - top)
            total = p.sum(axis=1, keepdims=True)
            return (_product(p.astype(v_LC.dtype), v_SC) / total).astype(q_RC.dtype), top + jnp.log(total)

        return _choose(shape.block, blocks, i, low, run)

    return lax.map(block, (jnp.arange(blocks), queries_n, lowest_n))


_cut = lax.dynamic_slice_in_dim


def _who(i: Array, begin: Array, size: int, block: int, segment_L: Array) -> tuple[tuple[Array, Array], tuple[Array, Array]]:
    """(segments, slots) of block i's queries, and of the keys that it reads."""
    own = _cut(segment_L, i * block, block), i * block + jnp.arange(block)
    return own, (_cut(segment_L, begin, size), begin + jnp.arange(size))


def _backward(shape: _Shape, kept, dout):
    q, k, v, segment, lowest, out, log_sum = kept
    heads = _Heads(shape, q, k)
    pull = jnp.sum(dout.astype(jnp.float32) * out.astype(jnp.float32), axis=-1, keepdims=True)  # what the softmax's own slope takes off
    given = (
        heads.queries(q), heads.keys(k), heads.lying(k), heads.lying(v), heads.each(segment), heads.each(lowest),
        heads.queries(dout.astype(q.dtype)), heads.queries(pull), log_sum,
    )  # fmt: skip
    dq, dk, dv = lax.map(partial(_head_slopes, shape), given)
    return heads.rows(dq), heads.slots(dk), heads.slots(dv), None, None


@partial(jax.jit, static_argnums=0)
def _head_slopes(shape: _Shape, given):
    """One key/value head of one row: gradients of its queries, keys and values."""
    queries_n, k_LC, k_CL, v_CL, segment_L, lowest_n, slopes_n, pulls_n, log_sums_n = given
    blocks = len(queries_n)

    def block(carry, given):
        i, q_RC, low, dy_RC, pull_R1, log_sum_R1 = given

        def run(begin, size, dk_CL, dv_CL):
            k_CS, k_SC, v_CS = _cut(k_CL, begin, size, 1), _cut(k_LC, begin, size, 0), _cut(v_CL, begin, size, 1)
            scores = _scores(shape, q_RC, k_CS, *_who(i, begin, size, shape.block, segment_L))
            p = jnp.exp(scores - log_sum_R1)
            ds = (p * (_product(dy_RC, v_CS) - pull_R1) * q_RC.shape[-1] ** -0.5).astype(q_RC.dtype)
            dk_CL, dv_CL = _added(dk_CL, begin, _product(q_RC.T, ds)), _added(dv_CL, begin, _product(dy_RC.T, p.astype(q_RC.dtype)))
            return (dk_CL, dv_CL), _product(ds, k_SC).astype(q_RC.dtype)

        return _choose(shape.block, blocks, i, low, run, *carry)

    zeros = jnp.zeros(k_CL.shape, jnp.float32)
    items = (jnp.arange(blocks), queries_n, lowest_n, slopes_n, pulls_n, log_sums_n)
    (dk, dv), dq = lax.scan(block, (zeros, zeros), items)
    return dq, dk.astype(k_LC.dtype), dv.astype(v_CL.dtype)


def _added(total_CL: Array, begin: Array, part_CS: Array) -> Array:
    there = _cut(total_CL, begin, part_CS.shape[1], 1)
    return lax.dynamic_update_slice_in_dim(total_CL, there + part_CS, begin, axis=1)


_attend.defvjp(_forward, _backward)
