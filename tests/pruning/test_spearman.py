"""spearman is the textbook rank correlation over the eligible samples of a batch."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from qtjax.pruning import spearman


def test_by_hand():
    """n = 5, rank differences 0, -1, 1, -1, 1: rho = 1 - 6 * 4 / (5 * 24) = 0.8; monotone pairs give 1 and -1."""
    np.testing.assert_allclose(spearman(np.array([1.0, 2, 3, 4, 5]), np.array([1.0, 3, 2, 6, 4])), 0.8, rtol=1e-6)
    np.testing.assert_allclose(spearman(np.array([1.0, 2, 9]), np.array([4.0, 5, 50])), 1, rtol=1e-6)
    np.testing.assert_allclose(spearman(np.array([1.0, 2, 9]), np.array([4.0, 3, -50])), -1, rtol=1e-6)


@settings(deadline=None, max_examples=60)
@given(st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9), st.integers(0, 5)), min_size=24, max_size=24))
def test_equals_scipy_with_ties_and_padding(samples):
    """Any values with ties; padding and NaN left out: scipy's number on the rest."""
    x, y, state = (np.array(column, np.float32) for column in zip(*samples))
    valid = state != 0
    x = np.where(state == 1, np.nan, x)
    used = state > 1
    got = spearman(x, y, valid)
    if used.sum() < 2 or len(set(x[used])) < 2 or len(set(y[used])) < 2:
        assert np.isnan(got)
    else:
        np.testing.assert_allclose(got, stats.spearmanr(x[used], y[used]).statistic, atol=1e-5)


@pytest.mark.parametrize("n", [0, 1, 3])
def test_undefined_is_nan(n):
    """Fewer than two samples, or a constant score, has no correlation."""
    assert np.isnan(spearman(np.ones(n), np.arange(n)))
