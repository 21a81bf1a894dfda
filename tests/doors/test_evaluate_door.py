"""evaluate: all tasks on a model folder and on a run; a table within 80 columns and the same numbers as JSON."""

import io
import json
import shutil

import jax
import pytest
from rich.console import Console

from qtjax import models
from qtjax.checkpoints import load_pretrained, save_pretrained
from qtjax.errors import QtjaxError
from qtjax.evaluate import main


def run(argv):
    out = io.StringIO()
    main(argv, Console(file=out, width=80))
    return out.getvalue()


def test_all_tasks_of_a_folder(experiment, tmp_path):
    """Loss, exact match and multiple choice; what is printed is what is written."""
    out = tmp_path / "eval.json"
    text = run(["--config", experiment, "--tasks", "loss,exact_match,choice", "--out", str(out)])
    record = json.loads(out.read_text())
    assert max(len(line) for line in text.splitlines() if not line.startswith(("written", "data"))) <= 80
    assert f"{record['loss']['loss']:.4f}" in text and 5 < record["loss"]["loss"] < 12
    assert record["loss"]["samples"] == record["exact_match"]["count"] == record["choice"]["count"] == 24
    assert record["choice"]["chance"] == 0.5 and len(record["exact_match"]["answers"]) == 24
    assert "multiple choice, acc" in text and "exact match" in text


def test_a_run_is_evaluated_at_its_newest_checkpoint(experiment, full_run, lora_run, tmp_path):
    """Full and LoRA runs load through their run folder and differ from their base."""
    losses = []
    for flags in ([], ["--checkpoint", full_run], ["--checkpoint", lora_run]):
        run(["--config", experiment, "--tasks", "loss", "--out", str(tmp_path / "x.json"), *flags])
        losses.append(json.loads((tmp_path / "x.json").read_text())["loss"]["loss"])
    assert len(set(losses)) == 3


def test_a_run_is_evaluated_on_its_own_data_unless_a_config_is_given(experiment, full_run, tiny_data, tmp_path, monkeypatch):
    """Without --config a run folder's data, lengths and templates are its own, changed by flags; a given --config is
    used instead; the data are named in one line either way."""
    monkeypatch.chdir(tmp_path)  # no configs/smol.py here: nothing can come from it

    def loss(*flags):
        text = run(["--checkpoint", full_run, "--tasks", "loss", "--out", "x.json", *flags])
        record = json.loads((tmp_path / "x.json").read_text())["loss"]
        return record["loss"], record["samples"], [line for line in text.splitlines() if line.startswith("data: ")]

    own = loss()
    assert own == loss("--config", experiment)
    assert own[1:] == (24, [f"data: {tiny_data}"])
    assert loss("--eval.max-samples", "5")[1] == 5
    (tmp_path / "other.jsonl").write_text('{"question": "red?", "answer": "blue blue"}\n' * 3)
    other = tmp_path / "other.py"
    other.write_text(open(experiment).read().replace(tiny_data, "other.jsonl"))
    assert loss("--config", str(other))[1:] == (3, ["data: other.jsonl"])


@pytest.mark.parametrize("mesh", [{"fsdp": 8}, {"data": 3}])
def test_a_run_of_other_devices_is_evaluated_on_these(full_run, tmp_path, mesh):
    """The run's own mesh, on a machine without it, is no reason to refuse: its parameters and batches lie data parallel."""
    moved = tmp_path / "moved"
    shutil.copytree(full_run, moved)
    config = json.loads((moved / "config.json").read_text())
    config["mesh"] |= mesh
    (moved / "config.json").write_text(json.dumps(config))
    assert "perplexity" in run(["--checkpoint", str(moved), "--tasks", "loss"])


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--tasks", "los"], "task 'los'"),
        (["--rule", "numbers"], "did you mean 'number'"),
        (["--choice-form", "x"], "--choice-form 'x'"),
        (["--checkpoint", "no/such/folder/here"], "no/such/folder/here"),
        (["--out", "no/such/folder/x.json"], "its folder does not exist"),
    ],
)
def test_bad_flags_are_one_line(experiment, flags, said):
    """Each names the flag or the value, before anything is loaded."""
    with pytest.raises(QtjaxError, match=said) as caught:
        run(["--config", experiment, *flags])
    assert "\n" not in str(caught.value)


def test_a_tokenizer_of_another_model_is_refused(experiment, tiny_model, tmp_path):
    """Ids past the embedding's rows would silently read its last row."""
    config, _ = load_pretrained(tiny_model)
    small = config.replace(vocab_size=300)
    save_pretrained(tmp_path / "small", small, models.init_params(small, jax.random.key(0)), tokenizer_from="smol")
    for task in ("loss", "choice"):
        with pytest.raises(QtjaxError, match="vocab_size is 300"):
            run(["--config", experiment, "--checkpoint", str(tmp_path / "small"), "--tasks", task])
