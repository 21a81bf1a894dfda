"""Batches are a pure function of seed and step: each epoch a permutation, hosts disjoint, resumable by one integer."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qtjax.data.iterate import BatchPlan, hold_out, permutation
from qtjax.errors import QtjaxError


@settings(max_examples=100, deadline=None)
@given(count=st.integers(1, 70), batch=st.integers(1, 20), seed=st.integers(0, 2**31), epoch=st.integers(0, 4))
def test_an_epoch_is_a_permutation(count, batch, seed, epoch):
    """ceil(count / batch) steps hold every sample once; only the last batch is padded, at its end, with -1."""
    plan = BatchPlan(count, batch, seed)
    steps = plan.steps_per_epoch
    batches = [plan.batch(epoch * steps + i) for i in range(steps)]
    assert steps == -(-count // batch) and all(len(b) == batch and b.dtype == np.int64 for b in batches)
    flat = np.concatenate(batches)
    assert sorted(flat[:count].tolist()) == list(range(count)) and (flat[count:] == -1).all()


@settings(max_examples=60, deadline=None)
@given(count=st.integers(1, 70), part=st.integers(1, 6), hosts=st.integers(1, 5), step=st.integers(0, 40))
def test_hosts_are_disjoint_and_complete(count, part, hosts, step):
    """The hosts' batches, put together in order, are the batch that one host would read."""
    parts = [BatchPlan(count, part * hosts, 3, i, hosts).batch(step) for i in range(hosts)]
    whole = BatchPlan(count, part * hosts, 3).batch(step)
    np.testing.assert_array_equal(np.concatenate(parts), whole)
    real = whole[whole >= 0]
    assert len(set(real.tolist())) == len(real)


def test_resume_by_step():
    """A plan made anew reads, at any step and in any order of asking, what the first one read."""
    first = BatchPlan(37, 8, seed=5)
    read = [first.batch(s) for s in range(20)]
    for step in (19, 3, 12, 4):
        np.testing.assert_array_equal(BatchPlan(37, 8, seed=5).batch(step), read[step])


def test_seeds_and_epochs_differ():
    """Another seed, and another epoch, is another order; the order is uniform enough that position and index do not correlate."""
    orders = [permutation(500, seed, epoch) for seed in (0, 1) for epoch in (0, 1)]
    for i, a in enumerate(orders):
        assert abs(np.corrcoef(a, np.arange(500))[0, 1]) < 0.15
        for b in orders[:i]:
            assert (a != b).mean() > 0.9


def test_the_order_never_changes():
    """The order is part of a run's identity: these values must not depend on numpy's version or machine."""
    assert permutation(8, 0, 0).tolist() == [0, 2, 1, 5, 4, 3, 6, 7]
    assert permutation(8, 7, 2).tolist() == [6, 7, 4, 0, 1, 5, 3, 2]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((10, 7, 0, 0, 2), r"prune\.batch_size = 7: must divide evenly over 2 hosts"),
        ((0, 4), r"there is no sample"),
        ((4, 4, 0, 2, 2), r"host 2 of 2"),
    ],
)
def test_impossible_plans(arguments, message):
    """A batch that hosts cannot share, an empty dataset, and a host that is none are errors."""
    with pytest.raises(QtjaxError, match=message):
        BatchPlan(*arguments)


@settings(max_examples=100, deadline=None)
@given(count=st.integers(1, 60), fraction=st.floats(0, 0.99), seed=st.integers(0, 100))
def test_hold_out_divides(count, fraction, seed):
    """Training and held-out indices are disjoint, complete, ascending and the same for the same seed; neither side is emptied."""
    train, held = hold_out(count, fraction, seed)
    assert sorted([*train, *held]) == list(range(count))
    assert (np.diff(train) > 0).all() and (np.diff(held) > 0).all() and len(train)
    assert bool(len(held)) == (fraction > 0 and count > 1)
    for a, b in zip(hold_out(count, fraction, seed), (train, held)):
        np.testing.assert_array_equal(a, b)
