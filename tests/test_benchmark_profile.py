"""The profile: its tables on a tiny model, and a variant that computes something else is refused."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import profile
from qtjax import models
from qtjax.data.packing import pack
from qtjax.errors import QtjaxError
from qtjax.training.ladder import cut
from qtjax.training.score import score_rows


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


def test_every_layout_holds_every_sample_once():
    """The same tokens packed, and alone in rows of one length and of several; launches of no more slots than asked, and of rows alone fewer
    empty ones than a length has launches. Alone means one segment a row, in the shortest of the lengths."""
    samples = profile.samples_of(64, 80, 50)
    sizes = np.asarray([len(s.input_ids) for s in samples])
    assert sizes.max() <= 80 and abs(np.median(sizes) - 30) < 6
    ways = profile.layouts(samples, 4, 80)
    fill = {}
    for way, launches in ways.items():
        assert all(x.input_ids.size <= 4 * 80 for x in launches)
        owner = np.concatenate([x.sample[x.segment_ids > 0] for x in launches])
        np.testing.assert_array_equal(np.bincount(owner, minlength=64), sizes)
        ids = np.concatenate([x.input_ids[x.sample == 7] for x in launches])
        np.testing.assert_array_equal(ids, samples[7].input_ids)
        if way == "packed":
            assert [len(x.input_ids) for x in launches] == cut(len(pack(sizes, 80)), (4, 2, 1))
        else:
            count, used = int(way.split(",")[1].split()[0]), {}
            for x in launches:
                assert x.segment_ids.max() == 1
                used.setdefault(x.input_ids.shape[1], []).append((x.segment_ids > 0).sum(axis=1))
            for length, tokens in used.items():
                assert sum((n == 0).sum() for n in tokens) < len(tokens)
                assert all((n[n > 0] > length - 80 // count).all() for n in tokens)
        fill[way] = len(owner) / sum(x.segment_ids.size for x in launches)
    assert list(fill) == ["packed", *(f"a sample a row, {n}" for n in ("4 lengths", "8 lengths", "16 lengths", "1 length"))]
    assert fill["packed"] > 0.85 and fill["a sample a row, 1 length"] < 0.5


def test_a_layout_that_changes_a_score_is_refused(monkeypatch):
    """Samples that see each other where they share a row have another nll than alone: the layout's name, no table."""
    config = models.ModelConfig(
        vocab_size=50, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2, head_dim=8
    )
    params = models.init_params(config, jax.random.key(0))
    measured = profile.measure_layouts(config, params, 4, 40, 1)
    assert [row["ratio"] for row in measured][0] == 1 and all(row["seconds"] > 0 for row in measured)
    blind = lambda own, params, overlay, rows: score_rows(own, params, overlay, rows | {"segment_ids": jnp.ones_like(rows["segment_ids"])})  # noqa: E731
    monkeypatch.setattr(profile, "score_rows", blind)
    with pytest.raises(QtjaxError, match="^a sample a row, 4 lengths: a sample's nll is not what it is in packed rows"):
        profile.measure_layouts(config, params, 4, 40, 1)


@pytest.mark.parametrize("flags", [["--rounds", "0"], ["--rows", "-1"]])
def test_bad_flags_are_one_line(flags):
    """Sizes below one are refused before anything is compiled."""
    with pytest.raises(QtjaxError, match=r"must be 1 or more$"):
        profile.main(flags)


@pytest.mark.slow
def test_all_tables_of_a_small_model(tmp_path, capsys):
    """The whole command: every part and every variant has seconds, and the matrix rate is a number."""
    profile.main(["--model", "smol", "--rows", "2", "--length", "60", "--rounds", "2", "--json", str(tmp_path / "p.json")])
    report = json.loads((tmp_path / "p.json").read_text())
    assert report["matrix_flops_per_second"] > 0 and len(report["parts"]) == 5 and len(report["variants"]) == 11
    assert all(row["seconds"] > 0 for row in [*report["parts"], *report["variants"], *report["layouts"]]) and len(report["layouts"]) == 5
    assert report["variants"][0]["name"] == "qtjax" and report["variants"][0]["ratio"] == 1
    assert "at the matrix rate" in capsys.readouterr().out
