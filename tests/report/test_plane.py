"""The picture of the EU plane shows what the records say."""

import numpy as np
import pyarrow as pa
import pytest
from matplotlib.figure import Figure
from matplotlib.image import imread

from qtjax.errors import QtjaxError
from qtjax.report import plane
from qtjax.report.plane import draw_plane
from qtjax.report.style import KIND_COLORS


@pytest.fixture
def figures(monkeypatch):
    """The figures that were saved, with the paths."""
    seen = []
    save = plane.save
    monkeypatch.setattr(plane, "save", lambda figure, path: (seen.append(figure), save(figure, path))[1])
    return seen


def records(n, seed=0):
    rng = np.random.default_rng(seed)
    keep = rng.random(n) < 0.3
    quadrant = np.where(keep, rng.choice([0, 2, 4], n), 0)
    return {
        "perplexity": np.exp(rng.gamma(2, 0.5, n)).astype(np.float32),
        "entropy": rng.gamma(2, 0.5, n).astype(np.float32),
        "keep": keep,
        "quadrant": quadrant,
        "supplement": keep & (quadrant == 0),
    }


def texts(figure: Figure):
    found = [t.get_text() for axes in figure.axes for t in axes.texts] + [t.get_text() for t in figure.texts]
    return "\n".join(found + [t.get_text() for legend in figure.legends for t in legend.get_texts()])


def test_every_sample_is_drawn_once_in_its_colour(tmp_path, figures):
    """Points per colour are the kept counts by kind; the rest is one grey cloud; the legend carries the counts."""
    columns = records(500)
    path = draw_plane(columns, tmp_path / "deep" / "plane.png", title="A run")
    (figure,) = figures
    main = figure.axes[0]
    assert main.get_yscale() == "log"
    points = [c.get_offsets() for c in main.collections if len(c.get_offsets())]
    supplement = columns["supplement"].sum()
    q2, q4 = (((columns["quadrant"] == q) & columns["keep"]).sum() for q in (2, 4))
    assert [len(p) for p in points] == [500 - columns["keep"].sum(), q2, q4, supplement]
    np.testing.assert_allclose(points[-1].min(axis=0)[0], columns["entropy"][columns["supplement"]].min())
    words = texts(figure)
    assert f"kept Q2, tokens pruned: {q2} (" in words and f"kept Q4, whole: {q4} (" in words
    assert f"kept as supplement, whole: {supplement} (" in words and "A run" in words
    for name in ("harmful noise", "misconception", "redundant", "calibration"):
        assert name in words
    image = imread(path)
    assert image.shape[0] > 800 and image.shape[1] > 800
    for color in KIND_COLORS["q2"], KIND_COLORS["q4"], KIND_COLORS["supplement"]:
        rgb = np.array([int(color[i : i + 2], 16) for i in (1, 3, 5)]) / 255
        assert (np.abs(image[..., :3] - rgb).max(axis=-1) < 0.02).sum() > 100, "the colour is really on the picture"


def test_medians_divide_the_plane(tmp_path, figures):
    """The dashed lines stand at the medians of the samples shown, and the quadrants' shares are counted by them."""
    columns = {"perplexity": np.array([1.0, 2, 3, 40, 50]), "entropy": np.array([1.0, 2, 3, 4, 0.5])}
    draw_plane(columns, tmp_path / "p.png")
    lines = [line.get_xydata() for line in figures[0].axes[0].lines]
    assert lines[0][0, 1] == 3 and lines[1][0, 0] == 2
    words = texts(figures[0])
    assert "Q1 harmful noise\n20% of samples" in words and "Q2 misconception\n20% of samples" in words
    assert "Q3 redundant\n40% of samples" in words and "Q4 calibration\n20% of samples" in words


def test_crowds_become_a_density_and_say_so(tmp_path, figures):
    """Beyond max_points fewer points are drawn, at one rate for all kinds, and the caption says so."""
    columns = records(5000)
    draw_plane(columns, tmp_path / "p.png", max_points=1000)
    scatters = [c for c in figures[0].axes[0].collections if type(c).__name__ == "PathCollection"]
    counts = [len(c.get_offsets()) for c in scatters]
    assert 195 <= sum(counts) <= 205
    kept = [int((columns["keep"] & (columns["quadrant"] == q)).sum()) for q in (2, 4, 0)]
    np.testing.assert_allclose(counts, np.array(kept) * 200 / sum(kept), atol=1.01)
    assert "density" in texts(figures[0]) and "at random" in texts(figures[0]).replace("\n", " ")


def test_unusable_scores_are_counted(tmp_path, figures):
    """Rows without finite scores are left out and the caption counts them; a table of pyarrow works as a mapping does."""
    columns = records(50)
    columns["perplexity"][:3] = np.nan
    columns["entropy"][3] = np.inf
    draw_plane(pa.table(columns), tmp_path / "p.png")
    assert "4 without finite scores left out" in texts(figures[0]).replace("\n", " ")
    assert "46 scored samples" in texts(figures[0])


def test_nothing_to_draw_is_one_line(tmp_path):
    """No finite score at all is an error that says so, and no file is left."""
    with pytest.raises(QtjaxError, match="nothing to draw"):
        draw_plane({"perplexity": np.array([np.nan]), "entropy": np.array([1.0])}, tmp_path / "p.png")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("n", [1, 2])
def test_degenerate_clouds_are_drawn(tmp_path, n):
    """One sample, equal samples, perplexity exactly 1: still a picture."""
    draw_plane({"perplexity": np.ones(n), "entropy": np.zeros(n)}, tmp_path / "p.png")
    assert imread(tmp_path / "p.png").size


def test_a_full_disk_leaves_the_old_picture(tmp_path, monkeypatch):
    """A picture is replaced whole or not at all."""
    path = draw_plane(records(20), tmp_path / "p.png")
    before = path.read_bytes()

    def full(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("os.write", full)
        with pytest.raises(QtjaxError, match="disk is full"):
            draw_plane(records(30), path)
    assert path.read_bytes() == before and len(list(tmp_path.iterdir())) == 1
