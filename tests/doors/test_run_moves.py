"""What a run writes and what the doors read of it: posteriors, sparse differences, experts, wherever the folder lies now."""

import io
import json
import shutil

import jax
import numpy as np
import pytest
from rich.console import Console

from qtjax import evaluate, export, generate
from qtjax.checkpoints import add_sparse_delta, load_adapter, load_pretrained, load_sparse_delta
from qtjax.config import Config, override, validate
from qtjax.errors import QtjaxError
from qtjax.overlays import merge, predictive
from qtjax.training import story
from qtjax.training.loop import Loop
from qtjax.training.restore import load_run
from qtjax.tree import flatten

QUIET = Console(quiet=True)


@pytest.fixture
def config_of(values, tmp_path):
    def make(method, **changes):
        base = values | {
            "overlay.method": method, "run.folder": str(tmp_path / "run"), "train.epochs": 2.0, "train.learning_rate": 1e-2,
            "train.checkpoint_every": 1, "train.shapes": 1, "train.compare_full_data": 0, "eval.generate_samples": 0,
            "run.tensorboard": False,
        }  # fmt: skip
        return validate(override(Config(), base | changes))

    return make


def loss_of(folder, tmp_path):
    out = tmp_path / "found.json"
    evaluate.main(["--checkpoint", str(folder), "--tasks", "loss", "--out", str(out)], Console(file=io.StringIO()))
    return json.loads(out.read_text())["loss"]["loss"]


def same(one, other):
    assert (one.method, one.spec) == (other.method, other.spec)
    jax.tree.map(np.testing.assert_array_equal, (one.params, one.frozen), (other.params, other.frozen))


@pytest.mark.slow
def test_export_of_a_laplace_run_has_the_posterior_of_the_run(config_of, tmp_path, tiny_data):
    """The same arrays and predictive probabilities as the run's own folder, bit by bit; merged it is the mean; on other
    data than the run's it is refused."""
    data = shutil.copy(tiny_data, tmp_path / "rows.jsonl")
    config = config_of("laplace", **{"overlay.r": 2, "overlay.target_modules": "q_proj,v_proj", "data.path": str(data)})
    story.run(config, QUIET, quiet=True)
    export.main(["--run", config.run.folder, "--out", str(tmp_path / "out")])
    _, shape, params, mean = load_run(config.run.folder)
    own, exported = (load_adapter(folder, shape, params) for folder in (tmp_path / "run" / "model", tmp_path / "out"))
    same(own, exported)
    assert own.spec.prior.fitted and flatten(own.frozen) and not flatten(mean.frozen)
    ids = np.arange(12).reshape(2, 6) * 31 % 2048
    one, other = (predictive(shape, params, o, ids, np.ones_like(ids), [5, 7, 11]).probabilities for o in (own, exported))
    np.testing.assert_array_equal(one, other)
    export.main(["--run", config.run.folder, "--out", str(tmp_path / "merged"), "--merge"])
    jax.tree.map(np.testing.assert_array_equal, load_pretrained(tmp_path / "merged")[1], merge(shape, params, mean)[1])
    data.write_text("\n".join(data.read_text().splitlines()[:-1]))
    with pytest.raises(QtjaxError, match="holds other samples than when this run began") as error:
        export.main(["--run", config.run.folder, "--out", str(tmp_path / "other")])
    assert "\n" not in str(error.value)


@pytest.mark.slow
def test_sparse_export_is_the_merged_model_in_few_bytes(config_of, tmp_path, tiny_model, capsys):
    """Base + file = merged export, bit by bit; the file has 12 bytes a kept value, kept_fraction of the targets' at most."""
    config = config_of("diffprune", **{"overlay.fields": "kept_fraction=0.05 target_modules=all-linear"})
    story.run(config, QUIET, quiet=True)
    capsys.readouterr()
    export.main(["--run", config.run.folder, "--out", str(tmp_path / "sparse"), "--sparse"])
    export.main(["--run", config.run.folder, "--out", str(tmp_path / "merged"), "--merge"])
    file = tmp_path / "sparse" / "sparse_delta.safetensors"
    assert str(file) in capsys.readouterr().out and [f.name for f in file.parent.iterdir()] == [file.name]
    delta, base = load_sparse_delta(file), load_pretrained(tiny_model)[1]
    tuned = add_sparse_delta(base, delta)
    jax.tree.map(np.testing.assert_array_equal, tuned, load_pretrained(tmp_path / "merged")[1])
    assert np.abs(np.asarray(tuned["layers"]["mlp"]["up_proj"]["kernel"] - base["layers"]["mlp"]["up_proj"]["kernel"])).max() > 0
    targets = sum(v.size for k, v in flatten(base).items() if k.endswith("proj/kernel"))
    count = sum(len(values) for _, values in delta.values())
    assert count == round(0.05 * targets)
    names = 150 * 2 * len(delta)  # the header: two entries a matrix
    assert 12 * count < file.stat().st_size < 12 * count + names < 4 * targets


def test_sparse_export_is_refused_where_there_is_no_sparse_difference(make_run, full_run, lora_run, tmp_path):
    """A full run, another method, a merge beside it, and a diffprune run before its projection: one line each, nothing written."""
    early = make_run("diffprune")
    for run, flags, message in (
        (full_run, [], "--sparse: .* trained all parameters"), (lora_run, [], "'lora': has no sparse difference"),
        (early, ["--merge"], "--sparse: beside --merge"), (early, [], "not projected yet, .* values are open"),
    ):  # fmt: skip
        with pytest.raises(QtjaxError, match=message) as error:
            export.main(["--run", run, "--out", str(tmp_path / "out"), "--sparse", *flags])
        assert "\n" not in str(error.value) and not (tmp_path / "out").exists()


@pytest.mark.slow
def test_a_moved_xlora_run_resumes_evaluates_and_exports(config_of, tmp_path, power_cut, capsys):
    """Its experts are those in the folder that was opened, the old place gone: it ends bitwise as it would have in place, and
    its loss, answers and adapter are the run's; so does the model folder alone, moved out of it."""
    here = config_of("xlora", **{"overlay.fields": "adapters=2 r=2"})
    half_way = lambda loop, number: loop.config.overlay.method == "xlora" and number == 1  # noqa: E731
    power_cut(lambda: story.run(here, QUIET, quiet=True), half_way)
    old, new = tmp_path / "run", tmp_path / "moved"
    shutil.copytree(old, new)
    summary = story.run(here, QUIET, quiet=True)
    stayed = load_run(old)[3]
    shutil.rmtree(old)
    assert load_run(new)[0].run.folder == str(new)  # half-way
    story.run(override(here, {"run.folder": str(new)}), QUIET, quiet=True)
    last = new.rename(tmp_path / "again")
    _, shape, params, overlay = load_run(last)
    same(overlay, stayed)
    assert loss_of(last, tmp_path) == pytest.approx(summary["evaluation"]["after"]["loss"], rel=1e-6)
    export.main(["--run", str(last), "--out", str(tmp_path / "out")])
    (last / "model").rename(tmp_path / "alone")
    shutil.rmtree(last / "experts" / "0" / "checkpoints")  # of the experts only their adapters are needed
    for folder in ("out", "alone"):
        same(load_adapter(tmp_path / folder, shape, params), overlay)
    answers = []
    for flags in (["--model", str(last)], ["--model", here.model.path, "--adapter", str(tmp_path / "alone")]):
        capsys.readouterr()
        generate.main([*flags, "--prompt", "red cat", "--max-new-tokens", "4"])
        answers.append(capsys.readouterr().out)
    assert answers[0] == answers[1]


@pytest.mark.slow
@pytest.mark.parametrize("init", ["pissa", "pissa_niter_4", "olora"])
def test_factors_of_the_base_are_the_same_after_a_resume(config_of, tmp_path, monkeypatch, init):
    """Initial factors are not in the checkpoints and made again from the base: a run that was stopped ends bitwise like one
    that was not, factors included, and its exported adapter too."""
    settings = {"overlay.r": 2, "overlay.fields": f"init_lora_weights={init}"}
    whole = config_of("lora", **settings, **{"run.folder": str(tmp_path / "whole")})
    story.run(whole, QUIET, quiet=True)
    broken = config_of("lora", **settings)
    true_step, calls = Loop.step, []

    def step(self, number, last):
        calls.append(number)
        if calls == [0, 1, 2]:
            raise RuntimeError("power cut")
        return true_step(self, number, last)

    monkeypatch.setattr(Loop, "step", step)
    with pytest.raises(RuntimeError):
        story.run(broken, QUIET, quiet=True)
    jax.clear_caches()  # as another process would, it compiles the initialisation anew
    story.run(broken, QUIET, quiet=True)
    assert calls == [0, 1, 2, 2, 3]
    _, shape, params, one = load_run(whole.run.folder)
    other = load_run(broken.run.folder)[3]
    assert any(path.endswith("initial_A") for path in flatten(one.frozen))
    same(one, other)
    for folder in ("whole", "run"):
        same(load_adapter(tmp_path / folder / "model", shape, params), one)
