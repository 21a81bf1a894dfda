"""generate: one prompt or many, from flags or standard input, with an adapter or without; the seed fixes what is drawn."""

import io

import pytest

from qtjax import export
from qtjax.errors import QtjaxError
from qtjax.generate import main


@pytest.fixture
def say(tiny_model, capsys):
    def say(*flags):
        main(["--model", tiny_model, "--max-new-tokens", "5", *flags])
        return capsys.readouterr().out

    return say


def test_prompts_from_flags_and_from_standard_input_agree(say, monkeypatch):
    """Two prompts together give the answers that each gives alone."""
    alone = [say("--prompt", p).strip("\n") for p in ("red cat", "one two three four")]
    together = say("--prompt", "red cat", "--prompt", "one two three four")
    assert together == "".join(f"> {p}\n{a}\n\n" for p, a in zip(("red cat", "one two three four"), alone))
    monkeypatch.setattr("sys.stdin", io.StringIO("red cat\n\none two three four\n"))
    assert say() == together


def test_the_seed_fixes_what_is_drawn_and_the_template_matters(say):
    """Same seed, same text; greedy text changes when the chat template is left out."""
    hot = ("--prompt", "red cat", "--temperature", "2")
    assert say(*hot, "--seed", "1") == say(*hot, "--seed", "1") != say(*hot, "--seed", "2")
    assert say("--prompt", "red cat") != say("--prompt", "red cat", "--chat-template", "none")


def test_an_adapter_and_a_run_answer_alike(say, lora_run, tmp_path, capsys):
    """A LoRA run opened as such, and its exported adapter over the base, are the same model."""
    export.main(["--run", lora_run, "--out", str(tmp_path / "adapter")])
    capsys.readouterr()
    as_run, as_adapter = say("--model", lora_run, "--prompt", "red"), say("--adapter", str(tmp_path / "adapter"), "--prompt", "red")
    assert as_run == as_adapter != say("--prompt", "red")


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--prompt", "x", "--top-p", "0"], "--top-p 0.0: is a fraction"),
        (["--prompt", "x", "--temperature", "warm"], "--temperature 'warm': must be a number"),
        (["--prompt", "x", "--max-new-tokens", "500"], "max_position_embeddings = 128"),
        (["--prompt", "x", "--dtype", "int8"], "int8.*float32"),
        (["--prompt", "x", "--adapter", "nowhere"], "nowhere"),
    ],
)
def test_bad_flags_are_one_line(tiny_model, flags, said):
    """Each names flag, value and rule."""
    with pytest.raises(QtjaxError, match=said) as caught:
        main(["--model", tiny_model, *flags])
    assert "\n" not in str(caught.value)
