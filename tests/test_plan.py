"""The plan: FLOPs and collectives by hand, memory as the shapes say, and what cannot be planned."""

import io
import json
from pathlib import Path

import jax
import pytest
from rich.console import Console

from qtjax import plan, planning, smol
from qtjax.config import override, read_config
from qtjax.errors import QtjaxError
from qtjax.models import ModelConfig
from qtjax.parallel import make_mesh
from qtjax.planning import on_device
from qtjax.training.programs import program_jobs

HLO = """HloModule m

%body.1 (p: (s32[], f32[8,4])) -> (s32[], f32[8,4]) {
  %a = bf16[8,128]{1,0} all-gather(%x), channel_id=1, dimensions={0}
  %s = (f32[4]{0}, f32[32]{0}) all-gather-start(%y), channel_id=2
  %d = f32[32]{0} all-gather-done(%s)
}

%cond.1 (p: (s32[], f32[8,4])) -> pred[] {
  ROOT %lt = pred[] compare(%i, %n), direction=LT
}

%inner.1 (p: f32[2]) -> f32[2] {
  %r = f32[2]{0} all-reduce(%p), channel_id=3, to_apply=%add.1
}

%add.1 (a: f32[], b: f32[]) -> f32[] {
  ROOT %s2 = f32[] add(%a, %b)
}

ENTRY %main (p: f32[8,4]) -> f32[8,4] {
  %w = (s32[], f32[8,4]) while(%t), condition=%cond.1, body=%body.1, backend_config={"known_trip_count":{"n":"32"}}
  %f = f32[2]{0} fusion(%q), kind=kLoop, calls=%inner.1
  %p2 = (s8[16]{0}, u32[]) collective-permute(%z), channel_id=4
}
"""


def test_collectives_by_hand():
    """In a loop of 32 turns: 8*128*2 and, of an asynchronous pair, the larger 32*4 bytes; 2*4 bytes reduced count twice."""
    assert planning.collectives(HLO) == [
        ("all-gather", 64, 32 * (2048 + 128)), ("all-reduce", 1, 16), ("collective-permute", 1, 16 + 4)
    ]  # fmt: skip


def test_flops_by_hand():
    """One layer, width 4, one head of 4, MLP 8, vocabulary 10, two tokens of rows of 3: 2*2*((4*16 + 3*4*8) + 2*3*4 + 40)."""
    config = ModelConfig(vocab_size=10, hidden_size=4, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1, num_key_value_heads=1, head_dim=4)
    assert planning.forward_flops(config, 2, 3) == 4 * (64 + 96 + 24 + 40)


@pytest.mark.parametrize(("name", "message"), [
    ("v5e:16x15", "did you mean 'v5e:16x16'"), ("v5e-256", "must be CHIP:SHAPE"), ("v5p:2x4", "v5p"), ("h9:1", "must be CHIP:SHAPE"),
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
@pytest.mark.parametrize("method", ["none", "lora"])
def test_a_run_is_planned_for_a_tpu_that_is_not_here(method, tmp_path):
    """v5e:2x4, 2 x 2 x 2: the compiler's arguments are the shards of what the run holds, and something moves between devices."""
    pytest.importorskip("libtpu")
    # Shards of whole tiles, 8 x 128: smaller ones the compiler pads.
    model = shape(tmp_path / "m", hidden_size=512, intermediate_size=1024, num_attention_heads=8, num_key_value_heads=4, head_dim=64)
    config = override(read_config("configs/smol.py"), {"overlay.method": method, "mesh.fsdp": 2, "mesh.tensor": 2, "model.path": model})
    devices, chip = planning.open_topology("v5e:2x4")
    mesh = make_mesh(config.mesh, devices)
    run = planning.abstract_run(config, mesh)
    jobs = program_jobs(
        run.subject, mesh, config.prune, "plain", run.optimizer, run.state, run.frozen, shapes=(8,), row_length=128, samples=64, max_length=128
    )  # fmt: skip
    needs = planning.needs_of({name: jobs[name] for name in ("score 8", "accumulate 8", "update")}, mesh, dict.fromkeys(jobs, 0), dict.fromkeys(jobs, 0))
    weights = on_device((run.state.trainable, run.frozen))
    whole = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves((run.state.trainable, run.frozen)))
    assert whole / 8 < weights < whole / 2  # matrices are cut in four, norms are not
    assert needs["score 8"].arguments == pytest.approx(weights, rel=0.05, abs=60_000)  # rows: 20 kB
    gradients = on_device(run.state.trainable)  # float32, as the parameters
    assert needs["update"].arguments == pytest.approx(on_device((run.state.trainable, run.state.optimizer)) + gradients, rel=0.05, abs=60_000)
    assert all(need.total < chip.memory * 2**30 for need in needs.values())
    assert {"all-gather", "all-reduce"} <= {each.kind for each in needs["accumulate 8"].moved}
    assert sum(each.count for each in needs["score 8"].moved) >= 4  # a gather a layer at least


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
