"""Loss and what was kept over the optimizer steps, from the metrics of a run."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from qtjax.errors import QtjaxError
from qtjax.report.quadrants import QUADRANT_NAMES
from qtjax.report.style import BLUE, INK, KIND_COLORS, QUADRANT_COLORS, SKY, VERMILION, save, tidy, title_size

_FEW = 60  # up to so many steps a step is drawn by itself


def draw_curves(metrics: Sequence[Mapping[str, Any]], path: str | os.PathLike, *, title: str = "") -> Path:
    """Draws up to four panels: loss; share of samples and tokens kept; which kind was kept; where the supplement came from.

    Args:
      metrics: one mapping a step, as a run folder reads them (`step`, `loss`, `samples`, `kept_samples`, ...; NaN where not
        measured). Panels whose metrics are missing (full-data training) are left out.
      path: the PNG; its folder is made.
      title: put on top; empty: "Training".
    Returns: the path. Raises QtjaxError if there is no step, or if the disk refuses.
    """
    if not metrics:
        raise QtjaxError(f"{path}: nothing to draw: no step has been recorded yet")
    series = Series(metrics)
    panels = [_loss, _kept]
    if series.total("kept_q2", "kept_q3", "kept_q4", "supplement"):
        panels.append(_composition)
    if series.total("supplement_median_q1", "supplement_median_q2", "supplement_median_q3", "supplement_median_q4"):
        panels.append(_supplement)
    rows = (len(panels) + 1) // 2
    figure = Figure(figsize=(11, 0.9 + 3.7 * rows), layout="constrained")
    figure.get_layout_engine().set(w_pad=0.15, h_pad=0.12)
    head = title or "Training"
    figure.suptitle(head, fontsize=title_size(head, 78), fontweight="bold", color=INK, x=0.015, ha="left")
    grid = figure.add_gridspec(rows, 2)
    for i, panel in enumerate(panels):
        alone = i == len(panels) - 1 and i % 2 == 0  # the last of three takes the whole lower row
        axes = figure.add_subplot(grid[i // 2, :] if alone else grid[i // 2, i % 2])
        tidy(axes)
        panel(axes, series)
        axes.set_xlabel("optimizer step", fontsize=10, color=INK)
        axes.xaxis.set_major_locator(MaxNLocator(7, integer=True, steps=[1, 2, 5, 10], min_n_ticks=1))
        axes.set_xlim(series.steps[0] - 0.5, series.steps[-1] + 0.5)
    return save(figure, path)


class Series:
    """Metrics as arrays over the steps, NaN where a step has no value, and their running means."""

    def __init__(self, metrics: Sequence[Mapping[str, Any]]):
        self._metrics = metrics
        self.steps = self["step"]
        # about forty independent points over the width of a panel, whatever the length of the run
        self.window = max(1, len(metrics) // 40)

    def __getitem__(self, name: str) -> np.ndarray:
        values = (m.get(name) for m in self._metrics)
        return np.array([np.nan if v is None else float(v) for v in values])

    def total(self, *names: str) -> float:
        return float(sum(np.nansum(self[name]) for name in names))

    def smooth(self, values: np.ndarray) -> np.ndarray:
        """Mean over a centred window of `window` steps, narrower at the ends; NaN counts as missing."""
        half = self.window // 2
        known = np.isfinite(values)
        sums = np.concatenate([[0.0], np.cumsum(np.where(known, values, 0.0))])
        counts = np.concatenate([[0], np.cumsum(known)])
        i = np.arange(len(values))
        low, high = np.maximum(i - half, 0), np.minimum(i + half + 1, len(values))
        count = counts[high] - counts[low]
        return np.where(count, (sums[high] - sums[low]) / np.maximum(count, 1), np.nan)

    def share(self, part: str, whole: str) -> np.ndarray:
        """Smoothed part over smoothed whole, so that small batches weigh little; NaN where there is no whole."""
        above, below = self.smooth(self[part]), self.smooth(self[whole])
        return np.divide(above, below, out=np.full(len(above), np.nan), where=below > 0)


def _heading(axes: Axes, text: str, note: str = "") -> None:
    axes.set_title(text, loc="left", fontsize=11.5, fontweight="bold", color=INK, pad=8)
    if note:
        axes.set_title(note, loc="right", fontsize=9, color="#666666", pad=8)


def _legend(axes: Axes, **kwargs: Any) -> None:
    axes.legend(frameon=False, fontsize=9, handlelength=1.4, **kwargs)


def _loss(axes: Axes, series: Series) -> None:
    loss = np.where(series["skipped"] > 0, np.nan, series["loss"])
    if series.window > 1:
        axes.plot(series.steps, loss, color=SKY, linewidth=0.8, alpha=0.5, label="each step")
        axes.plot(
            series.steps,
            series.smooth(loss),
            color=BLUE,
            linewidth=2,
            label=f"mean of {series.window // 2 * 2 + 1} steps",
        )
        _legend(axes, loc="upper right")
    else:
        axes.plot(series.steps, loss, color=BLUE, linewidth=1.8, marker="o", markersize=3)
    axes.set_ylabel("nats per kept token", fontsize=10, color=INK)
    _heading(axes, "Training loss", "of the tokens kept")


def _kept(axes: Axes, series: Series) -> None:
    lines = (
        ("samples", "kept_samples", "samples", BLUE, "-"),
        ("trained tokens", "kept_tokens", "target_tokens", VERMILION, "--"),
    )
    highest = 0.05
    for label, part, whole, color, style in lines:
        share, overall = series.share(part, whole), series.total(part) / max(series.total(whole), 1)
        highest = np.nanmax([highest, *share])
        marker = {"marker": "o", "markersize": 3} if len(share) <= _FEW else {}
        axes.plot(
            series.steps,
            share,
            color=color,
            linestyle=style,
            linewidth=2,
            label=f"{label}: {overall:.1%} overall",
            **marker,
        )
    _percent(axes, highest)
    _legend(axes, loc="upper left", ncols=2)
    _heading(axes, "Share kept")


def _stack(axes: Axes, series: Series, names: Mapping[str, tuple[str, str]], whole: str) -> None:
    """Stacked areas (bars for few steps) of {metric: (label, colour)} as shares of all samples; labels: shares of `whole`."""
    total = max(series.total(whole), 1)
    base = np.zeros(len(series.steps))
    for name, (label, color) in names.items():
        if not series.total(name):
            continue
        top = base + np.nan_to_num(series.share(name, "samples"))
        label = f"{label}: {series.total(name) / total:.1%}"
        if len(base) <= _FEW:
            axes.bar(
                series.steps,
                top - base,
                bottom=base,
                width=1.0,
                color=color,
                label=label,
                linewidth=0.5,
                edgecolor="white",
            )
        else:
            axes.fill_between(series.steps, base, top, color=color, label=label, linewidth=0.5, edgecolor="white")
        base = top
    _percent(axes, float(base.max()))
    _legend(axes, loc="upper left", ncols=2)


def _composition(axes: Axes, series: Series) -> None:
    names = {"kept_q2": ("Q2, tokens pruned", KIND_COLORS["q2"]), "kept_q4": ("Q4, whole", KIND_COLORS["q4"]),
             "kept_q3": ("Q3, whole", KIND_COLORS["q3"]), "supplement": ("supplement, whole", KIND_COLORS["supplement"])}  # fmt: skip
    _stack(axes, series, names, "samples")
    _heading(axes, "What was kept", "share of all samples")


def _supplement(axes: Axes, series: Series) -> None:
    names = {f"supplement_median_q{q}": (f"Q{q} {QUADRANT_NAMES[q]}", QUADRANT_COLORS[q]) for q in (2, 4, 3, 1)}
    _stack(axes, series, names, "supplement")
    _heading(axes, "The supplement by median quadrant", "share of all samples")


def _percent(axes: Axes, highest: float) -> None:
    """A percent axis from 0 with room for a legend above the highest value."""
    axes.set_ylim(0, 1.3 * highest)
    ticks = MaxNLocator(7, steps=[1, 2, 5, 10]).tick_values(0, 1.3 * highest)
    axes.set_yticks([tick for tick in ticks if tick <= min(1.0, 1.3 * highest) + 1e-9])
    axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0 if highest > 0.05 else 1))
