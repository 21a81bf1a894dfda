"""Packing places every sample once, in as few rows as good heuristics do; dropped tokens leave exactly the labels one works out by hand."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qtjax.data.packing import Sample, drop_tokens, fill_rows, mask_tokens, pack
from qtjax.errors import QtjaxError


def plain(*ids):
    return Sample(np.array(ids, np.int32), np.ones(len(ids), bool), np.arange(len(ids), dtype=np.int32))


@st.composite
def loads(draw):
    row = draw(st.integers(1, 64))
    return draw(st.lists(st.integers(0, row), max_size=60)), row


@settings(max_examples=300, deadline=None)
@given(loads())
def test_every_sample_once_and_no_row_too_long(load):
    """Every sample of positive length is in exactly one row; no row exceeds its capacity; the same input gives the same rows."""
    lengths, row = load
    bins = pack(lengths, row)
    assert sorted(i for b in bins for i in b) == [i for i, n in enumerate(lengths) if n]
    assert all(sum(lengths[i] for i in b) <= row for b in bins)
    assert all(b == sorted(b) for b in bins) and bins == sorted(bins, key=lambda b: b[0])
    assert pack(lengths, row) == bins == pack(np.array(lengths, np.int32), row)


@settings(max_examples=200, deadline=None)
@given(loads(), st.integers(1, 5))
def test_no_row_holds_more_samples_than_asked_for(load, most):
    """Still every sample once; rows that held few enough are as they were."""
    lengths, row = load
    bins = pack(lengths, row, most)
    assert sorted(i for b in bins for i in b) == [i for i, n in enumerate(lengths) if n] and all(len(b) <= most for b in bins)
    assert [b for b in pack(lengths, row) if len(b) <= most] == [b for b in bins if b in pack(lengths, row)]


def _reference(lengths, row):
    """Best-fit decreasing as one would write it down: scan all rows, take the fullest that fits."""
    rows: list[list[int]] = []
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        room = [(row - sum(lengths[j] for j in r), k) for k, r in enumerate(rows)]
        fits = [(free, k) for free, k in room if free >= lengths[i]]
        if fits:
            rows[min(fits)[1]].append(i)
        elif lengths[i]:
            rows.append([i])
    return rows


@settings(max_examples=200, deadline=None)
@given(loads())
def test_never_more_rows_than_plain_best_fit_decreasing(load):
    """At most as many rows as a quadratic best-fit decreasing makes, and no fewer than the tokens need."""
    lengths, row = load
    assert -(-sum(lengths) // row) <= len(pack(lengths, row)) <= len(_reference(lengths, row))


def test_where_best_fit_is_misled():
    """Best fit puts 4 + 4 together and needs three rows of 10 for what two hold."""
    lengths = [4, 4, 3, 3, 3, 3]
    assert len(_reference(lengths, 10)) == 3 and pack(lengths, 10) == [[0, 2, 3], [1, 4, 5]]


def test_fill_quality():
    """2,000 lengths like those of chat data fill rows of 512 to at least 99 %; halves and complements fit exactly."""
    lengths = np.clip(np.random.default_rng(0).lognormal(4.6, 0.6, 2000).astype(int), 8, 512)
    bins = pack(lengths, 512)
    assert lengths.sum() / (512 * len(bins)) > 0.99
    assert pack([3, 5, 4, 4, 7, 1], 8) == [[0, 1], [2, 3], [4, 5]]
    assert pack([], 8) == []


def test_too_long_a_sample_is_an_error():
    """A sample longer than a row is one line naming it."""
    with pytest.raises(QtjaxError, match=r"sample 1 has 9 tokens, a row holds 8; raise train\.row_length"):
        pack([3, 9], 8)


@settings(max_examples=100, deadline=None)
@given(loads(), st.integers(0, 3))
def test_rows_hold_the_samples_unchanged(load, spare):
    """Unpacked by segment, rows give back every sample; padding is zero, segment 0, sample -1; first tokens are no targets."""
    lengths, row = load
    samples, at = [], 1
    for n in lengths:
        samples.append(plain(*range(at, at + n)))
        at += n
    bins = pack(lengths, row)
    packed = fill_rows(samples, bins, len(bins) + spare, row)
    assert packed.input_ids.shape == (len(bins) + spare, row)
    for r, members in enumerate(bins):
        assert sorted(set(packed.segment_ids[r]) - {0}) == list(range(1, len(members) + 1))
        for s, i in enumerate(members, start=1):
            slots = packed.segment_ids[r] == s
            np.testing.assert_array_equal(packed.input_ids[r, slots], samples[i].input_ids)
            np.testing.assert_array_equal(packed.position_ids[r, slots], np.arange(lengths[i]))
            assert packed.loss_mask[r, slots].tolist() == [False] + [True] * (lengths[i] - 1)
            assert (packed.sample[r, slots] == i).all()
    empty = packed.segment_ids == 0
    assert not packed.input_ids[empty].any() and not packed.loss_mask[empty].any() and (packed.sample[empty] == -1).all()
    assert packed.fill == pytest.approx(sum(lengths) / max(packed.input_ids.size, 1)) if packed.input_ids.size else True


def test_shapes_are_fixed():
    """More bins than rows, or a bin too long, is a ValueError: shapes never stretch."""
    samples = [plain(1, 2, 3), plain(4, 5)]
    with pytest.raises(ValueError, match="2 bins for 1 rows"):
        fill_rows(samples, [[0], [1]], 1, 4)
    with pytest.raises(ValueError, match="more than 4 tokens"):
        fill_rows(samples, [[0, 1]], 1, 4)


# Two turns:        p   p   a   b   c   e   \n  q   q   x   y   e   \n
IDS = np.array([10, 11, 20, 21, 22, 23, 9, 12, 13, 30, 31, 32, 9], np.int32)
TARGETS = np.array([0, 0, 1, 1, 1, 1, 0, 0, 0, 1, 1, 1, 0], bool)


def keep(*slots):
    kept = np.zeros(len(IDS), bool)
    kept[list(slots)] = True
    return kept


def test_drop_by_hand():
    """Drop mode: pruned targets leave the input, prompts and what stands between turns stay, positions are the old ones; the
    label of a kept token is the next kept token of its answer, the prompt's last token predicts the first kept one."""
    got = drop_tokens(IDS, TARGETS, keep(3, 5, 10))
    assert got.input_ids.tolist() == [10, 11, 21, 23, 9, 12, 13, 31]
    assert got.position_ids.tolist() == [0, 1, 3, 5, 6, 7, 8, 10]
    assert got.loss_mask.tolist() == [False, False, True, True, False, False, False, True]
    packed = fill_rows([got], [[0]], 1, 10)
    pairs = [(int(packed.input_ids[0, t - 1]), int(packed.labels[0, t])) for t in np.flatnonzero(packed.loss_mask[0])]
    assert pairs == [(11, 21), (21, 23), (13, 31)]


def test_drop_compacts_positions():
    """compact_positions numbers the remaining tokens without gaps and changes nothing else."""
    got = drop_tokens(IDS, TARGETS, keep(3, 5, 10), compact_positions=True)
    assert got.position_ids.tolist() == list(range(8)) and got.position_ids.dtype == np.int32
    assert got.input_ids.tolist() == drop_tokens(IDS, TARGETS, keep(3, 5, 10)).input_ids.tolist()


def test_mask_by_hand():
    """Mask mode: every token up to the last kept target stays as context, only kept targets are in the loss."""
    got = mask_tokens(IDS, keep(3, 9))
    assert got.input_ids.tolist() == IDS[:10].tolist() and got.position_ids.tolist() == list(range(10))
    assert np.flatnonzero(got.loss_mask).tolist() == [3, 9]


def test_nothing_dropped_nothing_changed():
    """With every target kept both modes give the sample up to its last target."""
    for got in (drop_tokens(IDS, TARGETS, TARGETS), mask_tokens(IDS, TARGETS)):
        assert got.input_ids.tolist() == IDS[:12].tolist() and got.loss_mask.tolist() == TARGETS[:12].tolist()
        assert got.position_ids.tolist() == list(range(12))


def test_nothing_kept_is_empty():
    """Without a kept target there is nothing to launch, and packing leaves the sample out."""
    none = keep()
    for got in (drop_tokens(IDS, TARGETS, none), mask_tokens(IDS, none)):
        assert len(got.input_ids) == len(got.loss_mask) == len(got.position_ids) == 0
    assert pack([0, 3], 4) == [[1]]


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_modes_agree_on_what_is_trained(data):
    """Both modes train the same tokens in the same order, and drop mode never uses more slots than mask mode."""
    n = data.draw(st.integers(2, 24))
    targets = np.array([False, *data.draw(st.lists(st.booleans(), min_size=n - 1, max_size=n - 1))])
    kept = targets & np.array(data.draw(st.lists(st.booleans(), min_size=n, max_size=n)))
    ids = np.arange(100, 100 + n, dtype=np.int32)
    drop, mask = drop_tokens(ids, targets, kept), mask_tokens(ids, kept)
    assert drop.input_ids[drop.loss_mask].tolist() == mask.input_ids[mask.loss_mask].tolist() == ids[kept].tolist()
    assert len(drop.input_ids) <= len(mask.input_ids)
    assert (np.diff(drop.position_ids) > 0).all() and (ids[drop.position_ids] == drop.input_ids).all()
