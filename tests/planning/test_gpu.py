"""Plans compiled for GPUs that are not here: arguments and what moves against hand counts, and what JAX takes of the memory."""

import importlib.util
import io

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from rich.console import Console

from qtjax import plan, planning
from qtjax.config import override, read_config
from qtjax.errors import QtjaxError
from qtjax.models import ModelConfig
from qtjax.planning import GPU_NAMES, SHARE_VARIABLE
from qtjax.planning.gpus import gpu_share

there = any(importlib.util.find_spec(f"jax_{each}_plugin") for each in ("cuda12", "cuda13"))
needs_plugin = pytest.mark.skipif(not there, reason="compiling for GPUs needs the extra plan-gpu")
SHAPE = ModelConfig(
    vocab_size=2048, hidden_size=512, intermediate_size=1024, num_hidden_layers=5, num_attention_heads=8, num_key_value_heads=4, head_dim=64,
    max_position_embeddings=512,
)  # fmt: skip


@pytest.mark.skipif(there, reason="the extra plan-gpu is installed")
def test_without_the_plugin_one_line_says_what_to_install():
    """The very version that goes with this JAX."""
    with pytest.raises(QtjaxError, match=f"pip install jax-cuda12-plugin=={jax.__version__} jax-cuda12-pjrt=={jax.__version__}"):
        planning.open_topology("h100:8")


@pytest.mark.parametrize(("text", "share"), [(None, 0.75), ("0.92", 0.92), ("1", 1.0), ("0", None), ("90%", None), ("1.5", None)])
def test_the_share_of_the_memory_is_what_the_run_would_be_told(monkeypatch, text, share):
    """Three quarters by itself; the environment variable is read as a run would read it, and what is no fraction is refused."""
    monkeypatch.delenv("XLA_CLIENT_MEM_FRACTION", raising=False)
    monkeypatch.delenv(SHARE_VARIABLE, raising=False)
    if text is not None:
        monkeypatch.setenv(SHARE_VARIABLE, text)
    if share is None:
        with pytest.raises(QtjaxError, match=f"{SHARE_VARIABLE} = '{text}': must be a fraction"):
            gpu_share()
    else:
        assert gpu_share() == share
    monkeypatch.delenv(SHARE_VARIABLE, raising=False)
    monkeypatch.setenv("XLA_CLIENT_MEM_FRACTION", "two thirds")  # its other name
    with pytest.raises(QtjaxError, match="^XLA_CLIENT_MEM_FRACTION = 'two thirds'"):
        gpu_share()


@needs_plugin
@pytest.mark.slow
@pytest.mark.parity
@pytest.mark.parametrize("name", [name for name in GPU_NAMES if name.endswith(":2")])
def test_every_gpu_that_is_listed_can_be_compiled_for(name):
    """A product of two matrices cut along one axis; its arguments are the shards."""
    devices, chip = planning.open_topology(name)
    sharding = NamedSharding(Mesh(np.asarray(devices), ("x",)), P("x"))
    matrix = jax.ShapeDtypeStruct((256, 256), jnp.bfloat16, sharding=sharding)
    compiled = jax.jit(jnp.matmul).lower(matrix, matrix).compile()
    assert compiled.memory_analysis().argument_size_in_bytes == 2 * 2 * 256 * 256 / 2
    assert [each.kind for each in planning.collectives(compiled.as_text(), 2)] == ["all-gather"]
    assert chip.usable == 0.75 * chip.memory


@needs_plugin
@pytest.mark.slow
@pytest.mark.parity
def test_full_fine_tuning_of_a_tiny_model_by_hand():
    """fsdp 4 in bfloat16: arguments are quarters; matrices are gathered once forward and once backward, gradients are scattered."""
    changes = {"mesh.fsdp": 4, "model.dtype": "bfloat16"}
    devices, _ = planning.open_topology("h100:4")
    weighed = planning.weigh(override(read_config("configs/smol.py"), changes), SHAPE, devices)
    layers, tables, norms = 5 * (512 * (2 * 512 + 2 * 256) + 3 * 512 * 1024), 2 * 2048 * 512, 11 * 512
    weights, needs = 4 * ((layers + tables) / 4 + norms), weighed.needs
    assert needs["update"].arguments == pytest.approx(4 * weights, rel=0.01)
    assert needs["training"].arguments == pytest.approx(2 * weights, rel=0.01)
    scoring, training = ({each.kind: each.bytes for each in needs[name].moved} for name in ("scoring", "training"))
    assert scoring["all-gather"] == pytest.approx(3 / 4 * 2 * (layers + tables / 2), rel=0.02)
    assert training["all-gather"] == pytest.approx(3 / 4 * 2 * (2 * layers + tables / 2), rel=0.02)
    assert training["reduce-scatter"] >= 3 / 4 * 2 * layers


@needs_plugin
@pytest.mark.slow
@pytest.mark.parity
def test_the_door_says_what_is_approximate():
    """No kernel was tried out, and JAX takes a share of the memory."""
    console = Console(file=io.StringIO(), width=80)
    plan.main(["--config", "configs/smol.py", "--topology", "l4:1"], console)
    text = " ".join(console.file.getvalue().split())
    assert "temporaries are approximate" in text and "JAX takes 75% of a GPU's 22 GiB" in text and "of 16.5 GiB stay free" in text
