"""The plan's door: what it prints, and what cannot be planned."""

import io
import json
from pathlib import Path

import pytest
from rich.console import Console

from qtjax import plan, planning, smol
from qtjax.errors import QtjaxError

@pytest.mark.parametrize(("name", "message"), [
    ("v5e:16x15", "did you mean 'v5e:16x16'"), ("v5e-256", "there are v4, v5e, v5p, v6e, a100-40gb"), ("v5p:2x4", "v5p has 2x2x1, 2x2x2"),
    ("h100:3", "h100 has 1, 2, 4, 8"), ("H100", "did you mean 'h100:"), ("h10:8", "did you mean 'h100:8'"), ("cpu:1", "must be CHIP:SHAPE"),
])  # fmt: skip
def test_a_topology_that_does_not_exist(name, message):
    """Near names, or the shapes that the chip has."""
    with pytest.raises(QtjaxError, match=message):
        planning.open_topology(name)


def test_a_plan_needs_a_topology():
    """One line that names the flag."""
    with pytest.raises(QtjaxError, match="--topology: is missing"):
        plan.main(["--config", "configs/smol.py"])


def shape(folder, **changes):
    """A model folder with a config.json and nothing else."""
    raw = json.loads((Path(smol.__file__).parent / "model" / "config.json").read_text()) | changes
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(raw))
    return str(folder)


def said(*flags, width=100):
    console = Console(file=io.StringIO(), width=width)
    plan.main(["--config", "configs/smol.py", *flags], console)
    return console.file.getvalue()


@pytest.mark.slow
def test_what_does_not_fit_is_said_with_what_is_missing(tmp_path):
    """Two billion float32 parameters and their moments on one v5e: how much is lacking, and what to try; the small model fits."""
    pytest.importorskip("libtpu")
    large = shape(tmp_path / "large", vocab_size=128_000, hidden_size=8192, num_attention_heads=64, num_key_value_heads=8, head_dim=128, num_hidden_layers=1)
    text = said("--model.path", large, "--topology", "v5e:2x2", "--leaves")
    assert "does not fit" in text and "GiB are lacking on each device of 15.75 GiB" in text
    assert "try --model.remat full" in text and "try --mesh.fsdp 4" in text and "embed_tokens" in text
    text = said("--model.path", shape(tmp_path / "small"), "--topology", "v5e:2x2")
    assert "fits: " in text and "An estimate" in text and max(map(len, text.splitlines())) <= 100
