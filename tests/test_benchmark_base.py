"""The material of the larger base: made of the reference data, the same for the same seed, tested on what was not shown."""

import json

import jax
import pytest
from benchmarks import base

from qtjax.checkpoints import load_pretrained
from qtjax.data.tokenizer import load_tokenizer
from qtjax.errors import QtjaxError


@pytest.mark.slow
def test_what_is_tested_is_never_shown(shared, tmp_path):
    """No prompt of test.jsonl and no question of a choice file stands in train.jsonl or text.jsonl, alone or before its
    options; shares and sizes as asked for; twice the same bytes."""
    counts = base.prepare(shared, tmp_path / "one", 3, 2000, 12_000_000)
    rows = {
        name: [json.loads(line) for line in (tmp_path / "one" / f"{name}.jsonl").read_text().splitlines()]
        for name in ("text", "train", "test", *base.CHOICE)
    }
    assert counts == {name: len(lines) for name, lines in rows.items()}
    assert len(rows["train"]) == 2000 and {row["task"] for row in rows["train"]} == {"p3", "cot", "gsm8k", *base.CHOICE}
    assert all(base.fits(row) for row in rows["train"] + rows["test"])
    shown = [row["prompt"] for row in rows["train"]] + [row["text"] for row in rows["text"]]
    beginnings = {base.words(text.split("\nOptions")[0]) for text in shown} | {base.words(text.rsplit("\n", 1)[0]) for text in shown}
    assert not beginnings & {base.words(row["prompt"]) for row in rows["test"]}
    assert not beginnings & {base.words(row["question"]) for task in base.CHOICE for row in rows[task]}
    assert 12_000_000 <= sum(len(row["text"]) for row in rows["text"]) < 12_001_000
    config, params = load_pretrained(str(tmp_path / "one" / "init"))
    assert sum(x.size for x in jax.tree.leaves(params)) < 4e6
    assert load_tokenizer(str(tmp_path / "one" / "init")).eos_token_id == 1 and config.vocab_size == base.VOCABULARY
    base.prepare(shared, tmp_path / "two", 3, 2000, 12_000_000)
    for name in rows:
        assert (tmp_path / "one" / f"{name}.jsonl").read_bytes() == (tmp_path / "two" / f"{name}.jsonl").read_bytes()


def test_a_folder_without_the_data_is_refused(tmp_path):
    """One line that names the flag."""
    with pytest.raises(QtjaxError, match="--shared .*holds no data/sft"):
        base.main(["--shared", str(tmp_path)])
