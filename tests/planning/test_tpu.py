"""Plans compiled for TPUs that are not here: arguments and what moves, against hand counts."""

import io
import json
import re
from pathlib import Path

import jax
import pytest
from rich.console import Console

from qtjax import plan, planning, smol
from qtjax.config import override, read_config
from qtjax.models import ModelConfig
from qtjax.planning import PUBLISHED

pytestmark = [pytest.mark.slow, pytest.mark.parity, pytest.mark.usefixtures("libtpu")]
GIB = 2**30
# Shards of whole tiles, 8 x 128: smaller ones the compiler pads.
TINY = {"hidden_size": 512, "intermediate_size": 1024, "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 64, "num_hidden_layers": 5}


def tiny(topology="v5e:2x4", **changes):
    raw = json.loads((Path(smol.__file__).parent / "model" / "config.json").read_text()) | TINY
    shape = ModelConfig.from_hf(raw)
    devices, chip = planning.open_topology(topology)
    weighed = planning.weigh(override(read_config("configs/smol.py"), changes), shape, devices)
    assert all(need.total < chip.memory * GIB for need in weighed.needs.values())
    return shape, weighed


def moved(need):
    assert need.moved is not None, "unreadable"
    return {each.kind: each.bytes for each in need.moved}


def test_full_fine_tuning_of_a_tiny_model_by_hand():
    """fsdp 8: arguments are eighths of what the run holds; matrices are gathered in bfloat16, a TPU's way with float32 products, once
    forward and once backward; their gradients are scattered, the tied embedding's and the norms' are reduced whole."""
    shape, weighed = tiny(**{"mesh.fsdp": 8})
    layers = 5 * (512 * (2 * 512 + 2 * 256) + 3 * 512 * 1024)
    table, norms, ids = 2048 * 512, 11 * 512, 8 * 128
    needs = weighed.needs
    weights = 4 * ((layers + table) / 8 + norms)
    rows = 5 * 4 * 128  # of each device
    assert weighed.held.trained == weights and weighed.held.total == 4 * weights + 8  # and the optimizer's two counts of steps
    assert needs["scoring"].arguments == pytest.approx(weights + rows, rel=0.01)
    assert needs["training"].arguments == pytest.approx(2 * weights + rows, rel=0.01)
    assert needs["update"].arguments == pytest.approx(4 * weights, rel=0.01)
    assert moved(needs["scoring"])["all-gather"] == pytest.approx(7 / 8 * (2 * (layers + table) + 4 * ids), rel=0.01)
    training = moved(needs["training"])
    assert training["all-gather"] == pytest.approx(7 / 8 * (2 * (2 * layers + table) + 2 * 4 * ids), rel=0.01)
    assert training["reduce-scatter"] == pytest.approx(7 / 8 * 4 * layers, rel=0.01)
    assert training["all-reduce"] == pytest.approx(2 * 7 / 8 * 4 * (table + norms), rel=0.01)
    shares = {path: (shape, size) for path, shape, size in planning.leaves_by_path(weighed.run.state.trainable)}
    assert shares["embed_tokens/embedding"] == ("2048 x 512/f8", 4 * table / 8)
    assert shares["layers/mlp/down_proj/kernel"] == ("5 x 1024 x 512/f8", 4 * 5 * 512 * 1024 / 8)
    assert shares["norm/weight"] == ("512", 4 * 512)
    assert sum(size for _, size in shares.values()) == weights


@pytest.mark.parametrize("topology", ["v4:2x2x1", "v5p:2x2x2", "v6e:2x4"])
def test_every_generation_compiles(topology):
    """Eight devices of the others hold, are given and gather what eight v5e are. v4 and v5p reduce the layers' gradients whole, twice as
    much as is scattered. The programs of v5p and v6e are read from their second compilation."""
    _, weighed = tiny(topology, **{"mesh.fsdp": 8})
    layers, table, norms, ids = 5 * (512 * (2 * 512 + 2 * 256) + 3 * 512 * 1024), 2048 * 512, 11 * 512, 8 * 128
    weights = 4 * ((layers + table) / 8 + norms)
    needs = weighed.needs
    assert weighed.held.trained == weights
    for name, count in (("scoring", 1), ("training", 2), ("update", 4)):
        assert needs[name].arguments == pytest.approx(count * weights, rel=0.01), name
    assert moved(needs["scoring"])["all-gather"] == pytest.approx(7 / 8 * (2 * (layers + table) + 4 * ids), rel=0.01)
    training = moved(needs["training"])
    assert training["all-gather"] == pytest.approx(7 / 8 * (2 * (2 * layers + table) + 2 * 4 * ids), rel=0.01)
    scattered = layers if topology.startswith("v6e") else 0
    assert training.get("reduce-scatter", 0) == pytest.approx(7 / 8 * 4 * scattered, rel=0.01)
    assert training["all-reduce"] == pytest.approx(2 * 7 / 8 * 4 * (table + norms + layers - scattered), rel=0.01)


def test_lora_of_a_tiny_model_on_three_axes():
    """2 x 2 x 2: the base is cut in four and has no gradient; only the adapter's gradients are reduced."""
    shape, weighed = tiny(**{"mesh.fsdp": 2, "mesh.tensor": 2, "overlay.method": "lora", "overlay.target_modules": "all-linear"})
    base = sum(x.size for x in jax.tree.leaves(weighed.run.frozen["params"]))
    adapter = sum(x.size for x in jax.tree.leaves(weighed.run.state.trainable))
    assert weighed.held.frozen == pytest.approx(4 * base / 4, rel=0.01)
    assert weighed.held.moments == pytest.approx(2 * weighed.held.trained, rel=0.01)
    training = moved(weighed.needs["training"])
    assert training.get("reduce-scatter", 0) + training["all-reduce"] < 2 * 4 * adapter + 4 * 5 * 4 * 2 * 4 * 128 * 512 * 2
    assert training["all-gather"] > moved(weighed.needs["scoring"])["all-gather"] > 0


def test_offloaded_layers_inputs_are_not_in_the_device_s_memory(monkeypatch):
    """64 layers keep 256 MiB of inputs, float32, of a row of 2,048 slots: more than all that remat offload leaves on a device."""
    monkeypatch.setitem(TINY, "num_hidden_layers", 64)
    changes = {"mesh.fsdp": 8, "data.max_length": 2048, "train.row_length": 2048}
    _, weighed = tiny(**changes, **{"model.remat": "offload"})
    assert weighed.needs["training"].temporaries < 3 / 4 * 64 * 2048 * 512 * 4


def test_full_fine_tuning_of_mistral_7b_on_256_v5e():
    """fsdp 64 x tensor 4: weights, moments and gradient buffers are 4, 8 and 4 bytes a parameter over 256 chips, norms aside; each layer's
    quarter is gathered in bfloat16."""
    changes = {"mesh.fsdp": 64, "mesh.tensor": 4, "overlay.method": "none", "model.param_dtype": "float32"}
    shape = ModelConfig.from_hf(PUBLISHED["mistralai/Mistral-7B-v0.1"])
    devices, chip = planning.open_topology("v5e:16x16")
    weighed = planning.weigh(override(read_config("configs/mistral_7b.py"), changes), shape, devices)
    matrices, norms = 7_241_465_856, 65 * 4096
    needs, share = weighed.needs, matrices / 256 + norms
    assert (weighed.rows, weighed.length) == (64, 2048)
    assert weighed.held.trained + weighed.held.moments == pytest.approx(12 * share, abs=8)
    assert needs["update"].arguments == pytest.approx(16 * share, rel=0.01)
    assert needs["training"].arguments == pytest.approx(8 * share, rel=0.01)
    assert needs["training"].beside == pytest.approx(8 * share, abs=8)
    assert weighed.worst < chip.memory * GIB
    layers = matrices - 2 * 32000 * 4096
    scoring, training = moved(needs["scoring"]), moved(needs["training"])
    assert scoring["all-gather"] == pytest.approx(2 * (layers + 32000 * 4096) / 4 * 63 / 64, rel=0.01)  # and the head's quarter
    assert training["all-gather"] > 2 * 2 * layers / 4 * 63 / 64  # forward, and again backward
    assert training["reduce-scatter"] == pytest.approx((2 * layers + 4 * 32000 * 4096) / 4 * 63 / 64, rel=0.01)  # layers' gradients in bfloat16


def test_lora_of_llama_3_8b_on_64_v5p(monkeypatch):
    """The door, with the config as it stands: two bytes a frozen parameter over 64 chips, an adapter that lies whole along the axes which
    fsdp does not cut. Over 64 chips this compiler gathers by an all-reduce, which takes twice as much."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    console = Console(file=io.StringIO(), width=80)
    plan.main(["--config", "configs/llama3_8b.py", "--topology", "v5p:4x4x4", "--mesh.fsdp", "64", "--tokens-per-sample", "200"], console)
    text = console.file.getvalue()
    base, norms = 8_030_261_248 - 65 * 4096, 65 * 4096
    cut = 32 * 8 * (5 * 4096 + 2 * 4096)  # A of q, k, v, gate, up reads the embedding's axis, B of o and down writes it
    whole = 32 * 8 * (4096 + 14336 + 4096 + 2 * 1024 + 2 * 14336)
    adapter = 4 * (cut / 64 + whole)
    scoring = [float(x) for x in re.search(r"scoring +([\d.]+) +([\d.]+) +([\d.]+)", text).groups()]
    training = [float(x) for x in re.search(r"training +([\d.]+) +([\d.]+) +([\d.]+)", text).groups()]
    assert scoring[0] == pytest.approx((2 * (base / 64 + norms) + adapter) / GIB, abs=0.01)
    assert training[0] == pytest.approx((2 * (base / 64 + norms) + 2 * adapter) / GIB, abs=0.01)
    assert scoring[2] == training[2] == pytest.approx(2 * adapter / GIB, abs=0.01)
    embedding = 128256 * 4096
    gathered = 2 * 2 * 63 / 64 * (base - embedding + cut) + 2 * 63 / 64 * 4 * 64 * 2048  # in bfloat16; and the rows' input_ids
    assert float(re.search(r"scoring moves GiB: ([\d.]+) by \d+ all-reduce", text)[1]) == pytest.approx(gathered / GIB, abs=0.01)
    again = 2 * 2 * 63 / 64 * (base - 2 * embedding + cut)  # the layers, to go back; the adapter's gradients lie within the tolerance
    assert float(re.search(r"training moves GiB: ([\d.]+) by \d+ all-reduce", text)[1]) == pytest.approx((gathered + again) / GIB, rel=0.005)
    assert "fits: 9" in text and "shape as published" in text
    assert max(map(len, text.splitlines())) <= 80
