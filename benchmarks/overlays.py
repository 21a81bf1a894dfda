"""Every overlay's training step: trained values, compiler's temporary memory and FLOPs, and time against full fine-tuning and LoRA.

    python -m benchmarks.overlays                          # the embedded model, rows of 4 x 256
    python -m benchmarks.overlays --shape llama --rounds 3 --json overlays.json
    python -m benchmarks.overlays --methods lora,ia3,oft

A step is loss and gradients of one packed microbatch and the AdamW update, without remat. All programs are compiled first
and then run in turn, round after round in one process; a time ratio is the median over rounds of (method / full of the
SAME round). FLOPs are XLA's count of the lowered program with its layers unrolled, since it counts a scan's body once.
"""

import argparse
import json
import statistics
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.table import Table

from qtjax import models
from qtjax.checkpoints import load_pretrained
from qtjax.config import MeshSection, OverlaySection, TrainSection
from qtjax.errors import QtjaxError, door
from qtjax.overlays import METHODS, abstract_overlay, init_overlay
from qtjax.parallel import make_mesh
from qtjax.training.optimizer import make_optimizer
from qtjax.training.setup import overlay_fields
from qtjax.training.state import Subject, init_state
from qtjax.training.step import accumulate, update

LLAMA_7B = models.ModelConfig()
SHAPES = {
    "smol": None,
    # 15 million parameters, LLaMA's proportions
    "llama": models.ModelConfig(
        vocab_size=32000, hidden_size=288, intermediate_size=768, num_hidden_layers=6, num_attention_heads=6,
        num_key_value_heads=6, head_dim=48, tie_word_embeddings=True, max_position_embeddings=2048,
    ),
}  # fmt: skip
# Settings where a method's defaults do not fit a small model; the rest are defaults.
SETTINGS = {
    "adalora": "total_step=1000", "oft": "oft_block_size=16", "boft": "boft_block_size=4", "vera": "r=64",
    "fourierft": "n_frequency=256", "vblora": "num_vectors=64 vector_length=32 r=4", "ptuning": "encoder_hidden_size=128 num_virtual_tokens=16",
    "prompt": "num_virtual_tokens=16", "mpt": "num_virtual_tokens=16", "prefix": "num_virtual_tokens=16",
    "llama_adapter": "adapter_len=10 adapter_layers=3", "houlsby": "bottleneck=16", "xlora": "use_trainable_adapters=true",
}  # fmt: skip
QUANTIZED = {"qlora": "nf4"}  # the base that a method is measured over, if not the float32 one


def _base(shape: str, quantization: str | None):
    """(config, params) of a shape: the embedded model, or random weights."""
    if SHAPES[shape] is None:
        return load_pretrained("smol", quantization=quantization)
    config = SHAPES[shape].replace(quantization=quantization)
    return config, models.init_params(config, jax.random.key(0))


def _rows(config: models.ModelConfig, rows: int, length: int) -> dict[str, np.ndarray]:
    """A packed microbatch of two segments a row, every second token trained."""
    rng = np.random.default_rng(0)
    half = np.arange(length) >= length // 2
    return {
        "input_ids": rng.integers(0, config.vocab_size, (rows, length)).astype(np.int32),
        "position_ids": np.broadcast_to(np.where(half, np.arange(length) - length // 2, np.arange(length)), (rows, length)).astype(np.int32),
        "segment_ids": np.broadcast_to(1 + half, (rows, length)).astype(np.int32),
        "task_ids": np.zeros((rows, length), np.int32),
        "weights": np.broadcast_to(np.arange(length) % 2, (rows, length)).astype(np.float32),
    }


def _step(method: str, config: models.ModelConfig, params, rows: dict[str, np.ndarray]):
    """(jitted step, its arguments, trained values) of a method; "full": all parameters."""
    fields = {} if method == "full" else overlay_fields(OverlaySection(method=method, fields=SETTINGS.get(method, "")), 1000)
    overlay = None if method == "full" else init_overlay(method, config, params, jax.random.key(0), **fields)
    mesh, subject = make_mesh(MeshSection(), jax.devices()[:1]), Subject(config, overlay)
    trainable, frozen = subject.split(params)
    optimizer = make_optimizer(TrainSection(), 1000, subject.decayed(), subject.rates())
    state = init_state(subject, mesh, jax.tree.map(jnp.array, trainable), optimizer)
    targets = jnp.float32(rows["weights"][:, 1:].sum())
    rng = jax.random.key(1) if overlay is not None and overlay.draws else None

    def step(state, frozen, rows):
        zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), state.trainable)
        gradients, loss, _ = accumulate(subject, mesh, "plain", state.trainable, frozen, zeros, jnp.float32(0), rows, rng)
        state, _ = update(subject, optimizer, state, gradients, targets)
        return state, loss / targets

    count = sum(x.size for x in jax.tree.leaves(params)) if overlay is None else overlay.trainable_count
    return jax.jit(step), (state, frozen, rows), count


def measure(shape: str, methods: list[str], rows: int, length: int, rounds: int, console: Console) -> dict:
    """Compiles all, checks that each step's loss is finite and equal to the base's where the method starts there, times them."""
    programs, found = {}, {}
    for method in ["full", *methods]:
        console.print(f"[dim]compiling {method}[/dim]")
        config, params = _base(shape, QUANTIZED.get(method))
        batch = _rows(config, rows, length)
        step, arguments, count = _step(method, config, params, batch)
        compiled = step.lower(*arguments).compile()
        unrolled = _step(method, config.replace(unroll_layers=True), params, batch)
        cost = unrolled[0].lower(*unrolled[1]).cost_analysis()
        loss = float(compiled(*arguments)[1])
        assert np.isfinite(loss), method
        programs[method] = (compiled, arguments)
        found[method] = {
            "trained": count, "temp_bytes": compiled.memory_analysis().temp_size_in_bytes, "flops": cost["flops"], "loss": loss, "all_seconds": [],
        }  # fmt: skip
        if method != "full":
            fields = overlay_fields(OverlaySection(method=method, fields="" if method != "adalora" else "total_step=1000"), 1000)
            try:
                found[method]["trained_7b"] = abstract_overlay(method, LLAMA_7B.replace(quantization=QUANTIZED.get(method)), **fields).trainable_count
            except QtjaxError:
                found[method]["trained_7b"] = None
    for turn in range(rounds):
        console.print(f"[dim]round {turn + 1} of {rounds}[/dim]")
        for method, (compiled, arguments) in programs.items():
            start = time.perf_counter()
            jax.block_until_ready(compiled(*arguments))
            found[method]["all_seconds"].append(time.perf_counter() - start)
    for method, row in found.items():
        for against in ("full", "lora"):
            if against in found:
                row[f"time_to_{against}"] = statistics.median(a / b for a, b in zip(row["all_seconds"], found[against]["all_seconds"]))
    return {
        "shape": shape, "rows": rows, "length": length, "rounds": rounds, "jax": jax.__version__,
        "device": jax.devices()[0].device_kind, "backend": jax.default_backend(), "results": found,
    }  # fmt: skip


def table(report: dict) -> Table:
    drawn = Table(
        title=f"Training step on {report['shape']}, rows {report['rows']} x {report['length']}, {report['device']}, jax {report['jax']},"
        f" medians of {report['rounds']} alternating rounds"
    )
    for name in ("method", "trained", "at LLaMA-7B", "FLOPs / full", "temp MiB", "temp / full", "time / full", "time / LoRA"):
        drawn.add_column(name, justify="left" if name == "method" else "right")
    full = report["results"]["full"]
    for method, row in report["results"].items():
        drawn.add_row(
            method, f"{row['trained']:,}", f"{row['trained_7b']:,}" if row.get("trained_7b") else "", f"{row['flops'] / full['flops']:.2f}",
            f"{row['temp_bytes'] / 2**20:.1f}", f"{row['temp_bytes'] / full['temp_bytes']:.2f}", f"{row['time_to_full']:.2f}",
            f"{row['time_to_lora']:.2f}" if "time_to_lora" in row else "",
        )  # fmt: skip
    return drawn


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.overlays", description=__doc__.splitlines()[0])
    parser.add_argument("--shape", default="smol", choices=tuple(SHAPES), help="the model (default: %(default)s)")
    parser.add_argument("--methods", default="", help="comma-separated; empty: all")
    parser.add_argument("--rows", type=int, default=4, help="packed rows (default: %(default)s)")
    parser.add_argument("--length", type=int, default=256, help="tokens a row (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=5, help="alternating timed rounds (default: %(default)s)")
    parser.add_argument("--json", default="", help="file to write the numbers to; empty: none")
    given = parser.parse_args()
    names = [n for n in given.methods.split(",") if n] or list(METHODS)
    for name in names:
        if name not in METHODS:
            raise QtjaxError(f"--methods {name}: not a method; known: {', '.join(METHODS)}")
    for name in ("rows", "length", "rounds"):
        if getattr(given, name) < 1:
            raise QtjaxError(f"--{name} = {getattr(given, name)}: must be 1 or more")
    console = Console(width=None if Console().is_terminal else 140)
    report = measure(given.shape, names, given.rows, given.length, given.rounds, console)
    console.print(table(report))
    if given.json:
        Path(given.json).write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    door(main)
