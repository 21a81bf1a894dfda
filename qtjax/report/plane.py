"""The error-uncertainty plane as a picture: perplexity against entropy, what was kept and what was dropped.

Source: arXiv 2509.23873, figure 1a. Samples are scattered up to `max_points`; beyond that the dropped ones become a
density and the kept ones a random subset, which the caption then says.
"""

import os
import textwrap
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter, NullLocator

from qtjax.errors import QtjaxError
from qtjax.report.quadrants import QUADRANT_NAMES
from qtjax.report.style import GREY, INK, KIND_COLORS, PALE, QUADRANT_COLORS, save, tidy, title_size

_MARKERS = {"q2": "^", "q4": "o", "q3": "s", "supplement": "D"}
_LABELS = {
    "q2": "kept Q2, tokens pruned",
    "q4": "kept Q4, whole",
    "q3": "kept Q3, whole",
    "supplement": "kept as supplement, whole",
    "kept": "kept",
}


_DENSITY = LinearSegmentedColormap.from_list("density", ["#E2E2E2", "#6E6E6E"])


def draw_plane(
    columns: Any, path: str | os.PathLike, *, title: str = "", max_points: int = 20_000, seed: int = 0
) -> Path:
    """Draws EU records.

    Args:
      columns: a pyarrow Table or a mapping of arrays [n]: perplexity (>= 1), entropy (nats) and, where a choice was made,
        keep (bool), quadrant (2, 4; article 2, 3; 0 not placed), supplement (bool). Without `keep` the four quadrants by
        the medians are coloured instead. Rows with a NaN or infinite score are left out and counted in the caption.
      path: the PNG; its folder is made.
      title: put on top; empty: "EU plane".
      max_points: most samples drawn one by one.
      seed: of the random subset.
    Returns: the path. Raises QtjaxError if no row has finite scores or the disk refuses.
    """
    data = _arrays(columns)
    finite = np.isfinite(data["perplexity"]) & np.isfinite(data["entropy"])
    left_out = int((~finite).sum())
    data = {name: array[finite] for name, array in data.items()}
    total = len(data["perplexity"])
    if not total:
        raise QtjaxError(f"{path}: nothing to draw: none of the {left_out} samples has a finite perplexity and entropy")
    kinds = _kinds(data)
    crowded = total > max_points
    ppl, ent = data["perplexity"].astype(float), data["entropy"].astype(float)
    median_ppl, median_ent = float(np.median(ppl)), float(np.median(ent))

    figure = Figure(figsize=(9, 8))
    grid = figure.add_gridspec(2, 2, width_ratios=(6, 1), height_ratios=(1, 6), wspace=0.03, hspace=0.03,
                               left=0.085, right=0.98, bottom=0.13, top=0.86)  # fmt: skip
    axes = figure.add_subplot(grid[1, 0])
    top = figure.add_subplot(grid[0, 0], sharex=axes)
    side = figure.add_subplot(grid[1, 1], sharey=axes)
    for each in (axes, top, side):
        tidy(each)
    axes.set_yscale("log")
    _limits(axes, ent, ppl)
    ent, beyond_x = _clip(ent, axes.get_xlim())
    ppl, beyond_y = _clip(ppl, axes.get_ylim())

    rest = kinds.get("dropped")
    if crowded and rest is not None:
        axes.hexbin(ent[rest], ppl[rest], gridsize=70, yscale="log", bins="log", cmap=_DENSITY, mincnt=1, linewidths=0.1,
                    extent=(*axes.get_xlim(), *np.log10(axes.get_ylim())), zorder=2)  # fmt: skip
    elif rest is not None:
        axes.scatter(ent[rest], ppl[rest], s=_size(total), c=PALE, linewidths=0, zorder=2)
    rng = np.random.default_rng(seed)
    chosen = {kind: np.flatnonzero(mask) for kind, mask in kinds.items() if kind != "dropped"}
    if crowded:  # one rate for all kinds, so that their numbers can still be compared by eye
        rate = min(1.0, max_points / 5 / max(1, sum(len(index) for index in chosen.values())))
        chosen = {
            kind: rng.choice(index, int(np.ceil(rate * len(index))), replace=False) for kind, index in chosen.items()
        }
    for kind, index in chosen.items():
        axes.scatter(ent[index], ppl[index], s=_size(total) * (1.2 if kind == "supplement" else 1.6), c=_color(kind),
                     marker=_MARKERS.get(kind, "o"), linewidths=0.3, edgecolors="white", alpha=0.9, zorder=3)  # fmt: skip
    _medians(axes, ppl, ent, median_ppl, median_ent, kinds)
    _margins(top, side, axes, ppl, ent, kinds)
    _ticks(axes)
    axes.set_xlabel("entropy: uncertainty (nats per token)", fontsize=11, color=INK)
    axes.set_ylabel("perplexity: error (log scale)", fontsize=11, color=INK)
    head = title or "EU plane"
    figure.text(0.02, 0.972, head, fontsize=title_size(head, 64), fontweight="bold", color=INK, va="center")
    _legend(figure, kinds, total)
    drawn = sum(len(index) for index in chosen.values())
    caption = _caption(total, left_out, int((beyond_x | beyond_y).sum()), drawn if crowded else 0, kinds)
    figure.text(0.02, 0.06, textwrap.fill(caption, 145), fontsize=8.5, color="#555555", va="top", linespacing=1.4)
    return save(figure, path)


def _arrays(columns: Any) -> dict[str, np.ndarray]:
    wanted = ("perplexity", "entropy", "keep", "quadrant", "supplement")
    names = list(columns) if isinstance(columns, Mapping) else columns.column_names
    return {n: np.asarray(columns[n]) for n in wanted if n in names}


def _kinds(data: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Masks that partition the samples: "dropped", "q4", "q2", "q3", "supplement", "kept" (by a pruner without quadrants); or "1".."4" where nothing was chosen."""
    if "keep" not in data:
        high_ppl = data["perplexity"] > np.median(data["perplexity"])
        high_ent = data["entropy"] > np.median(data["entropy"])
        masks = {
            "1": high_ppl & high_ent,
            "2": high_ppl & ~high_ent,
            "3": ~high_ppl & ~high_ent,
            "4": ~high_ppl & high_ent,
        }
    else:
        keep = data["keep"].astype(bool)
        supplement = keep & data.get("supplement", np.zeros_like(keep)).astype(bool)
        quadrant = data.get("quadrant", np.zeros(len(keep), int))
        masks = {"dropped": ~keep} | {f"q{q}": keep & ~supplement & (quadrant == q) for q in (2, 4, 3)}
        masks |= {"supplement": supplement, "kept": keep & ~supplement & (quadrant == 0)}
    return {kind: mask for kind, mask in masks.items() if mask.any()}


def _color(kind: str) -> str:
    return QUADRANT_COLORS[int(kind)] if kind.isdigit() else KIND_COLORS[kind]


def _size(total: int) -> float:
    return float(np.clip(20_000 / total, 6, 40))


def _limits(axes: Axes, ent: np.ndarray, ppl: np.ndarray) -> None:
    """Frames all but the outermost thousandth on each side, with room for the quadrants' names above and below."""
    low, high = np.quantile(ent, (0.001, 0.999))
    air = 0.04 * (high - low) or 0.1
    axes.set_xlim(low - air, high + air)
    low, high = np.log(np.quantile(ppl, (0.001, 0.999)))
    air = 0.12 * (high - low) or 0.1
    axes.set_ylim(np.exp(low - air), np.exp(high + air))


def _clip(values: np.ndarray, limits: tuple[float, float]) -> tuple[np.ndarray, np.ndarray]:
    """Values moved to the frame's edge where they lie beyond it, and which ones those are."""
    low, high = limits
    return np.clip(values, low, high), (values < low) | (values > high)


def _ticks(axes: Axes) -> None:
    """Plain numbers on the log axis, as many as its span needs."""
    low, high = axes.get_ylim()
    if high / low > 1.6:
        subs = (1,) if high / low > 2000 else (1, 2, 5) if high / low > 12 else (1, 1.2, 1.5, 2, 2.5, 3, 4, 5, 6, 8)
        axes.yaxis.set_major_locator(LogLocator(subs=subs))
    else:
        axes.yaxis.set_major_locator(MaxNLocator(6))
        axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:,.0f}" if value >= 100 else f"{value:.3g}")


def _percent(share: float) -> str:
    return f"{share:.1%}" if 0 < share < 0.0995 else f"{share:.0%}"


def _medians(
    axes: Axes, ppl: np.ndarray, ent: np.ndarray, median_ppl: float, median_ent: float, kinds: Iterable[str]
) -> None:
    axes.axhline(median_ppl, color=INK, linewidth=1, linestyle=(0, (4, 3)), zorder=4)
    axes.axvline(median_ent, color=INK, linewidth=1, linestyle=(0, (4, 3)), zorder=4)
    corners = {
        1: (0.985, 0.985, "right", "top"),
        2: (0.015, 0.985, "left", "top"),
        3: (0.015, 0.015, "left", "bottom"),
        4: (0.985, 0.015, "right", "bottom"),
    }
    high_ppl, high_ent = ppl > median_ppl, ent > median_ent
    members = {1: high_ppl & high_ent, 2: high_ppl & ~high_ent, 3: ~high_ppl & ~high_ent, 4: ~high_ppl & high_ent}
    style = {"fontsize": 10, "fontweight": "bold", "linespacing": 1.3, "zorder": 5}
    style["bbox"] = {"facecolor": "white", "alpha": 0.8, "edgecolor": "none", "pad": 2}
    for quadrant, (x, y, ha, va) in corners.items():
        named = f"q{quadrant}" in kinds or str(quadrant) in kinds
        text = f"Q{quadrant} {QUADRANT_NAMES[quadrant]}\n{_percent(members[quadrant].mean())} of samples"
        color = QUADRANT_COLORS[quadrant] if named else "#666666"
        axes.text(x, y, text, transform=axes.transAxes, ha=ha, va=va, color=color, **style)


def _margins(top: Axes, side: Axes, axes: Axes, ppl: np.ndarray, ent: np.ndarray, kinds: dict[str, np.ndarray]) -> None:
    """Stacked histograms of the same kinds in the same colours."""
    colors = [PALE if kind == "dropped" else _color(kind) for kind in kinds]
    top.hist([ent[m] for m in kinds.values()], bins=np.linspace(*axes.get_xlim(), 60), stacked=True, color=colors)
    bins = np.geomspace(*axes.get_ylim(), 60)
    side.hist([ppl[m] for m in kinds.values()], bins=bins, stacked=True, color=colors, orientation="horizontal")
    for each in (top, side):
        each.grid(False)
    top.tick_params(labelbottom=False)
    side.tick_params(labelleft=False, which="both")
    top.yaxis.set_major_locator(MaxNLocator(3, integer=True))
    side.xaxis.set_major_locator(MaxNLocator(2, integer=True))
    for axis in (top.yaxis, side.xaxis):
        axis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    top.set_ylabel("samples", fontsize=9, color="#666666")
    side.set_xlabel("samples", fontsize=9, color="#666666")


def _legend(figure: Figure, kinds: dict[str, np.ndarray], total: int) -> None:
    handles, labels = [], []
    for kind, mask in kinds.items():
        count = int(mask.sum())
        color = GREY if kind == "dropped" else _color(kind)
        handles.append(Line2D([], [], color=color, marker=_MARKERS.get(kind, "o"), markersize=7, linestyle="none"))
        name = _LABELS.get(kind) or ("dropped" if kind == "dropped" else f"Q{kind} {QUADRANT_NAMES[int(kind)]}")
        labels.append(f"{name}: {count:,} ({_percent(count / total)})")
    figure.legend(handles, labels, loc="upper left", bbox_to_anchor=(0.01, 0.955), ncols=2, frameon=False, fontsize=10,
                  handletextpad=0.2, columnspacing=2.0)  # fmt: skip


def _caption(total: int, left_out: int, beyond: int, drawn: int, kinds: Iterable[str]) -> str:
    """`drawn`: how many chosen samples are shown where not all are, else 0."""
    parts = [f"{total:,} scored samples; dashed lines: their medians"]
    if "dropped" in kinds:
        parts.append("the choice is made within each scoring batch, so the borders of what is kept are not sharp here")
    if drawn and "dropped" in kinds:
        parts.append(f"grey: density of the dropped (log scale); coloured: {drawn:,} of the kept, chosen at random")
    elif drawn:
        parts.append(f"shown: {drawn:,}, chosen at random")
    if beyond:
        parts.append(f"{beyond:,} beyond the frame are drawn on its edge")
    if left_out:
        parts.append(f"{left_out:,} without finite scores left out")
    return "; ".join(parts) + "."
