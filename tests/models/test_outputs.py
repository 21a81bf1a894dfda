"""What the layers gave in an earlier pass stands for a pass of one's own: same values, same gradients, a forward pass less."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qtjax.errors import QtjaxError
from qtjax.models import ModelConfig, hidden_states, init_params, kept_hidden_states
from qtjax.overlays import init_overlay

TINY = ModelConfig(
    vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4,
    num_key_value_heads=2, head_dim=8, rope_theta=1000.0,
)  # fmt: skip
LENGTHS = (5, 9, 7)


def rows_of(order: list[int], length: int) -> dict[str, jax.Array]:
    """One row of the samples in this order; sample i is the same wherever it stands."""
    samples = [np.random.default_rng(i).integers(1, TINY.vocab_size, LENGTHS[i]) for i in order]
    parts = {
        "input_ids": np.concatenate(samples), "position_ids": np.concatenate([np.arange(len(s)) for s in samples]),
        "segment_ids": np.repeat(np.arange(1, len(samples) + 1), [len(s) for s in samples]),
    }  # fmt: skip
    return {name: jnp.asarray(np.pad(x, (0, length - len(x))))[None] for name, x in parts.items()}


def overlay_of(method: str, config: ModelConfig, params: dict):
    if not method:
        return None
    overlay = init_overlay(method, config, params, jax.random.key(1))
    drawn = jax.tree.map(lambda x: x + 0.1 * jax.random.normal(jax.random.key(2), x.shape, x.dtype), overlay.params)  # no zeros that hide it
    return overlay.replace(params=drawn)


@pytest.mark.parametrize(
    ("method", "change"),
    [
        ("", {}), ("", {"sliding_window": 4, "model_type": "mistral"}), ("", {"remat": "offload"}), ("lora", {}), ("prefix", {}),
        ("lora", {"unroll_layers": True}), ("lora", {"dtype": "bfloat16"}),
    ],
    ids=str,
)  # fmt: skip
def test_known_outputs_give_the_same_states_and_gradients(method, change):
    """Samples 0, 1, 2 in a row are kept, 2 and 0 in another row trained: values and gradients are those of a pass of their own.

    Three layers, sums in another order: 2e-5 of the largest in float32, of 24 bits, and 2^16 times that many roundings in bfloat16, of 8.
    """
    config = TINY.replace(**change)
    params = init_params(config, jax.random.key(0))
    overlay = overlay_of(method, config, params)
    scored, trained = rows_of([0, 1, 2], 24), rows_of([2, 0], 16)
    outputs = kept_hidden_states(config, params, **scored, overlay=overlay)[1]
    taken = np.pad(np.concatenate([np.arange(14, 21), np.arange(5)]), (0, 4), constant_values=23)  # 23: padding
    outputs = outputs[:, :, taken]
    weights = jax.random.normal(jax.random.key(3), (1, 16, config.hidden_size))

    def loss(tree, known):
        p, o = (tree, None) if overlay is None else (params, overlay.replace(params=tree))
        return (weights * hidden_states(config, p, **trained, overlay=o, outputs=known)).sum()

    tree = params if overlay is None else overlay.params
    (own, theirs), (value, found) = (jax.jit(jax.value_and_grad(loss))(tree, known) for known in (None, outputs))
    near = 2e-5 if config.dtype == "float32" else 0.05
    np.testing.assert_allclose(value, own, rtol=near, atol=10 * near)
    for want, got in zip(jax.tree.leaves(theirs), jax.tree.leaves(found), strict=True):
        np.testing.assert_allclose(got, want, atol=near * max(float(jnp.abs(want).max()), 1e-3))
        assert got.any() or not want.any()


def test_the_states_are_those_that_were_kept():
    """Known outputs are not computed again: other numbers in their place come out through the last norm."""
    params, rows = init_params(TINY, jax.random.key(0)), rows_of([0, 1, 2], 21)
    hidden, outputs = kept_hidden_states(TINY, params, **rows)
    np.testing.assert_array_equal(hidden_states(TINY, params, **rows, outputs=outputs), hidden)
    np.testing.assert_allclose(hidden_states(TINY, params, **rows, outputs=-outputs), -hidden, rtol=1e-6)


@pytest.mark.parametrize("layers", [1, 3], ids=["in a loop, whose body counts once", "unrolled"])
def test_a_forward_pass_less_is_computed(layers):
    """By the compiler's own count: loss and gradient with known outputs take the forward products of the layers less than with
    every layer computed again, and its last product (a layer's output, which nobody needs) less than with all of it kept."""
    wide = TINY.replace(hidden_size=64, intermediate_size=256, head_dim=16, unroll_layers=layers > 1)
    params, rows = init_params(wide, jax.random.key(0)), rows_of([0, 1, 2], 21)
    outputs = kept_hidden_states(wide, params, **rows)[1]

    def flops(config, known):
        run = jax.jit(jax.grad(lambda p, k: hidden_states(config, p, **rows, outputs=k).sum()))
        return run.lower(params, known).compile().cost_analysis()["flops"]

    d, m, kv = 64, 256, 32
    layer = 2 * 21 * (2 * d * d + 2 * d * kv + 3 * d * m)  # the products of 21 tokens, forward
    less = flops(wide.replace(remat="full"), None) - flops(wide.replace(remat="full"), outputs)
    assert less > 0.95 * layers * layer
    assert flops(wide, None) - flops(wide, outputs) > 0.95 * layers * 2 * 21 * d * m


def test_passes_that_cannot_be_kept_are_refused():
    """Virtual tokens would stand between what is kept and whose it is."""
    params = init_params(TINY, jax.random.key(0))
    with pytest.raises(QtjaxError, match="cannot be kept or known where virtual tokens"):
        kept_hidden_states(TINY, params, **rows_of([0], 8), overlay=overlay_of("prompt", TINY, params))
    for outputs, rng, message in (
        (jnp.zeros((3, 1, 8, 16)), None, r"outputs: must be float32 \[3, 1, 8, 32\], got float32 \[3, 1, 8, 16\]"),
        (jnp.zeros((3, 1, 8, 32), jnp.bfloat16), None, "got bfloat16"),
        (jnp.zeros((3, 1, 8, 32)), jax.random.key(0), "draws nothing; leave rng out"),
    ):
        with pytest.raises(QtjaxError, match=message):
            hidden_states(TINY, params, **rows_of([0], 8), outputs=outputs, rng=rng)
