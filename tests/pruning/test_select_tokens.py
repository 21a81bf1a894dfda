"""select_tokens is eq. 7 of the paper: the numbers of a hand-made table, and a plain Python loop on any input."""

import math

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qtjax.errors import QtjaxError
from qtjax.pruning import select_tokens, token_criterion

# One row; targets at slots 1, 2, 5, 6 (a gap between two turns) with PPL 3, 1, 9, 2.
MASK = np.array([[0, 1, 1, 0, 0, 1, 1, 0]], bool)
NLL = np.array([[7, math.log(3), 0, 7, 7, math.log(9), math.log(2), 7]], np.float32)


@pytest.mark.parametrize(
    ("weight", "neighbors", "criterion", "kept"),
    [
        # sum: (3 + (3+1))/2, (1 + (3+9))/2, (9 + (1+2))/2, (2 + (9+2))/2: ends take their own PPL, the gap is skipped
        (0.5, "sum", [3.5, 6.5, 6.0, 6.5], [1, 5]),
        (0.5, "mean", [2.5, 3.5, 5.25, 3.75], [1, 2]),
        (0.0, "sum", [3.0, 1.0, 9.0, 2.0], [2, 6]),
        (1.0, "sum", [4.0, 12.0, 3.0, 11.0], [1, 5]),
    ],
)
def test_by_hand(weight, neighbors, criterion, kept):
    """Four targets worked out on paper: criterion and the two that stay, for lambda 0, 1/2, 1 and both neighbour terms."""
    got = token_criterion(NLL, MASK, weight, neighbors)
    np.testing.assert_allclose(got[MASK], criterion, rtol=1e-6)
    assert not np.any(np.asarray(got)[~MASK])
    assert np.flatnonzero(select_tokens(NLL, MASK, 0.5, weight, neighbors)[0]).tolist() == kept


@pytest.mark.parametrize(("keep", "kept"), [(1e-9, [1]), (0.5, [1, 5]), (0.75, [1, 2, 5]), (0.99, [1, 2, 5]), (1.0, [1, 2, 5, 6])])
def test_budget_and_ties(keep, kept):
    """At least one stays; 6.5 ties between slots 2 and 6 and the earlier one wins; 1.0 keeps all."""
    assert np.flatnonzero(select_tokens(NLL, MASK, keep)[0]).tolist() == kept


def test_protected_targets_stay_within_the_budget_if_they_can():
    """Protected first, then the best; more protected than budget: all of them and nothing else; non-targets do not count."""

    def kept(keep, *slots):
        protect = np.isin(np.arange(8), slots)[None]
        return np.flatnonzero(select_tokens(NLL, MASK, keep, protect=protect)[0]).tolist()

    assert kept(0.5, 6) == [1, 6]
    assert kept(0.25, 6) == [6]
    assert kept(0.25, 2, 6) == [2, 6]
    assert kept(0.5, 0, 7) == [1, 5]


def plain(nll, mask, keep, weight, neighbors, protect):
    """eq. 7 with lists and loops in float64: (s by token, protected tokens, number kept)."""
    T = [t for t, on in enumerate(mask) if on]
    ppl = {t: math.exp(min(float(nll[t]), 50.0)) for t in T}
    s = {}
    for i, t in enumerate(T):
        before, after = ppl[T[max(i - 1, 0)]], ppl[T[min(i + 1, len(T) - 1)]]
        around = before + after if neighbors == "sum" else (before + after) / 2
        s[t] = (1 - weight) * ppl[t] + weight * around
    must = [t for t in T if protect[t]]
    return s, must, max(1, math.floor(keep * len(T) + 1e-6), len(must)) if T else 0


@settings(deadline=None, max_examples=300)
@given(
    rows=st.lists(
        st.lists(st.tuples(st.sampled_from([0.0, 0.5, 1.0, 2.0, 3.0, 7.0, 49.0, 60.0]), st.booleans(), st.integers(0, 5)), min_size=13, max_size=13),
        min_size=3, max_size=3,
    ),
    keep=st.sampled_from([1e-6, 0.1, 0.3, 0.5, 0.7, 0.9, 1.0]),
    weight=st.sampled_from([0.0, 0.5, 1.0]),
    neighbors=st.sampled_from(["sum", "mean"]),
)  # fmt: skip
def test_equals_a_plain_loop(rows, keep, weight, neighbors):
    """Any masks, repeated values (ties), nll beyond the clamp, protected targets: the choice of the written-out loop."""
    nll = np.array([[slot[0] for slot in row] for row in rows], np.float32)
    mask = np.array([[slot[1] for slot in row] for row in rows])
    protect = np.array([[slot[2] == 0 for slot in row] for row in rows])
    got = np.asarray(select_tokens(nll, mask, keep, weight, neighbors, protect))
    for b in range(3):
        s, must, count = plain(nll[b], mask[b], keep, weight, neighbors, protect[b])
        kept = np.flatnonzero(got[b]).tolist()
        assert len(kept) == count and set(must) <= set(kept) <= set(s)
        # Sums that are equal on paper round apart in float32, so a tie across the cut may fall either way here; which
        # of two truly equal scores stays is a hand table below.
        free, dropped = [s[t] for t in kept if t not in must], [s[t] for t in s if t not in kept]
        assert not free or not dropped or max(free) <= min(dropped) * (1 + 1e-6)


def test_degenerate_rows():
    """No target keeps none; one keeps it; equal scores keep the first; NaN and inf count as the worst; padding is not read."""
    nll = np.zeros((5, 4), np.float32)
    mask = np.ones((5, 4), bool)
    mask[0], mask[1] = False, [False, False, True, False]
    nll[3] = [np.nan, 1, 1, np.inf]
    nll[4], mask[4, :2] = [np.nan, np.nan, 2, 1], False
    got = np.asarray(select_tokens(nll, mask, 0.5, 0.0))
    assert got.tolist() == [[False] * 4, [False, False, True, False], [True, True, False, False], [False, True, True, False], [False, False, False, True]]
    assert np.isfinite(token_criterion(nll, mask)).all()
    assert select_tokens(np.zeros((2, 0)), np.zeros((2, 0), bool)).shape == (2, 0)


@pytest.mark.parametrize(("keep", "T", "count"), [(0.7, 90, 63), (0.5, 101, 50), (0.29, 100, 29), (0.001, 100, 1)])
def test_budget_is_exact(keep, T, count):
    """max(1, floor(keep * |T| + 1e-6)) tokens stay, whatever lies around them."""
    r = np.random.default_rng(T)
    mask = np.zeros((2, 128), bool)
    mask[0, r.choice(128, T, replace=False)] = True
    assert select_tokens(r.uniform(0, 9, (2, 128)), mask, keep).sum(1).tolist() == [count, 0]


def test_mirror_image_keeps_the_mirror_image():
    """Without ties the choice has no direction: reversing a row reverses it; appended padding changes nothing."""
    r = np.random.default_rng(0)
    nll, mask = r.uniform(0, 5, (64, 21)).astype(np.float32), r.random((64, 21)) < 0.7
    forward = np.asarray(select_tokens(nll, mask))
    np.testing.assert_array_equal(forward[:, ::-1], select_tokens(nll[:, ::-1], mask[:, ::-1]))
    longer = np.asarray(select_tokens(np.pad(nll, ((0, 0), (0, 9))), np.pad(mask, ((0, 0), (0, 9)))))
    np.testing.assert_array_equal(longer, np.pad(forward, ((0, 0), (0, 9))))


def test_works_under_jit():
    """Inside jit the same mask."""
    inside = jax.jit(lambda nll, mask: select_tokens(nll, mask, 0.5, protect=mask))(NLL, MASK)
    np.testing.assert_array_equal(inside, MASK)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"keep": 0.0}, "keep = 0.0"),
        ({"keep": True}, "keep = True"),
        ({"neighbor_weight": 1.1}, "neighbor_weight = 1.1"),
        ({"neighbors": "sums"}, "did you mean 'sum'"),
        ({"loss_mask": MASK[0]}, "must both be [B, L]"),
        ({"protect": MASK[:, :3]}, "protect has shape"),
    ],
)
def test_bad_arguments_are_one_line(change, message):
    """Each misuse is a QtjaxError of one line that names field, value and rule."""
    with pytest.raises(QtjaxError) as caught:
        select_tokens(**{"token_nll": NLL, "loss_mask": MASK, **change})
    assert message in str(caught.value) and "\n" not in str(caught.value)
