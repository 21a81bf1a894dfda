"""token_scores equals a float64 softmax written out in numpy, whatever the chunk, the mask, the dtype and the layout."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qtjax.errors import QtjaxError
from qtjax.scoring import token_scores


def reference(hidden, kernel, labels, mask):
    """nll and entropy in float64, nats, straight from the definitions."""
    logits = np.asarray(hidden, np.float64) @ np.asarray(kernel, np.float64)
    logits -= logits.max(axis=1, keepdims=True)
    p = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    log_p = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
    nll = -log_p[np.arange(len(labels)), labels]
    return np.where(mask, nll, 0), np.where(mask, -(p * log_p).sum(axis=1), 0)


def draw(T, D=8, V=37, seed=0, scale=1.0):
    r = np.random.default_rng(seed)
    hidden = (scale * r.normal(size=(T, D))).astype(np.float32)
    kernel = r.normal(size=(D, V)).astype(np.float32)
    return hidden, kernel, r.integers(0, V, T), r.random(T) < 0.6


@settings(deadline=None, max_examples=60)
@given(shape=st.sampled_from([(1, 1), (1, 128), (7, 3), (16, 4), (13, 64), (33, 8)]), bits=st.integers(0, 2**33 - 1), seed=st.integers(0, 99))
def test_equals_float64_for_any_mask(shape, bits, seed):
    """Any mask, any chunk (also one that does not divide T): the numbers of the definition, zeros elsewhere."""
    T, chunk = shape
    hidden, kernel, labels, _ = draw(T, seed=seed)
    mask = np.array([bits >> t & 1 for t in range(T)], bool)
    got = token_scores(hidden, kernel, labels, mask, chunk=chunk)
    for mine, theirs in zip(got, reference(hidden, kernel, labels, mask)):
        assert mine.dtype == jnp.float32
        np.testing.assert_allclose(mine, theirs, rtol=2e-5, atol=2e-5)
        assert not np.any(np.asarray(mine)[~mask])


def test_uniform_and_certain_by_hand():
    """Equal logits: nll = H = ln V.  Two logits 0 and ln 3: p = 1/4, 3/4, nll = ln 4, H = ln 4 - 3/4 ln 3."""
    nll, entropy = token_scores(np.zeros((1, 4), np.float32), np.ones((4, 5), np.float32), np.array([2]), np.array([True]))
    np.testing.assert_allclose([nll[0], entropy[0]], np.log(5), rtol=1e-6)
    kernel = np.array([[0.0, np.log(3.0)]], np.float32)
    nll, entropy = token_scores(np.ones((1, 1), np.float32), kernel, np.array([0]), np.array([True]))
    np.testing.assert_allclose(nll[0], 1.386294361, rtol=1e-6)
    np.testing.assert_allclose(entropy[0], 1.386294361 - 0.75 * 1.098612289, rtol=1e-6)


@pytest.mark.parametrize("offset", [0.0, 1e4, -1e4])
def test_large_logits_stay_finite(offset):
    """A constant added to every logit changes nothing: the maximum is taken off before exp."""
    hidden = np.array([[1.0, offset]], np.float32)
    kernel = np.array([[0.0, 1.0, 2.0], [1.0, 1.0, 1.0]], np.float32)
    nll, entropy = token_scores(hidden, kernel, np.array([0]), np.array([True]))
    p = np.exp([0.0, 1, 2]) / np.exp([0.0, 1, 2]).sum()
    np.testing.assert_allclose([nll[0], entropy[0]], [-np.log(p[0]), -(p * np.log(p)).sum()], rtol=2e-3 if offset else 1e-6)


def test_extreme_confidence_gives_zero_entropy_and_no_nan():
    """Logits 1000 apart: entropy 0, nll 0 or 1000, both finite."""
    kernel = np.array([[1000.0, 0.0, -1000.0]], np.float32)
    ones = np.ones((3, 1), np.float32)
    nll, entropy = token_scores(ones, kernel, np.array([0, 1, 2]), np.ones(3, bool))
    np.testing.assert_allclose(nll, [0, 1000, 2000])
    np.testing.assert_allclose(entropy, 0, atol=1e-30)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_statistics_are_float32_for_half_precision_operands(dtype):
    """With operands rounded to half precision first, the scores equal float64 on those operands to float32 accuracy."""
    hidden, kernel, labels, mask = draw(24, D=32, V=500, seed=3)
    hidden, kernel = jnp.asarray(hidden, dtype), jnp.asarray(kernel, dtype)
    got = token_scores(hidden, kernel, labels, mask, chunk=8)
    for mine, theirs in zip(got, reference(hidden, kernel, labels, mask)):
        assert mine.dtype == jnp.float32
        np.testing.assert_allclose(mine, theirs, rtol=1e-5, atol=1e-4)


def test_masked_positions_are_never_read():
    """NaN hidden states and illegal labels where mask is False leave every number as it was, bit for bit."""
    hidden, kernel, labels, mask = draw(20, seed=4)
    clean = token_scores(hidden, kernel, labels, mask, chunk=6)
    dirty_hidden = np.where(mask[:, None], hidden, np.nan).astype(np.float32)
    dirty_labels = np.where(mask, labels, -100)
    for a, b in zip(clean, token_scores(dirty_hidden, kernel, dirty_labels, mask, chunk=6)):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("label", [-1, -100, 37, 10**6])
def test_illegal_label_on_a_target_is_nan(label):
    """A label outside the vocabulary is loud, not the score of some other token."""
    hidden, kernel, labels, mask = draw(4)
    labels[1], mask[:] = label, True
    nll, _ = token_scores(hidden, kernel, labels, mask)
    assert np.isnan(nll[1]) and np.isfinite(np.delete(nll, 1)).all()


@pytest.mark.parametrize("T", [0, 1, 5])
def test_no_targets_give_zeros(T):
    """All False, or no slot at all: zeros of the right shape."""
    hidden, kernel, labels, _ = draw(T)
    for array in token_scores(hidden, kernel, labels, np.zeros(T, bool)):
        assert array.shape == (T,) and not np.any(array)


def test_vd_layout_equals_dv():
    """The embedding as stored and its transpose as a kernel give the same scores."""
    hidden, kernel, labels, mask = draw(20, seed=5)
    for a, b in zip(token_scores(hidden, kernel, labels, mask), token_scores(hidden, kernel.T, labels, mask, layout="vd")):
        np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("layout", ["dv", "vd"])
def test_temporary_memory_is_one_chunk_of_logits(layout):
    """The compiler's temporary memory stays near c * V floats, far below T * V, and no copy of the kernel is made."""
    T, D, V, chunk = 256, 32, 8192, 8
    kernel = jax.ShapeDtypeStruct((D, V) if layout == "dv" else (V, D), jnp.float32)
    program = token_scores.lower(
        jax.ShapeDtypeStruct((T, D), jnp.float32), kernel, jax.ShapeDtypeStruct((T,), jnp.int32), jax.ShapeDtypeStruct((T,), bool),
        chunk=chunk, layout=layout,
    ).compile()  # fmt: skip
    used = program.memory_analysis().temp_size_in_bytes
    assert used < 1.5 * 4 * chunk * V < 4 * D * V < 4 * T * V


def test_work_follows_the_targets():
    """With 1 of 512 slots a target, scoring takes a small part of the time of all 512."""
    import time

    hidden, kernel, labels, _ = draw(512, D=64, V=8192)
    one, every = np.arange(512) == 300, np.ones(512, bool)

    def seconds(mask):
        token_scores(hidden, kernel, labels, mask, chunk=16)[0].block_until_ready()
        took = []
        for _ in range(5):
            start = time.process_time()
            token_scores(hidden, kernel, labels, mask, chunk=16)[0].block_until_ready()
            took.append(time.process_time() - start)
        return min(took)

    assert seconds(one) < seconds(every) / 3


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"chunk": 0}, "chunk = 0"),
        ({"layout": "vocab"}, "layout = 'vocab'"),
        ({"layout": "vd"}, "pass the other layout"),
        ({"mask": np.ones(3, bool)}, "mask has shape"),
        ({"labels": np.ones((20, 1), int)}, "labels has shape"),
    ],
)
def test_bad_arguments_are_one_line(change, message):
    """Each misuse is a QtjaxError of one line that names the argument."""
    hidden, kernel, labels, mask = draw(20)
    arguments = {"hidden": hidden, "kernel": kernel, "labels": labels, "mask": mask, **change}
    with pytest.raises(QtjaxError) as caught:
        token_scores(**arguments)
    assert message in str(caught.value) and "\n" not in str(caught.value)
