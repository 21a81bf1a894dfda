"""Every overlay against peft's recorded reference cases: logits, loss, every gradient, counts, saved bytes."""

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tests.overlays.cases import RECORDED_WITH, REFERENCES, known_references
from safetensors.numpy import load_file, save_file

from qtjax import models
from qtjax.checkpoints import adapter_state_dict, load_adapter, load_pretrained, save_adapter
from qtjax.overlays import abstract_overlay, init_overlay, merge, method_named

pytestmark = [pytest.mark.shared, pytest.mark.slow]


def close_logits(got, expected, real):
    """The gate of the reference cases: 2e-4 times max(1, |logit|max / 10), where a token is real."""
    difference = np.abs(np.asarray(got, np.float64) - expected)[real].max()
    assert difference <= 2e-4 * max(1.0, np.abs(expected[real]).max() / 10), difference


def read_case(folder, work):
    """(config, params, overlay with the recorded trainables, inputs, meta).

    Where peft's file is a derived form, or peft has no such method, the recorded trainables are laid down as our own file.
    """
    config, params = load_pretrained(folder)
    inputs, meta = dict(np.load(folder / "inputs.npz")), json.loads((folder / "meta.json").read_text())
    method = REFERENCES[folder.name]
    own = method_named(method)
    if own.in_parts:  # peft 0.21 leaves classifier layers out of its file
        return config, params, load_adapter(_whole(folder, work / "whole"), config, params), inputs, meta
    if own.in_peft and (own.file is None or meta["saved_equals_raw"]):
        return config, params, load_adapter(folder, config, params), inputs, meta
    if own.in_peft:
        shutil.copy(folder / "adapter_config.json", work)
    else:
        fields = dict(meta["kwargs"]) | RECORDED_WITH.get(folder.name, {})
        fields["target_modules"] = fields.pop("targets", None)
        made = init_overlay(method, config, params, jax.random.key(0), **{k: v for k, v in fields.items() if v is not None})
        save_adapter(work, made)
    shutil.copy(folder / "trainable.safetensors", work / "qtjax_trainable.safetensors")
    return config, params, load_adapter(work, config, params), inputs, meta


def _whole(folder, work):
    """The recorded X-LoRA with every recorded tensor in the file where it belongs."""
    shutil.copytree(folder, work, copy_function=shutil.copyfile)
    work.chmod(0o755)
    tensors = load_file(folder / "trainable.safetensors")
    save_file({k: v for k, v in tensors.items() if not k.startswith("expert_")}, work / "adapter_model.safetensors")
    for part in work.glob("expert_*"):
        own = {k.removeprefix(f"{part.name}/"): v for k, v in tensors.items() if k.startswith(f"{part.name}/")}
        if own:
            part.chmod(0o755)
            save_file(own, part / "adapter_model.safetensors")
    return work


@pytest.fixture(scope="module", params=known_references())
def case(request, shared, tmp_path_factory):
    folder = shared / "peft_refs" / request.param
    return folder, *read_case(folder, tmp_path_factory.mktemp(request.param))


def _tasks(inputs):
    return jnp.asarray(inputs["task_ids"], jnp.int32) if "task_ids" in inputs else None


def _logits(config, params, overlay, inputs):
    return models.apply(
        config, params, inputs["input_ids"], inputs["attention_mask"], overlay=overlay, task_ids=_tasks(inputs)
    )


def cross_entropy(config, params, overlay, inputs):
    """Mean cross-entropy over labels other than -100, each predicted by the slot before it; and the logits."""
    logits = _logits(config, params, overlay, inputs)
    labels = jnp.asarray(inputs["labels"])[:, 1:]
    nll = -jnp.take_along_axis(jax.nn.log_softmax(logits[:, :-1]), jnp.maximum(labels, 0)[..., None], -1)[..., 0]
    return jnp.where(labels == -100, 0, nll).sum() / (labels != -100).sum(), logits


def test_logits_loss_and_every_gradient_equal_the_reference(case):
    """With a real adapter, logits, loss (penalty included) and the gradient of every trained array are the reference's."""
    folder, config, params, overlay, inputs, meta = case
    real = inputs["attention_mask"] == 1

    def total(trained):
        own = overlay.replace(params=trained)
        ce, logits = cross_entropy(config, params, own, inputs)
        return ce + own.penalty(), (ce, logits)

    (value, (ce, logits)), gradient = jax.value_and_grad(total, has_aux=True)(overlay.params)
    expected = inputs["logits"][:, inputs["logits"].shape[1] - real.shape[1] :]  # peft's include virtual tokens
    close_logits(logits, expected, real)
    assert np.abs(expected - inputs["base_logits"])[real].max() > 0.05
    assert abs(float(ce) - float(inputs["ce_loss"] if "ce_loss" in inputs else inputs["loss"])) <= 1e-5
    assert abs(float(value) - float(inputs["loss"])) <= 1e-5
    ours = adapter_state_dict(overlay.replace(params=gradient))
    theirs = {key.removeprefix("grad/"): value for key, value in inputs.items() if key.startswith("grad/")}
    assert theirs and set(theirs) <= set(ours), sorted(set(theirs) - set(ours))[:4]
    for key, reference in theirs.items():
        assert ours[key].shape == reference.shape, key
        assert np.linalg.norm(ours[key] - reference) <= 1e-3 * np.linalg.norm(reference) + 1e-9, key
    assert overlay.trainable_count == meta["n_trainable"]


def test_base_tree_alone_is_the_reference_base(case):
    """Without the overlay the same tree gives the base's logits: loading and applying changed nothing in it."""
    _, config, params, overlay, inputs, _ = case
    before = jax.tree.map(np.asarray, params)
    _logits(config, params, overlay, inputs)
    got = models.apply(config, params, inputs["input_ids"], inputs["attention_mask"])
    close_logits(got, inputs["base_logits"], inputs["attention_mask"] == 1)
    jax.tree.map(np.testing.assert_array_equal, jax.tree.map(np.asarray, params), before)


def test_merged_reference_computes_the_same(case):
    """Where the method can be merged, the base with the adapter folded in has the reference's logits without it."""
    folder, config, params, overlay, inputs, _ = case
    if method_named(overlay.method).unmergeable:
        return
    tasks = [None] if "task_ids" not in inputs else sorted(set(inputs["task_ids"].tolist()))
    for task in tasks:
        own, merged = merge(config, params, overlay, **({} if task is None else {"task_id": task}))
        got = models.apply(own, merged, inputs["input_ids"], inputs["attention_mask"])
        real = inputs["attention_mask"] == 1
        rows = slice(None) if task is None else inputs["task_ids"] == task
        close_logits(got[rows], inputs["logits"][rows], real[rows])


def test_saved_again_it_is_the_same_file(case, tmp_path):
    """load -> save -> load keeps every array bitwise, and what peft reads is bitwise what peft wrote."""
    folder, config, params, overlay, _, _ = case
    save_adapter(tmp_path, overlay)
    again = load_adapter(tmp_path, config, params)
    assert again.spec == overlay.spec
    jax.tree.map(np.testing.assert_array_equal, again.params, overlay.params)
    jax.tree.map(np.testing.assert_array_equal, again.frozen, overlay.frozen)
    if (tmp_path / "qtjax_trainable.safetensors").exists() or method_named(overlay.method).in_parts:
        return  # ours holds more than peft's file, in X-LoRA's case what peft leaves out
    ours, theirs = (load_file(f / "adapter_model.safetensors") for f in (tmp_path, folder))
    assert set(ours) == set(theirs)
    for key in theirs:
        assert ours[key].dtype == theirs[key].dtype
        np.testing.assert_array_equal(ours[key], theirs[key])
    new, old = (json.loads((f / "adapter_config.json").read_text()) for f in (tmp_path, folder))
    assert set(new) <= set(old)  # a field that peft does not know makes it warn
    for field in new:
        value, other = (sorted(v) if isinstance(v, list) else v for v in (new[field], old[field]))
        assert value == other, field


def test_abstract_overlay_has_the_shapes_of_a_made_one(case):
    """abstract_overlay allocates nothing and has the shapes and count of init_overlay with the same settings."""
    _, config, params, overlay, _, meta = case
    fields = {k: v for k, v in meta["kwargs"].items() if k != "task_type"}
    if "targets" in fields:
        fields["target_modules"] = fields.pop("targets")
    if overlay.method == "xlora":  # of a caller, fresh experts are taken only where they are trained
        fields["use_trainable_adapters"] = True
    made = init_overlay(overlay.method, config, params, jax.random.key(0), **fields)
    shapes = abstract_overlay(overlay.method, config, **fields)
    assert jax.tree.structure(made.params) == jax.tree.structure(shapes.params)
    for a, b in zip(jax.tree.leaves(made), jax.tree.leaves(shapes)):
        assert (a.shape, a.dtype) == (b.shape, b.dtype)
    assert made.trainable_count == shapes.trainable_count
