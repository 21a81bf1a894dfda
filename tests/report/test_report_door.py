"""`python -m qtjax.report RUN_FOLDER` rebuilds table and pictures from the files alone."""

import math
import os

import numpy as np
import pytest

from qtjax.config import Config, override
from qtjax.errors import QtjaxError
from qtjax.report.__main__ import main
from qtjax.training.run_folder import RunFolder


def make_run(path, *, steps=4, scored=True, finished=True):
    """A run of two epochs with 16 samples a step, a quarter of them kept."""
    rng = np.random.default_rng(0)
    with RunFolder.open(override(Config(), {"run.folder": str(path)})) as folder:
        for step in range(1, steps + 1):
            keep = np.arange(16) < 4
            metrics = {"loss": 1 / step, "samples": 16, "kept_samples": 4 if scored else 16, "target_tokens": 160}
            metrics |= {
                "kept_tokens": 40 if scored else 160,
                "seconds_score": 1.0,
                "seconds_pack": 1.0,
                "seconds_train": 2.0,
            }
            folder.log_step(
                step, metrics | ({"kept_q2": 2, "kept_q4": 2, "eligible": 16} if scored else {"eligible": 16})
            )
            if scored:
                folder.log_samples(
                    step,
                    {
                        "epoch": (step - 1) // 2, "row": np.arange(16), "perplexity": np.exp(rng.random(16)), "entropy": rng.random(16),
                        "count": np.full(16, 10), "quadrant": np.where(keep, 2 + 2 * (np.arange(16) % 2), 0), "keep": keep,
                        "median_quadrant": rng.integers(1, 5, 16), "supplement": np.zeros(16, bool), "kept_tokens": keep * 10,
                    },
                )  # fmt: skip
        folder.flush()
        if finished:
            folder.write_summary(
                {
                    "title": "a run",
                    "steps": steps,
                    "fill": math.nan,
                    "samples": {"seen": 64, "kept": 16, "q2": 8, "q4": 8},
                    "tokens": {"seen": 640, "kept": 160},
                }  # fmt: skip
            )
    return path


def test_a_finished_run(tmp_path, capsys):
    """Table and three pictures: both epochs' planes and the curves; each one is named."""
    run = make_run(tmp_path / "run")
    main([str(run)])
    text = capsys.readouterr().out
    assert "samples kept" in text and "25.0%" in text
    assert sorted(os.listdir(run / "pictures")) == ["curves.png", "eu_plane.png", "eu_plane_last.png"]
    assert text.count("drawn: ") == 3


def test_an_unfinished_run(tmp_path, capsys):
    """A run that is still going on (and holds the lock) can be looked at; the table says that it has not finished."""
    run = make_run(tmp_path / "run", finished=False)
    with RunFolder.open(override(Config(), {"run.folder": str(run)})):
        main([str(run), "--out", str(tmp_path / "elsewhere"), "--markdown"])
    text = capsys.readouterr().out
    assert "run (not finished): 4 steps" in text and "| samples kept | 16 | 64 | 25.0% |" in text
    assert not (run / "pictures").exists() and len(os.listdir(tmp_path / "elsewhere")) == 3


def test_full_data_draws_no_plane(tmp_path, capsys):
    """Where nothing was scored there is no plane to draw."""
    run = make_run(tmp_path / "run", scored=False, finished=False)
    main([str(run)])
    assert os.listdir(run / "pictures") == ["curves.png"]


def test_a_run_without_a_step(tmp_path, capsys):
    """A run killed before its first step says so instead of failing."""
    main([str(make_run(tmp_path / "run", steps=0, finished=False))])
    assert "no step has been recorded yet" in capsys.readouterr().out


def test_no_run_is_one_line(tmp_path):
    """A folder that is no run is named."""
    with pytest.raises(QtjaxError, match="not a run folder"):
        main([str(tmp_path)])
