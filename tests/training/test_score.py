"""eu_scores equals a plain log-softmax over full logits, however the samples are padded or packed."""

import json

import jax
import numpy as np
import pytest

from qtjax import models, scoring
from qtjax.training.score import eu_scores, rated_rows, score_rows

CONFIG = models.ModelConfig(
    vocab_size=61, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, head_dim=4, initializer_range=0.4,
)  # fmt: skip
LENGTHS, L = (9, 5, 12, 3), 16


@pytest.fixture(scope="module")
def params():
    return models.init_params(CONFIG, jax.random.key(3))


@pytest.fixture(scope="module")
def samples():
    """[(ids, loss_mask)]; the last sample has no target."""
    rng = np.random.default_rng(0)
    out = [(rng.integers(0, 61, n).astype(np.int32), rng.random(n) < 0.6) for n in LENGTHS]
    out[0][1][0] = True  # a first token asked for is still no target
    out[-1][1][:] = False
    return out


def reference(params, ids, mask):
    """Per-token nll and entropy in float64 from the logits of one unpadded sample."""
    logits = np.asarray(models.apply(CONFIG, params, ids[None]), np.float64)[0]
    logp = logits - np.log(np.exp(logits - logits.max(-1, keepdims=True)).sum(-1, keepdims=True)) - logits.max(-1, keepdims=True)
    nll, entropy = np.zeros(len(ids)), np.zeros(len(ids))
    for t in range(1, len(ids)):
        if mask[t]:
            nll[t] = -logp[t - 1, ids[t]]
            entropy[t] = -(np.exp(logp[t - 1]) * logp[t - 1]).sum()
    return nll, entropy


def padded(samples, side):
    arrays = {"input_ids": np.zeros((len(samples), L), np.int32)}
    arrays |= {name: np.zeros((len(samples), L), bool) for name in ("loss_mask", "attention_mask")}
    spans = []
    for b, (ids, mask) in enumerate(samples):
        span = slice(0, len(ids)) if side == "right" else slice(L - len(ids), L)
        arrays["input_ids"][b, span], arrays["loss_mask"][b, span], arrays["attention_mask"][b, span] = ids, mask, True
        spans.append(span)
    return arrays, spans


@pytest.mark.parametrize("side", ["right", "left"])
def test_padded_batch_equals_the_reference_of_each_sample(params, samples, side):
    """Token arrays stand at the target position, zero elsewhere; sample statistics are their means."""
    arrays, spans = padded(samples, side)
    scores = eu_scores(CONFIG, params, **arrays)
    for b, (ids, mask) in enumerate(samples):
        nll, entropy = reference(params, ids, mask)
        count = int(mask[1:].sum())
        assert int(scores.count[b]) == count
        np.testing.assert_allclose(scores.token_nll[b, spans[b]], nll, rtol=2e-5, atol=2e-5)
        np.testing.assert_allclose(scores.token_entropy[b, spans[b]], entropy, rtol=2e-5, atol=2e-5)
        outside = np.ones(L, bool)
        outside[spans[b]] = False
        assert not np.asarray(scores.token_nll)[b, outside].any()
        if count:
            np.testing.assert_allclose(scores.perplexity[b], np.exp(nll.sum() / count), rtol=5e-5)
            np.testing.assert_allclose(scores.entropy[b], entropy.sum() / count, rtol=5e-5)
        else:
            assert np.isnan(scores.perplexity[b]) and np.isnan(scores.entropy[b])
    assert scores.perplexity.dtype == scores.token_nll.dtype == np.float32


def test_the_first_token_of_a_row_or_segment_is_never_a_target(params, samples):
    """A row whose loss mask is all True has one target fewer than tokens, per segment."""
    ids = samples[0][0][None, :8]
    everywhere = np.ones((1, 8), bool)
    assert int(eu_scores(CONFIG, params, ids, everywhere).count[0]) == 7
    segments = np.array([[1, 1, 1, 2, 2, 2, 2, 0]])
    scores = eu_scores(CONFIG, params, ids, everywhere, segment_ids=segments)
    assert scores.count.tolist() == [[2, 3]]
    assert np.flatnonzero(np.asarray(scores.token_nll)[0]).tolist() == [1, 2, 4, 5, 6]


def packed(samples):
    """Two rows: samples 0 and 1 in the first (segments 1, 2), 2 and 3 in the second."""
    arrays = {name: np.zeros((2, L), np.int32) for name in ("input_ids", "position_ids", "segment_ids")}
    arrays["loss_mask"] = np.zeros((2, L), bool)
    for row in range(2):
        at = 0
        for segment, (ids, mask) in enumerate(samples[2 * row : 2 * row + 2], 1):
            span = slice(at, at + len(ids))
            at += len(ids)
            arrays["input_ids"][row, span], arrays["loss_mask"][row, span] = ids, mask
            arrays["position_ids"][row, span], arrays["segment_ids"][row, span] = np.arange(len(ids)), segment
    return arrays


def test_packed_equals_unpacked(params, samples):
    """A sample has the same scores alone in a padded row and packed beside another; its fields are then [B, S]."""
    alone = eu_scores(CONFIG, params, **padded(samples, "right")[0])
    together = eu_scores(CONFIG, params, **packed(samples))
    assert together.perplexity.shape == (2, 2)
    np.testing.assert_array_equal(together.count.reshape(-1), alone.count)
    np.testing.assert_allclose(together.perplexity.reshape(-1), alone.perplexity, rtol=5e-5)
    np.testing.assert_allclose(together.entropy.reshape(-1), alone.entropy, rtol=5e-5)
    np.testing.assert_allclose(together.token_nll[0, 9:14], alone.token_nll[1, :5], rtol=2e-5, atol=2e-5)


def test_score_rows_never_forms_logits(params):
    """No array of the compiled program has the size of [R, L, V], flattened or not."""
    shape = jax.ShapeDtypeStruct((4, 96), np.int32)
    rows = {name: shape for name in ("input_ids", "loss_mask", "position_ids", "segment_ids")}
    program = jax.jit(lambda p, r: score_rows(CONFIG, p, None, r)).lower(params, rows).compile().as_text()
    assert "[4,96,16]" in program
    for shape in ("4,96,61", "384,61", "61,384"):
        assert f"[{shape}]" not in program


def test_rated_rows_are_score_rows_and_a_rating(params, samples):
    """The scores are bitwise those of score_rows; the rating is the model's at the same targets."""
    rows, rater = packed(samples), "sparsevlm"
    nll, entropy = jax.jit(lambda p, r: score_rows(CONFIG, p, None, r))(params, rows)
    own_nll, own_entropy, rating = jax.jit(lambda p, r: rated_rows(CONFIG, p, None, r, rater))(params, rows)
    np.testing.assert_array_equal(own_nll, nll)
    np.testing.assert_array_equal(own_entropy, entropy)
    targets = scoring.target_mask(rows["loss_mask"], segment_ids=rows["segment_ids"])
    given = (rows["input_ids"], targets, rater, None, rows["position_ids"], rows["segment_ids"])
    wanted = jax.jit(models.rated_hidden_states, static_argnums=(0, 4))(CONFIG, params, *given)[1]
    np.testing.assert_allclose(rating, wanted, rtol=1e-5)
    np.testing.assert_array_equal(np.asarray(rating) > 0, targets)


@pytest.mark.slow
def test_rated_rows_on_eight_devices(run_python):
    """Scores and ratings with data x fsdp x tensor = 2 x 2 x 2 are those of one device; no array is gathered whole."""
    out = json.loads(run_python("tests.training.eight_devices", devices=8).splitlines()[-1])
    assert set(out) == set(models.RATERS)
    for found in out.values():
        np.testing.assert_allclose(found["mesh"], found["one"], rtol=1e-4, atol=1e-6)
        assert found["gathered"] == []
