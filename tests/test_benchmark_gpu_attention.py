"""The comparison of cuDNN's two ways: what is not attention is not timed, what is gets a line, and without such a GPU it says so."""

import io

import jax
import jax.numpy as jnp
import pytest
from benchmarks.gpu import attention
from benchmarks.gpu.attention import Case
from rich.console import Console

from qtjax.errors import QtjaxError
from qtjax.models.attention import visible
from qtjax.models.packed import runs

SMALL = Case(2, 32, 4, 2, 16, 4)


def stand_ins(case, segment, most, later=True):
    """Both ways in plain attention; later=False: a mask that lets slots see what comes later."""
    slots = jnp.arange(case.length)
    told = runs(segment, most)[0]
    run = jnp.sum(jnp.where(told.start < 0, case.length, told.start)[:, :, None] <= slots, axis=1)
    sees = visible(slots, slots, run, run, None)
    one = lambda q, k, v: jax.nn.dot_product_attention(q, k, v, mask=sees, implementation="xla")  # noqa: E731
    other = lambda q, k, v: jax.nn.dot_product_attention(q, k, v, mask=sees | (not later), implementation="xla")  # noqa: E731
    return {"by mask": one, "by sample": other}


def test_both_ways_are_checked_and_timed(monkeypatch):
    """Right ones get four numbers and a line; one that sees what comes later is refused in one line."""
    monkeypatch.setattr(attention, "kernels", stand_ins)
    assert 0 < attention.check(SMALL) < attention.ROUNDING
    found = attention.measured(SMALL)
    assert set(found) == {"by mask", "by sample"} and all(0 < x < 60 for pair in found.values() for x in pair)
    told = io.StringIO()
    Console(file=told, width=140).print(attention.table({SMALL: {"by mask": (0.002, 0.003), "by sample": (0.001, 0.002)}}, "a card"))
    assert "2 x 32" in told.getvalue() and "2.00" in told.getvalue() and "1.50" in told.getvalue()
    monkeypatch.setattr(attention, "kernels", lambda *given: stand_ins(*given, later=False))
    with pytest.raises(QtjaxError, match="off plain float32") as error:
        attention.measured(SMALL)
    assert "\n" not in str(error.value)


def test_other_devices_are_refused():
    """A CPU is named, and what would do."""
    if jax.default_backend() != "cpu":
        pytest.skip("this is about a CPU")
    with pytest.raises(QtjaxError, match="cpu: .*on Hopper GPUs only"):
        attention.main([])
