"""What prune.score_lag = 1 keeps in common with exact scores, and what it saves: both runs side by side.

    python -m benchmarks.score_lag                                  # configs/smol.py, shortened to 128 steps
    python -m benchmarks.score_lag --config configs/sft.py --steps 60 --rounds 6 --json lag.json --data.path ...

Two runs of one config, exact and lagged, each on its own weights. Before every step of the lagged run its batch is scored
once more on the weights as they are then: that is the exact decision, and what both decisions keep is counted (step 1
is exact in any case and left out). Only the steps themselves are timed, in rounds that alternate between the two runs, so
that what else the machine does falls on both; a time ratio is the median over rounds of (lag 1 / lag 0 of the SAME round).
Prints Markdown tables.
"""

import contextlib
import json
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from benchmarks.machine import machine
from qtjax.config import Config, load_config, override, validate
from qtjax.errors import QtjaxError, door
from qtjax.pruning import spearman
from qtjax.train import use_compile_cache
from qtjax.training.loop import CLOCKS, Loop
from qtjax.training.pruners import pruners
from qtjax.training.run import open_session
from qtjax.training.run_folder import RunFolder
from qtjax.training.step import Decision


@contextlib.contextmanager
def opened(config: Config, lag: int, steps: int, root: Path) -> Iterator[tuple[Loop, int]]:
    """(loop, its steps) of a fresh run, nothing held out, its folder thrown away."""
    config = override(
        config,
        {
            "prune.score_lag": lag, "train.max_steps": steps, "data.eval_path": "", "data.eval_fraction": 0.0,
            "run.folder": str(root / f"lag{lag}"), "run.tensorboard": False,
            "run.compile_cache": config.run.compile_cache or str(root / "compile_cache"),
        },
    )  # fmt: skip
    use_compile_cache(config)
    with RunFolder.open(validate(config)) as folder:
        session = open_session(config, folder, Console(stderr=True))
        yield session.loop, session.total_steps
        session.close()


def overlap(step: int, lagged: Decision, exact: Decision) -> dict[str, Any]:
    """Samples and tokens kept by both, and by the exact decision; Spearman's correlation of the two perplexities."""
    pairs = {"samples": (lagged.keep, exact.keep), "tokens": (lagged.tokens, exact.tokens)}
    out: dict[str, Any] = {"step": step + 1}
    for name, (ours, theirs) in pairs.items():
        ours, theirs = np.asarray(ours), np.asarray(theirs)
        out |= {f"{name}_common": int((ours & theirs).sum()), f"{name}_exact": int(theirs.sum())}
    return out | {"spearman": float(spearman(lagged.perplexity, exact.perplexity))}


def measure(loops: dict[int, Loop], steps: int, rounds: int, console: Console) -> dict[str, Any]:
    """Runs both loops to their end: {"overlap": a row a step, "rounds": seconds per step and clock of each lag}."""
    rows, turns = [], []
    for turn, block in enumerate(np.array_split(np.arange(steps), rounds)):
        seconds = {}
        for lag in (0, 1) if turn % 2 == 0 else (1, 0):  # neither is always first
            loop, spent, clocks = loops[lag], 0.0, dict.fromkeys(CLOCKS, 0.0)
            for step in block.tolist():
                if loop.following is not None:
                    rows.append(overlap(step, loop.following.scored.decision, loop.score(loop.prepare(step), step).decision))
                begin = time.perf_counter()
                metrics, _ = loop.step(step, steps)
                spent += time.perf_counter() - begin
                clocks = {name: clocks[name] + metrics[f"seconds_{name}"] for name in CLOCKS}
            seconds[lag] = {"step": spent / len(block)} | {name: clocks[name] / len(block) for name in CLOCKS}
        turns.append(seconds)
        console.print(f"[dim]round {turn + 1} of {rounds}: lag 0 {seconds[0]['step']:.3f} s a step, lag 1 {seconds[1]['step']:.3f} s[/dim]")
    return {"overlap": rows, "rounds": turns}


def thirds(rows: list[dict[str, Any]]) -> list[str]:
    """The overlap, a Markdown line for each third of the run and one for all of it."""
    parts = ["first", "middle", "last", "all"]
    blocks = [*np.array_split(np.arange(len(rows)), 3), np.arange(len(rows))]
    lines = ["| third of the run | steps | kept samples in common | kept tokens in common | Spearman of perplexities |", "|---|---|---:|---:|---:|"]
    for name, block in zip(parts, blocks):
        own = [rows[i] for i in block]
        shares = [sum(r[f"{n}_common"] for r in own) / sum(r[f"{n}_exact"] for r in own) for n in ("samples", "tokens")]
        rank = statistics.mean(r["spearman"] for r in own)
        lines.append(f"| {name} | {own[0]['step']}-{own[-1]['step']} | {shares[0]:.1%} | {shares[1]:.1%} | {rank:.4f} |")
    return lines


def timing(turns: list[dict[int, dict[str, float]]]) -> list[str]:
    """Seconds per step, medians over rounds, a Markdown line for each lag; of the ratio also the middle half of the rounds."""
    lines = ["| score_lag | seconds per step | scoring | packing | training | ratio | middle half |", "|---|---:|---:|---:|---:|---:|---:|"]
    for lag in (0, 1):
        low, ratio, high = np.quantile([t[lag]["step"] / t[0]["step"] for t in turns], (0.25, 0.5, 0.75))
        median = [statistics.median(t[lag][name] for t in turns) for name in ("step", *CLOCKS)]
        lines.append(f"| {lag} | {' | '.join(f'{m:.3f}' for m in median)} | {ratio:.2f} | {low:.2f}-{high:.2f} |")
    return lines


def main() -> None:
    config, given = load_config(
        "python -m benchmarks.score_lag", __doc__.splitlines()[0], None,
        {
            "steps": (128, "optimizer steps of each run"), "rounds": (8, "alternating timed rounds"),
            "json": ("", "file to write the numbers to; empty: none"),
        },
    )  # fmt: skip
    if given["rounds"] < 1 or given["steps"] < max(4, given["rounds"]):
        raise QtjaxError(f"--steps {given['steps']} --rounds {given['rounds']}: at least 4 steps, 1 round and a step a round")
    if not pruners(config.prune).scores:
        raise QtjaxError(f"prune.sample_pruner = {config.prune.sample_pruner!r}: these pruners need no scores; name others")
    console = Console(stderr=True)
    with tempfile.TemporaryDirectory() as root, contextlib.ExitStack() as stack:
        runs = {lag: stack.enter_context(opened(config, lag, given["steps"], Path(root))) for lag in (0, 1)}
        steps = runs[0][1]  # fewer than asked for, where train.epochs ends first
        report = measure({lag: loop for lag, (loop, _) in runs.items()}, steps, given["rounds"], console)
    head = f"{config.model.path} on {config.data.path}, {steps} steps of {config.prune.batch_size} samples, {machine()}"
    print("\n".join([head, "", *thirds(report["overlap"]), "", *timing(report["rounds"])]))
    if given["json"]:
        Path(given["json"]).write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    door(main)
