"""cuDNN's attention told of samples beside the same kernel with a mask, on one Hopper GPU.

    python -m benchmarks.gpu.attention

Rows are full and bfloat16; a pass forward, and one forward and backward, each the best of three rounds of ten launches. First both are
compared with plain attention in float32, packed and padded rows, and what is further off than bfloat16 rounds is not timed.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from rich.console import Console
from rich.table import Table

from qtjax.errors import QtjaxError, door
from qtjax.flags import parse_flags
from qtjax.models import ModelConfig
from qtjax.models.attention import attend, visible
from qtjax.models.packed import runs
from qtjax.training.kernels import HOPPER, MOST, capability

ROUNDING = 0.01  # of the norm: bfloat16's 2^-9, several in a row
LAUNCHES = 10


@dataclass(frozen=True)
class Case:
    """rows x length, query and key heads, head dim, and how many equally long samples a row holds."""

    rows: int
    length: int
    heads: int
    kv_heads: int
    dim: int
    samples: int


CASES = tuple(Case(*shape, samples) for shape in ((4, 2048, 32, 32, 64), (2, 4096, 32, 8, 128)) for samples in (1, 4, MOST))


def kernels(case: Case, segment: Array) -> dict[str, Callable[..., Array]]:
    """{way: (q, k, v) -> averages}, by the code of a model, with room for as many samples as there are."""
    config = ModelConfig(attention="cudnn", dtype="bfloat16", head_dim=case.dim, num_attention_heads=case.heads, num_key_value_heads=case.kv_heads)
    slots = jnp.arange(case.length, dtype=jnp.int32)
    return {
        "by mask": lambda q, k, v: attend(config, q, k, v, visible(slots, slots, segment, segment, None)),
        "by sample": lambda q, k, v: attend(config, q, k, v, runs(segment, case.samples)[0]),
    }


def drawn(case: Case) -> list[Array]:
    """q, k, v and a slope, bfloat16 normals."""
    heads = (case.heads, case.kv_heads, case.kv_heads, case.heads)
    keys = jax.random.split(jax.random.key(0), 4)
    return [jax.random.normal(key, (case.rows, case.length, n, case.dim), jnp.bfloat16) for key, n in zip(keys, heads)]


def slopes(kernel: Callable[..., Array], real: Array) -> Callable[..., Any]:
    """(q, k, v, dy) -> (averages of real slots, gradients)."""

    def both(q: Array, k: Array, v: Array, dy: Array) -> Any:
        y, pull = jax.vjp(kernel, q, k, v)
        return jnp.where(real, y, 0), *pull(jnp.where(real, dy, 0).astype(y.dtype))

    return both


def check(case: Case) -> float:
    """The largest difference of either way from plain float32, a share of the norm, where a row in two ends in padding."""
    few = Case(2, min(case.length, 512), case.heads, case.kv_heads, case.dim, case.samples)
    segment = segments(few).at[1, few.length // 2 + 3 :].set(0)
    given, real, slots = drawn(few), (segment != 0)[..., None, None], jnp.arange(few.length)
    plain = lambda q, k, v: jax.nn.dot_product_attention(q, k, v, mask=visible(slots, slots, segment, segment, None), implementation="xla")  # noqa: E731
    with jax.default_matmul_precision("highest"):
        exact = slopes(plain, real)(*(x.astype(jnp.float32) for x in given))
    worst = 0.0
    for kernel in kernels(few, segment).values():
        for mine, wanted in zip(jax.jit(slopes(kernel, real))(*given), exact):
            worst = max(worst, float(jnp.linalg.norm((mine - wanted).ravel()) / jnp.linalg.norm(wanted.ravel())))
    return worst


def segments(case: Case) -> Array:
    """int32 [rows, length], samples of one length."""
    each = -(-case.length // case.samples)
    return jnp.broadcast_to(jnp.arange(case.length, dtype=jnp.int32) // each + 1, (case.rows, case.length))


def best(function: Callable[..., Any], *given: Array) -> float:
    """Seconds of one launch."""
    jax.block_until_ready(function(*given))
    rounds = []
    for _ in range(3):
        begin = time.perf_counter()
        jax.block_until_ready([function(*given) for _ in range(LAUNCHES)])
        rounds.append((time.perf_counter() - begin) / LAUNCHES)
    return min(rounds)


def measured(case: Case) -> dict[str, tuple[float, float]]:
    """{way: seconds (forward, forward and backward)}. Raises QtjaxError where the numbers are not attention's."""
    worst = check(case)
    if not worst <= ROUNDING:
        raise QtjaxError(f"{case}: {worst:.2g} of the norm off plain float32, allowed is {ROUNDING}; not timed")
    *qkv, dy = drawn(case)
    segment, out = segments(case), {}
    for way, kernel in kernels(case, segment).items():
        out[way] = best(jax.jit(kernel), *qkv), best(jax.jit(slopes(kernel, jnp.ones((1, 1, 1, 1), bool))), *qkv, dy)
    return out


def table(results: dict[Case, dict[str, tuple[float, float]]], device: str) -> Table:
    """Milliseconds by case, and how many times as fast it is told of samples."""
    drawn = Table(title=f"attention, milliseconds, {device}, jax {jax.__version__}")
    for name in ("rows x length", "heads, dim", "samples", "forward: mask", "sample", "x", "and backward: mask", "sample", "x"):
        drawn.add_column(name, justify="right")
    for case, found in results.items():
        cells = [f"{case.rows} x {case.length}", f"{case.heads}/{case.kv_heads}, {case.dim}", str(case.samples)]
        for which in (0, 1):
            mask, sample = (1e3 * found[way][which] for way in ("by mask", "by sample"))
            cells += [f"{mask:.3f}", f"{sample:.3f}", f"{mask / sample:.2f}"]
        drawn.add_row(*cells)
    return drawn


def main(argv: Sequence[str] | None = None) -> None:
    parse_flags("python -m benchmarks.gpu.attention", __doc__.splitlines()[0], argv, {})
    device = jax.devices()[0]
    if capability(device) // 1 != HOPPER:
        raise QtjaxError(f"{device.device_kind}: cuDNN is told of samples on Hopper GPUs only; run it on one (H100, H200)")
    console = Console(width=None if Console().is_terminal else 140)
    console.print(table({case: measured(case) for case in CASES}, device.device_kind))


if __name__ == "__main__":
    door(main)
