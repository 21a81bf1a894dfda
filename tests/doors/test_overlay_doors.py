"""The doors on runs and adapters of every kind of overlay: their numbers are those of plain, unpacked forward passes."""

import io
import json
from typing import NamedTuple

import jax
import numpy as np
import pyarrow.parquet as pq
import pytest
from rich.console import Console

from qtjax import evals, evaluate, export, generate, models, score
from qtjax.checkpoints import load_adapter, load_pretrained
from qtjax.config import Config
from qtjax.data.examples import Example
from qtjax.data.prepare import held_out_data
from qtjax.data.templates import resolve_template
from qtjax.data.tokenize import prompt_and_answer
from qtjax.data.tokenizer import load_tokenizer
from qtjax.errors import QtjaxError
from qtjax.training.restore import load_run

pytestmark = pytest.mark.slow

# method -> its settings in the run, and the flags that an adapter folder, which knows nothing of base and data, needs
KINDS = {
    "ptuning": ({"overlay.fields": "num_virtual_tokens=3 encoder_hidden_size=8"}, []),
    "oft": ({"overlay.fields": "oft_block_size=4"}, []),
    "lora+ln_tuning": ({"overlay.r": 2}, []),
    "poly": ({"overlay.fields": "r=2 n_skills=2 n_splits=2 n_tasks=2", "data.task_column": "kind"}, ["--data.task-column", "kind"]),
    "xlora": ({"overlay.fields": "adapters=2"}, []),
    "diffprune": ({}, []),
    "qlora": ({"overlay.r": 2, "model.quantization": "nf4"}, ["--model.quantization", "nf4"]),
}  # fmt: skip
WIDTH, NEW = 48, 4
apply = models.apply


class Case(NamedTuple):
    """A run, the adapter exported from it, what an evaluation of it needs, and the plain numbers."""

    method: str
    run: str
    adapter: str
    flags: list[str]
    nll: np.ndarray  # [24], summed over targets
    targets: np.ndarray


@pytest.fixture(scope="module", params=KINDS)
def case(request, make_run, experiment, tmp_path_factory):
    changes, flags = KINDS[request.param]
    run, adapter = make_run(request.param, **changes), str(tmp_path_factory.mktemp("out") / "adapter")
    export.main(["--run", run, "--out", adapter])
    return Case(request.param, run, adapter, ["--config", experiment, *flags], *plain(run))


def plain(run, swapped=False, bare=False):
    """(nll summed over its targets, targets) of every held-out sample, each in a row of its own."""
    config, shape, params, overlay = load_run(run)
    data = held_out_data(config.data, load_tokenizer(config.model.path))
    ids, mask, real = (np.zeros((len(data), WIDTH), kind) for kind in (np.int32, bool, bool))
    for i in range(len(data)):
        tokens, targets, _ = data.sample(i)
        ids[i, : len(tokens)], mask[i, : len(tokens)], real[i, : len(tokens)] = tokens, targets, True
    tasks = np.asarray(data.task_ids, np.int32)
    logits = apply(shape, params, ids, real, overlay=None if bare else overlay, task_ids=1 - tasks if swapped else tasks)
    nll = -np.take_along_axis(np.asarray(jax.nn.log_softmax(logits))[:, :-1], ids[:, 1:, None], axis=2)[..., 0]
    return (nll * mask[:, 1:]).sum(axis=1, dtype=np.float64), mask[:, 1:].sum(axis=1)


def evaluated(path, *flags):
    evaluate.main(["--checkpoint", path, "--tasks", "loss", "--out", f"{path}/../found.json", *flags], Console(file=io.StringIO()))
    return json.load(open(f"{path}/../found.json"))["loss"]["loss"]


def test_evaluate_gives_the_loss_of_plain_forward_passes(case):
    """Of the run and of its adapter over the base alike; the overlay, and where there are tasks whose rows are whose, count."""
    expected = case.nll.sum() / case.targets.sum()
    bare = plain(case.run, bare=True)[0].sum() / case.targets.sum()
    assert abs(expected - bare) > 2e-3
    assert evaluated(case.run) == pytest.approx(expected, rel=2e-5)
    assert evaluated(case.adapter, *case.flags) == pytest.approx(expected, rel=2e-5)
    if case.method == "poly":
        assert abs(plain(case.run, swapped=True)[0].sum() / case.targets.sum() - expected) > 2e-3


def test_score_gives_the_perplexity_of_plain_forward_passes(case, tmp_path):
    """Every sample's, of the run and of its adapter."""
    for path, flags in ((case.run, []), (case.adapter, case.flags)):
        score.main(["--checkpoint", path, "--out", str(tmp_path), "--held-out", *flags], Console(file=io.StringIO()))
        found = pq.read_table(tmp_path / "eu.parquet")["perplexity"].to_numpy()
        np.testing.assert_allclose(np.log(found), case.nll / case.targets, rtol=1e-4)


def test_generate_prints_the_most_probable_tokens(case, tiny_model, capsys):
    """Greedy tokens by full forward passes, one at a time; an adapter over the unquantised base says the same as its run."""
    config, shape, params, overlay = load_run(case.run)
    tokenizer = load_tokenizer(tiny_model)
    template = resolve_template(tokenizer, config.data.chat_template)
    prompt = prompt_and_answer(tokenizer, Example(prompt="red cat", completion="-"), template, "prompt")[0].tolist()
    stop, tasks, said = evals.stop_ids_of_chat(Config(), shape, tokenizer), np.array([1], np.int32), []
    while len(said) < NEW:
        row = np.array([(prompt + said + [0] * WIDTH)[:WIDTH]], np.int32)
        real = np.arange(WIDTH)[None] < len(prompt) + len(said)
        token = int(apply(shape, params, row, real, overlay=overlay, task_ids=tasks)[0, len(prompt) + len(said) - 1].argmax())
        if token in stop:
            break
        said.append(token)
    flags = ["--prompt", "red cat", "--max-new-tokens", str(NEW), *(["--task-id", "1"] if overlay.tasks else [])]
    models_of = [["--model", case.run]]
    models_of += [] if shape.quantization else [["--model", tiny_model, "--adapter", case.adapter]]
    for model in models_of:
        capsys.readouterr()
        generate.main([*model, *flags])
        assert capsys.readouterr().out == tokenizer.decode(said, skip_special_tokens=True) + "\n"


def test_export_writes_what_the_run_holds(case, tmp_path, capsys):
    """The adapter's arrays are the run's, bit by bit; --merge is the same function of a task, or says why it cannot be."""
    _, shape, params, overlay = load_run(case.run)
    loaded = load_adapter(case.adapter, shape, params)
    trees = [(o.params, o.frozen) for o in (loaded, overlay)]
    jax.tree.map(np.testing.assert_array_equal, *trees)
    task = ["--task-id", "1"] if overlay.tasks else []
    if case.method in ("ptuning", "xlora"):
        with pytest.raises(QtjaxError, match="cannot be merged") as error:
            export.main(["--run", case.run, "--out", str(tmp_path / "merged"), "--merge"])
        assert "\n" not in str(error.value)
        return
    export.main(["--run", case.run, "--out", str(tmp_path / "merged"), "--merge", *task])
    ids = np.arange(20, dtype=np.int32)[None] * 37 % 2048
    merged = apply(*load_pretrained(tmp_path / "merged"), ids)
    np.testing.assert_allclose(merged, apply(shape, params, ids, overlay=overlay, task_ids=np.array([1], np.int32)), atol=3e-4)
