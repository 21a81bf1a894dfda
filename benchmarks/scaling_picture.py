"""The picture of benchmarks.scaling: up to four panels, in each how many times the smallest size's time and memory a size takes."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from qtjax.report.style import BLUE, GREEN, GREY, INK, PURPLE, SKY, VERMILION, save, tidy, title_size

# panel: (heading, x axis)
PANELS = {
    "length": ("Length of a row", "tokens"), "batch": ("Rows of a launch", "rows"), "model": ("Size of the model", "million parameters"),
    "data": ("Rows of data", "rows"),
}  # fmt: skip
# label: (part of a row, its number, colour, dash, marker)
STEPS = {
    "training, CPU time a token": ("train", "cpu", VERMILION, "-", "o"), "scoring, CPU time a token": ("score", "cpu", BLUE, "-", "s"),
    "training, temporaries": ("train", "temporaries", VERMILION, "--", "o"), "scoring, temporaries": ("score", "temporaries", BLUE, "--", "s"),
}  # fmt: skip
DATA = {
    "tokenizing, CPU time a row": ("tokenized", "cpu", GREEN, "-", "o"), "reading, CPU time a row": ("epoch", "cpu", PURPLE, "-", "s"),
    "own memory": ("epoch", "own", SKY, "--", "o"), "peak memory": ("epoch", "peak", GREY, "--", "s"),
}  # fmt: skip


def draw(report: Mapping[str, Any], path: str | os.PathLike) -> Path:
    """Draws the panels that were measured; returns the path. Raises QtjaxError if the disk refuses."""
    found = [name for name in PANELS if report["panels"].get(name)]
    deep = (len(found) + 1) // 2
    figure = Figure(figsize=(11, 0.9 + 3.9 * deep), layout="constrained")
    figure.get_layout_engine().set(w_pad=0.15, h_pad=0.12)
    head = f"Time and memory, in multiples of the smallest size: {report['machine']}"
    figure.suptitle(head, fontsize=title_size(head, 78), fontweight="bold", color=INK, x=0.015, ha="left")
    for at, name in enumerate(found):
        axes = figure.add_subplot(deep, min(len(found), 2), at + 1)
        tidy(axes)
        _panel(axes, name, report["panels"][name], f"{report['tokens']:,} tokens a launch" if name == "length" else "")
    return save(figure, path)


def multiples(rows: Sequence[Mapping[str, Any]], part: str, name: str) -> list[tuple[float, float]]:
    """(n, value over that of the first row), without what was not measured."""
    known = [(row["n"], row[part][name]) for row in rows if row[part][name]]
    return [(n, value / known[0][1]) for n, value in known]


def _panel(axes: Axes, name: str, rows: Sequence[Mapping[str, Any]], note: str) -> None:
    heading, unit = PANELS[name]
    scale = 1e6 if name == "model" else 1
    for label, (part, number, color, dash, marker) in (DATA if name == "data" else STEPS).items():
        points = [(n / scale, value) for n, value in multiples(rows, part, number)]
        if points:
            axes.plot(*zip(*points), color=color, linestyle=dash, marker=marker, markersize=4, linewidth=1.8, label=label)
    first, last = rows[0]["n"] / scale, rows[-1]["n"] / scale
    axes.set(xscale="log", yscale="log")
    low, high = axes.get_ylim()
    top = max(high, 1.5) * 3  # room for the legend
    reach = min(last / first, top / 2.5)  # proportional growth, as far as it stays below
    axes.plot([first, first * reach], [1, reach], color=GREY, linewidth=1, linestyle=":", label="proportional to n", zorder=1)
    axes.set_ylim(min(low, 0.7), top)
    axes.set_title(heading, loc="left", fontsize=11.5, fontweight="bold", color=INK, pad=8)
    axes.set_title(note, loc="right", fontsize=9, color="#666666", pad=8)
    axes.set_xlabel(unit, fontsize=10, color=INK)
    axes.set_ylabel("times the smallest", fontsize=10, color=INK)
    axes.set_xticks([row["n"] / scale for row in rows])
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}" if value >= 10 or value == round(value) else f"{value:.1f}"))
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_minor_formatter(NullFormatter())
    axes.legend(frameon=False, fontsize=8.5, handlelength=2.6, loc="upper left", ncols=2)
