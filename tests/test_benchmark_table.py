"""The table of pruners: intervals by hand, budgets and pairs as given, a stopped table goes on."""

import json

import pytest
from benchmarks import table
from rich.console import Console

from qtjax.config import Config, override
from qtjax.errors import QtjaxError


def test_interval_by_hand():
    """Values 1, 2, 3: mean 2, t(0.975, 2) = 4.3027, deviation 1, so 4.3027 / sqrt(3)."""
    mean, width = table.interval([1.0, 2.0, 3.0])
    assert mean == 2 and width == pytest.approx(2.48413, abs=1e-4)
    assert table.shown([0.5], ".1f") == "0.5" and table.shown([], ".1f") == "-"


def test_a_cell_s_config_holds_its_pair_budget_and_seed(tmp_path):
    """12.5x50 is 0.125 and 0.5; full data prunes nothing and stops where it is told."""
    made = table.configured(Config(), table.Cell("longest:fastv", "12.5x50"), 3, tmp_path / "run")
    assert (made.prune.sample_pruner, made.prune.token_pruner) == ("longest", "fastv")
    assert (made.prune.sample_keep, made.prune.token_keep, made.train.seed) == (0.125, 0.5, 3)
    full = table.configured(Config(), table.Cell(table.EQUAL_TIME, "25x50"), 0, tmp_path / "run", steps=7)
    assert (full.prune.sample_pruner, full.prune.token_pruner, full.train.max_steps) == ("none", "none", 7)


def result(loss, seconds, steps=10):
    return {"loss": loss, "exact_match": None, "seconds": {"scoring": seconds / 2, "training": seconds / 2}, "steps": steps,
            "tokens": {"kept": 1, "seen": 4}, "provenance": None}  # fmt: skip


def test_full_data_stops_at_the_wall_clock_of_q_tuning(tmp_path):
    """Q-Tuning's median 6 s over a full step's 2 s: three steps."""
    made = table.Table(tmp_path, Config(), Console(quiet=True))
    made.results = {table.Cell(table.FULL, "").key(s): result(1.0, 20.0) for s in range(3)}
    made.results |= {table.Cell(table.Q_TUNING, "25x50").key(s): result(1.0, t) for s, t in enumerate((5.0, 6.9, 100.0))}
    assert made.equal_time_steps("25x50") == 3


def test_finished_runs_are_not_repeated_and_other_settings_refused(tmp_path, monkeypatch):
    """A second table over the same folder runs what is missing only; one of another config is an error."""
    ran = []
    monkeypatch.setattr(table, "run_one", lambda config: ran.append(config.train.seed) or result(1.0, 1.0))
    for last in (1, 2):
        made = table.Table(tmp_path, Config(), Console(quiet=True))
        for seed in range(last + 1):
            made.fill(table.Cell(table.FULL, ""), seed)
    assert ran == [0, 1, 2] and len(json.loads((tmp_path / "results.json").read_text())["results"]) == 3
    with pytest.raises(QtjaxError, match="another train.learning_rate"):
        table.Table(tmp_path, override(Config(), {"train.learning_rate": 1.0}), Console(quiet=True))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--pairs", "randm:random"], "'randm' must be one of.*random"),
        (["--pairs", "random"], "must be SAMPLE:TOKEN"),
        (["--budgets", "25x0"], "--budgets '25x0': must be"),
        (["--budgets", "25"], "--budgets '25': must be"),
        (["--seeds", "0"], "--seeds = 0"),
    ],
)
def test_bad_input_is_one_line(flags, message, tmp_path):
    """Unknown pruners with near names, budgets outside (0, 100], no seed."""
    with pytest.raises(QtjaxError, match=message):
        table.main(["--config", "configs/smol.py", "--out", str(tmp_path), *flags])
