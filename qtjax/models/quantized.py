"""Quantised linear kernels: a few bits a weight in memory, a matrix again only where it is used.

A `Quantized` record stands where the tree has a kernel [in, out] (under "layers/" [N, in, out], the layer axis in front of
every array, so that the scan slices it). Kinds:

nf4   QLoRA (Dettmers et al. 2023, arXiv 2305.14314), 4.127 bits a weight, bit for bit what bitsandbytes packs: the matrix
      turned to [out, in] and read row by row, blocks of 64, w ~ NF4[code] * absmax; the first of two codes in the high half
      of a byte. absmax is quantised in its turn (double quantisation): minus its mean, blocks of 256, 8 bit dynamic codes.
      The reference is bitsandbytes 0.50 on a CPU. Its CUDA kernels take the exactly nearest of the 256 codes and sum the
      mean in another order, so that there one absmax in some hundreds is the neighbouring code.
int8  8 bits: symmetric, one scale per output channel: w ~ code * scale, scale = absmax / 127.
int4  4.25 bits: symmetric, blocks of 64 inputs of one output channel: w ~ code * scale, |code| <= 7, scale = absmax / 7
      rounded to bfloat16. A byte holds the inputs 2i (high half) and 2i + 1, as code + 8.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

KINDS = ("nf4", "int8", "int4")
BLOCK = 64  # weights that share one scale (nf4, int4)
NESTED = 256  # nf4: absmax values that share one scale

# Quantiles of a normal distribution, scaled to [-1, 1], with an exact zero (QLoRA, appendix E), as bitsandbytes has them.
NF4 = np.array(
    [
        -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
        -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
        0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
    ],
    np.float32,
)  # fmt: skip


def _dynamic_map() -> np.ndarray:
    """The 256 values of the signed 8 bit dynamic type (arXiv 2110.02861), float32, ascending: 0, 1, and for k = 0..6
    +-10^(k-6) times the middles of 2^k equal parts of [0.1, 1]. Rounded where bitsandbytes rounds."""
    values = [0.0, 1.0]
    for k in range(7):
        count = 2**k
        step = np.float64((np.float32(1) - np.float32(0.1)) / np.float32(count))
        from_below = (np.float64(np.float32(0.1)) + step * np.arange(count + 1)).astype(np.float32)
        from_above = (1 - step * np.arange(count, -1, -1)).astype(np.float32)
        edges = np.where(np.arange(count + 1) < (count + 1) // 2, from_below, from_above)
        middles = (edges[:-1] + edges[1:]) / np.float32(2) * np.float32(10.0 ** (k - 6))
        values += [*middles.tolist(), *(-middles).tolist()]
    return np.sort(np.asarray(values, np.float32))


DYNAMIC = _dynamic_map()
_GRID = np.float32(32767.5)  # bitsandbytes looks codes up on a grid of 2^16 points in [-1, 1]
_NEAREST = np.searchsorted((DYNAMIC[:-1] + DYNAMIC[1:]) / 2, np.arange(65536) / _GRID - 1).astype(np.uint8)


_FIELDS = {"data_fields": ["codes", "scale", "nested", "offset"], "meta_fields": ["kind", "sizes", "kept"]}


@partial(jax.tree_util.register_dataclass, **_FIELDS)
@dataclass(frozen=True, eq=False)
class Quantized:
    """A kernel [in, out] in few bits; a pytree of its arrays, whose leading axes (layers) are those of `shape`.

    kind: of KINDS. sizes: (in, out). kept: name of the dtype that the matrix had.
    nf4: codes uint8 [rows, bytes], scale uint8 [rows, blocks], nested float32 [blocks of blocks], offset float32 [].
      rows = out where 64 divides `in`, so that no block crosses a row and both axes can be sharded; else rows = 1.
    int8: codes int8 [in, out], scale float32 [1, out]. int4: codes uint8 [in / 2, out], scale bfloat16 [in / 64, out], `in`
      rounded up to a multiple of 64.
    """

    kind: str
    sizes: tuple[int, int]
    kept: str
    codes: Any
    scale: Any
    nested: Any = None
    offset: Any = None

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the matrix that it stands for, leading axes in front."""
        return (*self.codes.shape[:-2], *self.sizes)

    @property
    def ndim(self) -> int:
        return self.codes.ndim

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    @property
    def dtype(self) -> np.dtype:
        """Of the matrix before it was quantised."""
        return jnp.dtype(self.kept)

    @property
    def nbytes(self) -> int:
        """Bytes of the packed arrays."""
        return sum(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(self))

    def dequantize(self, dtype: Any) -> Array:
        """The matrix [..., in, out], computed in float32, then cast."""
        one = _DEQUANTIZE[self.kind]
        for _ in self.codes.shape[:-2]:
            one = jax.vmap(one)
        return one(self).astype(dtype)

    def axes(self, names: tuple[str | None, ...]) -> "Quantized":
        """The names of the matrix's axes (..., in, out) carried over to the packed arrays: a record of tuples."""
        *lead, into, out = names
        small = () if self.nested is None else (None,)
        if self.kind == "nf4":
            cut = (out, into) if self.codes.shape[-2] == self.sizes[1] else (None, None)
            return self.like((*lead, *cut), (*lead, *cut), (*lead, *small), tuple(lead))
        return self.like((*lead, into, out), (*lead, None if self.kind == "int8" else into, out), None, None)

    def like(self, codes: Any, scale: Any, nested: Any, offset: Any) -> "Quantized":
        """The same record with other arrays, or with something about each of them."""
        return Quantized(self.kind, self.sizes, self.kept, codes, scale, nested, offset)


@partial(jax.jit, static_argnames="kind")
def quantize(kernel: Array, kind: str) -> Quantized:
    """One matrix [in, out], quantised from its own dtype."""
    return _QUANTIZE[kind](kernel.astype(jnp.float32), jnp.dtype(kernel.dtype).name)


def quantize_layers(kernel: Array, kind: str) -> Quantized:
    """A stacked kernel [N, in, out], one layer at a time."""
    return jax.lax.map(lambda layer: quantize(layer, kind), kernel)


def abstract_quantized(kernel: Any, kind: str) -> Quantized:
    """The record of a stacked kernel [N, in, out], given as a shape struct, with jax.ShapeDtypeStruct arrays."""
    return jax.eval_shape(partial(quantize_layers, kind=kind), kernel)


def is_quantized_path(path: str) -> bool:
    """Whether a leaf of the parameter tree is one that quantisation packs: the layers' kernels; never head or embedding."""
    return path.startswith("layers/") and path.endswith("/kernel")


def _inverse(x: Array) -> Array:
    return jnp.where(x > 0, 1 / jnp.where(x > 0, x, 1), jnp.where(x == 0, 0, jnp.nan))


def _blocks(flat: Array, size: int) -> Array:
    """[n] as [ceil(n / size), size], zeros behind."""
    return jnp.pad(flat, (0, -flat.size % size)).reshape(-1, size)


def _pack(codes: Array) -> Array:
    """4 bit codes [..., 2k] as bytes [..., k], the first of a pair in the high half."""
    pairs = codes.reshape(*codes.shape[:-1], -1, 2).astype(jnp.uint8)
    return (pairs[..., 0] << 4) | pairs[..., 1]


def _unpack(packed: Array, axis: int) -> Array:
    """The inverse of `_pack` along an axis, int32."""
    halves = jnp.stack([packed >> 4, packed & 15], axis=axis + 1).astype(jnp.int32)
    return halves.reshape(*packed.shape[:axis], 2 * packed.shape[axis], *packed.shape[axis + 1 :])


def _quantize_nf4(w: Array, kept: str) -> Quantized:
    into, out = w.shape
    blocks, rest = _blocks(w.T.reshape(-1), BLOCK), w.size % BLOCK
    absmax = jnp.abs(blocks).max(axis=1)
    unit = blocks * _inverse(absmax)[:, None]
    if rest:  # bitsandbytes divides in a last block that is not full
        unit = unit.at[-1].set(blocks[-1] / jnp.where(absmax[-1] > 0, absmax[-1], 1))
    # How many of the 15 middles lie below: the nearest code, ties to the lower one.
    middles = (NF4[:-1] + NF4[1:]) / 2
    codes = sum((unit > middle).astype(jnp.uint8) for middle in middles).reshape(-1)[: w.size + w.size % 2]
    rows = out if into % BLOCK == 0 else 1
    offset = _mean(absmax)
    centred = _blocks(absmax - offset, NESTED)
    nested = jnp.abs(centred).max(axis=1)
    grid = jnp.floor((jnp.clip(centred * _inverse(nested)[:, None], -1, 1) + 1) * _GRID + 0.5)
    scale = jnp.where(nested[:, None] > 0, jnp.take(_NEAREST, grid.astype(jnp.int32), mode="clip"), 0)
    scale = scale.reshape(-1)[: absmax.size].astype(jnp.uint8)
    return Quantized("nf4", (into, out), kept, _pack(codes).reshape(rows, -1), scale.reshape(rows, -1), nested, offset)


def _dequantize_nf4(q: Quantized) -> Array:
    into, out = q.sizes
    rows, blocks = q.scale.shape
    absmax = jnp.take(DYNAMIC, q.scale.astype(jnp.int32), mode="clip")
    absmax = absmax * jnp.repeat(q.nested, NESTED)[: rows * blocks].reshape(rows, blocks)
    absmax = absmax + q.offset  # under jit one fused multiply-add, so the last bit may differ from two roundings
    values = jnp.take(NF4, _unpack(q.codes, 1), mode="clip")
    values = jnp.pad(values, ((0, 0), (0, blocks * BLOCK - values.shape[1])))
    values = (values.reshape(rows, blocks, BLOCK) * absmax[..., None]).reshape(rows, -1)
    return (values if rows == out else values[0, : into * out].reshape(out, into)).T


def _mean(x: Array) -> Array:
    """The float32 mean of [n], added in the order of torch's CPU kernel: 4 x 8 lanes, cascaded by sixteens."""
    lanes = 8
    whole = x.size // (4 * lanes)
    body, rest = x[: whole * 4 * lanes].reshape(whole, 4 * lanes), x[whole * 4 * lanes :]
    levels = []
    for _ in range(3):
        full = len(body) // 16 * 16
        levels.append(_in_order(body[full:], 4 * lanes))
        body = _in_order(jnp.moveaxis(body[:full].reshape(-1, 16, 4 * lanes), 1, 0), 4 * lanes)
    levels.append(_in_order(body, 4 * lanes))
    total = _in_order(levels, 4 * lanes).reshape(4, lanes)
    vectors = rest.size // lanes
    first = _in_order([total[0], *rest[: vectors * lanes].reshape(-1, lanes), total[1], total[2], total[3]], lanes)
    # The barrier keeps XLA from multiplying by the inverse of a constant instead.
    return _in_order([*rest[vectors * lanes :], *first], 1) / jax.lax.optimization_barrier(jnp.float32(x.size))


def _in_order(rows: Any, width: int) -> Array:
    rows = list(rows)
    return sum(rows[1:], rows[0]) if rows else jnp.zeros(width, jnp.float32)


def _quantize_int8(w: Array, kept: str) -> Quantized:
    scale = jnp.abs(w).max(axis=0, keepdims=True) / 127
    codes = jnp.round(jnp.clip(w * _inverse(scale), -127, 127)).astype(jnp.int8)
    return Quantized("int8", w.shape, kept, codes, scale)


def _dequantize_int8(q: Quantized) -> Array:
    return q.codes.astype(jnp.float32) * q.scale


def _quantize_int4(w: Array, kept: str) -> Quantized:
    into, out = w.shape
    blocks = jnp.pad(w, ((0, -into % BLOCK), (0, 0))).reshape(-1, BLOCK, out)
    scale = (jnp.abs(blocks).max(axis=1) / 7).astype(jnp.bfloat16)
    codes = jnp.round(jnp.clip(blocks * _inverse(scale.astype(jnp.float32))[:, None], -7, 7)).astype(jnp.int32) + 8
    return Quantized("int4", (into, out), kept, _pack(codes.reshape(-1, out).T).T, scale)


def _dequantize_int4(q: Quantized) -> Array:
    blocks, out = q.scale.shape
    codes = (_unpack(q.codes, 0) - 8).reshape(blocks, BLOCK, out)
    return (codes.astype(jnp.float32) * q.scale.astype(jnp.float32)[:, None]).reshape(-1, out)[: q.sizes[0]]


_QUANTIZE: dict[str, Callable[[Array, str], Quantized]] = {
    "nf4": _quantize_nf4, "int8": _quantize_int8, "int4": _quantize_int4
}  # fmt: skip
_DEQUANTIZE: dict[str, Callable[[Quantized], Array]] = {
    "nf4": _dequantize_nf4, "int8": _dequantize_int8, "int4": _dequantize_int4
}  # fmt: skip
