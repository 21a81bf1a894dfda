"""How time and memory grow: what the table says is what was measured, and nothing is said of programs that are wrong."""

import io
import json
import math

import numpy as np
import pytest
from benchmarks import scaling, scaling_one, scaling_picture
from rich.console import Console

from qtjax.errors import QtjaxError
from qtjax.models import ModelConfig

TINY = dict(
    vocab_size=64, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2, head_dim=8,
    tie_word_embeddings=True,
)  # fmt: skip


def row(n: int, cpu: float, temporaries: int, **more) -> dict:
    one = {"cpu": cpu, "wall": 2 * cpu, "temporaries": temporaries, "peak": 2**30}
    return {"size": n, "n": n, "rows": 4, "length": 8, "train": one, "score": one, "parameters": n} | more


def shown(table) -> str:
    console = Console(file=io.StringIO(), width=140)
    console.print(table)
    return console.file.getvalue()


def data_row(rows: int, own: int | None) -> dict:
    one = {"cpu": 0.25, "wall": 0.5, "own": own, "peak": 2**31}
    return {"size": rows, "n": rows, "bytes": 5_000_000, "tokens": 40 * rows, "tokenized": one, "epoch": one, "before": one}


def test_the_arithmetic_of_the_table():
    """Medians per 1,000 tokens, multiples of the first size, exponents between the last two; own memory in bytes a row."""
    assert scaling.per_thousand([0.3, 9.0, 0.1], 600) == pytest.approx(0.5)
    rows = [row(128, 0.5, 2**20), row(256, 0.5, 3 * 2**20), row(512, 2.0, 24 * 2**20)]
    assert scaling.exponent(rows, "train", "cpu") == pytest.approx(2) and scaling.exponent(rows, "score", "temporaries") == pytest.approx(3)
    assert math.isnan(scaling.exponent(rows[:1], "train", "cpu")) and scaling.growth("length", rows[:1]) == ""
    assert "n = tokens of a row: train: CPU ~ n^2.00, temporaries ~ n^3.00; score" in scaling.growth("length", rows)
    cells = [cell for line in shown(scaling.model_table("length", rows, "title")).splitlines() if " 512 " in line for cell in line.split()]
    assert cells == ["512", "4", "x", "8", *["2.000", "4.000", "4.00", "24", "1,024"] * 2]
    data = [data_row(1000, 300 * 2**20), data_row(11_000, 300 * 2**20 + 40_000)]
    assert scaling.growth("data", data).endswith("from 1,000 to 11,000 rows: +4 bytes for a row more")
    text = shown(scaling.data_table(data, "title"))
    assert "11,000" in text and "440,000" in text and "2,048" in text
    untold = [data_row(1, None), data_row(2, None)]
    assert "unknown on this system" in scaling.growth("data", untold) and "-" in shown(scaling.data_table(untold, ""))
    wide = [row(10_000, 100.123, 2**36), row(60_000_000, 10_000.123, 2**36)]
    for table in (scaling.model_table("model", wide, ""), scaling.data_table([data_row(1_000_000, 2**36)], "")):
        assert "…" not in shown(table)  # fits 140 columns


def test_shapes_have_about_the_parameters_that_are_asked_for():
    """1M to 60M: within a tenth, the width a multiple of a head's 32."""
    for millions in (1, 4, 15, 30, 60):
        shape = scaling.shape_of(millions * 1e6)
        width, layers = shape["hidden_size"], shape["num_hidden_layers"]
        count = width * shape["vocab_size"] + layers * width * (4 * width + 3 * shape["intermediate_size"])
        assert count == pytest.approx(millions * 1e6, rel=0.1) and width == 32 * shape["num_attention_heads"]


def test_rows_of_every_shape_hold_the_same_samples():
    """3 samples of 4 tokens in 2 x 8 and in 1 x 16 slots: the same ids in order; a sample's first token is no target, padding is no segment."""
    two, one = scaling_one.packed(50, 2, 8, 4, 3), scaling_one.packed(50, 1, 16, 4, 3)
    np.testing.assert_array_equal(two["input_ids"].ravel(), one["input_ids"].ravel())
    assert two["segment_ids"].tolist() == [[1] * 4 + [2] * 4, [1] * 4 + [0] * 4] and one["segment_ids"].max() == 3
    assert two["position_ids"].tolist() == [[0, 1, 2, 3] * 2, [0, 1, 2, 3] + [0] * 4]
    assert two["weights"].tolist() == [[0, 1, 1, 1] * 2, [0, 1, 1, 1] + [0] * 4]


def test_row_i_is_the_same_in_every_file(tmp_path):
    """What sizes of data share can then be compared."""
    for count in (3, 7):
        scaling.write_rows(tmp_path / f"{count}", count)
    few, many = ((tmp_path / name).read_text().splitlines() for name in ("3", "7"))
    assert many[:3] == few and len(set(many)) == 7 and all(set(json.loads(line)) == {"prompt", "completion"} for line in many)


@pytest.mark.slow
def test_wrong_programs_are_not_timed():
    """A score or a loss that plain logits do not find, sizes that disagree, a value that is not finite: no table."""
    steps = scaling_one.Steps(ModelConfig(**TINY), 2, 8)
    steps.compile("score 2", "zeros", "accumulate 2", "update")
    good = scaling_one.check(steps, 64, 8, 4)
    assert good["loss"] == pytest.approx(math.log(64), rel=0.05)
    for name, program in (("score 2", "score"), ("accumulate 2", "accumulate")):
        steps.start()
        true = steps.programs[name]
        index = 0 if program == "score" else 1
        wrong = lambda *a: tuple(x * (1 + 3e-4 * (i == index)) if i == index else x for i, x in enumerate(true(*a)))  # noqa: E731, B023
        steps.programs[name] = wrong
        with pytest.raises(QtjaxError, match=f"{program}: the loss of 2 samples is .* by plain logits .* no time counts"):
            scaling_one.check(steps, 64, 8, 4)
        steps.programs[name] = true
    with pytest.raises(QtjaxError, match="not finite"):
        scaling_one.timed(lambda rows: {"loss": math.nan}, {}, 1)
    rows = [row(1, 1.0, 1, check=good), row(2, 1.0, 1, check=good | {"loss": good["loss"] * 1.0002})]
    scaling.agree("batch", [rows[0], row(2, 1.0, 1, check=good | {"loss": good["loss"] * 1.00005})])
    with pytest.raises(QtjaxError, match="batch 2: loss .* the programs differ"):
        scaling.agree("batch", rows)


@pytest.mark.slow
def test_a_real_run_of_two_lengths(tmp_path, capsys, monkeypatch):
    """Processes, checks, table, JSON and picture, whole."""
    monkeypatch.setitem(scaling.SHAPES, "small", TINY)
    file, picture = tmp_path / "scaling.json", tmp_path / "scaling.png"
    flags = ["--quick", "--panels", "length", "--lengths", "4,8", "--tokens", "16", "--rounds", "1"]
    scaling.main([*flags, "--json", str(file), "--picture", str(picture)])
    said = capsys.readouterr().out
    assert "4 x 4" in said and "2 x 8" in said and max(map(len, said.splitlines())) <= 140
    few, many = json.loads(file.read_text())["panels"]["length"]
    for one in (few, many):
        assert all(one[name]["cpu"] > 0 and one[name]["wall"] > 0 and one[name]["temporaries"] > 0 for name in ("train", "score"))
        assert 2**27 < one["score"]["peak"] <= one["train"]["peak"] < 2**32
    assert few["check"]["loss"] == pytest.approx(many["check"]["loss"], rel=1e-4)
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_an_epoch_over_a_file_reads_every_row_once(tmp_path, capsys):
    """300 rows in batches of 128: tokens and memory are told; a file of another number of rows than was said is no measurement."""
    scaling.write_rows(tmp_path / "rows.jsonl", 300)
    given = {"file": str(tmp_path / "rows.jsonl"), "rows": 300, "length": 128, "batch": 128, "first": 10}
    scaling_one.data_size(given)
    found = json.loads(capsys.readouterr().out)
    assert found["tokens"] > 300 * 20 and len(found["check"]["first"]) == 10 and min(found["check"]["first"]) > 0
    assert found["epoch"]["peak"] >= found["before"]["peak"] > 2**27 and found["epoch"]["wall"] > 0
    with pytest.raises(QtjaxError, match="an epoch over 301 rows read 300 samples"):
        scaling_one.data_size(given | {"rows": 301})


@pytest.mark.slow
def test_quick_measures_every_panel(run_python, tmp_path):
    """All four panels at their tiny sizes, as a user runs them."""
    said = run_python("benchmarks.scaling", "--quick", "--json", str(tmp_path / "s.json"), "--picture", str(tmp_path / "s.png"))
    assert [f"By {name}" in said for name in scaling.PANELS.values()] == [True] * 4
    assert list(json.loads((tmp_path / "s.json").read_text())["panels"]) == list(scaling.PANELS)


def test_a_picture_leaves_out_what_was_not_measured(tmp_path):
    """One panel, and memory that the system does not tell."""
    report = {"machine": "here", "tokens": 8, "panels": {"data": [data_row(10, None), data_row(100, None)]}}
    assert scaling_picture.draw(report, tmp_path / "p.png").read_bytes().startswith(b"\x89PNG")
    assert scaling_picture.multiples([row(1, 2.0, 5), row(3, 3.0, 5)], "train", "cpu") == [(1, 1.0), (3, 1.5)]
    assert scaling_picture.multiples([data_row(1, None)], "epoch", "own") == []


def test_a_process_that_ends_is_named():
    """The size, the status and its last words in one line."""
    with scaling.started("length", {"size": 4096, "shape": {}, "rows": 1, "length": 0, "sample": 1}) as process:
        with pytest.raises(QtjaxError, match="^length 4,096: its process ended with status [12]: .+$"):
            process.read()


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--panels", "lenght"], "--panels lenght: 'lenght' is none; did you mean 'length'"),
        (["--lengths", "128,64"], "--lengths 128,64: must be whole numbers above 0, ascending"),
        (["--lengths", "128,200"], "200 must be a multiple of the shortest and divide --tokens"),
        (["--lengths", "4096"], "which holds two of the shortest"),
        (["--batches", "1.5"], "--batches 1.5: must be whole numbers"),
        (["--models", "nan"], "--models nan: must be numbers above 0"),
        (["--data", ""], "--data : must be numbers above 0"),
        (["--data", "0.0001"], "--data 0.0001: is in thousands; must be at least 0.001, and no two the same number of rows"),
        (["--rounds", "0"], "--rounds 0: must be 1 or more"),
        (["--model-length", "3"], "--model-length 3: must be 4 or more"),
        (["--round", "1"], "--round: no such flag; did you mean '--rounds'"),
    ],
)
def test_bad_flags_are_one_line(flags, said):
    """Before anything is started."""
    with pytest.raises(QtjaxError) as error:
        scaling.settings(flags)
    assert said in str(error.value) and "\n" not in str(error.value)
