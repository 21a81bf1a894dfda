"""Export writes what the run holds: whole models and adapters that load back to the same numbers, merged or not."""

import jax
import numpy as np
import pytest

from qtjax import models
from qtjax.checkpoints import load_adapter, load_pretrained
from qtjax.data.tokenizer import load_tokenizer
from qtjax.errors import QtjaxError
from qtjax.export import main
from qtjax.tree import flatten

IDS = np.arange(20, dtype=np.int32)[None] * 37 % 2048


def test_a_full_run_becomes_a_model_folder(full_run, tiny_model, tmp_path, capsys):
    """Base weights plus the 0.05 that "training" added, with the tokenizer beside them."""
    out = tmp_path / "model"
    main(["--run", full_run, "--out", str(out)])
    assert str(out) in capsys.readouterr().out
    (_, base), (config, params) = load_pretrained(tiny_model), load_pretrained(out)
    base, params = flatten(base), flatten(params)
    assert base.keys() == params.keys()
    for path, leaf in base.items():
        np.testing.assert_allclose(params[path], leaf + 0.05, atol=1e-6)
    assert load_tokenizer(str(out)).chat_template == load_tokenizer("smol").chat_template
    main(["--run", full_run, "--out", str(out), "--dtype", "bfloat16"])
    assert {leaf.dtype.name for leaf in jax.tree.leaves(load_pretrained(out, "bfloat16")[1])} == {"bfloat16"}


def test_a_lora_run_becomes_an_adapter_or_a_merged_model(lora_run, tiny_model, tmp_path):
    """Base + adapter and the merged folder give the same logits, which are not the base's."""
    main(["--run", lora_run, "--out", str(tmp_path / "adapter")])
    main(["--run", lora_run, "--out", str(tmp_path / "merged"), "--merge"])
    config, base = load_pretrained(tiny_model)
    overlay = load_adapter(tmp_path / "adapter", config, base)
    apply = jax.jit(models.apply, static_argnums=0)
    over = apply(config, base, IDS, overlay=overlay)
    merged = apply(config, load_pretrained(tmp_path / "merged")[1], IDS)
    np.testing.assert_allclose(over, merged, atol=1e-4)
    assert np.abs(merged - apply(config, base, IDS)).max() > 1e-2


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--out", "x"], "--run: is missing"),
        (["--run", "nowhere", "--out", "x"], "nowhere.*no run folder"),
        (["--ran", "x"], "--ran: no such flag; did you mean '--run'"),
        (["--run", "x", "--out", "y", "--dtype", "int8"], "--dtype 'int8'.*bfloat16"),
    ],
)
def test_bad_flags_are_one_line(flags, said):
    """Missing, unknown and mistyped flags name the remedy."""
    with pytest.raises(QtjaxError, match=said) as caught:
        main(flags)
    assert "\n" not in str(caught.value)


def test_exports_that_contradict_themselves_are_refused(full_run, lora_run, tiny_model):
    """No merging without an adapter; no adapter into a model's folder, which readers would then take for either."""
    with pytest.raises(QtjaxError, match="no adapter to merge"):
        main(["--run", full_run, "--out", "x", "--merge"])
    with pytest.raises(QtjaxError, match="another kind of export"):
        main(["--run", lora_run, "--out", tiny_model])
