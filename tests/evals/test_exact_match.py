"""Exact match joins each generation with its row's rule; accuracies are plain fractions, per task too."""

import math
import sys

import pytest

from qtjax import evals
from qtjax.config import Config, override
from qtjax.errors import QtjaxError
from qtjax.evals import Prompt, exact_match, suite
from qtjax.smol import instruct

MODULE = sys.modules[exact_match.__module__]  # the package's attribute of that name is the function


def prompts_of(tokenizer, rows):
    return [Prompt(tokenizer(r["prompt"])["input_ids"], r["completion"], r) for r in rows]


def test_accuracies_by_hand(monkeypatch, model, tokenizer):
    """Three of four right, half of task `sum`; the rule and the reference of each row are reported."""
    rows = [
        {"prompt": "two and two", "completion": "#### 4", "task": "sum"},
        {"prompt": "two and three", "completion": "#### 5", "task": "sum"},
        {"prompt": "colour of snow", "completion": "White!"},
        {"prompt": "who", "completion": "It was the old man.", "answer": "old man", "task": "who"},
    ]
    said = ["so it is 4", "so it is 4", "white", "I say the old man did"]
    monkeypatch.setattr(MODULE, "answer", lambda *a, **k: [tokenizer(t, add_special_tokens=False)["input_ids"] for t in said])
    lengths = [len(tokenizer(t, add_special_tokens=False)["input_ids"]) for t in said]
    found = exact_match(*model, tokenizer, prompts_of(tokenizer, rows), max_new_tokens=max(lengths), batch_size=4, stop_ids=())
    assert [a.ended for a in found.answers] == [n < max(lengths) for n in lengths] and found.ended == found.summary()["ended"] == 0.75
    assert [a.correct for a in found.answers] == [True, False, True, True]
    assert [a.rule for a in found.answers] == ["number", "number", "equal", "contains"]
    assert found.accuracy == 0.75 and found.by_task == {"sum": (0.5, 2), "who": (1.0, 1)}
    assert found.answers[3].reference == "old man" and found.answers[3].generated == said[3]
    assert found.summary()["by_task"]["sum"] == {"accuracy": 0.5, "count": 2}


def test_perfect_generations_of_the_embedded_data_score_one(monkeypatch, model, tokenizer):
    """The held-out rows' own completions, fed through prompts, rules and tasks, are all right; other rows' are mostly wrong."""
    config = override(
        Config(), {"data.eval_path": "smol-instruct", "eval.max_samples": 40, "eval.max_new_tokens": 32, "data.max_length": 128}
    )
    held_out = evals.load_held_out(config, model[0], tokenizer)
    assert len(held_out.prompts) == len(held_out.dataset) == 40 and held_out.skipped == 0
    texts = [p.completion for p in held_out.prompts]
    for shift, low, high in ((0, 1.0, 1.0), (1, 0.0, 0.3)):
        said = [tokenizer(t, add_special_tokens=False)["input_ids"] for t in texts[shift:] + texts[:shift]]
        monkeypatch.setattr(MODULE, "answer", lambda *a, said=said, **k: said)
        found = exact_match(*model, tokenizer, held_out.prompts, max_new_tokens=32, batch_size=8, stop_ids=held_out.stop_ids)
        assert low <= found.accuracy <= high
    assert set(found.by_task) == set(instruct.FAMILIES)


def test_prompts_hold_the_question_and_nothing_of_the_answer(model, tokenizer):
    """A prompt is the trained sample up to its first target, and what closes the answer stops generation."""
    config = override(Config(), {"data.eval_path": "smol-instruct", "eval.max_samples": 12, "data.max_length": 128})
    held_out = evals.load_held_out(config, model[0], tokenizer)
    for i, prompt in enumerate(held_out.prompts):
        ids, mask, closing = held_out.dataset.sample(i)
        assert list(prompt.ids) == ids[: mask.argmax()].tolist()
        assert set(ids[closing].tolist()) <= set(held_out.stop_ids)
    assert set(evals.stop_ids_of_chat(config, model[0], tokenizer)) == set(held_out.stop_ids)


def test_evaluate_runs_what_was_prepared(model, tokenizer):
    """Loss and exact match of a random model: a loss near log V, and answers that are wrong."""
    config = override(
        Config(),
        {"data.eval_path": "smol-instruct", "eval.max_samples": 6, "eval.max_new_tokens": 4, "data.max_length": 128, "train.rows": 2},
    )
    held_out = evals.load_held_out(config, model[0], tokenizer, ("loss", "exact_match"))
    results = evals.evaluate(config, *model, tokenizer, held_out, progress=False)
    assert set(results) == {"loss", "exact_match"}
    assert abs(results["loss"].loss - math.log(model[0].vocab_size)) < 3
    assert results["exact_match"].accuracy == 0 and results["exact_match"].count == 6


def test_spread_takes_evenly_spaced_rows():
    """All of them when few are there; else the asked number, first to last tenth."""
    assert suite.spread(5, 0).tolist() == suite.spread(5, 9).tolist() == [0, 1, 2, 3, 4]
    assert suite.spread(100, 4).tolist() == [0, 25, 50, 75]


@pytest.mark.parametrize("text", ["", "los", "loss,,exact"])
def test_unknown_tasks_are_one_line(text):
    """A mistyped task names the known ones."""
    with pytest.raises(QtjaxError, match="loss,exact_match,choice"):
        evals.parse_tasks(text)
