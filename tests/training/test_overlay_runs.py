"""Whole runs with overlays: every method by its name in the config, its own rule and state, experts, tasks, calibration."""

import json
from pathlib import Path

import jax
import numpy as np
import pytest
from rich.console import Console

from qtjax.checkpoints import load_adapter, load_pretrained, save_adapter
from qtjax.config import override
from qtjax.data.prepare import training_rows
from qtjax.errors import QtjaxError
from qtjax.overlays import METHODS, init_overlay
from qtjax.training import story
from qtjax.training.experts import missing_experts
from qtjax.training.restore import load_run
from qtjax.training.run import open_session, train_steps
from qtjax.training.run_folder import RunFolder, read_metrics
from qtjax.training.setup import check_overlay, overlay_fields
from qtjax.tree import flatten

QUIET = Console(quiet=True)
SMALL = {
    "adalora": "init_r=4 target_r=2 tinit=1 tfinal=2 deltaT=1", "oft": "oft_block_size=8", "boft": "boft_block_size=4", "vera": "r=8",
    "fourierft": "n_frequency=40", "vblora": "num_vectors=8 vector_length=8 r=2", "houlsby": "bottleneck=4", "prompt": "num_virtual_tokens=4",
    "ptuning": "num_virtual_tokens=4 encoder_hidden_size=8", "mpt": "num_virtual_tokens=4", "prefix": "num_virtual_tokens=4",
    "llama_adapter": "adapter_len=4 adapter_layers=1", "poly": "r=2 n_skills=2", "xlora": "adapters=2 r=2",
}  # fmt: skip


@pytest.fixture
def config_of(tiny_config):
    def make(method, **changes):
        fields = {"overlay.method": method, "overlay.fields": SMALL.get(method, ""), "train.epochs": 1.0, "train.shapes": 1}
        return tiny_config(**(fields | changes))

    return make


@pytest.mark.slow
@pytest.mark.parametrize("method", [m for m in METHODS if m not in ("lora", "xlora", "adalora", "laplace")])
def test_every_method_trains_by_its_name(config_of, method):
    """A run under Q-Tuning ends, its adapter moved, stands in the run folder, loads again and computes what the run had."""
    config = config_of(method, **{"run.export": True, "model.quantization": "nf4" if method == "qlora" else "none"})
    summary = story.run(config, QUIET, quiet=True)
    assert summary["steps"] == 3 and np.isfinite(summary["evaluation"]["after"]["loss"])
    _, model_config, params, trained = load_run(config.run.folder)
    loaded = load_adapter(Path(config.run.folder) / "model", model_config, params)
    assert summary["trained_values"] == trained.trainable_count
    moved = [np.abs(np.asarray(x)).max() for x in jax.tree.leaves(trained.params)]
    assert max(moved) > 0
    if loaded.method == method:
        jax.tree.map(np.testing.assert_array_equal, loaded.params, trained.params)


def test_adalora_prunes_on_schedule_and_resumes_bitwise(config_of, tmp_path, power_cut):
    """Its penalty is logged, its ranks fall to the budget, and a run that crashed keeps its averages and its masks."""
    whole = config_of("adalora", **{"train.epochs": 2.0, "run.folder": str(tmp_path / "whole"), "data.eval_fraction": 0.0})
    story.run(whole, QUIET, quiet=True)
    assert all(m["penalty"] > 0 for m in read_metrics(whole.run.folder))
    broken = config_of("adalora", **{"train.epochs": 2.0, "run.folder": str(tmp_path / "broken"), "data.eval_fraction": 0.0})
    power_cut(lambda: story.run(broken, QUIET, quiet=True), lambda loop, number: number == 5)
    story.run(broken, QUIET, quiet=True)
    trees = [flatten(load_run(c.run.folder)[3].params) for c in (whole, broken)]
    for path in trees[0]:
        np.testing.assert_array_equal(trees[0][path], trees[1][path], err_msg=path)
    importance = [np.asarray(v) for path, v in trees[0].items() if path.endswith("lora_E")]
    assert sum((e != 0).sum() for e in importance) <= 2 * sum(e.shape[0] for e in importance)


@pytest.mark.slow
def test_xlora_trains_its_experts_first_and_resumes(config_of, power_cut):
    """Two experts on a half of the rows each, then the classifier over them, frozen; a stop in between loses nothing."""
    config = config_of("xlora", **{"run.export": True})
    calls = []

    def classifier_begins(loop, number):
        calls.append(loop.config.overlay.method)
        return calls[-1] == "xlora"

    power_cut(lambda: story.run(config, QUIET, quiet=True), classifier_begins)
    assert calls.count("lora") == 2 * 2
    summary = story.run(config, QUIET, quiet=True)
    folder = Path(config.run.folder)
    _, model_config, params, overlay = load_run(folder)
    assert summary["steps"] == 3 and set(flatten(overlay.params)) == {"classifier/0/kernel", "classifier/0/bias"}
    again = load_adapter(folder / "model", model_config, params)
    for i in range(2):
        expert = load_adapter(folder / "experts" / str(i) / "model", model_config, params)
        for path, value in flatten(expert.params).items():
            np.testing.assert_array_equal(flatten(again.frozen)[f"expert_{i}/{path}"], value)
    rows = [training_rows(config.data.__class__(path=config.data.path, eval_fraction=0.0, part=f"{k}/2")) for k in (1, 2)]
    assert not set(rows[0].index) & set(rows[1].index) and len(rows[0]) + len(rows[1]) == 60
    onward = config_of("xlora", **{"overlay.path": str(folder / "model"), "overlay.fields": "", "run.folder": f"{folder}2"})
    assert missing_experts(onward) == [] and missing_experts(override(config, {"run.folder": f"{folder}2"}))
    assert set(flatten(check_overlay(onward, model_config).params)) == set(flatten(overlay.params))


@pytest.mark.slow
def test_laplace_reports_calibration(config_of):
    """After training the posterior is fitted, calibration stands in the summary before and after, the folder holds it."""
    summary = story.run(config_of("laplace", **{"run.export": True, "overlay.target_modules": "q_proj,v_proj"}), QUIET, quiet=True)
    found = summary["calibration"]
    assert found["rows"] > 0 and found["classes"] >= 2 and found["prior_precision"] > 0
    for when in ("before", "after"):
        assert 0 <= found[when]["calibration_error"] <= 1 and np.isfinite(found[when]["nll"])
    assert (Path(summary["model_folder"]) / "qtjax_trainable.safetensors").is_file()


@pytest.fixture
def task_rows(tmp_path):
    """A data file whose column "kind" is "say" or "count"."""
    rows = tmp_path / "tasks.jsonl"
    kinds = ["say", "count"]
    rows.write_text("".join(json.dumps({"prompt": f"{i} {kinds[i % 2]} red", "completion": "blue sun", "kind": kinds[i % 2]}) + "\n" for i in range(60)))
    return str(rows)


def _two_full_steps(config):
    """(state before, state, metrics) of a session under full data, all on the host."""
    with RunFolder.open(config) as folder:
        session = open_session(config, folder, QUIET)
        try:
            before = jax.tree.map(np.array, session.loop.state)
            train_steps(session, folder, quiet=True)
            return before, jax.tree.map(np.array, session.loop.state), read_metrics(config.run.folder)
        finally:
            session.close()


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_every_method_trains_under_full_data(config_of, tmp_path, power_cut, task_rows, tiny_model, method):
    """prune.sample_pruner none: both steps train on all targets, every trainable leaf moves.

    For methods that keep something of their own (averages and masks, a projection, an encoder, tasks by a column) a run
    that crashed between the two steps ends bitwise the same.
    """
    own = {"prune.sample_pruner": "none", "prune.token_pruner": "none", "data.eval_fraction": 0.0, "train.max_steps": 2, "train.checkpoint_every": 1}
    if method == "adalora":
        own["overlay.fields"] = "init_r=4 target_r=2"  # two steps leave no room for tinit and tfinal
    if method == "diffprune":
        own["overlay.fields"] = "kept_fraction=0.5"  # of so few values as by default none need be q_proj's
    if method == "poly":
        own |= {"data.path": task_rows, "overlay.fields": "r=2 n_skills=2 n_tasks=2", "data.task_column": "kind", "data.task_names": "say,count"}
    if method == "qlora":
        own["model.quantization"] = "nf4"
    if method == "xlora":
        model_config, params = load_pretrained(tiny_model)
        for i in range(2):
            expert = init_overlay("lora", model_config, params, jax.random.key(i), r=2)
            apart = jax.tree.map(lambda x, i=i: x + 0.1 * np.random.default_rng(i).normal(size=x.shape), expert.params)
            save_adapter(tmp_path / f"expert{i}", expert.replace(params=apart))  # fresh ones would leave nothing to choose
        own["overlay.fields"] = f"adapters={json.dumps([str(tmp_path / f'expert{i}') for i in range(2)], separators=(',', ':'))}"
    before, after, metrics = _two_full_steps(config_of(method, **own, **{"run.folder": str(tmp_path / "whole")}))
    assert [m["step"] for m in metrics] == [1, 2]
    for m in metrics:
        assert np.isfinite(m["loss"]) and m["loss"] > 0 and m["grad_norm"] > 0 and m["skipped"] == 0
        assert m["kept_tokens"] == m["target_tokens"] > 0 and m["kept_samples"] == m["samples"] == 16
    for path, start in flatten(before.trainable).items():
        assert np.isfinite(flatten(after.trainable)[path]).all() and (flatten(after.trainable)[path] != start).any(), path
    if method not in ("adalora", "ptuning", "diffprune", "poly"):
        return
    broken = config_of(method, **own, **{"run.folder": str(tmp_path / "broken")})
    power_cut(lambda: _two_full_steps(broken), lambda loop, number: number == 1)
    restored, resumed, again = _two_full_steps(broken)
    jax.tree.map(np.testing.assert_array_equal, resumed, after)
    assert [m["loss"] for m in again] == [m["loss"] for m in metrics]
    assert any((a != b).any() for a, b in zip(jax.tree.leaves(restored.trainable), jax.tree.leaves(before.trainable)))


@pytest.mark.slow
def test_tasks_come_from_a_column(config_of, tmp_path, task_rows):
    """data.task_column and task_names choose each row's task in training and evaluation; without them several tasks are refused."""
    given = {"data.path": task_rows, "overlay.fields": "r=2 n_skills=2 n_tasks=2", "eval.generate_samples": 4}
    config = config_of("poly", **given, **{"data.task_column": "kind", "data.task_names": "say,count"})
    summary = story.run(config, QUIET, quiet=True)
    assert np.isfinite(summary["evaluation"]["after"]["loss"]) and summary["evaluation"]["generated"] == 4
    overlay = load_run(config.run.folder)[3]
    moved = np.asarray(overlay.params["layers"]["self_attn"]["q_proj"]["module_logits"])
    assert np.abs(moved).max(axis=(0, 2)).min() > 2e-3  # both tasks' routers have learned
    for changes, message in (
        ({}, "data.task_column = ''"),
        ({"data.task_column": "sort"}, "has no 'sort'"),
        ({"data.task_column": "kind"}, "must be a task id"),
        ({"data.task_column": "kind", "data.task_names": "say"}, "is none of data.task_names"),
    ):
        with pytest.raises(QtjaxError, match=message) as error:
            story.run(config_of("poly", **given, **changes, **{"run.folder": str(tmp_path / "other")}), QUIET, quiet=True)
        assert "\n" not in str(error.value)


@pytest.mark.slow
def test_a_run_goes_on_from_an_adapter_folder(config_of, tmp_path):
    """overlay.path: the second run starts from the first one's adapter and its settings; another method is refused."""
    first = config_of("dora", **{"run.export": True, "overlay.r": 3, "run.folder": str(tmp_path / "first")})
    before = story.run(first, QUIET, quiet=True)["evaluation"]
    adapter = str(tmp_path / "first" / "model")
    second = config_of("dora", **{"overlay.path": adapter, "run.folder": str(tmp_path / "second")})
    after = story.run(second, QUIET, quiet=True)["evaluation"]
    assert after["base"]["loss"] == pytest.approx(before["after"]["loss"], rel=1e-5)
    assert load_run(tmp_path / "second")[3].spec.fields.r == 3
    for changes, message in (
        ({"overlay.method": "none"}, "overlay.method = 'none' trains all parameters and puts no adapter over them"),
        ({"overlay.method": "lora"}, "holds a dora adapter"), ({"overlay.r": 4}, "has its own settings"),
        ({"overlay.path": str(tmp_path / "none")}, "no such folder"),
    ):  # fmt: skip
        with pytest.raises(QtjaxError, match=message):
            story.run(config_of("dora", **{"overlay.path": adapter, "run.folder": str(tmp_path / "third")} | changes), QUIET, quiet=True)


@pytest.mark.parametrize("changes, message", [
    ({"overlay.method": "xlora+ln_tuning"}, "xlora cannot be stacked"),
    ({"overlay.method": "laplace", "overlay.fields": "init_lora_weights=pissa"}, "is not supported by laplace"),
    ({"overlay.method": "lroa"}, "overlay method 'lroa': not known; did you mean 'lora'"),
    ({"overlay.method": "ia3", "overlay.r": 4}, "ia3 has no field 'r'"),
    ({"overlay.method": "adalora", "overlay.fields": "init_rr=4"}, "adalora has no field 'init_rr'; did you mean 'init_r'"),
    ({"overlay.method": "lora", "overlay.fields": "rank 4"}, "'rank 4' is no name=value"),
    ({"overlay.method": "lora", "overlay.r": 64}, "r = 64: model.layers.0.self_attn.q_proj is 32 x 32"),
    ({"overlay.method": "LoRA"}, "overlay method 'LoRA': not known; did you mean 'lora'"),
    ({"overlay.method": "laplace", "overlay.fields": "prior_precison=2"}, "laplace has no field 'prior_precison'; did you mean 'prior_precision'"),
    ({"overlay.method": "lora", "overlay.fields": "exclude_modules=q_porj"}, "exclude_modules: 'q_porj' matches no module; did you mean 'q_proj'"),
    ({"overlay.method": "lora+lora"}, "names the same method twice"),
    ({"overlay.method": "qlora"}, "qlora: the base model's kernels are not quantised"),
    ({"model.quantization": "nf4"}, "full-parameter training cannot update quantised kernels"),
    ({"overlay.method": "xlora", "overlay.fields": "adapters=0"}, "adapters = 0"),
])  # fmt: skip
def test_a_mistake_in_the_overlay_is_said_before_anything_is_loaded(tiny_config, changes, message):
    """One line: what, the rule, near names."""
    with pytest.raises(QtjaxError, match=message) as error:
        story.run(tiny_config(**changes), QUIET, quiet=True)
    assert "\n" not in str(error.value)


def test_settings_come_from_the_config_by_name(tiny_config):
    """overlay.fields is read in JSON where it is JSON; what stays at -1 or empty is left to the method."""
    section = tiny_config(**{"overlay.method": "lora", "overlay.fields": 'use_rslora=true rank_pattern={"q_proj":4} target_modules=["v_proj"]'}).overlay
    assert overlay_fields(section, 9) == {"use_rslora": True, "rank_pattern": {"q_proj": 4}, "target_modules": ["v_proj"]}
    section = tiny_config(**{"overlay.method": "adalora", "overlay.lora_alpha": 4.0}).overlay
    assert overlay_fields(section, 9) == {"total_step": 9, "lora_alpha": 4.0}


@pytest.mark.parametrize("field", ["overlay.r", "overlay.lora_alpha"])
def test_a_rank_of_zero_is_no_default(tiny_config, field):
    """0 said is 0 meant, and impossible; the method's own value is -1."""
    with pytest.raises(QtjaxError, match=f"{field} = 0.*must be -1 or above 0"):
        tiny_config(**{"overlay.method": "lora", field: 0 if field == "overlay.r" else 0.0})
