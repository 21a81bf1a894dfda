"""Does pruning help, how much, with what: pruners x budgets x seeds on one model and data set, as the paper's Table 1 does.

    python -m benchmarks.table --config configs/smol.py --out runs/table                 # the paper's pairings, 5 seeds
    python -m benchmarks.table --config configs/smol.py --out runs/table --pairs q-tuning:q-tuning,random:random --seeds 3

All runs follow one another in this process and share compiled programs; --out holds every finished run, so that a stopped
table goes on. Beside the pairings stand full data after equal steps, and full data stopped at the wall clock of Q-Tuning
at each budget, its learning-rate schedule fitted to those steps. Writes results.json, table.md and pareto.png into --out.
Seconds are scoring, packing and training of a run together; compilation and evaluation are left out.
"""

import json
import shutil
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from rich.console import Console
from scipy import stats

from benchmarks.machine import machine
from qtjax import evals
from qtjax.atomic import write_atomic, write_json
from qtjax.config import SAMPLE_PRUNERS, TOKEN_PRUNERS, Config, load_config, override, validate
from qtjax.errors import QtjaxError, door, near_names
from qtjax.report.totals import totals
from qtjax.train import use_compile_cache
from qtjax.training import story
from qtjax.training.run import open_session, train_steps
from qtjax.training.run_folder import RunFolder

PAPER = "q-tuning:q-tuning," + ",".join(
    f"{sample}:{token}"
    for sample in ("random", "longest", "entropy", "infobatch-budget")
    for token in ("random", "perplexity", "fastv", "sparsevlm")
)
FULL, EQUAL_TIME, Q_TUNING = "full data", "full data, equal time", "q-tuning:q-tuning"


class Cell(NamedTuple):
    """One place of the table: a pair "sample:token" or a row of full data, at a budget "25x50" ("" for full data)."""

    pair: str
    budget: str

    def key(self, seed: int) -> str:
        return f"{self.pair} | {self.budget} | seed {seed}"


def parse_pairs(text: str) -> list[str]:
    """"random:perplexity,..." as given. Raises QtjaxError for an unknown pruner, with near names."""
    pairs = [pair.strip() for pair in text.split(",") if pair.strip()]
    for pair in pairs:
        names = pair.split(":")
        if len(names) != 2:
            raise QtjaxError(f"--pairs {pair!r}: must be SAMPLE:TOKEN, for example random:perplexity")
        for name, known in zip(names, (SAMPLE_PRUNERS, TOKEN_PRUNERS)):
            if name not in known:
                raise QtjaxError(f"--pairs {pair!r}: {name!r} must be one of {', '.join(known)}{near_names(name, known)}")
    return pairs


def parse_budgets(text: str) -> list[str]:
    """"12.5x50,25x50" as given. Raises QtjaxError for what is no percentage above 0 and at most 100."""
    budgets = [budget.strip() for budget in text.split(",") if budget.strip()]
    for budget in budgets:
        parts = budget.split("x")
        if len(parts) != 2 or not all(_is_share(part) for part in parts):
            raise QtjaxError(f"--budgets {budget!r}: must be SAMPLESxTOKENS in per cent, above 0 and at most 100, for example 25x50")
    return budgets


def _is_share(text: str) -> bool:
    try:
        return 0 < float(text) <= 100
    except ValueError:
        return False


def configured(config: Config, cell: Cell, seed: int, folder: Path, steps: int = 0) -> Config:
    """One run's config. Args: steps: of full data stopped early; 0: all."""
    changes: dict[str, Any] = {
        "train.seed": seed, "train.compare_full_data": 0, "run.folder": str(folder), "run.tensorboard": False, "run.export": False,
        "train.checkpoint_every": 10**6, "run.compile_cache": str(folder.parent / "compile_cache"),
    }  # fmt: skip
    if cell.pair in (FULL, EQUAL_TIME):
        changes |= {"prune.sample_pruner": "none", "prune.token_pruner": "none"}
        changes |= {"train.max_steps": steps} if steps else {}
    else:
        (sample, token), shares = cell.pair.split(":"), [float(part) / 100 for part in cell.budget.split("x")]
        changes |= {"prune.sample_pruner": sample, "prune.token_pruner": token}
        changes |= {"prune.sample_keep": shares[0], "prune.token_keep": shares[1]}
    return validate(override(config, changes))


def run_one(config: Config) -> dict[str, Any]:
    """Trains and evaluates; what the table and its readers need of it."""
    folder_path = Path(config.run.folder)
    shutil.rmtree(folder_path, ignore_errors=True)  # what an interrupted run left
    quiet = Console(quiet=True)
    with RunFolder.open(config) as folder:
        session = open_session(config, folder, quiet)
        train_steps(session, folder, quiet=True)
        params, overlay = session.model.subject.join(session.loop.state.trainable, session.loop.frozen)
        found = {}
        if session.held_out is not None:
            found = evals.evaluate(
                config, session.model.config, params, session.tokenizer, session.held_out, overlay=overlay, mesh=session.mesh,
                progress=False,
            )  # fmt: skip
        folder.flush()
        metrics = folder.read_metrics()
        provenance = story.provenance(session, folder)
        session.close()
    done = totals(metrics)
    correlations = [m["spearman"] for m in metrics if m.get("spearman") is not None]
    shutil.rmtree(folder_path)
    return {
        "loss": found["loss"].loss if "loss" in found else None,
        "exact_match": found["exact_match"].accuracy if "exact_match" in found else None,
        "seconds": {name: round(value, 3) for name, value in done["seconds"].items()}, "steps": done["steps"], "samples": done["samples"],
        "tokens": done["tokens"] | {"trained": sum(m["trained_tokens"] for m in metrics)}, "closing": done["closing"],
        "spearman": float(np.mean(correlations)) if correlations else None, "provenance": provenance,
    }  # fmt: skip


def spent(result: dict[str, Any]) -> float:
    """Seconds of scoring, packing and training."""
    return sum(result["seconds"].values())


class Table:
    """The finished runs of --out, and what is asked of them."""

    def __init__(self, out: Path, config: Config, console: Console):
        self.out, self.config, self.console, self.file = out, config, console, out / "results.json"
        out.mkdir(parents=True, exist_ok=True)
        settings = {n: v for n, v in config.flat().items() if n.split(".")[0] in ("model", "data", "overlay", "train", "eval")}
        settings |= {n: v for n, v in config.flat().items() if n in ("prune.batch_size", "prune.policy", "prune.supplement", "prune.mode")}
        self.results: dict[str, Any] = {}
        if self.file.is_file():
            known = json.loads(self.file.read_text())
            differ = [n for n, v in settings.items() if known["settings"].get(n) != v]
            if differ:
                raise QtjaxError(f"--out {out}: holds a table with another {differ[0]}; choose another folder, or remove it")
            self.results = known["results"]
        self.settings = settings

    def of(self, cell: Cell) -> list[dict[str, Any]]:
        """The results of a cell, over its seeds."""
        return [result for key, result in self.results.items() if key.startswith(f"{cell.pair} | {cell.budget} | ")]

    def fill(self, cell: Cell, seed: int, steps: int = 0) -> None:
        """Runs a place of the table unless it is there."""
        key = cell.key(seed)
        if key in self.results:
            return
        begin = time.monotonic()
        self.results[key] = run_one(configured(self.config, cell, seed, self.out / "run", steps))
        record = {"settings": self.settings, "machine": machine(), "results": self.results}
        write_json(self.file, record)
        loss = self.results[key]["loss"]
        self.console.print(f"{key}: loss {loss:.4f}, {time.monotonic() - begin:.0f} s", highlight=False)

    def equal_time_steps(self, budget: str) -> int:
        """Full-data steps in the median seconds of Q-Tuning at this budget, both as measured here; at least one."""
        pruned = statistics.median(spent(result) for result in self.of(Cell(Q_TUNING, budget)))
        step = statistics.median(spent(result) / result["steps"] for result in self.of(Cell(FULL, "")))
        return max(1, int(pruned / step))


def interval(values: Sequence[float]) -> tuple[float, float]:
    """(mean, half width of its 95 % interval by Student's t); the width is NaN for one value."""
    mean = float(np.mean(values))
    if len(values) < 2:
        return mean, float("nan")
    return mean, float(stats.t.ppf(0.975, len(values) - 1) * np.std(values, ddof=1) / np.sqrt(len(values)))


def shown(values: Sequence[float], form: str, scale: float = 1.0) -> str:
    """"0.512 ± 0.013"; "-" without values."""
    if not values:
        return "-"
    mean, width = interval([scale * value for value in values])
    return format(mean, form) + ("" if np.isnan(width) else f" ± {width:{form}}")


def markdown(table: Table, pairs: Sequence[str], budgets: Sequence[str], command: str) -> str:
    """The tables as the paper prints them: a row a pair, a column a budget."""
    full = table.of(Cell(FULL, ""))
    seeds = max((len(table.of(Cell(pair, budget))) for pair in pairs for budget in budgets), default=0)
    lines = [
        f"`{command}`", "",
        f"{machine()}; mean and 95 % interval (Student's t) over {seeds} seeds; budgets are % of samples x % of target tokens.", "",
    ]  # fmt: skip
    speed = statistics.median(map(spent, full)) if full else float("nan")
    parts = {
        "Held-out loss (nats per token)": lambda rs: shown([r["loss"] for r in rs], ".3f"),
        "Exact match (%)": lambda rs: shown([r["exact_match"] for r in rs if r["exact_match"] is not None], ".1f", 100),
        "Share of target tokens trained (%)": lambda rs: shown([r["tokens"]["kept"] / r["tokens"]["seen"] for r in rs], ".1f", 100),
        "Seconds over full data's (medians; scoring, packing, training)": lambda rs: (
            f"{statistics.median(map(spent, rs)) / speed:.2f}" if rs else "-"
        ),
    }
    for title, show in parts.items():
        if "Exact" in title and not any(r["exact_match"] is not None for r in table.results.values()):
            continue
        lines += [f"**{title}**", "", f"| pruners | {' | '.join(budgets)} |", "|---|" + "---:|" * len(budgets)]
        lines += [f"| {pair.replace(':', ' x ')} | {' | '.join(show(table.of(Cell(pair, b))) for b in budgets)} |" for pair in pairs]
        lines += [f"| {EQUAL_TIME} | {' | '.join(show(table.of(Cell(EQUAL_TIME, b))) for b in budgets)} |"]
        lines += [f"| {FULL}, equal steps | {show(full)} |" + " |" * (len(budgets) - 1), ""]
    return "\n".join(lines + provenance_lines(table, pairs, budgets))


def provenance_lines(table: Table, pairs: Sequence[str], budgets: Sequence[str]) -> list[str]:
    """How many rows of each provenance a pair drops, at the first budget; nothing where the data do not say."""
    found = {pair: [r["provenance"] for r in table.of(Cell(pair, budgets[0])) if r["provenance"]] for pair in pairs}
    kinds = sorted({kind for results in found.values() for counts in results for kind in counts})
    if not kinds:
        return []
    lines = [f"**Rows dropped, by provenance (%, at {budgets[0]})**", "", f"| pruners | {' | '.join(kinds)} | all |", "|---|" + "---:|" * (len(kinds) + 1)]
    for pair, results in found.items():
        if results:
            rates = [[1 - counts[kind]["kept"] / counts[kind]["seen"] for counts in results] for kind in kinds]
            everything = [1 - sum(c["kept"] for c in counts.values()) / sum(c["seen"] for c in counts.values()) for counts in results]
            lines.append(f"| {pair.replace(':', ' x ')} | {' | '.join(shown(rate, '.1f', 100) for rate in [*rates, everything])} |")
    return [*lines, ""]


def draw(table: Table, pairs: Sequence[str], budgets: Sequence[str], file: Path) -> None:
    """Held-out loss against seconds over full data's: a colour a sample pruner, a marker a token pruner, size by budget."""
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    from qtjax.report.style import INK, save, tidy

    full = table.of(Cell(FULL, ""))
    speed = statistics.median(map(spent, full))
    samples, tokens = (list(dict.fromkeys(pair.split(":")[i] for pair in pairs)) for i in (0, 1))
    palette = ["#D55E00", "#0072B2", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#4D4D4D", "#882255"]
    colors = {name: palette[i % len(palette)] for i, name in enumerate(samples)}
    markers = {name: "o^sDvP*X"[i % 8] for i, name in enumerate(tokens)}
    figure = Figure(figsize=(10, 6.5), layout="constrained")
    axes = figure.add_subplot()
    tidy(axes)
    best: list[tuple[float, float]] = []
    for pair in [*pairs, EQUAL_TIME]:
        for size, budget in enumerate(budgets):
            results = table.of(Cell(pair, budget))
            if not results:
                continue
            x = statistics.median(map(spent, results)) / speed
            mean, width = interval([r["loss"] for r in results])
            best.append((x, mean))
            sample, token = pair.split(":") if ":" in pair else ("", "")
            axes.errorbar(
                x, mean, yerr=None if np.isnan(width) else width, color=colors.get(sample, INK), marker=markers.get(token, "_"),
                markersize=5 + 2 * size, elinewidth=0.8, alpha=0.85, linestyle="none",
            )  # fmt: skip
    mean, width = interval([r["loss"] for r in full])
    axes.errorbar(1, mean, yerr=None if np.isnan(width) else width, color=INK, marker="*", markersize=13, linestyle="none")
    front, low = [], float("inf")
    for x, y in sorted([*best, (1.0, mean)]):
        if y < low:
            low = y
            front.append((x, y))
    axes.plot(*zip(*front), color="#9A9A9A", linewidth=1, linestyle="--", zorder=1)
    handles = [Line2D([], [], color=color, marker="o", linestyle="none", label=f"samples: {name}") for name, color in colors.items()]
    handles += [Line2D([], [], color="#777777", marker=mark, linestyle="none", label=f"tokens: {name}") for name, mark in markers.items()]
    handles += [Line2D([], [], color=INK, marker="*", markersize=11, linestyle="none", label=FULL)]
    handles += [Line2D([], [], color=INK, marker="_", linestyle="none", label=EQUAL_TIME)]
    axes.legend(handles=handles, fontsize=8, ncols=2, frameon=False)
    axes.set_xlabel("seconds of scoring, packing and training over full data's (medians)")
    axes.set_ylabel("held-out loss (nats per token)")
    axes.set_title(f"Quality against seconds; larger marks: larger budgets ({', '.join(budgets)})", fontsize=11, loc="left")
    save(figure, file)


def main(argv: Sequence[str] | None = None) -> None:
    config, own = load_config(
        "python -m benchmarks.table",
        __doc__.splitlines()[0],
        argv,
        {
            "out": ("", "folder of the table; a stopped one goes on"),
            "pairs": (PAPER, "SAMPLE:TOKEN pruners, comma-separated"),
            "budgets": ("12.5x50,25x50,25x70,50x70", "per cent of samples x per cent of target tokens, comma-separated"),
            "seeds": (5, "seeds 0, 1, ... of each"),
        },
    )
    if not own["out"]:
        raise QtjaxError("--out: is missing; give a folder for the table")
    if own["seeds"] < 1:
        raise QtjaxError(f"--seeds = {own['seeds']}: must be 1 or more")
    pairs, budgets, console = parse_pairs(own["pairs"]), parse_budgets(own["budgets"]), Console(stderr=True)
    out = Path(own["out"])
    table = Table(out, config, console)
    use_compile_cache(override(config, {"run.compile_cache": str(out / "compile_cache")}))
    for seed in range(own["seeds"]):  # all places once before any place twice: a table that is stopped is thin, not half
        table.fill(Cell(FULL, ""), seed)
        for budget in budgets:
            for pair in pairs:
                table.fill(Cell(pair, budget), seed)
    if Q_TUNING in pairs:
        for budget in budgets:
            steps = table.equal_time_steps(budget)
            for seed in range(own["seeds"]):
                table.fill(Cell(EQUAL_TIME, budget), seed, steps)
    text = markdown(table, pairs, budgets, "python -m benchmarks.table " + " ".join(argv if argv is not None else sys.argv[1:]))
    write_atomic(out / "table.md", text + "\n")
    draw(table, pairs, budgets, out / "pareto.png")
    print(text)


if __name__ == "__main__":
    door(main)
