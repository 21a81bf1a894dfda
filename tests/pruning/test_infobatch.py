"""InfoBatch's epochs: its authors' rule with another generator, without bias, the same under every numpy."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qtjax.data.iterate import permutation
from qtjax.errors import QtjaxError
from qtjax.pruning import INITIAL_SCORE, anneals, epoch_choice


def authors_rule(scores, fraction, keep):
    """prune() of the authors' code, in lists: (well learned, how many of them stay, weights given which stay)."""
    mean = sum(map(float, scores)) / len(scores)
    learned = [i for i, s in enumerate(scores) if s < mean]
    weights = [1.0] * len(scores)
    for i in learned:
        weights[i] = 1 / (1 - fraction) if keep[i] else 0.0
    return learned, int((1 - fraction) * len(learned)), weights


@settings(deadline=None, max_examples=200)
@given(
    scores=st.lists(st.sampled_from([0.0, 0.25, 0.5, 1.0, 3.0, 8.0]), min_size=1, max_size=40),
    seed=st.integers(0, 5), epoch=st.integers(0, 5), fraction=st.sampled_from([0.0, 0.3, 0.5, 0.75, 0.95]),
)  # fmt: skip
def test_equals_the_authors_rule(scores, seed, epoch, fraction):
    """Any scores: those at or above the mean stay with weight 1, int((1-f) n) of those below with 1/(1-f), others 0."""
    keep, weight = epoch_choice(np.array(scores, np.float32), seed, epoch, fraction)
    learned, stay, weights = authors_rule(scores, fraction, keep)
    assert keep.dtype == bool and weight.dtype == np.float32
    assert keep[learned].sum() == stay and keep[[i for i in range(len(scores)) if i not in learned]].all()
    np.testing.assert_array_equal(weight, np.array(weights, np.float32))
    again = epoch_choice(np.array(scores, np.float32), seed, epoch, fraction)
    np.testing.assert_array_equal(again[0], keep)


def test_by_hand():
    """Scores 0..9, seed 0, epoch 1: the five below 4.5 keep two. Pinned: another numpy must choose the same."""
    keep, weight = epoch_choice(np.arange(10, dtype=np.float32), 0, 1)
    assert np.flatnonzero(keep).tolist() == [1, 3, 5, 6, 7, 8, 9]
    assert weight.tolist() == [2.0 * k for k in keep[:5]] + [1.0] * 5


@pytest.mark.parametrize("value", [INITIAL_SCORE, 0.1, 1e-8, 7.3e5])
@pytest.mark.parametrize("n", [0, 1, 3, 1_000_003])
def test_equal_scores_drop_nothing(value, n):
    """The first epoch, and any set of equal scores: nobody lies below the mean, however many there are."""
    keep, weight = epoch_choice(np.full(n, value, np.float32), 1, 0)
    assert keep.all() and (weight == 1).all() and keep.shape == weight.shape == (n,)


def test_unknown_scores_keep_their_samples_and_leave_the_mean():
    """NaN and inf are left out of the mean 1.5 of 0..3; their samples stay with weight 1, one of two below does."""
    scores = np.array([np.nan, 0, 1, np.inf, 2, 3], np.float32)
    keep, weight = epoch_choice(scores, 0, 0)
    assert keep[[0, 3, 4, 5]].all() and (weight[[0, 3, 4, 5]] == 1).all() and sorted(weight[[1, 2]]) == [0, 2]
    assert epoch_choice(np.full(4, np.nan), 0, 0)[0].all()


@pytest.mark.parametrize("fraction", [0.25, 0.5, 0.75])
def test_weights_are_unbiased(fraction):
    """Over 3000 epochs of 100 samples, 60 below: the mean weight of each is int((1-f) 60) / ((1-f) 60) = 1.

    A weight is w = 1/(1-f) with probability 1/w, else 0: variance w - 1; 5 standard errors are 5 sqrt((w - 1) / 3000).
    """
    scores = np.where(np.arange(100) < 60, 0.5, 2.0).astype(np.float32)
    total = sum(epoch_choice(scores, 3, epoch, fraction)[1].astype(np.float64) for epoch in range(3000)) / 3000
    np.testing.assert_array_equal(total[60:], 1)
    np.testing.assert_allclose(total[:60], 1, atol=5 * math.sqrt((1 / (1 - fraction) - 1) / 3000))
    np.testing.assert_allclose(total.mean(), 1, rtol=1e-7)  # 4/3 is rounded to float32


def test_who_stays_has_nothing_to_do_with_the_order_of_the_epoch():
    """Samples that stay come in the epoch's order neither first nor last: mean place 0.5 within 5 standard errors.

    The order is drawn by Philox(seed, epoch) too; from the same stream those that stay would be the first of it (mean 0.25).
    """
    scores = np.where(np.arange(2000) < 1000, 0.5, 2.0).astype(np.float32)
    keep, _ = epoch_choice(scores, 4, 2)
    order = permutation(2000, 4, 2)
    places = np.empty(2000)
    places[order] = np.arange(2000) / 2000
    assert abs(places[:1000][keep[:1000]].mean() - 0.5) < 5 * math.sqrt(1 / 12 / 500)


def test_seed_and_epoch_each_change_the_draw():
    """Neighbouring epochs and seeds choose otherwise, and (1, 2) is not (2, 1)."""
    scores = np.where(np.arange(200) < 100, 0.5, 2.0).astype(np.float32)
    choices = {epoch_choice(scores, s, e)[0].tobytes() for s in range(4) for e in range(4)}
    assert len(choices) == 16


@pytest.mark.parametrize(
    ("epochs", "share", "first"),
    [
        (8, 0.125, 7), (16, 0.125, 14), (9, 0.125, 7), (3, 0.125, 2), (2, 0.125, 1), (1, 0.125, 0),
        (100, 0.07, 93), (10, 0.1, 9), (4, 0.0, 4), (4, 1.0, 0),
    ],
)  # fmt: skip
def test_the_last_epochs_anneal(epochs, share, first):
    """The last ceil(share * epochs), as the authors' `iterations > num_epochs * delta`, iterations = epoch + 1."""
    assert [anneals(e, epochs, share) for e in range(epochs)] == [e >= first for e in range(epochs)]
    if share == 0.125:
        assert [anneals(e, epochs) for e in range(epochs)] == [e + 1 > epochs * 0.875 for e in range(epochs)]


@pytest.mark.parametrize("fraction", [-0.1, 1.0, 1.5, float("nan"), "half", True])
def test_bad_fractions_are_one_line(fraction):
    """A fraction outside [0, 1) names itself and the rule."""
    with pytest.raises(QtjaxError, match="fraction = .*at least 0 and below 1") as caught:
        epoch_choice(np.ones(3), 0, 0, fraction)
    assert "\n" not in str(caught.value)


def test_bad_shares_are_one_line():
    """A share outside [0, 1] names itself and the rule."""
    with pytest.raises(QtjaxError, match="share = 1.5.*from 0 to 1"):
        anneals(0, 3, 1.5)
