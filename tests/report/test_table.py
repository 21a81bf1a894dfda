"""The closing table says what the summary holds, in 80 columns."""

import copy
import io
import json
import re

import pytest
from rich.console import Console

from qtjax.report.table import summary_markdown, summary_table

SUMMARY = {
    "title": "smol on smol-instruct, full-parameter",
    "steps": 120,
    "policy": "paper",
    "samples": {
        "seen": 15360, "eligible": 15350, "kept": 3840, "q2": 1502, "q3": 0, "q4": 1490, "supplement": 848,
        "supplement_median": {"1": 640, "2": 20, "3": 60, "4": 128},
    },
    "tokens": {"seen": 512345, "kept": 101234, "scored": 900000},
    "closing": {"seen": 3840, "pruned": 411},
    "fill": 0.934,
    "evaluation": {
        "samples": 512, "generated": 256,
        "base": {"loss": 1.91234, "exact_match": 0.12}, "after": {"loss": 0.81236, "exact_match": 0.6442},
    },
    "seconds": {"scoring": 40.2, "packing": 1.1, "training": 55.0, "total": 151.3},
    "speed_up": {"value": 1.871, "full_data_seconds": 180.2, "pruned_seconds": 96.3, "how": "median of 8 full-data steps times 120"},
    "provenance": {
        "clean": {"seen": 8000, "kept": 2500}, "mislabelled": {"seen": 2000, "kept": 300},
        "redundant": {"seen": 3000, "kept": 100}, "padded": {"seen": 2360, "kept": 940},
    },
    "data": {"samples": 5120, "cut": 12, "skipped": {"empty answer": 3, "no answer token left": 2}},
    "model_folder": "runs/smol/model",
}  # fmt: skip


def plain(summary, width=80, encoding="utf-8"):
    raw = io.BytesIO()
    stream = io.TextIOWrapper(raw, encoding=encoding, newline="\n")
    Console(file=stream, width=width).print(summary_table(summary))
    stream.flush()
    return raw.getvalue().decode(encoding)


def row(text, label):
    (line,) = [line for line in text.splitlines() if line.strip().startswith(label)]
    return line.strip()[len(label) :].split()


def test_every_number_is_where_it_belongs():
    """Numbers worked out by hand from the sample stand in their rows."""
    text = plain(SUMMARY)
    assert row(text, "loss (nats per token)") == ["1.9123", "0.8124"]
    assert row(text, "exact match") == ["12.0%", "64.4%"]
    assert row(text, "samples kept") == ["3,840", "15,360", "25.0%"]
    assert row(text, "Q2 misconception, tokens pruned") == ["1,502", "9.8%"]
    assert row(text, "Q4 calibration, whole") == ["1,490", "9.7%"]
    assert row(text, "supplement, whole") == ["848", "5.5%"]
    assert row(text, "trained tokens kept") == ["101,234", "512,345", "19.8%"]
    assert row(text, "closing (EOS) tokens pruned") == ["411", "3,840", "10.7%"]
    assert row(text, "scoring") == ["40.2", "26.6%"]
    assert row(text, "other") == ["55.0", "36.4%"]
    assert row(text, "total") == ["151.3", "100.0%"]
    assert row(text, "speed-up of the pruned steps") == ["1.87x"]
    assert row(text, "mislabelled") == ["300", "1,700", "85.0%"]
    flowing = " ".join(text.split())
    assert "Q1 75.5%, Q2 2.4%, Q3 7.1%, Q4 15.1%" in flowing and "22.1% of the kept samples" in flowing
    assert "10 samples had no usable score" in flowing and "training): 93.4%" in flowing
    assert "180.2 s / 96.3 s, median of 8 full-data steps times 120" in flowing
    assert "5 rows skipped (empty answer: 3, no answer token left: 2)" in flowing
    assert "75.0% were dropped" in flowing and "runs/smol/model" in flowing
    assert "Q3 redundant, whole" not in text


def test_it_fits_eighty_columns_and_plain_terminals():
    """No line is wider than 80 columns; a terminal that knows ASCII only shows it all."""
    long = copy.deepcopy(SUMMARY)
    long["title"] = "a-very-long-model-name-" * 6
    long["evaluation"]["full_data"] = {"loss": 0.7, "exact_match": None}
    long["samples"].update(seen=123_456_789_012, q3=5)
    long["model_folder"] = "runs/" + "long-name/" * 12
    for summary in (SUMMARY, long):
        for line in plain(summary).splitlines():
            assert len(line.rstrip()) <= 80
    assert "full data" in plain(long) and "Q3 redundant, whole" in plain(long)
    assert row(plain(SUMMARY, encoding="ascii").replace("|", " "), "samples kept") == ["3,840", "15,360", "25.0%"]


OPTIONAL = [name for name in SUMMARY if name not in ("steps", "samples", "tokens")]


@pytest.mark.parametrize("gone", [*([name] for name in OPTIONAL), OPTIONAL])
def test_missing_parts_are_left_out(gone):
    """Any part but steps, samples and tokens may be missing or null; its lines are gone and nothing else fails."""
    without = {k: v for k, v in SUMMARY.items() if k not in gone}
    null = {k: (None if k in gone else v) for k, v in SUMMARY.items()}
    assert plain(without) == plain(null)
    assert summary_markdown(without) == summary_markdown(null)
    assert "samples kept" in plain(without)


def test_full_data_shows_no_quadrants():
    """A run that keeps everything has one line of samples and one of tokens."""
    full = {"steps": 3, "samples": {"seen": 10, "eligible": 10, "kept": 10}, "tokens": {"seen": 50, "kept": 50}}
    text = plain(full)
    assert row(text, "samples kept") == ["10", "10", "100.0%"] and "Q2" not in text and "supplement" not in text


def test_article_policy_shows_its_own_quadrants():
    """policy="article" names Q3 in place of Q4."""
    text = plain({**SUMMARY, "policy": "article", "samples": {**SUMMARY["samples"], "q3": 1490, "q4": 0}})
    assert row(text, "Q3 redundant, whole") == ["1,490", "9.7%"] and "Q4 calibration, whole" not in text


def test_markdown_is_tables_with_the_same_cells():
    """Each Markdown table has equally many cells in every line, and holds every number of the terminal's table."""
    text = summary_markdown(SUMMARY)
    for table in re.findall(r"(?:^\|.*\|\n)+", text, flags=re.M):
        assert len({line.count("|") for line in table.splitlines()}) == 1
    for number in ("1.9123", "3,840", "1,502", "101,234", "1.87x", "85.0%", "75.5%"):
        assert number in text
    assert not any(line.startswith(" ") for line in text.splitlines())


def test_a_summary_survives_json():
    """The summary read back from JSON prints the same."""
    assert plain(json.loads(json.dumps(SUMMARY))) == plain(SUMMARY)


def test_a_run_that_changed_nothing_says_so():
    """A loss equal to the base's to the last bit is said in words; the least difference is not."""
    same = copy.deepcopy(SUMMARY)
    assert "NOTHING WAS LEARNED" not in " ".join(plain(same).split())
    same["evaluation"]["after"]["loss"] = same["evaluation"]["base"]["loss"]
    assert "NOTHING WAS LEARNED" in " ".join(plain(same).split())
