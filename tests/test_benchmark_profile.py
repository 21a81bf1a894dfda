"""The profile: both tables on a tiny model, and a variant that computes something else is refused."""

import json

import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import profile
from qtjax.errors import QtjaxError


def test_rows_hold_whole_samples_whose_second_half_is_answer():
    """Three samples a row, positions from 0 in each, targets in their second halves only."""
    rows = profile.packed_rows(2, 30, 50)
    assert rows.input_ids.shape == (2, 30) and set(np.unique(rows.segment_ids)) == {1, 2, 3}
    np.testing.assert_array_equal(rows.position_ids[0], np.tile(np.arange(10), 3))
    np.testing.assert_array_equal(rows.weights[0], np.tile([0] * 5 + [1] * 5, 3))


def test_a_variant_that_strays_is_refused():
    """A loss or a gradient that is not the plain one's ends the table with its name; bfloat16 may be as far as its eight bits."""
    plain = (jnp.float32(2), {"w": jnp.ones(4)})
    off = (jnp.float32(2), {"w": jnp.ones(4) * 1.01})
    profile.check({"plain attention and all logits": plain, "bfloat16": off})
    with pytest.raises(QtjaxError, match="layers unrolled: loss 2 against 2, gradient 0.01"):
        profile.check({"plain attention and all logits": plain, "layers unrolled": off})
    with pytest.raises(QtjaxError, match="qtjax: loss 3"):
        profile.check({"plain attention and all logits": plain, "qtjax": (jnp.float32(3), plain[1])})


@pytest.mark.parametrize("flags", [["--rounds", "0"], ["--rows", "-1"]])
def test_bad_flags_are_one_line(flags):
    """Sizes below one are refused before anything is compiled."""
    with pytest.raises(QtjaxError, match=r"must be 1 or more$"):
        profile.main(flags)


@pytest.mark.slow
def test_both_tables_of_a_small_model(tmp_path, capsys):
    """The whole command: every part and every variant has seconds, and the matrix rate is a number."""
    profile.main(["--model", "smol", "--rows", "2", "--length", "60", "--rounds", "2", "--json", str(tmp_path / "p.json")])
    report = json.loads((tmp_path / "p.json").read_text())
    assert report["matrix_flops_per_second"] > 0 and len(report["parts"]) == 5 and len(report["variants"]) == 10
    assert all(row["seconds"] > 0 for row in [*report["parts"], *report["variants"]])
    assert report["variants"][0]["name"] == "qtjax" and report["variants"][0]["ratio"] == 1
    assert "at the matrix rate" in capsys.readouterr().out
