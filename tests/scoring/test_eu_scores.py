"""Targets and per-sample scores follow eq. 4 and 5 row by row, packed or not, and an empty sample is NaN."""

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qtjax.errors import QtjaxError
from qtjax.scoring import sample_scores, target_mask


def test_target_mask_by_hand():
    """Slot 0, the first token of a segment, the first after left padding, and padding itself are never targets."""
    assert target_mask([[1, 1, 0, 1]]).tolist() == [[False, True, False, True]]
    left_padded = target_mask([[1, 1, 1, 1]], attention_mask=[[0, 0, 1, 1]])
    assert left_padded.tolist() == [[False, False, False, True]]
    right_padded = target_mask([[1, 1, 1, 1]], attention_mask=[[1, 1, 1, 0]])
    assert right_padded.tolist() == [[False, True, True, False]]
    packed = target_mask(np.ones((1, 7), bool), segment_ids=[[1, 1, 2, 2, 2, 0, 0]])
    assert packed.tolist() == [[False, True, False, True, True, False, False]]
    both = target_mask(np.ones((1, 4), bool), attention_mask=[[1, 1, 0, 1]], segment_ids=[[1, 1, 1, 1]])
    assert both.tolist() == [[False, True, False, False]]
    assert target_mask(np.ones((2, 0), bool)).shape == (2, 0)


def plain_target(loss, real, segment):
    return [
        bool(loss[t] and t > 0 and real[t] and real[t - 1] and segment[t] and segment[t] == segment[t - 1]) for t in range(len(loss))
    ]


@settings(deadline=None, max_examples=60)
@given(st.lists(st.tuples(st.booleans(), st.booleans(), st.integers(0, 3)), min_size=9, max_size=9))
def test_target_mask_equals_its_sentence(slots):
    """Any combination of the three masks: the rule written as one Python condition."""
    loss, real, segment = (list(x) for x in zip(*slots))
    assert target_mask([loss], [real], [segment]).tolist() == [plain_target(loss, real, segment)]


def test_sample_scores_by_hand():
    """nll ln 2, ln 8 -> PPL 4; entropies 1, 3 -> 2; masked slots (NaN) are 0 in the token arrays; no target -> NaN."""
    nll = np.array([[np.nan, np.log(2), 5, np.log(8)], [1, 1, 1, 1]], np.float32)
    entropy = np.array([[np.nan, 1, 5, 3], [1, 1, 1, 1]], np.float32)
    mask = np.array([[0, 1, 0, 1], [0, 0, 0, 0]], bool)
    scores = sample_scores(nll, entropy, mask)
    np.testing.assert_allclose(scores.perplexity, [4, np.nan], rtol=1e-6)
    np.testing.assert_allclose(scores.entropy, [2, np.nan])
    assert scores.count.tolist() == [2, 0] and scores.count.dtype == np.int32
    np.testing.assert_array_equal(scores.token_nll, np.where(mask, nll, 0))
    np.testing.assert_array_equal(scores.token_entropy, np.where(mask, entropy, 0))
    assert scores.perplexity.dtype == scores.entropy.dtype == np.float32


def test_packed_rows_give_the_scores_of_each_sample():
    """[B, S] by segment: as the samples scored alone; a missing segment is NaN; one sample's NaN stays its own."""
    r = np.random.default_rng(0)
    nll, entropy = r.uniform(0, 5, (2, 2, 12)).astype(np.float32)
    mask = r.random((2, 12)) < 0.7
    segments = np.array([[1] * 4 + [2] * 5 + [0] * 3, [1] * 3 + [2] * 3 + [3] * 6])
    nll[1, 3:6] = np.nan
    scores = sample_scores(nll, entropy, mask, segments)
    assert scores.perplexity.shape == scores.entropy.shape == scores.count.shape == (2, 3)
    for b in range(2):
        for s in range(1, 4):
            mine = mask[b] & (segments[b] == s)
            assert scores.count[b, s - 1] == mine.sum()
            with np.errstate(all="ignore"):
                np.testing.assert_allclose(scores.perplexity[b, s - 1], np.exp(nll[b][mine].sum() / mine.sum()), rtol=1e-5)
                np.testing.assert_allclose(scores.entropy[b, s - 1], entropy[b][mine].sum() / mine.sum(), rtol=1e-5)
    assert np.isnan(scores.perplexity[0, 2]) and np.isnan(scores.perplexity[1, 1]) and np.isfinite(scores.perplexity[1, 2])


def test_num_segments_is_static_under_jit():
    """Under jit the number of segments must be given; then shapes follow it."""
    ones, segments = np.ones((2, 4), np.float32), np.ones((2, 4), int)
    with pytest.raises(QtjaxError, match="num_segments"):
        jax.jit(lambda s: sample_scores(ones, ones, ones > 0, s))(segments)
    assert jax.jit(lambda s: sample_scores(ones, ones, ones > 0, s, 5))(segments).count.tolist() == [[4, 0, 0, 0, 0]] * 2


def test_a_row_does_not_depend_on_its_batch():
    """The scores are a function of one row: the same bits alone and among others."""
    r = np.random.default_rng(1)
    nll, entropy = r.uniform(0, 9, (2, 16, 33)).astype(np.float32)
    mask = r.random((16, 33)) < 0.5
    whole = sample_scores(nll, entropy, mask)
    for b in (0, 7, 15):
        alone = sample_scores(nll[b : b + 1], entropy[b : b + 1], mask[b : b + 1])
        assert alone.perplexity[0] == whole.perplexity[b] and alone.entropy[0] == whole.entropy[b]
