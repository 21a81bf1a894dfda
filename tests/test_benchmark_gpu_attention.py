"""The comparison of cuDNN's two ways: what is not attention is not timed, what is gets a line, and without such a GPU it says so."""

import io

import jax
import pytest
from benchmarks.gpu import attention
from benchmarks.gpu.attention import Case
from rich.console import Console

from qtjax.errors import QtjaxError
from qtjax.models.packed import runs

SMALL = Case(2, 32, 4, 2, 16, 4)


def test_both_ways_are_checked_and_timed(monkeypatch, runs_by_mask):
    """Right ones get four numbers and a line; one that sees what comes later is refused in one line."""
    def right(case, segment):
        one = lambda q, k, v: runs_by_mask(q, k, v, runs(segment, case.samples)[0])  # noqa: E731
        return {"by mask": one, "by sample": one}

    def wrong(case, segment):
        return right(case, segment) | {"by sample": lambda q, k, v: jax.nn.dot_product_attention(q, k, v, implementation="xla")}

    monkeypatch.setattr(attention, "kernels", right)
    assert 0 < attention.check(SMALL) < attention.ROUNDING
    found = attention.measured(SMALL)
    assert set(found) == {"by mask", "by sample"} and all(0 < x < 60 for pair in found.values() for x in pair)
    told = io.StringIO()
    Console(file=told, width=140).print(attention.table({SMALL: {"by mask": (0.002, 0.003), "by sample": (0.001, 0.002)}}, "a card"))
    assert "2 x 32" in told.getvalue() and "2.00" in told.getvalue() and "1.50" in told.getvalue()
    monkeypatch.setattr(attention, "kernels", wrong)
    with pytest.raises(QtjaxError, match="off plain float32") as error:
        attention.measured(SMALL)
    assert "\n" not in str(error.value)


def test_other_devices_are_refused():
    """A CPU is named, and what would do."""
    if jax.default_backend() != "cpu":
        pytest.skip("this is about a CPU")
    with pytest.raises(QtjaxError, match="cpu: .*on Hopper GPUs only"):
        attention.main([])
