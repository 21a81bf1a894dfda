"""The door that shows examples: the sample as decoded, its trained tokens told apart with and without colours."""

import io
import json

import pytest
from rich.console import Console

from qtjax.errors import QtjaxError
from qtjax.show import main, pieces, render_sample


@pytest.fixture
def arguments(tmp_path):
    """A config file and two rows, on the embedded tokenizer."""
    data = tmp_path / "d.jsonl"
    rows = [{"prompt": f"What is {i} plus 1?", "completion": f"The answer is {i + 1}."} for i in range(4)]
    data.write_text("".join(json.dumps(r) + "\n" for r in rows))
    config = tmp_path / "c.py"
    config.write_text("from qtjax.config import Config\n\n\ndef get_config():\n    return Config()\n")
    return ["--config", str(config), "--data.path", str(data), "--data.eval-fraction", "0"]


def shown(arguments, **console):
    file = io.StringIO()
    main(arguments, Console(file=file, width=200, **console))
    return file.getvalue()


def test_without_colours_trained_text_is_marked(arguments):
    """On plain output every answer, with the token that closes it, stands between marks, and the source line is named."""
    text = shown([*arguments, "--count", "2", "--start", "1"])
    for i in (1, 2):
        assert f"d.jsonl:{i + 1}" in text and f"⟦The answer is {i + 1}." in text.replace("⟦ ", "⟦")
    assert text.count("⟧") == 3 and "What is 3" not in text and "2 rows -> 2 samples" in text


def test_colours(arguments, monkeypatch):
    """On a colour terminal trained text is coloured and not marked; NO_COLOR takes the colours away and brings the marks back."""
    monkeypatch.delenv("NO_COLOR", raising=False)
    coloured = shown([*arguments, "--count", "1"], force_terminal=True, color_system="standard")
    assert "\x1b[1;32m" in coloured and "⟦" not in coloured
    monkeypatch.setenv("NO_COLOR", "1")
    plain = shown([*arguments, "--count", "1"], force_terminal=True, color_system="standard")
    assert "32m" not in plain and "⟦" in plain


def test_pieces_are_the_sample():
    """The pieces put together are the decoded sample, whatever their kinds."""

    class Letters:
        def decode(self, ids, **_):
            return "".join(chr(i) for i in ids)

    import numpy as np

    ids = np.array([ord(c) for c in "promptanswer."], np.int32)
    trained = np.array([0] * 6 + [1] * 7, bool)
    closing = np.array([0] * 12 + [1], bool)
    parts = pieces(Letters(), ids, trained, closing)
    assert parts == [("prompt", "context"), ("answer", "trained"), (".", "closing")]
    assert render_sample(parts, marks=True).plain == "prompt⟦answer.⟧" and render_sample(parts, marks=False).plain == "promptanswer."
    assert pieces(Letters(), ids[:0], trained[:0], closing[:0]) == []


def test_impossible_counts(arguments):
    """A start beyond the data and a count below one are one line."""
    with pytest.raises(QtjaxError, match=r"--start 9: must be below 4"):
        main([*arguments, "--start", "9"])
    with pytest.raises(QtjaxError, match=r"--count 0: must be 1 or more"):
        main([*arguments, "--count", "0"])
