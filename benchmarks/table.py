"""Does pruning help, how much, with what: pruners x budgets x seeds on one model and data set, as the paper's Table 1 does.

    python -m benchmarks.table --config configs/smol.py --out runs/table                 # the paper's pairings, 5 seeds
    python -m benchmarks.table --config configs/smol.py --out runs/policy --budgets 25x50 \\
        --pairs q-tuning:q-tuning,q-tuning:q-tuning+policy=article,q-tuning:q-tuning+mode=drop
    python -m benchmarks.table --config configs/smol.py --out runs/noise --budgets 25x50 --noise 0,10,30,50 \\
        --pairs q-tuning:q-tuning,random:random

All runs follow one another in this process and share compiled programs; --out holds every finished run, so that a stopped
table goes on, and what is there stands in table.md after every seed. Beside the pairings stand full data after equal steps, and full data after as many steps
as fit Q-Tuning's median seconds at each budget, its learning-rate schedule fitted to them. Writes results.json, table.md, pareto.png and differences.png into --out.
Seconds are scoring, packing and training of a run together; compilation and evaluation are left out.
"""

import dataclasses
import json
import os
import re
import shutil
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from rich.console import Console
from scipy import stats

from benchmarks.machine import machine
from benchmarks.noise import write_noisy
from qtjax import evals
from qtjax.atomic import write_atomic, write_json
from qtjax.config import Config, PruneSection, load_config, override, validate
from qtjax.data.prepare import held_out_rows, training_rows
from qtjax.errors import Diverged, QtjaxError, door, near_names
from qtjax.evals.choice_rows import FORMS, read_question
from qtjax.flags import typed
from qtjax.pruning import sample_pruner, token_pruner
from qtjax.report.totals import totals
from qtjax.sections import SAMPLE_PRUNERS, TOKEN_PRUNERS
from qtjax.train import use_compile_cache
from qtjax.training import story
from qtjax.training.pruners import pruners
from qtjax.training.run import Session, open_session, train_steps
from qtjax.training.run_folder import RunFolder, take_lock

PAPER = "q-tuning:q-tuning," + ",".join(
    f"{sample}:{token}"
    for sample in ("random", "longest", "entropy", "infobatch-budget")
    for token in ("random", "perplexity", "fastv", "sparsevlm")
)
# What the rows, columns and seeds of a table are made of.
OWN = (
    "prune.sample_pruner", "prune.token_pruner", "prune.sample_keep", "prune.token_keep", "train.seed", "train.epochs", "train.max_steps",
    "data.path", "data.eval_path",
)  # fmt: skip
FULL, EQUAL_TIME, Q_TUNING = "full data", "full data, equal time", "q-tuning:q-tuning"


class Column(NamedTuple):
    """A budget "25x50", in per cent of samples and target tokens, and the share of injected wrong answers, "30" in per cent."""

    budget: str
    noise: str = ""

    def __str__(self) -> str:
        return self.budget + (f", {self.noise} % wrong" if self.noise else "")


class Cell(NamedTuple):
    """One place of the table: a row (a pair "sample:token+field=value..." or full data) and a column."""

    pair: str
    column: Column

    def key(self, seed: int) -> str:
        return " | ".join([self.pair, self.column.budget, *([f"noise {self.column.noise}"] if self.column.noise else []), f"seed {seed}"])


def full(column: Column) -> Cell:
    """Full data, which has no budget."""
    return Cell(FULL, Column("", column.noise))


def settings_of(pair: str, config: Config) -> dict[str, Any]:
    """The pruners and changes of "q-tuning:q-tuning+policy=article"; a field without a section is of `prune`.

    Raises QtjaxError for an unknown pruner or field, with near names, for a value of another type, and for what the table sets
    itself.
    """
    text, *changes = re.split(r"\+(?=[\w.]+=)", pair)  # a value may hold a plus: token_scope=q2+q4
    names = text.split(":")
    if len(names) != 2:
        raise QtjaxError(f"--pairs {pair!r}: must be SAMPLE:TOKEN, for example random:perplexity")
    for name, known in zip(names, (SAMPLE_PRUNERS, TOKEN_PRUNERS)):
        if name not in known:
            raise QtjaxError(f"--pairs {pair!r}: {name!r} must be one of {', '.join(known)}{near_names(name, known)}")
    out = changes_of(changes, config, f"--pairs {pair!r}")
    own = sample_pruner(names[0]).options | token_pruner(names[1]).options
    every = frozenset().union(*(sample_pruner(name).options for name in SAMPLE_PRUNERS), *(token_pruner(name).options for name in TOKEN_PRUNERS))
    for name in out:
        if name.removeprefix("prune.") in every - own:
            raise QtjaxError(f"--pairs {pair!r}: neither of the two pruners has {name}, the row would be a copy; leave it out")
        if name.startswith("run.") or name in OWN:
            raise QtjaxError(f"--pairs {pair!r}: {name} is set by the table itself; leave it out")
    return {"prune.sample_pruner": names[0], "prune.token_pruner": names[1]} | out


def changes_of(texts: Sequence[str], config: Config, where: str) -> dict[str, Any]:
    """{"prune.policy": "article", ...} of ["policy=article", ...]. Raises QtjaxError that begins with `where`."""
    known, out = config.flat(), {}
    for text in texts:
        name, _, value = text.partition("=")
        name = name if "." in name else f"prune.{name}"
        if name not in known:
            raise QtjaxError(f"{where}: {name}: no such field{near_names(name, known)}")
        out[name] = typed(f"{where}: {name} =", type(known[name]), value, name)
    return out


def parse_pairs(text: str, config: Config) -> list[str]:
    """"random:perplexity,..." as given. Raises QtjaxError as `settings_of`."""
    pairs = [pair.strip() for pair in text.split(",") if pair.strip()]
    for pair in pairs:
        pruners(validate(override(config, settings_of(pair, config))).prune)
    return pairs


def parse_shares(flag: str, text: str, parts: int, least: float) -> list[str]:
    """"12.5x50,25x50" as given. Raises QtjaxError for what is not `parts` percentages from `least` to 100."""

    def holds(share: str) -> bool:
        try:
            return float(share) <= 100 and (float(share) > 0 or least == 0 == float(share))
        except ValueError:
            return False

    shares = [share.strip() for share in text.split(",") if share.strip()]
    for share in shares:
        if len(share.split("x")) != parts or not all(map(holds, share.split("x"))):
            rule = "SAMPLESxTOKENS in per cent, above 0 and at most 100, for example 25x50" if parts == 2 else "per cent from 0 to 100"
            raise QtjaxError(f"--{flag} {share!r}: must be {rule}")
    if len({tuple(map(float, share.split("x"))) for share in shares}) < len(shares):
        raise QtjaxError(f"--{flag} {text!r}: names one column twice")
    return shares


def configured(config: Config, cell: Cell, seed: int, folder: Path, *, data_path: str = "", steps: int = 0) -> Config:
    """One run's config. Args: data_path: rows in place of the config's; steps: of full data at equal time; 0: all."""
    changes: dict[str, Any] = {
        "train.seed": seed, "train.compare_full_data": 0, "run.folder": str(folder), "run.tensorboard": False, "run.export": False,
        "train.checkpoint_every": 10**6, "run.compile_cache": str(folder.parent / "compile_cache"),
    }  # fmt: skip
    changes |= {"data.path": data_path, "data.part": "", "data.max_samples": 0} if data_path else {}  # what is written is all of it
    if cell.pair in (FULL, EQUAL_TIME):  # what only pruning has is refused without it
        config = dataclasses.replace(config, prune=PruneSection("none", "none", batch_size=config.prune.batch_size))
        if steps:  # more than the config's, where pruning is slower than full data
            changes |= {"train.max_steps": steps, "train.epochs": config.train.epochs + steps}
    else:
        shares = [float(part) / 100 for part in cell.column.budget.split("x")]
        changes |= {"prune.sample_keep": shares[0], "prune.token_keep": shares[1]} | settings_of(cell.pair, config)
    return validate(override(config, changes))


def run_one(config: Config, choice: Sequence[str] = (), form: str = "auto") -> dict[str, Any]:
    """Trains and evaluates; what the table and its readers need of it. choice: files of multiple-choice questions, asked in
    the form of `evals.read_question`."""
    folder_path = Path(config.run.folder)
    shutil.rmtree(folder_path, ignore_errors=True)  # what an interrupted run left
    with RunFolder.open(config) as folder:
        session = open_session(config, folder, Console(quiet=True))
        train_steps(session, folder, quiet=True)
        found = evaluated(config, session, choice, form)
        folder.flush()
        metrics, records = folder.read_metrics(), folder.read_samples()
        provenance = story.provenance(session, folder)
        quadrants = quadrants_by_provenance(config, records) if provenance else None
        session.close()
    done = totals(metrics)
    done["seconds"]["scoring"] += session.seconds["other_models"]
    shutil.rmtree(folder_path)
    return found | {
        "seconds": {name: round(value, 3) for name, value in done["seconds"].items()}, "steps": done["steps"], "samples": done["samples"],
        "tokens": done["tokens"] | {"trained": sum(m["trained_tokens"] for m in metrics)}, "closing": done["closing"], "fill": done["fill"],
        "by_epoch": {name: by_epoch(metrics, name) for name in ("spearman", "level")},
        "provenance": provenance, "quadrants": quadrants,
    }  # fmt: skip


def evaluated(config: Config, session: Session, choice: Sequence[str], form: str) -> dict[str, Any]:
    """loss (nats a token), exact_match, ended (fractions 0-1), None where not asked for; tasks {name: accuracy} by exact match,
    "FILE (choice)" by the likeliest choice (acc_norm)."""
    params, overlay = session.subject.join(session.loop.state.trainable, session.loop.frozen)
    given = {"overlay": overlay, "mesh": session.mesh, "progress": False}
    out: dict[str, Any] = {"loss": None, "exact_match": None, "ended": None, "tasks": {}}
    if session.held_out is not None:
        found = evals.evaluate(config, session.subject.config, params, session.tokenizer, session.held_out, **given)
        out["loss"] = found["loss"].loss
        if exact := found.get("exact_match"):
            out |= {"exact_match": exact.accuracy, "ended": exact.ended, "tasks": {t: a for t, (a, _) in exact.by_task.items()}}
    for file in choice:
        asked = override(config, {"data.eval_path": file})
        questions = evals.load_held_out(asked, session.subject.config, session.tokenizer, ("choice",), choice_form=form)
        found = evals.evaluate(asked, session.subject.config, params, session.tokenizer, questions, **given)
        out["tasks"][f"{Path(file).stem} (choice)"] = found["choice"].acc_norm
    return out


def by_epoch(metrics: Sequence[dict[str, Any]], name: str) -> list[float | None]:
    """The mean of a metric over the steps of each epoch; None where none has it."""
    known: list[list[float]] = [[] for _ in range(max((m["epoch"] for m in metrics), default=-1) + 1)]
    for m in metrics:
        if m.get(name) is not None and m[name] == m[name]:
            known[m["epoch"]].append(m[name])
    return [round(float(np.mean(values)), 4) if values else None for values in known]


def quadrants_by_provenance(config: Config, records: Any) -> dict[str, dict[str, list[int]]]:
    """{"first" | "last": {provenance: samples in median quadrant 0 (not scored), 1, 2, 3, 4}} of the first and last epoch."""
    rows = training_rows(config.data)
    origin = {int(index): rows[i]["provenance"] for i, index in enumerate(rows.index)}
    row, epoch, quadrant = (records[name].to_numpy() for name in ("row", "epoch", "median_quadrant"))
    kinds = np.array([origin[int(r)] for r in row])
    return {
        name: {
            str(kind): np.bincount(quadrant[(epoch == at) & (kinds == kind)], minlength=5).tolist() for kind in np.unique(kinds)
        }
        for name, at in (("first", epoch.min()), ("last", epoch.max()))
    }


def spent(result: dict[str, Any]) -> float:
    """Seconds of scoring, packing and training."""
    return sum(result["seconds"].values())


class Table:
    """The finished runs of --out, and what is asked of them."""

    def __init__(self, out: Path, config: Config, console: Console, choice: Sequence[str] = (), form: str = "auto"):
        self.out, self.config, self.console, self.choice, self.form = out, config, console, choice, form
        self.file = out / "results.json"
        out.mkdir(parents=True, exist_ok=True)
        settings = {n: v for n, v in config.flat().items() if n.split(".")[0] in ("model", "data", "overlay", "train", "eval", "prune")}
        for name in ("prune.sample_pruner", "prune.token_pruner", "prune.sample_keep", "prune.token_keep"):
            settings.pop(name)
        settings |= {"choice": list(choice), "choice_form": form}
        self.results: dict[str, Any] = {}
        self.machine = machine()
        if self.file.is_file():
            known = json.loads(self.file.read_text())
            differ = [n for n, v in settings.items() if known["settings"].get(n) != v]
            if differ:
                raise QtjaxError(f"--out {out}: holds a table with another {differ[0]}; choose another folder, or remove it")
            self.results, self.machine = known["results"], known["machine"]
        self.settings = settings

    def of(self, cell: Cell) -> list[dict[str, Any]]:
        """The results of a cell, over its seeds."""
        return list(self.by_seed(cell).values())

    @property
    def done(self) -> dict[str, dict[str, Any]]:
        """The runs that did not fail."""
        return {key: result for key, result in self.results.items() if "failed" not in result}

    def known(self) -> list[tuple[str, float, str]]:
        """Of QUALITIES, those that every run has."""
        return [quality for quality in QUALITIES if all(result[quality[0]] is not None for result in self.done.values())]

    def by_seed(self, cell: Cell) -> dict[str, dict[str, Any]]:
        """{seed: result} of a cell."""
        begin = cell.key(0).removesuffix("0")
        return {key.removeprefix(begin): result for key, result in self.done.items() if key.startswith(begin)}

    def fill(self, cell: Cell, seed: int, steps: int = 0) -> None:
        """Runs a place of the table unless it is there."""
        key = cell.key(seed)
        if key in self.results:
            return
        begin = time.monotonic()
        data_path = self._noisy(cell.column.noise, seed)
        config = configured(self.config, cell, seed, self.out / "run", data_path=data_path, steps=steps)
        try:
            self.results[key] = run_one(config, self.choice, self.form)
            said = f"loss {self.results[key]['loss']:.4f}"
        except Diverged as error:  # a result too: it is told, and the other runs go on
            self.results[key] = {"failed": str(error)}
            said = str(error)
        self.results[key]["wall"] = round(time.monotonic() - begin, 1)
        self.machine = machine()
        write_json(self.file, {"settings": self.settings, "machine": self.machine, "results": self.results})
        self.console.print(f"{key}: {said}, {self.results[key]['wall']:.0f} s", highlight=False)

    def _noisy(self, noise: str, seed: int) -> str:
        """The file of the data with so many per cent of wrong answers, drawn anew for every seed; "" without noise."""
        if not noise:
            return ""
        file = self.out / f"noise-{noise}-{seed}.jsonl"
        if not file.is_file():
            write_noisy(self.config.data, float(noise) / 100, seed, file)
        return str(file)

    def equal_time_steps(self, column: Column) -> int:
        """Full-data steps in the median seconds of Q-Tuning in this column, both as measured here; at least one. Runs that are
        there keep their number, so that all seeds have the same."""
        if known := self.of(Cell(EQUAL_TIME, column)):
            return known[0]["steps"]
        pruned = statistics.median(spent(result) for result in self.of(Cell(Q_TUNING, column)))
        step = statistics.median(spent(result) / result["steps"] for result in self.of(full(column)))
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


def named(pair: str) -> str:
    """A row's name: "longest x fastv", "q-tuning x q-tuning, policy=article"."""
    names, *changes = re.split(r"\+(?=[\w.]+=)", pair)
    return ", ".join([names.replace(":", " x "), *changes])


def markdown(table: Table, pairs: Sequence[str], columns: Sequence[Column], command: str) -> str:
    """The tables as the paper prints them: a row a pair, a column a budget."""
    counts = sorted({len(table.of(Cell(pair, column))) for pair in pairs for column in columns})
    seeds = "-".join(map(str, dict.fromkeys((counts[0], counts[-1]))))
    lines = [
        f"`{command}`", "",
        f"{table.machine}; mean and 95 % interval (Student's t) over {seeds} seeds; budgets are % of samples x % of target tokens."
        f" Equal time is as many steps of full data as fit {named(Q_TUNING)}'s median seconds, reckoned before they ran. Intervals hold"
        " what seeds change, not which rows were held out, and none is corrected for how many there are.", "",
        *(f"* failed: {key}: {result['failed']}" for key, result in table.results.items() if "failed" in result), "",
    ]  # fmt: skip

    def seconds(results: Sequence[dict[str, Any]], column: Column) -> str:
        whole = table.of(full(column))
        return f"{statistics.median(map(spent, results)) / statistics.median(map(spent, whole)):.2f}" if results and whole else "-"

    def of_field(name: str, form: str, scale: float) -> Callable[[Sequence[dict[str, Any]], Column], str]:
        return lambda results, _: shown([r[name] for r in results if r[name] is not None], form, scale)

    parts: dict[str, Callable[[Sequence[dict[str, Any]], Column], str]] = {
        "Held-out loss (nats per token)": of_field("loss", ".3f", 1),
        "Exact match (%)": of_field("exact_match", ".1f", 100),
        "Answers that end by themselves (%)": of_field("ended", ".1f", 100),
        "Closing tokens of kept samples pruned (%)": lambda rs, _: shown(
            [r["closing"]["pruned"] / r["closing"]["seen"] for r in rs if r["closing"]["seen"]], ".1f", 100
        ),
        "Share of samples kept (%)": lambda rs, _: shown([r["samples"]["kept"] / r["samples"]["seen"] for r in rs], ".1f", 100),
        "Share of target tokens trained (%)": lambda rs, _: shown([r["tokens"]["kept"] / r["tokens"]["seen"] for r in rs], ".1f", 100),
        "Tokens in the steps (1,000)": lambda rs, _: shown([r["tokens"]["trained"] for r in rs], ".1f", 1e-3),
        "Seconds (scoring, packing, training)": lambda rs, _: shown(list(map(spent, rs)), ".1f"),
        "Seconds over full data's (of the medians)": seconds,
    }
    everything = list(table.done.values())
    tasks = sorted({task for result in everything for task in result["tasks"]})
    for task in tasks:
        parts[f"Accuracy on {task} (%)"] = lambda rs, _, task=task: shown([r["tasks"][task] for r in rs if task in r["tasks"]], ".1f", 100)
    for title, show in parts.items():
        if title.startswith(("Exact", "Answers")) and all(r["exact_match"] is None for r in everything):
            continue
        lines += [f"**{title}**", "", f"| pruners | {' | '.join(map(str, columns))} |", "|---|" + "---:|" * len(columns)]
        lines += [f"| {named(pair)} | {' | '.join(show(table.of(Cell(pair, c)), c) for c in columns)} |" for pair in pairs]
        if any(table.of(Cell(EQUAL_TIME, c)) for c in columns):
            lines += [f"| {EQUAL_TIME} | {' | '.join(show(table.of(Cell(EQUAL_TIME, c)), c) for c in columns)} |"]
        lines += [f"| {FULL}, equal steps | {' | '.join(show(table.of(full(c)), c) for c in columns)} |", ""]
    more = (difference_lines, chosen_lines, quadrant_lines, provenance_lines)
    return "\n".join([*lines, *(line for part in more for line in part(table, pairs, columns))])


def paired(table: Table, cell: Cell, first: Cell, name: str) -> list[float]:
    """A quality less the first row's, seed by seed: what the seed does to both cancels."""
    own, other = table.by_seed(cell), table.by_seed(first)
    both = [(own[seed][name], other[seed][name]) for seed in own if seed in other]
    return [a - b for a, b in both if a is not None and b is not None]


def compared(pairs: Sequence[str], column: Column) -> list[tuple[Cell, str]]:
    """(place, name) of the rows that stand beside the first in a column."""
    others = [(Cell(pair, column), named(pair)) for pair in pairs[1:]]
    return [*others, (Cell(EQUAL_TIME, column), EQUAL_TIME), (full(column), f"{FULL}, equal steps")]


def difference_lines(table: Table, pairs: Sequence[str], columns: Sequence[Column]) -> list[str]:
    """Every row less the first, paired by seed; bold where the interval leaves zero out."""
    out = []
    for name, scale, said in QUALITIES:
        lines = {}
        for column in columns:
            for cell, row in compared(pairs, column):
                values = paired(table, cell, Cell(pairs[0], column), name)
                text = "-" if not values else shown(values, "+.1f" if scale > 1 else "+.3f", scale).replace("± +", "± ")
                if len(values) > 1 and abs(interval(values)[0]) > interval(values)[1]:
                    text = f"**{text}**"
                lines.setdefault(row, []).append(text)
        if lines and any(text != "-" for texts in lines.values() for text in texts):
            out += [f"**Difference from {named(pairs[0])}, paired by seed: {said}**", "", f"| pruners | {' | '.join(map(str, columns))} |", "|---|" + "---:|" * len(columns)]
            out += [f"| {row} | {' | '.join(texts)} |" for row, texts in lines.items() if any(text != "-" for text in texts)]
            out.append("")
    return out


def chosen_lines(table: Table, pairs: Sequence[str], columns: Sequence[Column]) -> list[str]:
    """Of pruners with corners: where the chosen samples come from, correlation of the two scores."""
    lines = []
    for pair in pairs:
        for column in columns:
            runs = table.of(Cell(pair, column))
            sums = {name: sum(r["samples"].get(name, 0) for r in runs) for name in ("q2", "q3", "q4", "supplement")}
            if not sums["q2"] + sums["q3"] + sums["q4"] + sums["supplement"]:
                continue
            chosen = sums["q2"] + sums["q3"] + sums["q4"] + sums["supplement"]  # not what a warm-up trained on
            medians = [sum(r["samples"]["supplement_median"][q] for r in runs) for q in "1234"]
            rank = [[r["by_epoch"]["spearman"][at] for r in runs if r["by_epoch"]["spearman"][at] is not None] for at in (0, -1)]
            cells = [f"{100 * sums[name] / chosen:.1f}" for name in ("q2", "q4", "q3", "supplement")]
            cells += [" ".join(f"{100 * m / max(sums['supplement'], 1):.0f}" for m in medians)]
            cells += [f"{np.mean(values):.2f}" if values else "-" for values in rank]
            lines.append(f"| {named(pair)} | {column} | {' | '.join(cells)} |")
    if not lines:
        return []
    head = "| pruners | at | Q2 | Q4 | Q3 | supplement | of it in median Q1 Q2 Q3 Q4 | Spearman, first epoch | last |"
    return ["**Where the chosen samples come from (% of them), and what the two scores have in common**", "", head, "|---|---|" + "---:|" * 7, *lines, ""]


def quadrant_lines(table: Table, pairs: Sequence[str], columns: Sequence[Column]) -> list[str]:
    """Of Q-Tuning: in which median quadrant the rows of each provenance lie, in the first and in the last epoch."""
    lines = []
    for column in columns:
        runs = [r["quadrants"] for r in table.of(Cell(Q_TUNING, column)) if r.get("quadrants")] if Q_TUNING in pairs else []
        for when in ("first", "last") if runs else ():
            for kind in sorted({kind for run in runs for kind in run[when]}):
                counts = np.sum([run[when][kind] for run in runs if kind in run[when]], axis=0)[1:]
                lines.append(f"| {column} | {when} | {kind} | {' | '.join(f'{100 * c / max(counts.sum(), 1):.0f}' for c in counts)} |")
    if not lines:
        return []
    head = ["| at | epoch | rows | Q1 | Q2 | Q3 | Q4 |", "|---|---|---|---:|---:|---:|---:|"]
    return [f"**Median quadrants by provenance, {named(Q_TUNING)} (% of such rows)**", "", *head, *lines, ""]


def provenance_lines(table: Table, pairs: Sequence[str], columns: Sequence[Column]) -> list[str]:
    """For every provenance: recall (of its rows, how many are dropped) and precision (of the dropped rows, how many are of
    it); nothing where the data do not say."""
    lines = []
    for column in columns:
        found = {pair: [r["provenance"] for r in table.of(Cell(pair, column)) if r["provenance"]] for pair in pairs}
        kinds = sorted({kind for results in found.values() for counts in results for kind in counts})
        if not kinds:
            continue
        lines += [
            f"**Rows dropped by provenance, at {column}: of all such rows (%); in brackets, of all dropped rows (%)**", "",
            f"| pruners | {' | '.join(kinds)} |", "|---|" + "---:|" * len(kinds),
        ]  # fmt: skip
        for pair, results in found.items():
            if results:
                lines.append(f"| {named(pair)} | {' | '.join(_dropped(results, kind) for kind in kinds)} |")
        lines.append("")
    return lines


def _dropped(results: Sequence[dict[str, Any]], kind: str) -> str:
    def dropped(counts: dict[str, Any], of: str) -> int:
        return counts[of]["seen"] - counts[of]["kept"]

    recall = [dropped(counts, kind) / counts[kind]["seen"] for counts in results if counts.get(kind, {}).get("seen")]
    every = [sum(dropped(counts, each) for each in counts) for counts in results]
    precision = [dropped(counts, kind) / n for counts, n in zip(results, every) if kind in counts and n]
    return shown(recall, ".1f", 100) + (f" ({np.mean(precision):.1%})".replace("%", "") if precision else "")


PALETTE = ["#D55E00", "#0072B2", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#4D4D4D", "#882255"]
MARKERS = "o^sDvP*X"


def styles(pairs: Sequence[str]) -> dict[str, tuple[str, str]]:
    """pair -> (colour, marker): of the sample and the token pruner; of the row, where rows differ in more than these."""
    samples, tokens = (list(dict.fromkeys(pair.split("+")[0].split(":")[i] for pair in pairs)) for i in (0, 1))
    if any("+" in pair for pair in pairs):
        return {pair: (PALETTE[i % 8], MARKERS[i // 8 % 8]) for i, pair in enumerate(pairs)}
    return {
        pair: (PALETTE[samples.index(sample) % 8], MARKERS[tokens.index(token) % 8])
        for pair in pairs
        for sample, token in [pair.split(":")]
    }


def draw(table: Table, pairs: Sequence[str], columns: Sequence[Column], file: Path) -> None:
    """Held-out loss, and exact match where it is known, against seconds over full data's; marks grow with the columns, the
    dashed line joins what nothing beats in both."""
    from matplotlib.figure import Figure

    from qtjax.report.style import save, tidy

    known = table.known()
    figure = Figure(figsize=(13 if len(known) > 1 else 8, 6.5), layout="constrained")
    looks = styles(pairs)
    for place, (name, scale, said) in enumerate(known):
        axes = figure.add_subplot(1, len(known), place + 1)
        tidy(axes)
        _log(axes.xaxis, axes.set_xscale)
        if name == "loss":
            _log(axes.yaxis, axes.set_yscale)
        _scatter(axes, table, pairs, columns, looks, name, scale)
        axes.set_xlabel("seconds of scoring, packing and training over full data's (medians)")
        axes.set_ylabel(said)
    figure.suptitle(f"Quality against seconds; marks grow with the columns: {'; '.join(map(str, columns))}", fontsize=11, x=0.01, ha="left")
    figure.legend(handles=_handles(pairs, looks), fontsize=8, ncols=6, frameon=False, loc="outside lower center")
    save(figure, file)


QUALITIES = (("loss", 1, "held-out loss (nats per token)"), ("exact_match", 100, "exact match (%)"))


def _scatter(axes: Any, table: Table, pairs: Sequence[str], columns: Sequence[Column], looks: dict, name: str, scale: float) -> None:
    """One panel's marks with their intervals, and the line of what nothing beats."""
    from qtjax.report.style import GREY, INK

    found: list[tuple[float, float]] = []
    for pair in [*pairs, EQUAL_TIME, FULL]:
        color, marker = looks.get(pair, (INK, "*" if pair == FULL else "_"))
        for size, column in enumerate(columns):
            results, whole = table.of(full(column) if pair == FULL else Cell(pair, column)), table.of(full(column))
            if not results or not whole:
                continue
            x = statistics.median(map(spent, results)) / statistics.median(map(spent, whole))
            mean, width = interval([scale * r[name] for r in results])
            found.append((x, mean))
            low = min(width, 0.95 * mean) if name == "loss" else width  # an axis in logarithms has no zero
            axes.errorbar(
                x, mean, yerr=None if np.isnan(width) else [[low], [width]], color=color, marker=marker,
                markersize=13 if pair == FULL else 5 + 2 * size, elinewidth=0.8, alpha=0.85, linestyle="none",
            )  # fmt: skip
    front, best = [], float("inf")
    for x, y in sorted(found):
        if (better := y if name == "loss" else -y) < best:
            best = better
            front.append((x, y))
    axes.plot(*zip(*front), color=GREY, linewidth=1, linestyle="--", zorder=1)


def _handles(pairs: Sequence[str], looks: dict[str, tuple[str, str]]) -> list[Any]:
    from matplotlib.lines import Line2D

    from qtjax.report.style import INK

    def mark(label: str, color: str, marker: str) -> Line2D:
        return Line2D([], [], color=color, marker=marker, linestyle="none", label=label)

    ends = [mark(FULL, INK, "*"), mark(EQUAL_TIME, INK, "_")]
    if any("+" in pair for pair in pairs):
        return [mark(named(pair), *looks[pair]) for pair in pairs] + ends
    samples = {pair.split(":")[0]: looks[pair][0] for pair in pairs}
    tokens = {pair.split(":")[1]: looks[pair][1] for pair in pairs}
    return (
        [mark(f"samples: {name}", color, "o") for name, color in samples.items()]
        + [mark(f"tokens: {name}", "#777777", marker) for name, marker in tokens.items()]
        + ends
    )


def draw_differences(table: Table, pairs: Sequence[str], columns: Sequence[Column], file: Path) -> None:
    """Every row less the first, paired by seed, with its interval; a panel a quality, a colour a column."""
    from matplotlib.figure import Figure

    from qtjax.report.style import INK, save, tidy

    known = table.known()
    rows = [row for _, row in compared(pairs, columns[0])]
    figure = Figure(figsize=(5 * len(known) + 4, 1.2 + (0.14 + 0.12 * len(columns)) * len(rows)), layout="constrained")
    panels = figure.subplots(1, len(known), sharey=True, squeeze=False)[0]
    for axes, (name, scale, said) in zip(panels, known):
        tidy(axes)
        axes.axvline(0, color=INK, linewidth=1)
        for place, column in enumerate(columns):
            shift = 0.7 * ((place + 0.5) / len(columns) - 0.5)
            for y, (cell, _) in enumerate(compared(pairs, column)):
                values = paired(table, cell, Cell(pairs[0], column), name)
                if values:
                    mean, width = interval([scale * value for value in values])
                    axes.errorbar(
                        mean, y + shift, xerr=None if np.isnan(width) else width, color=PALETTE[place % 8], marker=MARKERS[place % 8],
                        markersize=5, elinewidth=1, label=str(column) if y == 0 else None,
                    )  # fmt: skip
        axes.set_xlabel(said)
        if name == "loss":  # a pruner that fails altogether must not hide the others
            axes.set_xscale("symlog", linthresh=0.1)
            axes.xaxis.set_major_formatter("{x:g}")
    panels[0].set_yticks(range(len(rows)), rows, fontsize=8)
    panels[0].set_ylim(len(rows) - 0.4, -0.6)
    if len(columns) > 1:
        figure.legend(*panels[0].get_legend_handles_labels(), fontsize=8, ncols=8, frameon=False, loc="outside lower center")
    figure.suptitle(f"Difference from {named(pairs[0])}, paired by seed, 95 % intervals", fontsize=11, x=0.01, ha="left")
    save(figure, file)


def draw_noise(table: Table, pairs: Sequence[str], columns: Sequence[Column], file: Path) -> None:
    """Quality against the share of wrong answers; a row of panels a budget, a panel a quality."""
    from matplotlib.figure import Figure

    from qtjax.report.style import INK, save, tidy

    budgets = list(dict.fromkeys(column.budget for column in columns))
    known = table.known()
    figure = Figure(figsize=(5.5 * len(known) + 2.5, 4.5 * len(budgets)), layout="constrained")
    grid = figure.subplots(len(budgets), len(known), squeeze=False)
    looks = styles(pairs)
    for budget, panels in zip(budgets, grid):
        for axes, (name, scale, said) in zip(panels, known):
            tidy(axes)
            for pair in [*pairs, EQUAL_TIME, FULL]:
                own = [c for c in columns if c.budget == budget and table.of(full(c) if pair == FULL else Cell(pair, c))]
                if not own:
                    continue
                runs = [table.of(full(c) if pair == FULL else Cell(pair, c)) for c in own]
                means, widths = zip(*(interval([scale * r[name] for r in results]) for results in runs))
                color, marker = looks.get(pair, (INK, "*" if pair == FULL else "_"))
                axes.errorbar(
                    [float(c.noise) for c in own], means, yerr=None if np.isnan(widths).any() else widths, color=color, marker=marker,
                    linestyle="--" if pair in (FULL, EQUAL_TIME) else "-", elinewidth=0.8, capsize=2, label=named(pair),
                )  # fmt: skip
            if name == "loss":
                _log(axes.yaxis, axes.set_yscale)
            axes.set_xlabel("rows with another row's answer (%)")
            axes.set_ylabel(said)
            axes.set_title(budget, loc="left", fontsize=11)
    figure.legend(*grid[0][0].get_legend_handles_labels(), fontsize=8, frameon=False, loc="outside right center")
    save(figure, file)


def _log(axis: Any, set_scale: Callable[[str], None]) -> None:
    """Logarithmic, with plain numbers at it."""
    from matplotlib.ticker import LogLocator

    set_scale("log")
    axis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 3, 5, 7)))
    axis.set_major_formatter("{x:g}")
    axis.set_minor_formatter("")


def main(argv: Sequence[str] | None = None) -> None:
    config, own = load_config(
        "python -m benchmarks.table",
        __doc__.splitlines()[0],
        argv,
        {
            "out": ("", "folder of the table; a stopped one goes on"),
            "pairs": (PAPER, "SAMPLE:TOKEN pruners, comma-separated; +field=value after a pair sets what else it differs in"),
            "budgets": ("12.5x50,25x50,25x70,50x70", "per cent of samples x per cent of target tokens, comma-separated"),
            "noise": ("", "per cent of the rows that get another row's answer (rows marked mislabelled leave first), comma-separated; empty: the data as they are"),
            "choice": ("", "files of multiple-choice questions, comma-separated, at most eval.max_samples of each"),
            "choice-form": ("auto", f"how they are asked: {', '.join(FORMS)}"),
            "seeds": (5, "seeds 0, 1, ... of each"),
        },
    )
    if not own["out"]:
        raise QtjaxError("--out: is missing; give a folder for the table")
    if own["seeds"] < 1:
        raise QtjaxError(f"--seeds = {own['seeds']}: must be 1 or more")
    pairs, console = parse_pairs(own["pairs"], config), Console(stderr=True)
    if not pairs:
        raise QtjaxError("--pairs: is empty; name at least one, for example random:random")
    budgets, noises = parse_shares("budgets", own["budgets"], 2, 1), parse_shares("noise", own["noise"], 1, 0)
    columns = [Column(budget, noise) for budget in budgets for noise in noises or [""]]
    out = Path(own["out"])
    if not config.data.eval_path and (own["noise"] or not config.data.eval_fraction):
        raise QtjaxError("data.eval_path = '': a table compares held-out losses, and noise must not reach them; name a held-out file")
    if own["choice-form"] not in FORMS:
        raise QtjaxError(f"--choice-form {own['choice-form']!r}: must be one of {', '.join(FORMS)}{near_names(own['choice-form'], FORMS)}")
    choice = [file.strip() for file in own["choice"].split(",") if file.strip()]
    for file in choice:
        for i, row in enumerate(held_out_rows(override(config, {"data.eval_path": file}).data)):
            read_question(row, own["choice-form"], f"--choice {file} row {i}")
    if len({Path(file).stem for file in choice}) < len(choice):
        raise QtjaxError(f"--choice {own['choice']}: two files have the same name; a table's rows are named by them")
    table = Table(out, config, console, choice, own["choice-form"])
    use_compile_cache(override(config, {"run.compile_cache": str(out / "compile_cache")}))
    command = "python -m benchmarks.table " + " ".join(argv if argv is not None else sys.argv[1:])
    lock = take_lock(out)
    try:
        for seed in range(own["seeds"]):  # all places once before any place twice: a table that is stopped is thin, not half
            for column in columns:
                table.fill(full(column), seed)
                for pair in pairs:
                    table.fill(Cell(pair, column), seed)
            write(table, pairs, columns, command)
        if Q_TUNING in pairs:
            for column in columns:
                steps = table.equal_time_steps(column)
                for seed in range(own["seeds"]):
                    table.fill(Cell(EQUAL_TIME, column), seed, steps)
        print(write(table, pairs, columns, command))
    finally:
        os.close(lock)


def write(table: Table, pairs: Sequence[str], columns: Sequence[Column], command: str) -> str:
    """table.md and the pictures of what is there; returns the former."""
    text = markdown(table, pairs, columns, command)
    write_atomic(table.out / "table.md", text + "\n")
    draw(table, pairs, columns, table.out / "pareto.png")
    draw_differences(table, pairs, columns, table.out / "differences.png")
    if columns[0].noise:
        draw_noise(table, pairs, columns, table.out / "noise.png")
    return text


if __name__ == "__main__":
    door(main)
