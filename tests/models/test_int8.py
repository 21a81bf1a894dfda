"""Eight-bit products of a scoring pass."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qtjax.models import ModelConfig, hidden_states, init_params, int8_layers
from qtjax.models.int8 import Int8
from qtjax.overlays import init_overlay
from qtjax.tree import flatten

CONFIG = ModelConfig(
    vocab_size=50, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=8
)


def test_a_product_is_off_by_half_a_step_of_each_side():
    """|x W - int8(x) int8(W)| <= half a code of x times |W| + half a code of W times |x|, summed over `in`: numpy's own bound."""
    rng = np.random.default_rng(0)
    x, w = rng.normal(size=(3, 5, 40)).astype(np.float32), rng.normal(size=(40, 24)).astype(np.float32)
    x[0, 0] = 0  # a token of zeros has no scale of its own
    kernel = int8_layers({"layers": {"a": {"kernel": jnp.asarray(w)}}})["layers"]["a"]["kernel"]
    assert isinstance(kernel, Int8) and kernel.codes.dtype == jnp.int8 and kernel.codes.min() >= -127
    step_x, step_w = np.abs(x).max(axis=-1, keepdims=True) / 127, np.abs(w).max(axis=0, keepdims=True) / 127
    bound = step_x / 2 * np.abs(w).sum(axis=0) + step_w / 2 * np.abs(x).sum(axis=-1, keepdims=True) + 40 * step_x * step_w / 4
    apart = np.abs(np.asarray(kernel.times(jnp.asarray(x))) - x @ w)
    assert (apart <= bound + 1e-5).all() and apart.max() > 1e-3
    assert not apart[0, 0].any()
    np.testing.assert_allclose(kernel.dequantize(jnp.float32), w, atol=float(step_w.max()) / 2 + 1e-6)


@pytest.mark.parametrize("method", [None, "lora", "dora", "ia3"])
def test_hidden_states_stay_near(method):
    """Whole layers with packed kernels, overlays included: within 5 % of the states' size (two layers of products at 1/127)."""
    params = init_params(CONFIG, jax.random.key(0))
    params = jax.tree.map(lambda x: x * (8 if x.ndim > 2 else 1), params)  # kernels of size 0.16, so that layers matter
    overlay = None if method is None else init_overlay(method, CONFIG, params, jax.random.key(1))
    ids = jax.random.randint(jax.random.key(2), (2, 20), 0, 50)
    exact = hidden_states(CONFIG, params, ids, overlay=overlay)
    packed = jax.jit(int8_layers)(params)
    near = hidden_states(CONFIG, packed, ids, overlay=overlay)
    apart = float(jnp.linalg.norm(near - exact) / jnp.linalg.norm(exact))
    assert 1e-4 < apart < 0.05
    kinds = {path: type(leaf).__name__ for path, leaf in flatten(packed).items()}
    assert {path for path, kind in kinds.items() if kind == "Int8"} == {p for p in kinds if p.startswith("layers") and p.endswith("kernel")}
