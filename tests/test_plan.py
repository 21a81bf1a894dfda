"""The plan's door: what it prints, and what cannot be planned."""

import io
import json
import re
from pathlib import Path

import pytest
from rich.console import Console

from qtjax import plan, planning, smol
from qtjax.errors import QtjaxError
from qtjax.planning import Chip, Part

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


@pytest.mark.parity
@pytest.mark.parametrize(("flags", "message"), [
    (("--mesh.fsdp", "3"), "mesh.fsdp = 3: does not divide the 8 devices; values that do: 1, 2, 4, 8"),
    (("--mesh.tensor", "8"), "mesh.tensor = 8: does not divide dimension 1 of layers/mlp/down_proj/kernel, 300; values that do: 1, 2, 4"),
    (("--mesh.fsdp", "8"), "mesh.fsdp = 8: does not divide dimension 1 of embed_tokens/embedding, 100; values that do: 1, 2, 4"),
    (("--prune.reuse-forward", "true"), "prune.reuse_forward = True: survivors move between the mesh's 8 devices of data x fsdp"),
    (("--data.max-length", "1024"), "data.max_length = 1024: the model .* has 512 positions"),
    (("--model.param-dtype", "bfloat16"), "full-parameter training keeps float32 parameters"),
    (("--tokens-per-sample", "129"), "--tokens-per-sample 129: must be from 1 to data.max_length = 128"),
])  # fmt: skip
def test_what_the_run_would_refuse_the_plan_refuses(flags, message, tmp_path, libtpu):
    """A mesh that does not divide the devices or the model, and what training would not begin with: one line, before anything compiles."""
    model = shape(tmp_path / "m", hidden_size=100, intermediate_size=300, num_attention_heads=8, num_key_value_heads=8, head_dim=32)
    with pytest.raises(QtjaxError, match=message):
        said("--model.path", model, "--topology", "v5e:2x4", *flags)


def test_launches_that_are_not_filled_are_said_with_what_fills_them():
    """128 samples leave 6,400 tokens for a launch of 16,384 slots: 328 would fill it; of two launches the second may be half empty."""
    chip = Chip(16, 100, 100, 100)
    lines = plan.assumptions([Part("training", 6400, 16384, 1.0, 1.0, 0.0, 0.0)], chip, 16384, 128)
    assert "fills 39% of its slots" in lines[1] and "--prune.batch-size 328 fills one" in lines[1]
    assert len(plan.assumptions([Part("training", 9600, 12288, 1.0, 1.0, 0.0, 0.0)], chip, 4096, 128)) == 1
    assert "What moves is not in it" in plan.assumptions([Part("training", 9600, 9600, 1.0, 1.0, 0.0, None)], chip, 4096, 128)[0]


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
@pytest.mark.parity
def test_what_does_not_fit_is_said_with_what_would(tmp_path, libtpu):
    """1.4 billion float32 parameters with moments and gradients, 21 GiB on one v5e: how much is lacking, and flags
    that were tried: cut in four it fits."""
    sizes = {"hidden_size": 4096, "intermediate_size": 32768, "num_attention_heads": 32, "num_key_value_heads": 8, "num_hidden_layers": 3}
    large = shape(tmp_path / "large", head_dim=128, **sizes)
    text = said("--model.path", large, "--topology", "v5e:2x2", "--leaves", width=80)
    kept = 16 * (3 * (4096 * 4096 * 2 + 4096 * 1024 * 2 + 3 * 4096 * 32768) + 2048 * 4096) / 2**30  # bytes a parameter, all at once
    lacking = float(re.search(r"does not fit: ([\d.]+) GiB are lacking on each device of 15.75 GiB", text)[1])
    assert kept - 15.75 <= lacking + 0.05 and "embed_tokens" in text and "refused" in text and "estimate" not in text
    flags, free = re.search(r"fits with (.*): ([\d.]+) GiB stay free", text).groups()
    assert flags == "--mesh.fsdp 4" and 0 < float(free) < 15.75 - kept / 4
    assert max(map(len, text.splitlines())) <= 80
