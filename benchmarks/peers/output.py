"""What is shown of a run: a table and its bars per model, the numbers as JSON, and a picture."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

from benchmarks.peers.drive import Bench
from benchmarks.peers.results import Round, Verdict, judge, median
from benchmarks.peers.rows import OWN, ROWS, Row, bars_of


def medians(bench: Bench) -> dict[str, Round]:
    """Of the rows that were measured and agree."""
    return {name: median(rounds) for name, rounds in bench.rounds.items() if rounds}


def verdicts(bench: Bench, rows: Sequence[Row]) -> list[Verdict]:
    """The model's bars of which both sides are among the rows."""
    known, names = medians(bench), {row.name for row in rows}
    return [judge(bar, known) for bar in bars_of(bench.work.name) if bar.own in names and names & set(bar.others)]


def table(bench: Bench, rows: Sequence[Row], heading: str, not_there: dict[str, str]) -> Table:
    """One model's rows. Args: not_there: {environment: why it could not be installed}."""
    known = medians(bench)
    drawn = Table(title=heading, title_justify="left", caption_justify="left")
    drawn.caption = (
        "CPU s: user and system time of all threads. x: CPU s over qtjax's of the same kind. Useful tokens: real ones of prompts and answers.\n"
        "First step: seconds from the process' start to the end of its first step; cold: with an empty compile cache."
    )
    drawn.add_column("")
    for name in ("CPU s per\n1,000 tokens", "x", "useful\ntokens/s", "peak\nMB", "first\nstep s", "cold"):
        drawn.add_column(name, justify="right")
    drawn.add_column("checked against the torch loop", overflow="fold", max_width=48)
    for i, row in enumerate(rows):
        last = i + 1 == len(rows) or rows[i + 1].kind != row.kind
        drawn.add_row(*_cells(bench, row, known, not_there), end_section=last)
    return drawn


def _cells(bench: Bench, row: Row, known: dict[str, Round], not_there: dict[str, str]) -> list[str]:
    if row.name not in known:
        checked = bench.checked.get(row.name)
        if row.env in not_there:
            why = f"[red]not installed[/red]: {_plain(not_there[row.env])}"
        elif row.name in bench.failed:
            why = f"[red]failed[/red]: {_plain(bench.failed[row.name])}"
        else:
            why = f"[red]differs[/red]: {_plain(checked.said)}" if checked else ""
        return [row.says, *["-"] * 6, why]
    r, own = known[row.name], known.get(OWN[row.kind])
    return [
        row.says, f"{r.cpu:.3f}" if r.cpu < 10 else f"{r.cpu:.1f}", f"{r.cpu / own.cpu:.2f}" if own else "", f"{r.speed:,.0f}",
        f"{r.peak / 2**20:,.0f}", f"{r.first:.1f}", "" if r.cold is None else f"{r.cold:.1f}", bench.checked[row.name].said,
    ]  # fmt: skip


def _plain(text: str) -> str:
    return text.replace("[", r"\[")


def bar_table(bench: Bench, rows: Sequence[Row]) -> Table:
    """The bars: ratio of medians within the run; what is not asked of this model is said without a verdict."""
    drawn = Table("", "best other", title=f"Bars, {Path(bench.work.name).name}: how many times better qtjax is", title_justify="left")
    for name in ("ratio", "by wall clock", "asked"):
        drawn.add_column(name, justify="right")
    drawn.add_column("")
    for v in verdicts(bench, rows):
        asked = "" if v.bar.least is None else f">= {v.bar.least:.2f}"
        said = v.said if v.ratio is None else {None: "", True: "[green]met[/green]", False: "[red]not met[/red]"}[v.met]
        shown = [f"{x:.2f}" if x is not None else "" for x in (v.ratio, v.wall)]
        drawn.add_row(v.bar.says, ROWS[v.other].says if v.other else "", *shown, asked, said)
    return drawn


def report(benches: Sequence[Bench], rows: Sequence[Row], given: dict[str, Any], machine: str, not_there: dict[str, str]) -> dict[str, Any]:
    """Everything, for --json."""
    out: dict[str, Any] = {"machine": machine, "settings": {k: v for k, v in given.items() if k not in ("json", "picture")}, "models": {}}
    for bench in benches:
        known, entries = medians(bench), {}
        for row in rows:
            entry: dict[str, Any] = {"says": row.says, "kind": row.kind, "options": dict(row.options), "variables": dict(row.variables)}
            if row.name in known:
                entry |= {"median": known[row.name]._asdict(), "rounds": [r._asdict() for r in bench.rounds[row.name]]}
                entry |= {"details": bench.details[row.name]}
            if row.name in bench.checked:
                entry["checked"] = bench.checked[row.name]._asdict()
            failed = not_there.get(row.env) or bench.failed.get(row.name)
            entries[row.name] = entry | ({"failed": failed} if failed else {})
        bars = [
            {"says": v.bar.says, "own": v.bar.own, "other": v.other, "measure": v.bar.measure, "ratio": v.ratio, "wall_ratio": v.wall,
             "least": v.bar.least, "met": v.met, "said": v.said}
            for v in verdicts(bench, rows)
        ]  # fmt: skip
        work = bench.work
        out["models"][Path(work.name).name] = {"useful_tokens": work.useful, "targets": work.targets, "rows": entries, "bars": bars}
    return out


def draw(benches: Sequence[Bench], rows: Sequence[Row], heading: str, file: Path) -> None:
    """Useful tokens per CPU second, a panel a model and kind of work; longer is better."""
    from matplotlib.figure import Figure

    from qtjax.report.style import BLUE, GREY, PURPLE, SKY, VERMILION, save, tidy

    def color(name: str) -> str:
        return {"qtjax": BLUE, "torch": GREY, "peft": GREY, "trl": VERMILION, "tunix": PURPLE}.get(name.split("-")[0], SKY)

    kinds = list(dict.fromkeys(row.kind for row in rows))
    counts = [sum(row.kind == kind for row in rows) for kind in kinds]
    figure = Figure(figsize=(6.5 * len(benches), 1.0 + 0.9 * len(kinds) + 0.3 * sum(counts)), layout="constrained")
    grid = figure.subplots(len(kinds), len(benches), squeeze=False, height_ratios=[n + 1.0 for n in counts])
    for column, bench in enumerate(benches):
        known = medians(bench)
        for kind, axes in zip(kinds, grid[:, column]):
            shown = [row for row in rows if row.kind == kind]
            tidy(axes)
            axes.grid(False, axis="y")
            speeds = [1000 / known[row.name].cpu if row.name in known else 0.0 for row in shown]
            axes.barh(range(len(shown)), speeds, color=[color(row.name) for row in shown], height=0.7)
            for y, (row, speed) in enumerate(zip(shown, speeds)):
                axes.text(speed, y, f" {speed:,.0f}" if speed else " no number", va="center", fontsize=8)
            axes.set_yticks(range(len(shown)), [row.says for row in shown], fontsize=8)
            axes.set_ylim(len(shown) - 0.4, -0.6)
            axes.xaxis.set_major_formatter("{x:,.0f}")
            axes.set_xlim(0, 1.15 * max(speeds) or 1)
            axes.set_title(f"{Path(bench.work.name).name}, {kind}", loc="left", fontsize=10)
    for axes in grid[-1]:
        axes.set_xlabel("useful tokens per CPU second")
    figure.suptitle(heading, fontsize=11, x=0.01, ha="left")
    save(figure, file)
