"""score: every sample once, with the scores that eu_scores gives it and the choice that its training batch would make."""

import io

import numpy as np
import pyarrow.parquet as pq
import pytest
from rich.console import Console

from qtjax.checkpoints import load_pretrained
from qtjax.config import read_config
from qtjax.data.iterate import BatchPlan
from qtjax.data.prepare import training_data
from qtjax.data.tokenizer import load_tokenizer
from qtjax.errors import QtjaxError
from qtjax.pruning import select_samples
from qtjax.score import main
from qtjax.training.score import eu_scores


def test_scores_and_choices_equal_the_plain_composition(experiment, tiny_model, tmp_path):
    """One unpacked eu_scores call over all samples, then select_samples on each of the epoch's batches."""
    console = Console(file=io.StringIO(), width=80)
    main(["--config", experiment, "--out", str(tmp_path / "eu")], console)
    table = pq.read_table(tmp_path / "eu" / "eu.parquet")
    assert (tmp_path / "eu" / "eu_plane.png").read_bytes()[:4] == b"\x89PNG"
    config = read_config(experiment)
    dataset = training_data(config.data, load_tokenizer(tiny_model), progress=False)
    assert table["row"].to_pylist() == dataset.row_index.tolist() == list(range(24))
    ids, mask, real = (np.zeros((24, 48), kind) for kind in (np.int32, bool, bool))
    for i in range(24):
        tokens, targets, _ = dataset.sample(i)
        ids[i, : len(tokens)], mask[i, : len(tokens)], real[i, : len(tokens)] = tokens, targets, True
    scores = eu_scores(*load_pretrained(tiny_model), ids, mask, attention_mask=real)
    for name in ("perplexity", "entropy", "count"):
        np.testing.assert_allclose(table[name].to_numpy(), getattr(scores, name), rtol=1e-4)
    plan = BatchPlan(24, config.prune.batch_size, config.train.seed)
    keep = np.zeros(24, bool)
    for step in range(plan.steps_per_epoch):
        batch = plan.global_batch(step)
        valid = batch >= 0
        ppl, ent = table["perplexity"].to_numpy()[batch], table["entropy"].to_numpy()[batch]
        choice = select_samples(ppl, ent, keep=config.prune.sample_keep, valid=valid)
        keep[batch[valid]] = np.asarray(choice.keep)[valid]
        assert (table["step"].to_numpy()[batch[valid]] == step + 1).all()
    assert table["keep"].to_numpy().tolist() == keep.tolist() and keep.sum() == 4 + 2
    text = console.file.getvalue()
    assert max(len(line) for line in text.splitlines() if not line.startswith(("written", "data"))) <= 80 and "Spearman" in text


def test_a_run_is_scored_on_its_own_data(experiment, full_run, tiny_data, tmp_path, monkeypatch):
    """Without --config the run's data and settings, the same table as with its config given; the data are named."""
    tables = []
    for flags in ([], ["--config", experiment]):
        with monkeypatch.context() as here:
            here.chdir(tmp_path)  # no configs/smol.py here: nothing can come from it
            console = Console(file=io.StringIO(), width=80)
            main(["--checkpoint", full_run, "--out", "eu", *flags], console)
        assert f"data: {tiny_data}\n" in console.file.getvalue()
        tables.append(pq.read_table(tmp_path / "eu" / "eu.parquet"))
    assert tables[0].equals(tables[1]) and tables[0].num_rows == 24


def test_a_pruner_without_scores_is_shown_on_the_plane(experiment, tmp_path):
    """random x none: what it would keep, and every sample's scores and median quadrant all the same."""
    tables = {}
    for name in ("random", "q-tuning"):
        main(["--config", experiment, "--out", str(tmp_path / name), "--prune.sample-pruner", name, "--prune.token-pruner", "none"],
             Console(file=io.StringIO(), width=80))  # fmt: skip
        tables[name] = pq.read_table(tmp_path / name / "eu.parquet")
    for name in ("perplexity", "entropy", "median_quadrant"):
        np.testing.assert_array_equal(tables["random"][name].to_numpy(), tables["q-tuning"][name].to_numpy())
    assert sum(tables["random"]["keep"].to_pylist()) == 4 + 2 and tables["random"]["keep"] != tables["q-tuning"]["keep"]


def test_out_is_needed(experiment):
    """Nothing is written where nobody said to."""
    with pytest.raises(QtjaxError, match="--out: is missing"):
        main(["--config", experiment])
