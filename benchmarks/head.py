"""The fused head against the naive one: compiler's temporary memory and time, for scoring and for training.

    python -m benchmarks.head                       # N=4096, D=512, V=49152, float32: the sizes that the bars are for
    python -m benchmarks.head --tokens 1024 --rounds 3 --json head.json

All variants are compiled first and then run in turn, round after round in one process, so that what else the machine
does falls on all of them alike. A time ratio is the median over rounds of (fused / naive of the SAME round).
"""

import argparse
import functools
import json
import statistics
import time
from pathlib import Path

import jax
import jax.numpy as jnp
from rich.console import Console
from rich.table import Table

from qtjax.errors import QtjaxError, door
from qtjax.scoring import head_loss, token_scores

# kind: (chunk, memory at most this share of the naive, time at most this multiple of the naive)
BARS = {
    "score": [(128, 1 / 16, 1.1)],
    "train": [(512, 1 / 4, 1.1), (256, 1 / 10, 1.4)],
}


def naive_scores(hidden, kernel, labels, mask):
    """nll and entropy [T] from the whole [T, V] array of logits, in the form that needs least memory (1x, not 2x)."""
    logits = hidden @ kernel
    total = jax.nn.logsumexp(logits, axis=1, keepdims=True)
    nll = total[:, 0] - jnp.take_along_axis(logits, labels[:, None], axis=1)[:, 0]
    entropy = total[:, 0] - jnp.sum(jnp.exp(logits - total) * logits, axis=1)
    return jnp.where(mask, nll, 0.0), jnp.where(mask, entropy, 0.0)


def naive_loss(hidden, kernel, labels, weights):
    """sum(weights * nll) from the whole [B, L, V] array of logits."""
    logits = hidden @ kernel
    label_logit = jnp.take_along_axis(logits, labels[..., None], axis=-1)[..., 0]
    return jnp.sum(weights * (jax.nn.logsumexp(logits, axis=-1) - label_logit))


def programs(tokens: int, width: int, vocab: int):
    """{kind: {chunk or None for naive: (compiled program, its arguments)}}"""
    keys = jax.random.split(jax.random.key(0), 3)
    hidden = jax.random.normal(keys[0], (tokens, width), jnp.float32)
    kernel = jax.random.normal(keys[1], (width, vocab), jnp.float32) * width**-0.5
    labels = jax.random.randint(keys[2], (tokens,), 0, vocab)
    score = (hidden, kernel, labels, jnp.ones(tokens, bool))
    train = (hidden[None], kernel, labels[None], jnp.ones((1, tokens), jnp.float32))
    variants = {
        "score": {None: naive_scores} | {c: functools.partial(token_scores, chunk=c) for c, *_ in BARS["score"]},
        "train": {None: jax.value_and_grad(naive_loss, (0, 1))}
        | {c: jax.value_and_grad(functools.partial(head_loss, chunk=c), (0, 1)) for c, *_ in BARS["train"]},
    }
    arguments = {"score": score, "train": train}
    return {
        kind: {chunk: (jax.jit(f).lower(*arguments[kind]).compile(), arguments[kind]) for chunk, f in kinds.items()}
        for kind, kinds in variants.items()
    }


def measure(tokens: int, width: int, vocab: int, rounds: int, console: Console) -> dict:
    """Runs every variant `rounds` times in turn; raises AssertionError if a fused result strays from the naive one."""
    results = []
    for kind, kinds in programs(tokens, width, vocab).items():
        outputs = {chunk: jax.block_until_ready(program(*given)) for chunk, (program, given) in kinds.items()}
        seconds = {chunk: [] for chunk in kinds}
        difference = {}
        for chunk, output in outputs.items():
            pairs = list(zip(jax.tree.leaves(output), jax.tree.leaves(outputs[None])))
            difference[chunk] = max(float(jnp.max(jnp.abs(a - b)) / jnp.max(jnp.abs(b))) for a, b in pairs)
            assert difference[chunk] < 1e-4, f"{kind} with chunk {chunk} differs from the naive by {difference[chunk]}"
        del outputs
        for turn in range(rounds):
            console.print(f"[dim]{kind}: round {turn + 1} of {rounds}[/dim]")
            for chunk, (program, given) in kinds.items():
                start = time.perf_counter()
                jax.block_until_ready(program(*given))
                seconds[chunk].append(time.perf_counter() - start)
        naive_memory = kinds[None][0].memory_analysis().temp_size_in_bytes
        bars = {chunk: bar for chunk, *bar in BARS[kind]}
        for chunk, (program, _) in kinds.items():
            memory = program.memory_analysis().temp_size_in_bytes
            ratio = statistics.median(mine / naive for mine, naive in zip(seconds[chunk], seconds[None]))
            row = {
                "kind": kind, "chunk": chunk, "temp_bytes": memory, "memory_share": memory / naive_memory,
                "seconds": statistics.median(seconds[chunk]), "time_ratio": ratio, "all_seconds": seconds[chunk],
                "relative_difference": difference[chunk],
            }  # fmt: skip
            if chunk in bars:
                row["bar_memory_share"], row["bar_time_ratio"] = bars[chunk]
                row["met"] = bool(row["memory_share"] <= bars[chunk][0] and ratio <= bars[chunk][1])
            results.append(row)
    return {
        "tokens": tokens, "width": width, "vocab": vocab, "rounds": rounds, "jax": jax.__version__,
        "device": jax.devices()[0].device_kind, "backend": jax.default_backend(), "results": results,
    }  # fmt: skip


def table(report: dict) -> Table:
    size = f"N={report['tokens']} D={report['width']} V={report['vocab']} float32, {report['device']}, jax {report['jax']}"
    drawn = Table(title=f"Language-model head, {size}, medians of {report['rounds']} alternating rounds")
    for name in ("what", "variant", "temporary MiB", "share", "seconds", "time ratio", "bar", "verdict"):
        drawn.add_column(name, justify="left" if name in ("what", "variant", "bar", "verdict") else "right")
    names = {"score": "nll + entropy", "train": "loss + gradients"}
    for row in report["results"]:
        fused = row["chunk"] is not None
        bar = f"<= 1/{1 / row['bar_memory_share']:.0f} at <= {row['bar_time_ratio']}x" if fused else ""
        drawn.add_row(
            names[row["kind"]],
            f"fused, {row['chunk']} tokens" if fused else "naive",
            f"{row['temp_bytes'] / 2**20:.1f}",
            f"1/{1 / row['memory_share']:.1f}" if fused else "1",
            f"{row['seconds']:.2f}",
            f"{row['time_ratio']:.2f}",
            bar,
            ("[green]met[/green]" if row["met"] else "[red]not met[/red]") if fused else "",
        )
    return drawn


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.head", description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=4096, help="N, targets (default: %(default)s; the bars are for this size)")
    parser.add_argument("--width", type=int, default=512, help="D (default: %(default)s)")
    parser.add_argument("--vocab", type=int, default=49152, help="V (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=5, help="alternating timed rounds (default: %(default)s)")
    parser.add_argument("--json", default="", help="file to write the numbers to; empty: none")
    given = parser.parse_args()
    for name in ("tokens", "width", "vocab", "rounds"):
        if getattr(given, name) < 1:
            raise QtjaxError(f"--{name} = {getattr(given, name)}: must be 1 or more")
    console = Console(width=None if Console().is_terminal else 140)
    report = measure(given.tokens, given.width, given.vocab, given.rounds, console)
    console.print(table(report))
    if given.json:
        Path(given.json).write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    door(main)
