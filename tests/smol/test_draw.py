"""Draws come from raw Philox words alone: pinned values, ranges respected, samples without repetition."""

import numpy as np

from qtjax.smol.draw import Draw


def test_stream_is_pinned():
    """The first draws of (seed 0, stream 0) never change; they equal NumPy's raw stream, taken from its end by 4,096."""
    raw = np.random.Philox(key=np.array([0, 0], np.uint64)).random_raw(4096).tolist()
    draw = Draw(0)
    assert [draw.below(1000) for _ in range(5000)][:3] == [w % 1000 for w in raw[::-1][:3]]


def test_ranges_and_samples():
    """between and below stay inside, every value occurs, sample repeats no position, shuffle keeps the items."""
    draw = Draw(3, stream=9)
    assert {draw.between(2, 5) for _ in range(200)} == {2, 3, 4, 5}
    assert all(len(set(draw.sample("abcdef", 4))) == 4 for _ in range(50))
    items = list(range(50))
    draw.shuffle(items)
    assert items != list(range(50)) and sorted(items) == list(range(50))
    assert 0 < sum(draw.chance(30) for _ in range(1000)) < 500


def test_streams_differ():
    """Seeds and streams are independent keys."""
    first = {tuple(Draw(s, t).below(1 << 30) for _ in range(4)) for s in range(4) for t in range(4)}
    assert len(first) == 16
