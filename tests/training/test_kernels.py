"""What a run says of its attention is what it takes."""

import io

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from rich.console import Console

from qtjax import models
from qtjax.models.attention import Segments, attend, kernel_for, visible
from qtjax.training.programs import _in_dtype
from qtjax.training.run import open_session
from qtjax.training.run_folder import RunFolder

SMALL = models.ModelConfig(
    vocab_size=8, hidden_size=32, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2, head_dim=16
)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({}, "blocks"),
        ({"overlay.method": "lora", "overlay.r": 2}, "blocks"),
        ({"overlay.method": "prompt", "overlay.fields": "num_virtual_tokens=2"}, "xla, since blocks takes no virtual tokens"),
        ({"overlay.method": "prefix", "overlay.fields": "num_virtual_tokens=2"}, "xla, since blocks takes no virtual tokens"),
        ({"prune.token_pruner": "fastv"}, "blocks; scoring xla, since fastv reads the weights"),
    ],
)
def test_a_run_says_which_attention_it_takes(tiny_config, monkeypatch, changes, said):
    """The second line names the kernel, or plain attention and why; while its programs were traced the kernel ran, or did not."""
    from qtjax.models import attention

    ran, own = [], attention.blockwise
    monkeypatch.setattr(attention, "blockwise", lambda *a, **b: ran.append(1) or own(*a, **b))
    config, told = tiny_config(**changes), io.StringIO()
    with RunFolder.open(config) as folder:
        open_session(config, folder, Console(file=told, width=200)).close()
    assert f"attention: {said}\n" in told.getvalue()
    assert bool(ran) == said.startswith("blocks")


def test_rows_that_cudnn_refuses_take_plain_attention():
    """An odd number of slots, heads wider than 128 or of no whole eight: no error, and the numbers of plain attention."""
    config = SMALL.replace(dtype="bfloat16", attention="cudnn")
    assert [kernel_for(config.replace(head_dim=dim), 2, length) for dim, length in ((16, 64), (16, 63), (20, 64), (256, 64))] == ["cudnn", "xla", "xla", "xla"]
    q, k, v = np.random.default_rng(0).normal(size=(3, 1, 7, 2, 16)).astype(np.float32)
    slots, segment = jnp.arange(7), jnp.ones((1, 7), jnp.int32)
    sees = visible(slots, slots, segment, segment, None)
    plain = attend(config.replace(attention="xla"), q, k, v, sees)
    np.testing.assert_array_equal(attend(config, q, k, v, sees), plain)
    blocks = attend(config.replace(attention="blocks"), q, k, v, Segments(segment, jnp.zeros((1, 7), jnp.int32)))
    np.testing.assert_allclose(blocks, plain, atol=2e-6)


def test_what_cudnn_gave_is_kept_where_products_are(monkeypatch):
    """Its kernel runs once in a backward pass with remat dots, as with none, and twice with full, which keeps nothing of a layer."""
    from jax._src.cudnn import fused_attention_stablehlo as cudnn

    monkeypatch.setattr(cudnn, "check_cudnn_version", lambda: 91000)  # traced, not run
    ids = np.zeros((2, 8), np.int32)

    def kernels(remat):
        config = SMALL.replace(dtype="bfloat16", attention="cudnn", remat=remat)
        slope = jax.grad(lambda params: models.hidden_states(config, params, ids).astype(jnp.float32).sum())
        text = str(jax.make_jaxpr(slope)(models.init_params(config, jax.random.key(0))))
        return text.count("dot_product_attention_fwd_wrapper["), text.count("dot_product_attention_bwd_wrapper[")

    assert [kernels(remat) for remat in ("none", "dots", "full")] == [(1, 1), (1, 1), (2, 1)]


class _Mesh:
    """As much of a mesh as is looked at."""

    def __init__(self, platform):
        self.devices = np.array([type("Device", (), {"platform": platform})()])


def test_a_scoring_pass_in_another_dtype_has_that_ones_kernel():
    """cuDNN takes 16 bits only: not for a pass in float32, and for one in bfloat16 of a float32 model; a chosen kernel stays."""
    half, whole = SMALL.replace(dtype="bfloat16", attention="cudnn"), SMALL.replace(attention="xla")
    gpu = _Mesh("gpu")
    assert _in_dtype(half, "float32", gpu).attention == "xla" and _in_dtype(whole, "bfloat16", gpu).attention == "cudnn"
    assert _in_dtype(half.replace(attention="xla"), "float32", gpu).attention == "xla"
    assert _in_dtype(whole.replace(attention="blocks"), "bfloat16", _Mesh("cpu")).attention == "blocks"
