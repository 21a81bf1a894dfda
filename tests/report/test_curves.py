"""Curves over the steps show the sums that the metrics hold."""

import math

import numpy as np
import pytest

from qtjax.errors import QtjaxError
from qtjax.report import curves
from qtjax.report.curves import Series, draw_curves
from qtjax.report.totals import totals


def step(i, **changes):
    q2, supplement = 2 + i % 3, 3
    return {
        "step": i, "epoch": 0, "loss": 2 / i, "samples": 32, "eligible": 32, "kept_samples": 8, "kept_q2": q2, "kept_q3": 0, "kept_q4": 5 - q2,
        "supplement": supplement, "supplement_median_q1": 2, "supplement_median_q2": 0, "supplement_median_q3": 0, "supplement_median_q4": 1,
        "level": math.nan, "target_tokens": 100 * i, "kept_tokens": 20 * i, "closing_tokens": 8, "closing_pruned": 1, "scored_tokens": 400,
        "trained_slots": 64 * i, "fill": 0.5 if i % 2 else 1.0, "seconds_score": 0.25, "seconds_pack": 0.5, "seconds_train": 1.0, "skipped": 0,
    } | changes  # fmt: skip


@pytest.fixture
def figures(monkeypatch):
    seen = []
    save = curves.save
    monkeypatch.setattr(curves, "save", lambda figure, path: (seen.append(figure), save(figure, path))[1])
    return seen


def headings(figure):
    return [axes.get_title(loc="left") for axes in figure.axes]


@pytest.mark.parametrize("steps", [1, 7, 300])
def test_panels_and_shares(tmp_path, figures, steps):
    """Four panels for a pruned run, of any length; legends carry the overall shares; stacks end at the share kept."""
    path = draw_curves([step(i) for i in range(1, steps + 1)], tmp_path / "new" / "c.png")
    assert path.read_bytes().startswith(b"\x89PNG")
    (figure,) = figures
    assert headings(figure) == ["Training loss", "Share kept", "What was kept", "The supplement by median quadrant"]
    legends = [t.get_text() for axes in figure.axes if axes.get_legend() for t in axes.get_legend().get_texts()]
    assert "samples: 25.0% overall" in legends and "trained tokens: 20.0% overall" in legends
    assert "Q1 harmful noise: 66.7%" in legends and "Q4 calibration: 33.3%" in legends
    stack = figure.axes[2]
    if stack.patches:
        top = max(p.get_y() + p.get_height() for p in stack.patches)
    else:
        top = max(c.get_paths()[0].vertices[:, 1].max() for c in stack.collections)
    assert top == pytest.approx(0.25)


def test_full_data_has_two_panels(tmp_path, figures):
    """A run that chooses nothing shows loss and kept share only."""
    rows = [
        {"step": i, "loss": 1.0, "samples": 4, "kept_samples": 4, "target_tokens": 9, "kept_tokens": 9}
        for i in (1, 2, 3)
    ]
    draw_curves(rows, tmp_path / "c.png")
    assert headings(figures[0]) == ["Training loss", "Share kept"]


def test_skipped_steps_have_no_loss(tmp_path, figures):
    """A step without any target was not trained; its loss of 0 is not drawn."""
    draw_curves([step(1), step(2, skipped=1, loss=0.0), step(3)], tmp_path / "c.png")
    np.testing.assert_array_equal(figures[0].axes[0].lines[0].get_ydata(), [2, np.nan, 2 / 3])


def test_running_mean_equals_a_plain_loop():
    """The running mean is the mean of the finite values within half a window."""
    rng = np.random.default_rng(0)
    values = np.where(rng.random(200) < 0.2, np.nan, rng.normal(size=200))
    values[50:70] = np.nan
    series = Series([{"step": i} for i in range(1, 201)])
    half = series.window // 2
    assert half == 2
    expected = [
        np.nan if np.isnan(w).all() else np.nanmean(w)
        for i in range(200)
        for w in [values[max(0, i - half) : i + half + 1]]
    ]
    np.testing.assert_allclose(series.smooth(values), expected, atol=1e-12)


def test_nothing_to_draw_is_one_line(tmp_path):
    """No step at all is an error that says so."""
    with pytest.raises(QtjaxError, match="no step has been recorded"):
        draw_curves([], tmp_path / "c.png")


def test_totals_by_hand():
    """Sums over three steps worked out by hand; fill is weighted by slots; what was not measured counts nothing."""
    found = totals([step(1), step(2), step(3, fill=math.nan, trained_slots=0, loss=math.nan)])
    assert found["steps"] == 3
    assert found["samples"] == {
        "seen": 96, "eligible": 96, "kept": 24, "q2": 3 + 4 + 2, "q3": 0, "q4": 2 + 1 + 3, "supplement": 9,
        "supplement_median": {"1": 6, "2": 0, "3": 0, "4": 3},
    }  # fmt: skip
    assert found["tokens"] == {"seen": 600, "kept": 120, "scored": 1200}
    assert found["closing"] == {"seen": 24, "pruned": 3}
    assert found["fill"] == pytest.approx((0.5 * 64 + 1.0 * 128) / 192)
    assert found["seconds"] == {"scoring": 0.75, "packing": 1.5, "training": 3.0}
    assert totals([])["fill"] is None
