"""Where a step's time goes, and what each way of computing it is worth: one change at a time, on one packed microbatch; one way of
laying a step's samples out for scoring at a time.

    python -m benchmarks.profile                                    # the 15M LLaMA, 8 rows of 512
    python -m benchmarks.profile --model FOLDER --length 256 --rounds 9 --json profile.json

CPU seconds of the process (all threads) on a CPU, wall clock on an accelerator; medians of rounds in which all variants take turns. "At the
matrix rate" is what the part's FLOPs would take at the rate of a large product measured in the same run. Every variant's loss and gradient
are compared with the plain one's before a number is printed, every layout's nll with the packed one's.
"""

import json
import operator
import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

import jax
import jax.numpy as jnp
import numpy as np
from rich import box
from rich.console import Console
from rich.table import Table

from benchmarks.machine import machine
from benchmarks.peers.inputs import SMALL, small_shape
from qtjax import models
from qtjax.checkpoints import read_config, resolve_folder
from qtjax.config import TrainSection
from qtjax.data.packing import PackedRows, Sample, fill_rows, pack
from qtjax.errors import QtjaxError, door
from qtjax.flags import parse_flags
from qtjax.models.attention import rope_tables, rotate
from qtjax.models.blocks import blockwise, first_slots
from qtjax.pages import with_own_pages
from qtjax.scoring import head_loss, token_scores
from qtjax.training.ladder import cut, ladder
from qtjax.training.score import score_rows
from qtjax.tree import flatten

SEGMENTS = 3  # samples that share a row
STEP = 64  # samples of a step whose scoring is laid out
BUCKETS = (4, 8, 16, 1)  # lengths of rows of one sample; 1: all as long as a packed row
CLOSE = {"float32": 2e-4, "bfloat16": 0.08}  # of a gradient's norm: float32 sums in another order; eight bits of bfloat16 in six layers


class Rows(NamedTuple):
    """One packed microbatch, int32 and float32 [B, L]; the second half of every sample is its answer."""

    input_ids: jax.Array
    position_ids: jax.Array
    segment_ids: jax.Array
    weights: jax.Array


def packed_rows(rows: int, length: int, vocab: int) -> Rows:
    """Random tokens, SEGMENTS samples a row."""
    size = -(-length // SEGMENTS)
    slot = np.broadcast_to(np.arange(length), (rows, length))
    ids = np.random.default_rng(0).integers(0, vocab, (rows, length))
    as32 = partial(jnp.asarray, dtype=jnp.int32)
    return Rows(as32(ids), as32(slot % size), as32(1 + slot // size), jnp.asarray(slot % size >= size // 2, jnp.float32))


def loss(config: models.ModelConfig, rows: Rows, chunk: int | None, params: Any) -> jax.Array:
    """qtjax's own: the fused head on the targets alone."""
    hidden = models.hidden_states(config, params, rows.input_ids, position_ids=rows.position_ids, segment_ids=rows.segment_ids)
    hidden, kernel, layout = models.readout(config, params, hidden)
    return head_loss(hidden, kernel, *targets(rows), layout=layout, chunk=chunk)


def logits_loss(config: models.ModelConfig, rows: Rows, params: Any) -> jax.Array:
    """The plain one: logits of every slot, [B, L, V]."""
    hidden = models.hidden_states(config, params, rows.input_ids, position_ids=rows.position_ids, segment_ids=rows.segment_ids)
    labels, weights = targets(rows)
    scores = models.logits(config, params, hidden)
    picked = jnp.take_along_axis(scores, labels[..., None], axis=-1)[..., 0]
    return jnp.sum(weights * (jax.nn.logsumexp(scores, axis=-1) - picked))


def targets(rows: Rows) -> tuple[jax.Array, jax.Array]:
    """labels and weights at the states that predict them."""
    return jnp.roll(rows.input_ids, -1, axis=1), jnp.roll(rows.weights, -1, axis=1)


def as_run(config: models.ModelConfig) -> models.ModelConfig:
    """The config as `qtjax.train` takes it here."""
    return config.replace(attention=models.kernel_of(jax.default_backend(), config.dtype), unroll_layers=models.unrolled(config, False))


def variants(config: models.ModelConfig, rows: Rows) -> dict[str, Callable[[Any], jax.Array]]:
    """{name: loss(params)}: as qtjax computes it here first, then one change at a time; the last is what a plain step would do."""
    own = as_run(config)
    plain = own.replace(attention="xla")
    out = {"qtjax": partial(loss, own, rows, None)}
    out["plain attention ([L, L] per head)"] = partial(loss, plain, rows, None)
    out["logits of every slot"] = partial(logits_loss, own, rows)
    out["products of [B, L, D], not [T, D]"] = out["qtjax"]  # compiled with another `matmul`
    other = "layers in a loop" if own.unroll_layers else "layers unrolled"
    out[other] = partial(loss, own.replace(unroll_layers=not own.unroll_layers), rows, None)
    out |= {f"remat {name}": partial(loss, own.replace(remat=name), rows, None) for name in ("dots", "full")}
    out |= {f"head in chunks of {size}": partial(loss, own, rows, size) for size in (128, 2048)}
    half = own.replace(dtype="bfloat16", attention=models.kernel_of(jax.default_backend(), "bfloat16"))
    out["bfloat16"] = partial(loss, half, rows, None)
    out["plain attention and all logits"] = partial(logits_loss, plain, rows)
    return out


def parts(config: models.ModelConfig, rows: Rows, params: Any) -> dict[str, tuple[Callable[..., Any], tuple[Any, ...], float]]:
    """{name: (function, arguments, FLOPs)} of the pieces of one step."""
    own = as_run(config)
    batch, length = rows.input_ids.shape
    count, wanted = batch * length, float(rows.weights.sum())
    layers = sum(leaf.size for path, leaf in flatten(params).items() if path.startswith("layers") and path.endswith("kernel"))
    width = config.hidden_size
    size = length / SEGMENTS
    attention = 2 * config.num_hidden_layers * count * size * config.num_attention_heads * config.head_dim  # causal: half of 4

    def states(params):
        return models.hidden_states(own, params, rows.input_ids, position_ids=rows.position_ids, segment_ids=rows.segment_ids)

    def pulled(params):
        return jnp.sum(states(params).astype(jnp.float32))

    hidden = jax.jit(states)(params)
    hidden, kernel, layout = models.readout(own, params, hidden)
    labels, weights = targets(rows)
    shape = (batch, length, config.num_attention_heads, config.head_dim)
    q = jax.random.normal(jax.random.key(0), shape, hidden.dtype)
    k = q[:, :, : config.num_key_value_heads]
    rope, first = rope_tables(config, rows.position_ids), first_slots(rows.segment_ids)

    def attended(q, k):
        return jnp.sum(blockwise(rotate(q, *rope), rotate(k, *rope), k, rows.segment_ids, first, config.sliding_window).astype(jnp.float32))

    flat = (hidden.reshape(-1, hidden.shape[-1]), kernel, labels.reshape(-1), weights.reshape(-1) > 0)
    head = 2 * wanted * width * config.vocab_size
    return {
        "layers, forward": (states, (params,), 2 * count * layers + attention),
        "layers, forward and backward": (jax.grad(pulled), (params,), 3 * (2 * count * layers + attention)),
        "  of it attention, one layer": (jax.grad(attended, (0, 1)), (q, k), 3.5 * attention / config.num_hidden_layers),
        "head, loss and gradients": (jax.grad(partial(head_loss, layout=layout), (0, 1)), (hidden, kernel, labels, weights), 3 * head),
        "head, nll and entropy": (partial(token_scores, layout=layout), flat, head),
    }


def timer() -> Callable[[], float]:
    """Seconds that nobody else's work falsifies: of this process's CPUs, or of the wall where an accelerator computes."""
    return time.process_time if jax.default_backend() == "cpu" else time.perf_counter


def take_turns(programs: dict[str, tuple[Any, tuple[Any, ...]]], rounds: int) -> dict[str, list[float]]:
    """Seconds of every program, once a round."""
    clock = timer()
    spent: dict[str, list[float]] = {name: [] for name in programs}
    for _ in range(rounds):
        for name, (program, given) in programs.items():
            jax.block_until_ready(program(*given))  # untimed: what the one before left in caches and heap is not this one's
            begin = clock()
            jax.block_until_ready(program(*given))
            spent[name].append(clock() - begin)
    return spent


def measure(config: models.ModelConfig, batch: int, length: int, rounds: int, console: Console) -> dict[str, Any]:
    """The tables' numbers. Raises QtjaxError where a variant's loss or gradient strays from the plain one's, or a score from packed rows'."""
    params = models.init_params(config, jax.random.key(0))
    rows = packed_rows(batch, length, config.vocab_size)
    compiled, temporaries = {}, {}
    for name, function in variants(config, rows).items():
        console.print(f"[dim]compiling {name}[/dim]", highlight=False)
        plain = patch("qtjax.models.products.matmul", operator.matmul) if name.startswith("products") else nullcontext()
        with plain:
            program = jax.jit(jax.value_and_grad(lambda params, run=function: run(params))).lower(params).compile()
        compiled[name], temporaries[name] = (program, (params,)), program.memory_analysis().temp_size_in_bytes
    check({name: program(*given) for name, (program, given) in compiled.items()})
    by_layout = measure_layouts(config, params, batch, length, rounds)
    own = parts(config, rows, params)
    pieces = {name: (jax.jit(f).lower(*given).compile(), given) for name, (f, given, _) in own.items()}
    square = jax.random.normal(jax.random.key(1), (2048, 2048), jnp.dtype(config.dtype))
    rate = 2 * 2048**3 / statistics.median(take_turns({"matrix": (jax.jit(jnp.matmul), (square, square))}, max(rounds, 5))["matrix"])
    console.print("[dim]measuring[/dim]")
    by_variant, by_part = take_turns(compiled, rounds), take_turns(pieces, rounds)
    base = by_variant["qtjax"]
    return {
        "machine": machine(), "jax": jax.__version__, "rows": batch, "length": length, "rounds": rounds, "matrix_flops_per_second": rate,
        "clock": "CPU seconds" if jax.default_backend() == "cpu" else "seconds", "parameters": sum(x.size for x in jax.tree.leaves(params)),
        "targets": float(rows.weights.sum()),
        "variants": [
            {"name": name, "seconds": statistics.median(spent), "ratio": statistics.median(a / b for a, b in zip(spent, base)), "temporaries": temporaries[name]}
            for name, spent in by_variant.items()
        ],
        "parts": [{"name": name, "seconds": statistics.median(spent), "flops": own[name][2]} for name, spent in by_part.items()],
        "layouts": by_layout,
    }  # fmt: skip


def samples_of(count: int, length: int, vocab: int) -> list[Sample]:
    """Samples of random tokens whose lengths are log-normal, half of them below three eighths of a row, none above one; half answer."""
    random = np.random.default_rng(1)
    sizes = np.clip(random.lognormal(np.log(3 * length / 8), 0.4, count), 2, length).astype(int)
    return [Sample(random.integers(0, vocab, size, np.int32), np.arange(size) >= size // 2, np.arange(size, dtype=np.int32)) for size in sizes]


def launched(samples: Sequence[Sample], bins: Sequence[Sequence[int]], launches: Sequence[int], length: int) -> list[PackedRows]:
    """Rows of one length, so many in each launch; what the last one lacks is empty."""
    ends = np.cumsum(launches)
    return [fill_rows(samples, bins[end - rows : end], rows, length) for rows, end in zip(launches, ends)]


def layouts(samples: Sequence[Sample], rows: int, length: int) -> dict[str, list[PackedRows]]:
    """{name: launches of at most rows * length slots}: packed as a run does it, and a sample a row in rows of one or several lengths.

    For these launches are as large as their rows ask for, so that hardly a row is empty, which a run, whose shapes are few, could not do.
    """
    sizes = np.asarray([len(sample.input_ids) for sample in samples])
    bins = pack(sizes, length)
    out = {"packed": launched(samples, bins, cut(len(bins), ladder(rows, 1, TrainSection.shapes)), length)}
    for count in BUCKETS:
        multiple = -(-length // count)
        bucket = -(-sizes // multiple)
        launches = out[f"a sample a row, {count} length{'s' * (count > 1)}"] = []
        for b in np.unique(bucket):
            alone = [[int(i)] for i in np.flatnonzero(bucket == b)]
            times = -(-len(alone) // (rows * length // (b * multiple)))
            launches += launched(samples, alone, [-(-len(alone) // times)] * times, int(b) * multiple)
    return out


def measure_layouts(config: models.ModelConfig, params: Any, batch: int, length: int, rounds: int) -> list[dict[str, Any]]:
    """The third table's rows: the scoring pass of STEP samples by layout. Raises QtjaxError where a sample's nll depends on it."""
    own = as_run(config)
    ways = layouts(samples_of(STEP, length, config.vocab_size), batch, length)
    names = ("input_ids", "loss_mask", "position_ids", "segment_ids")
    one = jax.jit(lambda params, rows: score_rows(own, params, None, rows)[0])

    def scored(params: Any, launches: list[dict[str, np.ndarray]]) -> list[jax.Array]:
        return [one(params, rows) for rows in launches]

    programs = {way: (scored, (params, [{name: getattr(x, name) for name in names} for x in launches])) for way, launches in ways.items()}
    sums = {way: np.zeros(STEP) for way in ways}
    for way, launches in ways.items():
        for launch, nll in zip(launches, scored(*programs[way][1])):
            np.add.at(sums[way], launch.sample[launch.loss_mask], np.asarray(nll)[launch.loss_mask])
        apart = np.abs(sums[way] / sums["packed"] - 1).max()
        if not apart < CLOSE.get(config.dtype, CLOSE["bfloat16"]):
            raise QtjaxError(f"{way}: a sample's nll is not what it is in packed rows: {apart:.2g} of it apart")
    spent = take_turns(programs, rounds)
    return [
        {"name": way, "seconds": statistics.median(spent[way]), "ratio": statistics.median(a / b for a, b in zip(spent[way], spent["packed"])),
         "shapes": len({launch.input_ids.shape for launch in launches}), "launches": len(launches),
         "fill": sum(int((x.segment_ids > 0).sum()) for x in launches) / sum(x.segment_ids.size for x in launches)}
        for way, launches in ways.items()
    ]  # fmt: skip


def check(results: dict[str, tuple[jax.Array, Any]]) -> None:
    """Every variant against the plain one: the loss, and the gradient as a whole."""
    value, slope = results["plain attention and all logits"]
    norm = float(jnp.sqrt(sum(jnp.sum(jnp.square(leaf)) for leaf in jax.tree.leaves(slope))))
    for name, (own, gradient) in results.items():
        bound = CLOSE["bfloat16" if name == "bfloat16" else "float32"]
        apart = float(jnp.sqrt(sum(jnp.sum(jnp.square(a - b)) for a, b in zip(jax.tree.leaves(gradient), jax.tree.leaves(slope))))) / norm
        if not (abs(float(own / value) - 1) < bound and apart < bound):
            raise QtjaxError(f"{name}: loss {float(own):.6g} against {float(value):.6g}, gradient {apart:.2g} of its norm apart, {bound:g} allowed")


def _table(title: str, *columns: str) -> Table:
    """Empty; names stand left, numbers right."""
    out = Table(title=title, box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, title_justify="left")
    for i, name in enumerate(columns):
        out.add_column(name, justify="right" if i else "left")
    return out


def tables(report: dict[str, Any]) -> list[Table]:
    """Where the time goes; one change at a time; one layout of a scoring pass at a time."""
    heading = f"{report['parameters']:,} parameters, {report['rows']} rows x {report['length']}, {report['targets']:,.0f} targets; {report['machine']}"
    first = _table(heading, "part", report["clock"], "GFLOP", "at the matrix rate")
    for row in report["parts"]:
        share = row["flops"] / report["matrix_flops_per_second"] / row["seconds"]
        first.add_row(row["name"], f"{row['seconds']:.3f}", f"{row['flops'] / 1e9:.1f}", f"{share:.0%}")
    first.caption = f"matrix rate: {report['matrix_flops_per_second'] / 1e9:.0f} GFLOP/s"
    second = _table("loss and gradient, one change at a time", "variant", report["clock"], "ratio to qtjax", "temporaries MiB")
    for row in report["variants"]:
        second.add_row(row["name"], f"{row['seconds']:.2f}", f"{row['ratio']:.2f}", f"{row['temporaries'] / 2**20:,.0f}")
    third = _table(f"scoring {STEP} samples", "layout", report["clock"], "ratio to packed", "fill", "launches", "shapes")
    for row in report["layouts"]:
        third.add_row(row["name"], f"{row['seconds']:.2f}", f"{row['ratio']:.2f}", f"{row['fill']:.1%}", str(row["launches"]), str(row["shapes"]))
    return [first, second, third]


def main(argv: Sequence[str] | None = None) -> None:
    given = parse_flags(
        "python -m benchmarks.profile", __doc__.splitlines()[0], argv,
        {
            "model": (SMALL, f"HF folder (its config.json is read, weights are random), or {SMALL}"), "dtype": ("float32", "compute dtype"),
            "rows": (8, "packed rows"), "length": (512, "slots of a row"), "rounds": (5, "timed rounds"), "json": ("", "file for the numbers"),
        },
    )  # fmt: skip
    for name in ("rows", "length", "rounds"):
        if given[name] < 1:
            raise QtjaxError(f"--{name} {given[name]}: must be 1 or more")
    config = small_shape() if given["model"] == SMALL else read_config(resolve_folder(given["model"]))
    console = Console(width=None if Console().is_terminal else 140)
    report = measure(config.replace(dtype=given["dtype"], param_dtype="float32"), given["rows"], given["length"], given["rounds"], console)
    for table in tables(report):
        console.print(table)
    if given["json"]:
        Path(given["json"]).write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    with_own_pages(keep=True)
    door(main)
