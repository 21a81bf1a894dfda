"""What an overlay saves in arithmetic, by the compiler's count."""

import jax
import pytest
import jax.numpy as jnp

from qtjax import models
from qtjax.overlays import init_overlay

pytestmark = pytest.mark.slow

# LLaMA's proportions; layers unrolled, since the compiler counts a scan's body once
CONFIG = models.ModelConfig(
    vocab_size=256, hidden_size=128, intermediate_size=344, num_hidden_layers=4, num_attention_heads=4,
    num_key_value_heads=4, head_dim=32, unroll_layers=True,
)  # fmt: skip
IDS = jax.ShapeDtypeStruct((2, 64), jnp.int32)


def _flops(method: str, **fields) -> float:
    params = models.init_params(CONFIG, jax.random.key(0))
    overlay = None if method == "full" else init_overlay(method, CONFIG, params, jax.random.key(1), **fields)

    def loss(trained, ids):
        own, tree = (None, trained) if overlay is None else (overlay.replace(params=trained), params)
        hidden = models.hidden_states(CONFIG, tree, ids, overlay=own)
        hidden, kernel, layout = models.readout(CONFIG, tree, hidden, own)
        logp = jax.nn.log_softmax(hidden @ (kernel if layout == "dv" else kernel.T))
        return -jnp.take_along_axis(logp, ids[..., None], -1).mean()

    trained = params if overlay is None else overlay.params
    return jax.jit(jax.value_and_grad(loss)).lower(trained, IDS).compile().cost_analysis()["flops"]


def test_a_lora_step_needs_three_quarters_of_a_full_step_at_most():
    """Without remat the frozen kernels' gradients, a third of a full step's products, are not formed."""
    full = _flops("full")
    assert _flops("lora", r=4) <= 0.75 * full
    # vectors cost next to nothing beside the frozen products
    assert _flops("ia3") <= 0.72 * full
    assert _flops("ln_tuning") <= 0.72 * full
