"""The table of pruners: intervals by hand, budgets and pairs as given, a stopped table goes on."""

import dataclasses
import json
import os

import pytest
from benchmarks import noise, table
from rich.console import Console

from qtjax.config import Config, DataSection, override
from qtjax.errors import Diverged, QtjaxError
from qtjax.smol.instruct import load_rows
from qtjax.training.pruners import pruners
from qtjax.training.run_folder import take_lock


def test_interval_by_hand():
    """Values 1, 2, 3: mean 2, t(0.975, 2) = 4.3027, deviation 1, so 4.3027 / sqrt(3)."""
    mean, width = table.interval([1.0, 2.0, 3.0])
    assert mean == 2 and width == pytest.approx(2.48413, abs=1e-4)
    assert table.shown([0.5], ".1f") == "0.5" and table.shown([], ".1f") == "-"


def test_a_cell_s_config_holds_its_pair_budget_and_seed(tmp_path):
    """12.5x50 is 0.125 and 0.5; full data prunes nothing and stops where it is told."""
    made = table.configured(Config(), table.Cell("longest:fastv", table.Column("12.5x50")), 3, tmp_path / "run")
    assert (made.prune.sample_pruner, made.prune.token_pruner) == ("longest", "fastv")
    assert (made.prune.sample_keep, made.prune.token_keep, made.train.seed) == (0.125, 0.5, 3)
    base = override(Config(), {"prune.warmup_fraction": 0.1, "prune.score_every": 2, "prune.batch_size": 16})
    full = table.configured(base, table.full(table.Column("25x50")), 0, tmp_path / "run")
    assert full.prune == dataclasses.replace(Config().prune, sample_pruner="none", token_pruner="none", batch_size=16)
    pruners(full.prune)  # nothing in it that needs pruning
    full = table.configured(Config(), table.Cell(table.EQUAL_TIME, table.Column("25x50")), 0, tmp_path / "run", steps=7)
    assert (full.prune.sample_pruner, full.prune.token_pruner, full.train.max_steps) == ("none", "none", 7)
    row = "q-tuning:none+token_scope=q2+q4+mode=drop"
    assert table.settings_of(row, Config())["prune.token_scope"] == "q2+q4" and table.named(row) == "q-tuning x none, token_scope=q2+q4, mode=drop"
    row = "q-tuning:q-tuning+policy=article+neighbor_weight=0.25+train.loss=dft"
    made = table.configured(Config(), table.Cell(row, table.Column("25x50")), 0, tmp_path / "run")
    assert (made.prune.policy, made.prune.neighbor_weight, made.train.loss) == ("article", 0.25, "dft")


def result(loss, seconds, steps=10):
    return {"loss": loss, "exact_match": None, "ended": None, "tasks": {}, "steps": steps, "tokens": {"kept": 1, "seen": 4, "trained": 2000},
            "closing": {"pruned": 1, "seen": 10}, "by_epoch": {"spearman": [None]},
            "seconds": {"scoring": seconds / 2, "training": seconds / 2}, "samples": {"kept": 1, "seen": 4}, "provenance": None}  # fmt: skip


def test_full_data_stops_at_the_wall_clock_of_q_tuning(tmp_path):
    """Q-Tuning's median 6 s over a full step's 2 s: three steps."""
    made = table.Table(tmp_path, Config(), Console(quiet=True))
    column = table.Column("25x50")
    made.results = {table.full(column).key(s): result(1.0, 20.0) for s in range(3)}
    made.results |= {table.Cell(table.Q_TUNING, column).key(s): result(1.0, t) for s, t in enumerate((5.0, 6.9, 100.0))}
    made.results[table.Cell(table.Q_TUNING + "+mode=drop", column).key(0)] = result(1.0, 1000.0)
    made.results[table.Cell(table.Q_TUNING, table.Column("25x50", "30")).key(0)] = result(1.0, 1000.0)
    assert made.equal_time_steps(column) == 3


def test_finished_runs_are_not_repeated_and_other_settings_refused(tmp_path, monkeypatch):
    """A second table over the same folder runs what is missing only; one of another config is an error."""
    ran = []
    monkeypatch.setattr(table, "run_one", lambda config, *choice: ran.append(config.train.seed) or result(1.0, 1.0))
    for last in (1, 2):
        made = table.Table(tmp_path, Config(), Console(quiet=True))
        for seed in range(last + 1):
            made.fill(table.full(table.Column("25x50")), seed)
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
        (["--noise", "0,101"], "--noise '101': must be"),
        (["--pairs", "random:random+polcy=paper"], "prune.polcy: no such field.*prune.policy"),
        (["--pairs", "random:random+neighbor_weight=x"], "neighbor_weight = 'x': must be a number"),
        (["--pairs", "q-tuning:q-tuning+neighbor_weight=2"], "neighbor_weight = 2.0: is a fraction"),
        (["--seeds", "0"], "--seeds = 0"),
        (["--pairs", "random:random+run.folder=x"], "run.folder is set by the table itself"),
        (["--pairs", "random:random+policy=article"], "neither of the two pruners has prune.policy"),
        (["--pairs", "q-tuning:random+neighbor_weight=0.1"], "neither of the two pruners has prune.neighbor_weight"),
        (["--budgets", "25x50,25.0x50"], "names one column twice"),
        (["--pairs", "random:random+sample_keep=0.5"], "sample_keep is set by the table itself"),
        (["--pairs", "q-tuning:rho-1"], "reference_model = ''"),
        (["--pairs", ","], "--pairs: is empty"),
        (["--noise", "0,30", "--data.eval-path", ""], "data.eval_path = ''"),
        (["--choice-form", "clause"], "choice-form 'clause': must be one of"),
        (["--choice", "nowhere.jsonl"], "nowhere.jsonl"),
    ],
)
def test_bad_input_is_one_line(flags, message, tmp_path):
    """Unknown pruners with near names, budgets outside (0, 100], no seed."""
    with pytest.raises(QtjaxError, match=message):
        table.main(["--config", "configs/smol.py", "--out", str(tmp_path), *flags])


def test_noise_gives_a_known_share_of_rows_another_row_s_answer(tmp_path):
    """30 % of smol-instruct's rows without the mislabelled ones: as many are "injected", of the same task, each differs."""
    data = DataSection(path="smol-instruct", split="train", eval_path="smol-instruct", eval_split="test")
    noise.write_noisy(data, 0.3, 5, tmp_path / "noisy.jsonl")
    rows = [json.loads(line) for line in (tmp_path / "noisy.jsonl").read_text().splitlines()]
    original = {row["id"]: row for row in load_rows("train")}
    assert len(rows) == sum(row["provenance"] != "mislabelled" for row in original.values())
    wrong = [row for row in rows if row["messages"] != original[row["id"]]["messages"]]
    assert {row["id"] for row in wrong} == {row["id"] for row in rows if row["provenance"] == noise.INJECTED}
    assert len(wrong) == round(0.3 * len(rows))
    answers = {(row["task"], row["messages"][1]["content"]) for row in original.values()}
    assert all((row["task"], row["messages"][1]["content"]) in answers for row in wrong)
    noise.write_noisy(data, 0.3, 5, tmp_path / "again.jsonl")
    assert (tmp_path / "again.jsonl").read_bytes() == (tmp_path / "noisy.jsonl").read_bytes()


@pytest.mark.parametrize(("rows", "message"), [
    ([{"text": "a"}], "one answer a row"),
    ([{"prompt": "a", "completion": "x"}, {"prompt": "b", "completion": "x"}], "same answer"),
])  # fmt: skip
def test_noise_refuses_rows_that_have_no_wrong_answer(rows, message, tmp_path):
    """Plain text has no answer; where all answers are alike there is no wrong one."""
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(QtjaxError, match=message):
        noise.write_noisy(DataSection(path=str(file), eval_fraction=0.0), 1.0, 0, tmp_path / "noisy.jsonl")


def test_a_metric_s_mean_is_taken_epoch_by_epoch():
    """Steps say their epoch; steps without the metric, and NaN, do not count; an epoch without any has none."""
    metrics = [{"epoch": 0, "level": 0.2}, {"epoch": 0, "level": 0.4}, {"epoch": 1}, {"epoch": 2, "level": float("nan")}, {"epoch": 2, "level": 1.0}]
    assert table.by_epoch(metrics, "level") == [0.3, None, 1.0]


def test_equal_time_may_be_longer_than_the_config_and_stays_what_it_was(tmp_path):
    """Where pruning is slower than full data, equal time is more than the config's epochs; a second call with other medians
    keeps the number of steps."""
    column = table.Column("25x50")
    made = table.configured(Config(), table.Cell(table.EQUAL_TIME, column), 0, tmp_path / "run", steps=900)
    assert made.train.max_steps == 900 and made.train.epochs > Config().train.epochs
    held = table.Table(tmp_path, Config(), Console(quiet=True))
    held.results = {table.full(column).key(0): result(1.0, 20.0), table.Cell(table.Q_TUNING, column).key(0): result(1.0, 6.0),
                    table.Cell(table.EQUAL_TIME, column).key(0): result(1.0, 1.0, steps=5)}  # fmt: skip
    assert held.equal_time_steps(column) == 5


def test_noise_is_not_taken_from_twice(tmp_path):
    """The file holds the rows of the part and number asked for, so that a noisy cell's config asks for all of it."""
    config = override(Config(), {"data.part": "2/3", "data.max_samples": 10, "data.eval_path": "smol-instruct"})
    made = table.configured(config, table.Cell("random:random", table.Column("25x50", "30")), 0, tmp_path / "run", data_path="noisy.jsonl")
    assert (made.data.path, made.data.part, made.data.max_samples) == ("noisy.jsonl", "", 0)


def test_provenance_says_recall_and_precision_by_hand():
    """Of 10 clean rows 4 dropped, of 5 wrong ones 4: half of what is dropped is wrong."""
    counts = {"clean": {"seen": 10, "kept": 6}, "wrong": {"seen": 5, "kept": 1}}
    assert table._dropped([counts], "wrong") == "80.0 (50.0)"


@pytest.mark.slow
def test_a_table_of_small_runs_is_written_whole_and_goes_on(tmp_path):
    """Two pairs, one budget, two levels of noise on 64 rows: every kind of number stands in table.md, both pictures are
    written, and the second call trains nothing."""
    flags = ["--config", "configs/smol.py", "--data.max-samples", "64", "--prune.batch-size", "32", "--train.epochs", "1",
             "--eval.max-samples", "8", "--eval.generate-samples", "8", "--out", str(tmp_path), "--budgets", "50x50", "--noise", "0,50",
             "--seeds", "1", "--pairs", "q-tuning:q-tuning,random:random+train.loss=dft"]  # fmt: skip
    table.main(flags)
    text = (tmp_path / "table.md").read_text()
    assert "| q-tuning x q-tuning | 50x50, 0 % wrong |" in text and "| 50x50, 50 % wrong | first | injected |" in text
    for said in ("random x random, train.loss=dft", "50x50, 50 % wrong", "Answers that end by themselves", "injected", "Accuracy on "):
        assert said in text
    assert all((tmp_path / f"{name}.png").stat().st_size for name in ("noise", "pareto", "differences"))
    done = json.loads((tmp_path / "results.json").read_text())["results"]
    assert len(done) == 2 * 3 + 2  # columns x (pairs and full data), and equal time
    table.main(flags)
    assert json.loads((tmp_path / "results.json").read_text())["results"] == done


def test_where_samples_come_from_by_hand(tmp_path):
    """Two runs summed: of 100 chosen 30 from Q2, 20 from Q4, half supplement, of which 40 of 50 lie in Q1; what a warm-up trained
    on beside them is kept and not chosen."""
    made, column = table.Table(tmp_path, Config(), Console(quiet=True)), table.Column("25x50")
    for seed, q2 in ((0, 10), (1, 20)):
        samples = {"kept": 80, "seen": 200, "q2": q2, "q3": 0, "q4": 10, "supplement": 25, "supplement_median": {"1": 20, "2": 0, "3": 5, "4": 0}}
        made.results[table.Cell(table.Q_TUNING, column).key(seed)] = result(1.0, 1.0) | {
            "samples": samples, "closing": {"seen": 30, "pruned": 1 + seed}, "by_epoch": {"spearman": [0.5, None, 0.7 + 0.2 * seed]},
            "quadrants": {"first": {"clean": [0, 1, 1, 2, 0]}, "last": {"clean": [0, 0, 0, 4, 0]}},
        }  # fmt: skip
    line = table.chosen_lines(made, [table.Q_TUNING], [column])[4]
    assert line == "| q-tuning x q-tuning | 25x50 | 30.0 | 20.0 | 0.0 | 50.0 | 80 0 20 0 | 0.50 | 0.80 |"
    assert table.quadrant_lines(made, [table.Q_TUNING], [column])[4:6] == [
        "| 25x50 | first | clean | 25 | 25 | 50 | 0 |", "| 25x50 | last | clean | 0 | 0 | 100 | 0 |"
    ]  # fmt: skip


def test_differences_are_paired_by_seed(tmp_path):
    """The first row's loss rises by 10 from seed to seed, and the other's with it: their difference is 1 ± 0 nonetheless. A row
    of other seeds is compared on the common ones; what has no common seed is left out."""
    made, column = table.Table(tmp_path, Config(), Console(quiet=True)), table.Column("25x50")
    pairs = ["q-tuning:q-tuning", "random:random", "random:none", "longest:none"]
    for seed in range(3):
        made.results[table.Cell(pairs[0], column).key(seed)] = result(10.0 * seed, 1.0)
        made.results[table.Cell(pairs[1], column).key(seed)] = result(10.0 * seed + 1, 1.0)
    made.results[table.Cell(pairs[2], column).key(1)] = result(8.0, 1.0)
    lines = table.difference_lines(made, pairs, [column])
    assert lines[0] == "**Difference from q-tuning x q-tuning, paired by seed: held-out loss (nats per token)**"
    assert lines[4:6] == ["| random x random | **+1.000 ± 0.000** |", "| random x none | -2.000 |"] and len(lines) == 7
    table.draw_differences(made, pairs, [column], tmp_path / "differences.png")
    assert (tmp_path / "differences.png").stat().st_size


def test_a_run_that_diverges_is_told_and_the_others_go_on(tmp_path, monkeypatch):
    """It stands in results.json and above the table, is in no mean, and is not tried again."""

    def run_one(config, *choice):
        if config.train.seed == 1:
            raise Diverged("step 3: loss nan")
        return result(1.0, 1.0)

    monkeypatch.setattr(table, "run_one", run_one)
    made, cell = table.Table(tmp_path, Config(), Console(quiet=True)), table.Cell("random:none", table.Column("25x50"))
    for seed in range(3):
        made.fill(cell, seed)
        made.fill(table.full(cell.column), seed)
    again = table.Table(tmp_path, Config(), Console(quiet=True))
    assert len(again.of(cell)) == 2 and again.results[cell.key(1)]["failed"] == "step 3: loss nan"
    text = table.markdown(again, ["random:none"], [cell.column], "command")
    assert "* failed: random:none | 25x50 | seed 1: step 3: loss nan" in text and "| random x none | 1.000 ± 0.000 |" in text
    assert "over 2 seeds" in text and "| random x none | 10.0 ± 0.0 |" in text and "| random x none | 2.0 ± 0.0 |" in text  # closing tokens; thousands
    monkeypatch.setattr(table, "run_one", lambda config, *choice: pytest.fail("tried again"))
    again.fill(cell, 1)


def test_one_process_at_a_time(tmp_path):
    """A second table over the same folder would remove the first one's run under it."""
    lock = take_lock(tmp_path)
    with pytest.raises(QtjaxError, match="in use by another process"):
        table.main(["--config", "configs/smol.py", "--out", str(tmp_path), "--pairs", "random:none", "--seeds", "1"])
    os.close(lock)
