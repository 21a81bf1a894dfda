"""prune: the decisions of training's first epoch, written beside the rows; a stopped curation goes on."""

import datetime
import io
import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from rich.console import Console

from qtjax import prune
from qtjax.checkpoints import load_pretrained
from qtjax.config import read_config
from qtjax.data.prepare import training_data
from qtjax.data.tokenizer import load_tokenizer
from qtjax.errors import QtjaxError
from qtjax.evals import curate
from qtjax.evals.decisions import decisions


def run(experiment, out, *flags) -> str:
    console = Console(file=io.StringIO(), width=80)
    prune.main(["--config", experiment, "--out", str(out), *flags], console)
    return console.file.getvalue()


def rows_of(path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture
def decided(experiment, tiny_model):
    """{source row: (keep, weight, kept positions, quadrant, perplexity)} by the decisions alone."""
    config = read_config(experiment)
    dataset = training_data(config.data, load_tokenizer(tiny_model), progress=False)
    out = {}
    for one in decisions(config, *load_pretrained(tiny_model), dataset):
        for i in np.flatnonzero(one.batch.valid):
            d = one.decision
            row = int(dataset.row_index[one.batch.indices[i]])
            out[row] = (bool(d.keep[i]), float(d.weight[i]), np.flatnonzero(d.tokens[i]).tolist(), int(d.quadrant[i]), float(d.perplexity[i]))
    return out


def test_kept_rows_carry_what_was_decided(experiment, tiny_data, decided, tmp_path):
    """Exactly the kept rows, as the source has them, with quadrant, scores, ids and the positions of the kept targets."""
    text = run(experiment, tmp_path / "out")
    source = rows_of(type(tmp_path)(tiny_data))
    kept = rows_of(tmp_path / "out" / "kept.jsonl")
    assert [row["qtjax"]["row"] for row in kept] == sorted(row for row, d in decided.items() if d[0])
    for row in kept:
        own = row.pop("qtjax")
        _, weight, positions, quadrant, perplexity = decided[own["row"]]
        assert row == source[own["row"]]
        assert (own["weight"], own["kept"], own["quadrant"]) == (weight, positions, quadrant) and len(positions) == own["kept_tokens"]
        assert own["perplexity"] == pytest.approx(perplexity, rel=1e-6) and max(positions) < len(own["input_ids"])
    scores = pq.read_table(tmp_path / "out" / "scores.parquet")
    assert scores["row"].to_pylist() == list(range(24)) and scores["keep"].to_pylist() == [decided[i][0] for i in range(24)]
    assert (tmp_path / "out" / "eu_plane.png").read_bytes()[:4] == b"\x89PNG"
    assert "samples" in text and max(map(len, text.splitlines()[:8])) <= 80


def test_parquet_holds_the_same(experiment, tmp_path):
    """--format parquet: the same rows in the same order."""
    run(experiment, tmp_path / "a")
    run(experiment, tmp_path / "b", "--format", "parquet")
    assert pq.read_table(tmp_path / "b" / "kept.parquet").to_pylist() == rows_of(tmp_path / "a" / "kept.jsonl")


def test_fields_that_json_has_no_word_for_are_written_as_text(experiment, tiny_data, tmp_path):
    """A Parquet source with dates, bytes and NaN: each kept row is strict JSON, nothing is lost after the scoring."""
    rows = rows_of(type(tmp_path)(tiny_data))
    for i, row in enumerate(rows):
        row |= {"made": datetime.date(2026, 1, 1 + i), "raw": bytes([i]), "grade": float("nan")}
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "rows.parquet")
    run(experiment, tmp_path / "out", "--data.path", str(tmp_path / "rows.parquet"))
    text = (tmp_path / "out" / "kept.jsonl").read_text()
    kept = [json.loads(line, parse_constant=lambda name: pytest.fail(name)) for line in text.splitlines()]
    assert kept and all(row["made"] == str(rows[row["qtjax"]["row"]]["made"]) and row["grade"] is None for row in kept)


def test_a_stopped_curation_goes_on(experiment, tmp_path, monkeypatch):
    """Interrupted after the first batch and started again: the same bytes, and the first batch is not decided again."""
    run(experiment, tmp_path / "whole")
    append, seen = curate.Parts.append, []

    def stop(self, one):
        seen.append(one.step)
        append(self, one)
        if len(seen) == 1:
            raise KeyboardInterrupt

    monkeypatch.setattr(curate.Parts, "append", stop)
    with pytest.raises(KeyboardInterrupt):
        run(experiment, tmp_path / "broken")
    assert not (tmp_path / "broken" / "kept.jsonl").exists()
    assert "goes on after batch 1" in run(experiment, tmp_path / "broken") and seen == [0, 1]
    for name in ("kept.jsonl", "scores.parquet"):
        assert (tmp_path / "broken" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_pruners_without_scores_need_no_picture(experiment, tmp_path):
    """random x none: nothing is scored, perplexity is null, and there is no plane to draw."""
    run(experiment, tmp_path / "out", "--prune.sample-pruner", "random", "--prune.token-pruner", "none")
    kept = rows_of(tmp_path / "out" / "kept.jsonl")
    assert len(kept) == 4 + 2 and all(row["qtjax"]["perplexity"] is None for row in kept)
    assert not (tmp_path / "out" / "eu_plane.png").exists()


def test_bad_input_is_one_line(experiment, tmp_path):
    """No folder, an unknown format, nothing to prune, a pruner that needs training, other settings over the same folder."""
    with pytest.raises(QtjaxError, match="--out: is missing"):
        prune.main(["--config", experiment])
    with pytest.raises(QtjaxError, match="--format 'csv': must be one of jsonl, parquet"):
        run(experiment, tmp_path / "x", "--format", "csv")
    with pytest.raises(QtjaxError, match="both 'none'"):
        run(experiment, tmp_path / "x", "--prune.sample-pruner", "none", "--prune.token-pruner", "none")
    with pytest.raises(QtjaxError, match="infobatch.*infobatch-budget"):
        run(experiment, tmp_path / "x", "--prune.sample-pruner", "infobatch")
    run(experiment, tmp_path / "out")
    with pytest.raises(QtjaxError, match="sample_keep = 0.25, this one has 0.5; choose another --out"):
        run(experiment, tmp_path / "out", "--prune.sample-keep", "0.5")
