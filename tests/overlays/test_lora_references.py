"""LoRA against peft's recorded reference cases: logits, loss, every gradient, saved bytes."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from qtjax import models
from qtjax.checkpoints import adapter_state_dict, load_adapter, load_pretrained, save_adapter
from qtjax.overlays import init_overlay, merge
from qtjax.tree import flatten

pytestmark = pytest.mark.shared
CASES = ("llama-lora", "llama-lora-rs")


def close_logits(got, expected, real):
    """The gate of the reference cases: 2e-4 times max(1, |logit|max / 10), where a token is real."""
    difference = np.abs(np.asarray(got, np.float64) - expected)[real].max()
    assert difference <= 2e-4 * max(1.0, np.abs(expected[real]).max() / 10), difference


@pytest.fixture(scope="module", params=CASES)
def case(request, shared):
    folder = shared / "peft_refs" / request.param
    config, params = load_pretrained(folder)
    return folder, config, params, load_adapter(folder, config, params), dict(np.load(folder / "inputs.npz"))


_apply = jax.jit(models.apply, static_argnums=0)


def loss(config, params, overlay, inputs):
    """Mean cross-entropy over labels other than -100, each predicted by the slot before it."""
    logits = _apply(config, params, inputs["input_ids"], inputs["attention_mask"], overlay=overlay)
    labels = jnp.asarray(inputs["labels"])[:, 1:]
    nll = -jnp.take_along_axis(jax.nn.log_softmax(logits[:, :-1]), jnp.maximum(labels, 0)[..., None], -1)[..., 0]
    return jnp.where(labels == -100, 0, nll).sum() / (labels != -100).sum(), logits


def test_logits_loss_and_every_gradient_equal_peft(case):
    """With a real adapter, logits, loss and the gradient of every factor are peft's, right and left padding included."""
    folder, config, params, overlay, inputs = case
    real = inputs["attention_mask"] == 1
    (value, logits), gradient = jax.value_and_grad(
        lambda p: loss(config, params, overlay.replace(params=p), inputs), has_aux=True
    )(overlay.params)
    close_logits(logits, inputs["logits"], real)
    assert np.abs(inputs["logits"] - inputs["base_logits"])[real].max() > 1
    assert abs(float(value) - float(inputs["loss"])) <= 1e-5
    ours = adapter_state_dict(overlay.replace(params=gradient))
    theirs = {key.removeprefix("grad/"): value for key, value in inputs.items() if key.startswith("grad/")}
    assert set(ours) == set(theirs)
    for key, reference in theirs.items():
        assert np.linalg.norm(ours[key] - reference) <= 1e-3 * np.linalg.norm(reference), key
    assert overlay.trainable_count == json.loads((folder / "meta.json").read_text())["n_trainable"]


def test_merged_reference_computes_the_same(case):
    """The base with the reference adapter folded in has peft's logits without an overlay."""
    _, config, params, overlay, inputs = case
    merged_config, merged = merge(config, params, overlay)
    got = _apply(merged_config, merged, inputs["input_ids"], inputs["attention_mask"])
    close_logits(got, inputs["logits"], inputs["attention_mask"] == 1)


def test_base_tree_alone_is_the_reference_base(case):
    """Without the overlay the same tree gives the base's logits: loading and applying changed nothing in it."""
    _, config, params, overlay, inputs = case
    before = {path: np.asarray(leaf) for path, leaf in flatten(params).items()}
    loss(config, params, overlay, inputs)
    got = _apply(config, params, inputs["input_ids"], inputs["attention_mask"])
    close_logits(got, inputs["base_logits"], inputs["attention_mask"] == 1)
    for path, leaf in flatten(params).items():
        np.testing.assert_array_equal(np.asarray(leaf), before[path])


def test_saved_again_it_is_the_same_file(case, tmp_path):
    """load -> save writes bitwise the tensors that peft wrote, under the same names, and settings of equal meaning."""
    folder, config, params, overlay, _ = case
    save_adapter(tmp_path, overlay)
    ours, theirs = (load_file(f / "adapter_model.safetensors") for f in (tmp_path, folder))
    assert set(ours) == set(theirs)
    for key in theirs:
        assert ours[key].dtype == theirs[key].dtype
        np.testing.assert_array_equal(ours[key], theirs[key])
    new, old = (json.loads((f / "adapter_config.json").read_text()) for f in (tmp_path, folder))
    assert set(new) <= set(old)
    for field, value in new.items():
        same = sorted(old[field]) if field == "target_modules" else old[field]
        assert value == same, field
    assert load_adapter(tmp_path, config, params).spec == overlay.spec


def test_settings_of_the_reference_made_here_name_the_same_tensors(case):
    """init_overlay with the reference's settings has the names and shapes of the file peft wrote."""
    folder, config, params, overlay, _ = case
    fields = json.loads((folder / "meta.json").read_text())["kwargs"]
    ours = adapter_state_dict(init_overlay("lora", config, params, jax.random.key(0), **fields))
    theirs = load_file(folder / "adapter_model.safetensors")
    assert {k: v.shape for k, v in ours.items()} == {k: v.shape for k, v in theirs.items()}
