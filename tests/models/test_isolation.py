"""Who may influence whom, proven by gradients and by comparing packed rows with separate ones."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qtjax.models import ModelConfig, abstract_params, apply, hidden_states, unrolled
from qtjax.tree import flatten, unflatten

TINY = ModelConfig(
    vocab_size=48, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, head_dim=8, rope_theta=1000.0,
)  # fmt: skip
WINDOW = TINY.replace(model_type="mistral", sliding_window=4)
jit_apply = jax.jit(apply, static_argnums=0)


def params_of(config: ModelConfig) -> dict:
    """Random weights from numpy: drawing them on the device would cost seconds of compilation per test."""
    rng = np.random.default_rng(0)
    flat = flatten(abstract_params(config))
    return unflatten({p: jnp.asarray(rng.normal("norm" in p, 0.3, s.shape), s.dtype) for p, s in flat.items()})


def sensitivity(config, ids, target, **arguments) -> np.ndarray:
    """[B, L]: largest |d logits[0, target] / d embedding of slot (b, s)|, by making every slot its own table row."""
    params = params_of(config)
    own_rows = np.arange(ids.size).reshape(ids.shape)
    table = params["embed_tokens"]["embedding"]
    table = table.at[: ids.size].set(table[ids.reshape(-1)])  # ids.size is at most the vocabulary
    jacobian = _jacobian(config, params, table, own_rows, target, arguments)
    return np.abs(np.asarray(jacobian)).max(axis=(0, 2))[: ids.size].reshape(ids.shape)


@partial(jax.jit, static_argnums=0)
def _jacobian(config, params, table, rows, target, arguments):
    def some_logits(table):
        return apply(config, params | {"embed_tokens": {"embedding": table}}, rows, **arguments)[0, target, :6]

    return jax.jacrev(some_logits)(table)


def ids_of(batch: int, length: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(1, TINY.vocab_size, (batch, length))


@pytest.mark.parametrize("target", (0, 4, 9))
def test_causality(target):
    """d logits[t] / d embedding of a later token is exactly 0, of every token up to t it is not, and rows are apart."""
    reached = sensitivity(TINY, ids_of(2, 10), target)
    assert (reached[0, : target + 1] > 0).all()
    assert (reached[0, target + 1 :] == 0).all()
    assert (reached[1] == 0).all()


def test_sliding_window_reach():
    """With window W and one layer, token t sees exactly tokens t-W+1..t; with N layers nothing beyond N(W-1) back."""
    one = sensitivity(WINDOW.replace(num_hidden_layers=1), ids_of(1, 12), 9)[0]
    assert ((one > 0) == (np.isin(np.arange(12), (6, 7, 8, 9)))).all()
    two = sensitivity(WINDOW, ids_of(1, 12), 9)[0]
    assert ((two > 0) == (np.isin(np.arange(12), range(3, 10)))).all()


def packed_row():
    """Three samples in a row of 20: lengths 6, 9, 3, then two slots of padding."""
    lengths = (6, 9, 3)
    segments = np.repeat([1, 2, 3, 0], [*lengths, 2])[None]
    positions = np.concatenate([*(np.arange(n) for n in lengths), np.zeros(2, int)])[None]
    return ids_of(1, 20, seed=1), positions, segments, lengths


@pytest.mark.parametrize("config", (TINY, WINDOW), ids=("full", "window"))
def test_packing_isolation(config):
    """A logit's gradient is exactly 0 at every token of other segments and of the padding."""
    ids, positions, segments, _ = packed_row()
    for target in (0, 5, 6, 14, 15, 17):
        reached = sensitivity(config, ids, target, position_ids=positions, segment_ids=segments)[0]
        own = (segments[0] == segments[0, target]) & (np.arange(20) <= target)
        assert (reached[~own] == 0).all(), target
        assert reached[target] > 0, target


@pytest.mark.parametrize("config", (TINY, WINDOW), ids=("full", "window"))
def test_packed_equals_separate(config):
    """Logits of samples packed into one row equal those of each sample alone (2e-5: another order of summation)."""
    ids, positions, segments, lengths = packed_row()
    params = params_of(config)
    together = np.asarray(jit_apply(config, params, ids, position_ids=positions, segment_ids=segments))[0]
    start = 0
    for length in lengths:
        alone = np.asarray(jit_apply(config, params, ids[:, start : start + length]))[0]
        assert np.abs(alone).max() > 1
        np.testing.assert_allclose(together[start : start + length], alone, atol=2e-5, rtol=0)
        start += length


@pytest.mark.parametrize("by", ("attention_mask", "segment_ids"))
def test_padded_queries_are_finite_without_gradient(by):
    """Padded slots, a fully padded row included: finite output, no gradient through it, no influence of their ids."""
    params = params_of(TINY)
    ids, real = ids_of(3, 8), np.ones((3, 8), np.int32)
    real[0, :3] = real[1, 5:] = real[2] = 0

    def total(params, ids):
        hidden = hidden_states(TINY, params, ids, **{by: real})
        return jnp.sum(jnp.where(real[..., None] == 0, hidden, 0) ** 2 + jnp.where(real[..., None] == 0, hidden, 0)), hidden

    (_, hidden), gradient = jax.jit(jax.value_and_grad(total, has_aux=True))(params, ids)
    assert np.isfinite(hidden).all()
    assert all((np.asarray(leaf) == 0).all() for leaf in jax.tree.leaves(gradient))
    other = np.where(real == 1, ids, (ids + 7) % TINY.vocab_size)
    again = jax.jit(lambda p, i: hidden_states(TINY, p, i, **{by: real}))(params, other)
    np.testing.assert_array_equal(np.asarray(hidden)[real == 1], np.asarray(again)[real == 1])


def test_attention_mask_and_segments_combine():
    """A token needs attention_mask 1 AND the own nonzero segment: masked tokens inside a segment have no influence."""
    ids, positions, segments, _ = packed_row()
    mask = np.ones_like(ids)
    mask[0, 8] = 0
    reached = sensitivity(TINY, ids, 12, attention_mask=mask, position_ids=positions, segment_ids=segments)[0]
    assert ((reached > 0) == np.isin(np.arange(20), (6, 7, 9, 10, 11, 12))).all()


def test_remat_and_unroll_do_not_change_the_numbers():
    """Loss and gradient are the same for remat none | dots | full and for scanned or unrolled layers."""
    params, ids = params_of(TINY), ids_of(2, 12)

    def loss_and_gradient(config):
        def loss(p):
            logits = apply(config, p, ids)
            return -jnp.mean(jnp.take_along_axis(jax.nn.log_softmax(logits[:, :-1]), ids[:, 1:, None], axis=-1))

        return jax.jit(jax.value_and_grad(loss))(params)

    plain = loss_and_gradient(TINY)
    assert plain[0] > 1
    for changes in ({"remat": "dots"}, {"remat": "full"}, {"unroll_layers": True}, {"remat": "full", "unroll_layers": True}):
        other = loss_and_gradient(TINY.replace(**changes))
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-6, rtol=2e-5), plain, other)


def test_a_run_unrolls_the_layers_of_small_models_by_itself():
    """By width and number of layers; of any model where it is asked for."""
    small, wide, deep = (TINY.replace(hidden_size=width, num_hidden_layers=count) for width, count in ((64, 8), (72, 2), (32, 9)))
    assert [unrolled(config, False) for config in (small, wide, deep)] == [True, False, False]
    assert unrolled(wide, True)


def test_full_remat_recomputes_the_layer():
    """remat="full" really drops the layers' activations: the backward pass holds a second layer body with its products."""
    params, ids = params_of(TINY), ids_of(2, 12)

    def products(config) -> int:
        gradient = jax.jit(jax.grad(lambda p: apply(config, p, ids).sum()))
        return gradient.lower(params).as_text().count("stablehlo.dot_general")

    assert products(TINY.replace(remat="full")) > products(TINY)


def test_full_remat_recomputes_unrolled_layers():
    """In a straight line too, where XLA would merge the second forward pass with the first: a third more products in the layers."""
    config, ids = TINY.replace(unroll_layers=True), ids_of(2, 12)

    def flops(config) -> float:
        gradient = jax.jit(jax.grad(lambda p: hidden_states(config, p, ids).sum()))
        return gradient.lower(params_of(config)).compile().cost_analysis()["flops"]

    assert flops(config.replace(remat="full")) > 1.2 * flops(config)


def test_positions_matter_and_default_to_arange():
    """Omitted positions are arange; a common shift changes nothing (rotary is relative), stretching them does."""
    params, ids = params_of(TINY), ids_of(2, 12)
    positions = np.broadcast_to(np.arange(12), ids.shape)
    plain = np.asarray(jit_apply(TINY, params, ids))
    np.testing.assert_array_equal(plain, jit_apply(TINY, params, ids, position_ids=positions))
    np.testing.assert_allclose(plain, jit_apply(TINY, params, ids, position_ids=positions + 31), atol=1e-4)
    assert np.abs(plain - np.asarray(jit_apply(TINY, params, ids, position_ids=positions * 2))).max() > 0.05


def test_compute_and_parameter_dtype_are_apart():
    """bf16 compute on fp32 parameters gives bf16 hidden states, fp32 logits and fp32 gradients, near the fp32 run."""
    params, ids = params_of(TINY), ids_of(2, 12)
    half = TINY.replace(dtype="bfloat16")
    assert jax.eval_shape(lambda: hidden_states(half, params, ids)).dtype == jnp.bfloat16
    logits, exact = np.asarray(jit_apply(half, params, ids)), np.asarray(jit_apply(TINY, params, ids))
    assert logits.dtype == np.float32
    assert 1e-4 < np.abs(logits - exact).mean() < 0.02 * exact.std() + 0.02
    gradient = jax.jit(jax.grad(lambda p: apply(half, p, ids).mean()))(params)
    assert {leaf.dtype.name for leaf in jax.tree.leaves(gradient)} == {"float32"}
    stored_half = abstract_params(TINY.replace(param_dtype="bfloat16"))
    assert {leaf.dtype.name for leaf in jax.tree.leaves(stored_half)} == {"bfloat16"}
