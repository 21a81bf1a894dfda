"""The attention kernels against plain masked attention."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qtjax.models import ModelConfig, hidden_states, init_params
from qtjax.models.attention import Segments, attend, kernel_of, visible
from qtjax.models.blocks import _scores, blockwise, first_slots
from qtjax.models.products import product
from qtjax.models.splash import splash

# (B, L, H, K, C, window): whole blocks, a block that is not full, one short row, heads that share keys, windows of all sizes
SHAPES = [
    (2, 256, 4, 2, 16, None), (1, 300, 2, 2, 8, None), (3, 40, 4, 1, 8, None), (1, 640, 2, 1, 8, None),
    (2, 256, 4, 2, 16, 1), (1, 384, 2, 2, 8, 100), (1, 300, 2, 1, 8, 299),
]  # fmt: skip


def rows(shape, dtype=jnp.float32):
    batch, length, heads, kv_heads, dim, _ = shape
    rng = np.random.default_rng(length)
    q, k, v = (jnp.asarray(rng.normal(size=(batch, length, n, dim)), dtype) for n in (heads, kv_heads, kv_heads))
    cuts = np.sort(rng.integers(0, length, (batch, 4)), axis=1)
    segment = (np.arange(length)[None, :, None] >= cuts[:, None, :]).sum(axis=2)  # 0 at the front: padding there
    segment[:, length - length // 5 :] = 0  # and behind
    segment[0, : length // 10] = segment[0, length // 2]  # a segment that is not in one piece
    return q, k, v, jnp.asarray(segment, jnp.int32)


def plain(q, k, v, segment, window):
    slots = jnp.arange(q.shape[1])
    return attend(ModelConfig(), q, k, v, visible(slots, slots, segment, segment, window))


def blocks(q, k, v, segment, window):
    return blockwise(q, k, v, segment, first_slots(segment), window)


def seen(y, segment):
    """What padding reads is nobody's business."""
    return jnp.where((segment != 0)[..., None, None], y.astype(jnp.float32), 0)


def slopes(run, q, k, v, segment, window):
    return jax.grad(lambda *x: jnp.sum(jnp.sin(seen(run(*x, segment, window), segment))), (0, 1, 2))(q, k, v)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_blocks_equal_plain_attention(shape):
    """Values and gradients are those of masked attention, whatever the segments, the window and the heads that share keys."""
    q, k, v, segment = rows(shape)
    window = shape[-1]
    # sums of up to 640 float32 products in another order
    np.testing.assert_allclose(seen(blocks(q, k, v, segment, window), segment), seen(plain(q, k, v, segment, window), segment), atol=2e-6)
    for mine, reference in zip(slopes(blocks, q, k, v, segment, window), slopes(plain, q, k, v, segment, window)):
        np.testing.assert_allclose(mine, reference, atol=2e-5)


def test_padding_gets_no_gradient_and_no_nan():
    """A query that sees nothing yields a finite value, and padding's keys take part in nothing."""
    q, k, v, segment = rows(SHAPES[0])
    k, v = (jnp.where((segment == 0)[..., None, None], 1e30, x) for x in (k, v))
    assert np.isfinite(blocks(q, jnp.where(jnp.abs(k) > 1e29, 0, k), v, segment, None)[np.asarray(segment) != 0]).all()
    for slope in slopes(blocks, q, k, v, segment, None)[1:]:
        assert np.all(np.asarray(slope)[np.asarray(segment) == 0] == 0)


def test_half_precision_is_as_near_as_plain_attention():
    """bfloat16 operands keep float32 statistics: no further from float32 than plain attention in bfloat16 (8 bits: 2^-8)."""
    q, k, v, segment = rows(SHAPES[0])
    exact = seen(plain(q, k, v, segment, None), segment)
    mine = seen(blocks(*(x.astype(jnp.bfloat16) for x in (q, k, v)), segment, None), segment)
    assert mine.dtype == jnp.float32 and float(jnp.abs(mine - exact).max()) < 2**-6


def test_no_square_of_the_row_is_held():
    """Temporary memory of the gradient grows with L, not with L^2: at 2048 slots less than one head's [L, L]."""
    q, k, v, segment = rows((1, 2048, 4, 4, 16, None))
    compiled = jax.jit(partial(slopes, blocks), static_argnums=4).lower(q, k, v, segment, None).compile()
    # q, k, v, their slopes, out and its slope in two layouts: 16 arrays of 2048 x 4 x 16; one block's scores and slopes beside them
    assert compiled.memory_analysis().temp_size_in_bytes < 2048 * 2048 * 4


@pytest.mark.parametrize("unrolled", [False, True])
def test_layers_share_no_array_of_what_queries_see(unrolled):
    """Nor in a model: what depends on segments alone is not taken out of the loop over layers, for every query of every head."""
    config = ModelConfig(
        vocab_size=20, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=4, head_dim=4,
        attention="blocks", unroll_layers=unrolled,
    )  # fmt: skip
    params = jax.eval_shape(lambda: init_params(config, jax.random.key(0)))
    row = jax.ShapeDtypeStruct((1, 2048), jnp.int32)

    def loss(params, ids, segment):
        return jnp.sum(hidden_states(config, params, ids, segment_ids=segment))

    compiled = jax.jit(jax.grad(loss)).lower(params, row, row).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < 2048 * 2048 * 4  # one head's scores


def test_programs_of_other_rows_trace_it_once(monkeypatch):
    """A run compiles several row counts: what a head does, forward and backward, is traced for the first of them."""
    traced = []
    monkeypatch.setattr("qtjax.models.blocks._scores", lambda *given: traced.append(1) or _scores(*given))
    counts = []
    for rows in (6, 3, 1):
        shape = jax.ShapeDtypeStruct((rows, 230, 2, 12), jnp.float32)  # of no other test
        segment = jax.ShapeDtypeStruct((rows, 230), jnp.int32)
        jax.jit(jax.grad(lambda q, k, v, s: blockwise(q, k, v, s, first_slots(s), 77).sum(), (0, 1, 2))).lower(shape, shape, shape, segment)
        counts.append(len(traced))
    assert counts[0] >= 2 and counts[1:] == counts[:1] * 2


def test_splash_equals_plain_attention():
    """The TPU kernel, interpreted: values and gradients, segments, heads that share keys, a sliding window."""
    run = partial(splash, interpret=True)
    for window in (None, 100):
        q, k, v, segment = rows((1, 256, 2, 1, 16, None))
        given = (q, k, v, segment, window)
        kernel = lambda q, k, v, segment, window: run(q, k, v, segment, first_slots(segment), window)  # noqa: E731
        np.testing.assert_allclose(seen(kernel(*given), segment), seen(plain(*given), segment), atol=2e-6)
        for mine, reference in zip(slopes(kernel, *given), slopes(plain, *given)):
            np.testing.assert_allclose(mine, reference, atol=2e-5)


def test_the_kernel_goes_with_the_platform():
    """Each platform has its kernel, cuDNN's only in 16 bits, and an unknown one plain attention."""
    assert [kernel_of(p, "bfloat16") for p in ("cpu", "gpu", "cuda", "tpu", "metal")] == ["blocks", "cudnn", "cudnn", "splash", "xla"]
    assert kernel_of("gpu", "float32") == "xla" and kernel_of("tpu", "float32") == "splash"


def test_hidden_states_do_not_depend_on_the_kernel(window=20):
    """A model's hidden states and gradients, packed and padded, are the same with either kernel; remat changes nothing."""
    config = ModelConfig(
        vocab_size=50, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        head_dim=8, sliding_window=window,
    )  # fmt: skip
    params = init_params(config, jax.random.key(0))
    ids = jax.random.randint(jax.random.key(1), (2, 150), 0, 50)
    segment = rows((2, 150, 1, 1, 8, None))[-1]

    def loss(config, params):
        return jnp.sum(jnp.cos(hidden_states(config, params, ids, segment_ids=segment)))

    value, slope = jax.value_and_grad(partial(loss, config))(params)
    for other in (config.replace(attention="blocks"), config.replace(attention="blocks", remat="dots"), config.replace(remat="offload")):
        mine, own = jax.value_and_grad(partial(loss, other))(params)
        np.testing.assert_allclose(mine, value, rtol=1e-5)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-4), own, slope)


def test_half_precision_products_are_rounded_float32_sums():
    """In 16 bits a product and its two slopes are float32 sums rounded once: numpy's, within half a unit of the last of 8 bits."""
    rng = np.random.default_rng(3)
    x, w, dy = (jnp.asarray(rng.normal(size=shape), jnp.bfloat16) for shape in ((2, 6, 40), (40, 24), (2, 6, 24)))
    y, pull = jax.vjp(lambda x, w: product(x, w), x, w)
    x64, w64, dy64 = (np.asarray(a, np.float64) for a in (x, w, dy))
    expected = (x64 @ w64, dy64 @ w64.T, np.einsum("blm,bln->mn", x64, dy64))
    for mine, exact in zip((y, *pull(dy)), expected):
        assert mine.dtype == jnp.bfloat16
        np.testing.assert_allclose(np.asarray(mine, np.float64), exact, rtol=2**-8, atol=2**-8)


def test_segments_are_what_the_kernel_gets():
    """`attend` with Segments runs the kernel of the config."""
    q, k, v, segment = rows(SHAPES[2])
    config = ModelConfig(attention="blocks")
    y = attend(config, q, k, v, Segments(segment, first_slots(segment)))
    np.testing.assert_array_equal(y, blocks(q, k, v, segment, None))
