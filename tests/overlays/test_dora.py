"""DoRA: the base at the start, the formula with and without dropout, the norm without gradient, unedited layers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tests.overlays.test_lora import CONFIG, KEY, logits

from qtjax import models
from qtjax.errors import QtjaxError
from qtjax.models import LinearEdit
from qtjax.overlays import abstract_overlay, init_overlay, merge, overlay_axes
from qtjax.tree import flatten

pytestmark = pytest.mark.slow

DOWN, UP, W = (np.random.default_rng(n).normal(size=s).astype(np.float32) for n, s in enumerate([(10, 4), (4, 7), (10, 7)]))
M, BIAS = np.linspace(0.5, 2, 7, dtype=np.float32), np.linspace(-1, 1, 7, dtype=np.float32)
X = np.random.default_rng(9).normal(size=(5, 10)).astype(np.float32)


@pytest.fixture(scope="module")
def params():
    return models.init_params(CONFIG, jax.random.key(0))


def test_a_fresh_overlay_is_the_base_and_its_magnitudes_are_the_column_norms(params):
    """m starts as the norms of the base's columns, so the logits are the base's up to rounding; other layers hold zeros."""
    overlay = init_overlay("dora", CONFIG, params, KEY, r=4, layers_to_transform=[0, 2], target_modules="v_proj,up_proj")
    np.testing.assert_allclose(logits(params, overlay), logits(params, None), atol=1e-5)
    m = flatten(overlay.params)["layers/mlp/up_proj/lora_magnitude_vector"]
    norms = np.linalg.norm(np.asarray(params["layers"]["mlp"]["up_proj"]["kernel"]), axis=1)
    np.testing.assert_allclose(m[0], norms[0], rtol=1e-6)
    assert not np.asarray(m[1]).any()
    with pytest.raises(QtjaxError, match="give init_overlay its params"):
        init_overlay("dora", CONFIG, None, KEY)


def test_layers_that_are_not_edited_are_bitwise_the_base(params):
    """Their scale is exactly 1 in the forward and in the merge, whatever the other layers hold."""
    overlay = init_overlay("dora", CONFIG, params, KEY, r=2, layers_to_transform=[1], target_modules="up_proj")
    edit = overlay.expand().tree["layers"]["mlp"]["up_proj"]["edit"]
    kernel = params["layers"]["mlp"]["up_proj"]["kernel"]
    x = jax.random.normal(KEY, (3, 32))
    for n in (0, 2):
        np.testing.assert_array_equal(jax.tree.map(lambda v: v[n], edit)(x, kernel[n]), x @ kernel[n])
    _, merged = merge(CONFIG, params, overlay.replace(params=jax.tree.map(lambda v: 2 * v, overlay.params)))
    got = merged["layers"]["mlp"]["up_proj"]["kernel"]
    np.testing.assert_array_equal(got[0], kernel[0])
    np.testing.assert_allclose(got[1], 2 * kernel[1], rtol=1e-5)


def test_the_formula_and_its_gradient():
    """y = m / ||W + AB|| (x W + x A B) + b in float64, and the gradient takes the norm as a constant (section 4.3)."""
    edit = LinearEdit(down=DOWN, up=UP, magnitude=M)
    norm = np.linalg.norm(W.astype(np.float64) + DOWN.astype(np.float64) @ UP, axis=0)
    np.testing.assert_allclose(edit(jnp.asarray(X), W, BIAS), M / norm * (X @ (W + DOWN @ UP)) + BIAS, rtol=1e-5, atol=1e-5)

    def through(up, magnitude):
        return LinearEdit(down=DOWN, up=up, magnitude=magnitude)(jnp.asarray(X), W).sum()

    slope, own = jax.grad(through, argnums=(0, 1))(jnp.asarray(UP), jnp.asarray(M))
    np.testing.assert_allclose(slope, np.outer((X @ DOWN).sum(0), M / norm), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(own, (X @ (W + DOWN @ UP)).sum(0) / norm, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("undropped", [0, 1])
def test_dropout_acts_on_all_that_training_changes(undropped):
    """y = x W + (c - 1) x' W + c x' A B + b with the dropped x' (authors' code, PEFT); initial factors count as W."""
    edit = LinearEdit(down=DOWN, up=UP, magnitude=M, dropout_key=KEY, dropout_rate=0.4, undropped=undropped)
    dropped = np.asarray(edit.drop(jnp.asarray(X)))
    assert 0.1 < (dropped == 0).mean() < 0.8
    w = W + DOWN[:, 4 - undropped :] @ UP[4 - undropped :]
    side = DOWN[:, : 4 - undropped] @ UP[: 4 - undropped]
    c = M / np.linalg.norm(w + side, axis=0)
    expected = X @ w + (c - 1) * (dropped @ w) + c * (dropped @ side) + BIAS
    np.testing.assert_allclose(edit(jnp.asarray(X), W, BIAS), expected, rtol=1e-4, atol=1e-4)


def test_dropout_reaches_the_model(params):
    """A key changes the logits, no key drops nothing, and the fresh overlay under dropout is still the base."""
    fresh = init_overlay("dora", CONFIG, params, KEY, r=4, lora_dropout=0.5, target_modules="down_proj")
    np.testing.assert_allclose(logits(params, fresh, rng=KEY), logits(params, None), atol=2e-5)
    overlay = fresh.replace(params=jax.tree.map(lambda v: v + 0.2, fresh.params))
    one, same, two = (logits(params, overlay, rng=key) for key in (KEY, KEY, jax.random.key(9)))
    np.testing.assert_array_equal(one, same)
    assert np.abs(one - two).max() > 0.05 and np.abs(one - logits(params, overlay)).max() > 0.05


def test_counts_axes_and_refusals():
    """At 7B the count is the closed form; m lies along its kernel's output; what DoRA does not edit is refused."""
    config = models.ModelConfig()
    assert abstract_overlay("dora", config, r=16).trainable_count == 41_336_832
    axes = flatten(overlay_axes(abstract_overlay("dora", CONFIG), CONFIG).params)
    assert axes["layers/mlp/up_proj/lora_magnitude_vector"] == ("layers", "mlp")
    for fields, message in (
        (dict(target_modules=["embed_tokens"]), "matches 'model.embed_tokens', which is not a linear module"),
        (dict(use_dora=False), "use_dora = False: is not supported for dora; only True"),
        (dict(r=0), "r = 0: must be an integer above 0"),
    ):
        with pytest.raises(QtjaxError, match=message):
            abstract_overlay("dora", CONFIG, **fields)
