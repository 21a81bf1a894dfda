"""head_loss and its gradients equal autodiff of the naive loss; what is not differentiated is not computed."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qtjax.errors import QtjaxError
from qtjax.scoring import head_loss, token_scores
from qtjax.scoring.chunks import chunk_for


def naive(hidden, kernel, labels, weights):
    logits = (hidden @ kernel).astype(jnp.float32)
    nll = jax.nn.logsumexp(logits, -1) - jnp.take_along_axis(logits, labels[..., None], -1)[..., 0]
    return jnp.sum(weights * nll)


def draw(B=3, L=5, D=8, V=29, seed=0):
    r = np.random.default_rng(seed)
    weights = r.uniform(0.1, 2, size=(B, L)) * (r.random((B, L)) < 0.6)
    return (
        jnp.asarray(r.normal(size=(B, L, D)), jnp.float32),
        jnp.asarray(r.normal(size=(D, V)), jnp.float32),
        jnp.asarray(r.integers(0, V, (B, L)), jnp.int32),
        jnp.asarray(weights, jnp.float32),
    )


@functools.partial(jax.jit, static_argnums=4)
def both_gradients(hidden, kernel, labels, weights, chunk):
    mine = jax.value_and_grad(lambda *a: 0.7 * head_loss(*a, chunk=chunk), (0, 1, 3))(hidden, kernel, labels, weights)
    return mine, jax.value_and_grad(lambda *a: 0.7 * naive(*a), (0, 1, 3))(hidden, kernel, labels, weights)


def matmuls(f, *arguments):
    return str(jax.make_jaxpr(f)(*arguments)).count("dot_general[")


@settings(deadline=None, max_examples=40)
@given(shape=st.sampled_from([(1, 1, 4), (3, 5, 1), (3, 5, 4), (2, 8, 16), (4, 3, 256)]), bits=st.integers(0, 2**16 - 1), seed=st.integers(0, 99))
def test_value_and_gradients_equal_autodiff(shape, bits, seed):
    """For any weights and chunk: loss, d hidden, d kernel as autodiff of the naive loss; d weights is the nll of targets."""
    B, L, chunk = shape
    hidden, kernel, labels, weights = draw(B, L, seed=seed)
    on = np.array([bits >> t & 1 for t in range(B * L)], bool).reshape(B, L)
    weights = jnp.where(on, weights + 0.5, 0)
    mine, theirs = both_gradients(hidden, kernel, labels, weights, chunk)
    np.testing.assert_allclose(mine[0], theirs[0], rtol=1e-5, atol=1e-5)
    for a, b in zip(mine[1][:2], theirs[1][:2]):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(mine[1][2], np.where(on, theirs[1][2], 0), rtol=1e-4, atol=1e-5)


def test_gradient_by_hand():
    """One token, D = 1, logits (0, ln 3), label 0: loss ln 4, slope (p - onehot) = (-3/4, 3/4), dh = slope . W, dW = h slope."""
    hidden, kernel = jnp.full((1, 1, 1), 2.0), jnp.asarray([[0.0, np.log(3.0) / 2]], jnp.float32)
    loss, (dh, dw) = jax.value_and_grad(head_loss, (0, 1))(hidden, kernel, jnp.zeros((1, 1), jnp.int32), jnp.ones((1, 1)))
    np.testing.assert_allclose(loss, np.log(4), rtol=1e-6)
    np.testing.assert_allclose(dh[0, 0, 0], 0.75 * np.log(3) / 2, rtol=1e-6)
    np.testing.assert_allclose(dw, [[-1.5, 1.5]], rtol=1e-6)


def test_vd_layout_equals_dv():
    """A tied embedding as stored gives the same loss and the transposed gradient."""
    hidden, kernel, labels, weights = draw()
    a = jax.value_and_grad(head_loss, (0, 1))(hidden, kernel, labels, weights)
    b = jax.value_and_grad(functools.partial(head_loss, layout="vd", chunk=4), (0, 1))(hidden, kernel.T, labels, weights)
    np.testing.assert_allclose(a[0], b[0], rtol=1e-6)
    np.testing.assert_allclose(a[1][0], b[1][0], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(a[1][1], b[1][1].T, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("argnums", "count"), [((0, 1), 3), (0, 2), (1, 2), (3, 1)])
@pytest.mark.parametrize("wrap", [lambda f: f, jax.jit])
def test_only_wanted_gradients_are_computed(argnums, count, wrap):
    """Three matmuls with a trained head, two with a frozen one (LoRA), one for the loss alone; also through jit."""
    assert matmuls(jax.grad(wrap(head_loss), argnums), *draw()) == count


def test_frozen_head_inside_an_accumulation_scan():
    """The kernel's gradient is not computed either when grad runs inside lax.scan over microbatches."""
    hidden, kernel, labels, weights = draw()

    def accumulate(scale, kernel):
        def micro(total, _):
            gradient = jax.grad(lambda s: head_loss(s * hidden, kernel, labels, weights))(scale)
            return total + gradient, None

        return jax.lax.scan(micro, jnp.float32(0), None, length=2)[0]

    assert matmuls(accumulate, jnp.float32(1.5), kernel) == 2
    expected = 2 * jax.grad(lambda s: naive(s * hidden, kernel, labels, weights))(1.5)
    np.testing.assert_allclose(accumulate(jnp.float32(1.5), kernel), expected, rtol=1e-5)


def test_no_target_is_zero_without_nan():
    """All weights zero (and NaN hidden states, illegal labels): loss 0, gradients 0."""
    hidden, kernel, labels, weights = draw()
    loss, gradients = jax.value_and_grad(head_loss, (0, 1))(hidden * jnp.nan, kernel, labels - 100, weights * 0)
    assert loss == 0 and all(not np.any(g) for g in gradients)
    assert head_loss(hidden[:, :0], kernel, labels[:, :0], weights[:, :0]) == 0


def test_slots_of_weight_zero_are_never_read():
    """NaN hidden states outside the targets: same loss and gradients bit for bit, zero gradient there."""
    hidden, kernel, labels, weights = draw(seed=2)
    f = jax.value_and_grad(functools.partial(head_loss, chunk=4), (0, 1))
    clean, dirty = f(hidden, kernel, labels, weights), f(jnp.where(weights[..., None] > 0, hidden, jnp.nan), kernel, labels, weights)
    jax.tree.map(np.testing.assert_array_equal, clean, dirty)
    assert not np.any(np.asarray(dirty[1][0])[np.asarray(weights) == 0])


def test_illegal_label_makes_the_loss_nan():
    """A target outside the vocabulary stops the run instead of training something else."""
    hidden, kernel, labels, weights = draw()
    assert np.isnan(head_loss(hidden, kernel, labels.at[0, 0].set(29), weights.at[0, 0].set(1.0)))


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_half_precision_keeps_float32_statistics(dtype):
    """Loss to float32 accuracy on the rounded operands; gradients come back in the operands' dtype, near the exact ones."""
    hidden, kernel, labels, weights = draw(4, 8, D=16, V=300, seed=1)
    hidden, kernel = hidden.astype(dtype), kernel.astype(dtype)
    # A tiny outer factor (1 / tokens of a step) must not flush the gradients on the way.
    loss, gradients = jax.value_and_grad(lambda *a: head_loss(*a, chunk=8), (0, 1))(hidden, kernel, labels, weights)
    exact = jax.value_and_grad(naive, (0, 1))(hidden.astype(jnp.float32), kernel.astype(jnp.float32), labels, weights)
    np.testing.assert_allclose(loss, exact[0], rtol=1e-5)
    for mine, theirs in zip(gradients, exact[1]):
        assert mine.dtype == dtype
        error = np.linalg.norm(np.asarray(mine, np.float32) - theirs) / np.linalg.norm(theirs)
        assert error < (1e-2 if dtype == jnp.bfloat16 else 2e-3)


def test_temporary_memory_stays_below_the_naive_tenth():
    """Training with T much larger than the chunk: temporaries near c * V + D * V floats, no [T, V]."""
    B, L, D, V, chunk = 4, 256, 16, 4096, 16
    shapes = [jax.ShapeDtypeStruct(s, t) for s, t in [((B, L, D), "float32"), ((D, V), "float32"), ((B, L), "int32"), ((B, L), "float32")]]

    def temporaries(f):
        return jax.jit(jax.value_and_grad(f, (0, 1))).lower(*shapes).compile().memory_analysis().temp_size_in_bytes

    mine = temporaries(functools.partial(head_loss, chunk=chunk))
    assert mine < 4 * (3 * chunk * V + 2 * D * V) and mine < temporaries(naive) / 10


@pytest.mark.parametrize(
    ("change", "message"),
    [({"chunk": -1}, "chunk = -1"), ({"layout": "x"}, "layout = 'x'"), ({"weights": jnp.ones((3, 4))}, "weights has shape"), ({"kernel": jnp.ones((9, 29))}, "kernel has shape")],
)
def test_bad_arguments_are_one_line(change, message):
    """Each misuse is a QtjaxError of one line that names the argument."""
    arguments = dict(zip(("hidden", "kernel", "labels", "weights"), draw())) | change
    with pytest.raises(QtjaxError) as caught:
        head_loss(**arguments)
    assert message in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("train", [True, False])
def test_a_launch_without_targets_multiplies_nothing(train):
    """Where one chunk is as long as the row, its logits are still formed inside the loop alone: none for a row without targets."""
    hidden, head = jnp.ones((1, 64, 16)), jnp.ones((16, 40))
    labels, weights = jnp.zeros((1, 64), jnp.int32), jnp.ones((1, 64))
    if train:
        run, given = jax.value_and_grad(functools.partial(head_loss, chunk=64), (0, 1)), (hidden, head, labels, weights)
    else:
        run, given = functools.partial(token_scores, chunk=64), (hidden[0], head, labels[0], weights[0] > 0)
    text = jax.jit(run).lower(*given).compile().as_text()
    entry = text[text.index("\nENTRY ") :]
    assert "f32[64,40]" in text and "f32[64,40]" not in entry[: entry.index("\n}")]


@pytest.mark.parametrize(("width", "chunk"), [(1, 256), (256, 256), (257, 512), (288, 512), (2048, 2048), (4096, 2048)])
def test_a_chunk_is_as_long_as_the_model_is_wide(width, chunk):
    """Unless the caller says: the least power of two that is not below the width, from 256 to 2,048 tokens."""
    assert chunk_for(width) == chunk
