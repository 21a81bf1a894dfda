"""What cheaper scores keep in common with exact ones, and what they save: scores one step old, kept for some epochs, taken
in bfloat16, or of another model (prune.score_lag, score_every, score_dtype, score_model).

    python -m benchmarks.cheaper_scores                             # configs/smol.py, shortened to 128 steps
    python -m benchmarks.cheaper_scores --ways score_lag=1,score_every=2 --steps 60 --rounds 6 --json scores.json --config ...

Runs of one config side by side, one exact and one for each way, each on its own weights. Before every step of such a run its
batch is scored once more, exactly, on the weights as they are then, and what both decisions keep is counted; step 1 is left out,
and with score_every the epochs that score anew, which are exact. Only the steps themselves are timed, in rounds that alternate
between the runs, so that what else the machine does falls on all. The time ratio is that of the sums over all rounds, since rounds
with and without a scoring pass differ; score_every=n is fair where the steps are a multiple of n epochs. The pass of another model
before the first step is divided among the steps. Prints a Markdown table.
"""

import contextlib
import statistics
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from rich.console import Console

from benchmarks.machine import machine
from benchmarks.table import changes_of
from qtjax.atomic import write_json
from qtjax.config import Config, load_config, override, validate
from qtjax.errors import QtjaxError, door
from qtjax.pruning import spearman
from qtjax.train import use_compile_cache
from qtjax.training.clock import CLOCKS
from qtjax.training.loop import Loop
from qtjax.training.pruners import pruners
from qtjax.training.run import open_session
from qtjax.training.run_folder import RunFolder
from qtjax.training.step import Decision


@contextlib.contextmanager
def opened(config: Config, changes: dict[str, Any], steps: int, folder: Path) -> Iterator[tuple[Loop, int, float]]:
    """(loop, its steps, seconds of another model's pass) of a fresh run, nothing held out, its folder thrown away."""
    config = override(
        config,
        {
            "train.max_steps": steps, "data.eval_path": "", "data.eval_fraction": 0.0, "run.folder": str(folder),
            "run.tensorboard": False, "run.compile_cache": config.run.compile_cache or str(folder.parent / "compile_cache"),
        } | changes,
    )  # fmt: skip
    use_compile_cache(config)
    with RunFolder.open(validate(config)) as run:
        session = open_session(config, run, Console(stderr=True))
        yield session.loop, session.total_steps, session.seconds["other_models"]
        session.close()


def overlap(step: int, ours: Decision, exact: Decision) -> dict[str, Any]:
    """Samples and tokens kept by both, and by the exact decision; Spearman's correlation of the two perplexities."""
    pairs = {"samples": (ours.keep, exact.keep), "tokens": (ours.tokens, exact.tokens)}
    out: dict[str, Any] = {"step": step + 1}
    for name, (own, theirs) in pairs.items():
        own, theirs = np.asarray(own), np.asarray(theirs)
        out |= {f"{name}_common": int((own & theirs).sum()), f"{name}_exact": int(theirs.sum())}
    return out | {"spearman": float(spearman(ours.perplexity, exact.perplexity))}


def exact_decision(scorer: Loop, loop: Loop, step: int) -> Decision:
    """What `scorer`, an exact run, decides about a step's batch on the weights of `loop`."""
    own, scorer.state = scorer.state, loop.state
    decision = scorer.score(scorer.prepare(step), step).decision
    scorer.state = own
    return decision


def measure(loops: dict[str, Loop], before: dict[str, float], steps: int, rounds: int, console: Console) -> dict[str, Any]:
    """Runs all loops to their end, the first of them the exact one: {"overlap": {way: a row a step}, "rounds": seconds per
    step and clock of each way, a dict a round}. before: seconds spent before the first step."""
    exact, rows, turns = next(iter(loops)), {way: [] for way in loops}, []
    decided: dict[str, list[Decision]] = {way: [] for way in loops}
    for way, loop in loops.items():
        remember(loop, decided[way])
    for turn, block in enumerate(np.array_split(np.arange(steps), rounds)):
        seconds = {}
        ways = list(loops)
        for way in ways[turn % len(ways) :] + ways[: turn % len(ways)]:  # none is always first
            loop, spent, clocks = loops[way], 0.0, dict.fromkeys(CLOCKS, 0.0)
            for step in block.tolist():
                same = way == exact or step == 0 or (loop.store is not None and loop.store.passes(step))
                truth = None if same else jax.block_until_ready(exact_decision(loops[exact], loop, step))
                begin = time.perf_counter()
                metrics, _ = loop.step(step, steps)
                spent += time.perf_counter() - begin
                clocks = {name: clocks[name] + metrics[f"seconds_{name}"] for name in CLOCKS}
                if truth is not None:
                    rows[way].append(overlap(step, decided[way][step], truth))
            seconds[way] = {"step": spent / len(block) + before[way] / steps} | {name: clocks[name] / len(block) for name in CLOCKS}
        turns.append(seconds)
        said = ", ".join(f"{way} {seconds[way]['step']:.3f}" for way in loops)
        console.print(f"[dim]round {turn + 1} of {rounds}, seconds a step: {said}[/dim]")
    return {"overlap": rows, "rounds": turns}


def remember(loop: Loop, decided: list[Decision]) -> None:
    """Lets a loop note down its decisions, in the order of its steps."""
    choose = loop._choose

    def noting(scored: Any, clock: Any) -> Any:
        decided.append(scored.decision)
        return choose(scored, clock)

    loop._choose = noting


def lines(report: dict[str, Any]) -> list[str]:
    """A Markdown line a way: samples in common by third of the run and in all, tokens, Spearman, mean seconds, ratio of these."""
    exact = next(iter(report["overlap"]))
    out = [
        "| scores | samples in common: first third | middle | last | all | tokens in common | Spearman | seconds a step | ratio |",
        "|---|" + "---:|" * 8,
    ]
    for way, rows in report["overlap"].items():
        cells = ["", "", "", "", "", ""]
        if rows:
            blocks = [*np.array_split(np.arange(len(rows)), 3), np.arange(len(rows))]
            cells = [f"{share([rows[i] for i in block], 'samples'):.1%}" for block in blocks]
            cells += [f"{share(rows, 'tokens'):.1%}", f"{statistics.mean(r['spearman'] for r in rows):.4f}"]
        seconds, of_exact = (statistics.mean(t[name]["step"] for t in report["rounds"]) for name in (way, exact))
        out.append(f"| {way} | {' | '.join(cells)} | {seconds:.3f} | {seconds / of_exact:.2f} |")
    return out


def share(rows: Sequence[dict[str, Any]], name: str) -> float:
    """Of what the exact decisions keep, the fraction (0-1) that the others keep too."""
    return sum(r[f"{name}_common"] for r in rows) / sum(r[f"{name}_exact"] for r in rows)


def main() -> None:
    config, given = load_config(
        "python -m benchmarks.cheaper_scores", __doc__.splitlines()[0], None,
        {
            "ways": ("score_lag=1,score_every=2,score_every=4,score_dtype=bfloat16", "settings compared with exact scores, comma-separated"),
            "steps": (128, "optimizer steps of each run"), "rounds": (8, "alternating timed rounds"),
            "json": ("", "file to write the numbers to; empty: none"),
        },
    )  # fmt: skip
    if given["rounds"] < 1 or given["steps"] < max(4, given["rounds"]):
        raise QtjaxError(f"--steps {given['steps']} --rounds {given['rounds']}: at least 4 steps, 1 round and a step a round")
    if given["json"] and not Path(given["json"]).absolute().parent.is_dir():
        raise QtjaxError(f"--json {given['json']}: there is no such folder; make it first")
    if not pruners(config.prune).scores:
        raise QtjaxError(f"prune.sample_pruner = {config.prune.sample_pruner!r}: these pruners need no scores; name others")
    plain = {"score_lag": 0, "score_every": 1, "score_dtype": "", "score_model": "", "warmup_fraction": 0.0}
    for name, value in plain.items():
        if getattr(config.prune, name) != value:
            raise QtjaxError(f"prune.{name} = {getattr(config.prune, name)!r}: is not exact; leave it out here and name it in --ways")
    ways = {way.strip(): changes_of([way.strip()], config, f"--ways {way.strip()!r}") for way in given["ways"].split(",") if way.strip()}
    with tempfile.TemporaryDirectory() as root, contextlib.ExitStack() as stack:
        runs = {
            way: stack.enter_context(opened(config, changes, given["steps"], Path(root) / f"run{i}"))
            for i, (way, changes) in enumerate({"exact": {}, **ways}.items())
        }
        steps = runs["exact"][1]  # fewer than asked for, where train.epochs ends first
        loops, before = ({way: run[i] for way, run in runs.items()} for i in (0, 2))
        report = measure(loops, before, steps, given["rounds"], Console(stderr=True))
    head = f"{config.model.path} on {config.data.path}, {steps} steps of {config.prune.batch_size} samples, {machine()}"
    print("\n".join([head, "", *lines(report)]))
    if given["json"]:
        write_json(Path(given["json"]), report)


if __name__ == "__main__":
    door(main)
