"""Polytropon and X-LoRA between qtjax and peft, on a windowed Mistral and a tied LLaMA."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qtjax import models
from qtjax.checkpoints import adapter_state_dict, load_adapter, save_adapter
from qtjax.errors import QtjaxError
from qtjax.overlays import init_overlay
from tests.overlays.randomized import randomized

pytestmark = pytest.mark.parity
torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")

from tests.overlays.test_deltas_peft import IDS, MASK, REAL, bases, close, torch_base  # noqa: E402, F401  bases is a fixture

TASKS = np.array([2, 0])
LABELS = np.where(REAL, IDS, -100)


def run(config, params, overlay, task_ids=None):
    """((loss, logits), gradient of every trainable) of next-token prediction on real tokens."""

    def loss(trained):
        logits = models.apply(config, params, IDS, MASK, overlay=overlay.replace(params=trained), task_ids=task_ids)
        weight = jnp.asarray(MASK[:, 1:])
        logp = jnp.take_along_axis(jax.nn.log_softmax(logits[:, :-1]), IDS[:, 1:, None], -1)[..., 0]
        return -(logp * weight).sum() / weight.sum(), logits

    return jax.value_and_grad(loss, has_aux=True)(overlay.params)


def same_gradients(overlay, gradient, theirs):
    ours = adapter_state_dict(overlay.replace(params=gradient))
    for key, reference in theirs.items():
        assert np.linalg.norm(ours[key] - reference) <= 1e-3 * np.linalg.norm(reference), key


@pytest.mark.parametrize("base", ["mistral", "llama"])
def test_poly_and_peft_read_each_other(bases, base, tmp_path):  # noqa: F811
    """peft saves, qtjax loads, and the other way round: same logits by task, loss, gradients, counts."""
    folder, config, params = bases[base]
    settings = dict(r=3, n_tasks=3, n_skills=2, n_splits=2, target_modules=["q_proj", "v_proj", "down_proj"])
    torch.manual_seed(2)
    model = peft.get_peft_model(torch_base(folder), peft.PolyConfig(task_type="CAUSAL_LM", **settings)).eval()
    own = {k.replace(".default", ""): w for k, w in model.named_parameters() if w.requires_grad}
    with torch.no_grad():
        for weight in own.values():
            weight.copy_(torch.randn_like(weight) * 0.5)
    model.save_pretrained(tmp_path / "theirs")
    overlay = load_adapter(tmp_path / "theirs", config, params)
    given = dict(attention_mask=torch.tensor(MASK), task_ids=torch.tensor(TASKS))
    output = model(torch.tensor(IDS), labels=torch.tensor(LABELS), **given)
    output.loss.backward()
    (value, logits), gradient = run(config, params, overlay, TASKS)
    close(logits, output.logits.detach().numpy())
    assert abs(float(value) - output.loss.item()) <= 1e-5
    same_gradients(overlay, gradient, {key: weight.grad.numpy() for key, weight in own.items()})
    assert overlay.trainable_count == sum(w.numel() for w in own.values())

    # a task of its own at every token, as in packed rows, is the same side path
    by_token = models.apply(config, params, IDS, MASK, overlay=overlay, task_ids=np.repeat(TASKS[:, None], IDS.shape[1], 1))
    close(by_token, output.logits.detach().numpy())

    made = randomized(init_overlay("poly", config, params, jax.random.key(0), **settings))
    save_adapter(tmp_path / "ours", made)
    again = peft.PeftModel.from_pretrained(torch_base(folder), tmp_path / "ours").eval()
    with torch.no_grad():
        theirs = again(torch.tensor(IDS), **given).logits.numpy()
    close(models.apply(config, params, IDS, MASK, overlay=made, task_ids=TASKS), theirs)


@pytest.mark.parametrize("base, fields", [
    ("mistral", dict(xlora_depth=1, softmax_temperature=0.7)),
    ("llama", dict(xlora_depth=3, xlora_size=7, layerwise_scalings=True, top_k_lora=2, enable_softmax=False, enable_softmax_topk=True)),
])  # fmt: skip
def test_xlora_mixes_experts_as_peft_does(bases, base, fields, tmp_path):  # noqa: F811
    """The same experts and classifier: logits, loss and the classifier's gradients are peft's; ours is saved in full."""
    folder, config, params = bases[base]
    experts = []
    for i, (rank, names) in enumerate([(2, ["q_proj", "v_proj"]), (3, ["q_proj", "down_proj"]), (2, ["v_proj", "up_proj"])]):
        expert = init_overlay("lora", config, params, jax.random.key(i), r=rank, lora_alpha=2 * rank, target_modules=names)
        experts.append(randomized(expert, seed=i))
        save_adapter(tmp_path / f"expert_{i}", experts[-1], base_model_name=str(folder))
    base_model = torch_base(folder)
    base_model.config.use_cache = False
    adapters = {str(i): str(tmp_path / f"expert_{i}") for i in range(3)}
    torch.manual_seed(3)
    settings = peft.XLoraConfig(task_type="CAUSAL_LM", hidden_size=config.hidden_size, adapters=adapters, **fields)
    model = peft.get_peft_model(base_model, settings).eval()
    own = {k: w for k, w in model.named_parameters() if "internal_xlora_classifier" in k}
    with torch.no_grad():
        for weight in own.values():
            weight.copy_(torch.randn_like(weight) * 0.5)
    overlay = init_overlay("xlora", config, params, jax.random.key(9), adapters=experts, **fields)
    save_adapter(tmp_path / "made", overlay)
    from safetensors.numpy import load_file, save_file

    file = tmp_path / "made" / "adapter_model.safetensors"
    names = load_file(file)
    values = {f"base_model.internal_xlora_classifier{k.split('internal_xlora_classifier')[1]}": w for k, w in own.items()}
    assert set(names) == set(values)
    save_file({key: values[key].detach().numpy() for key in names}, file)
    overlay = load_adapter(tmp_path / "made", config, params)
    output = model(input_ids=torch.tensor(IDS), attention_mask=torch.tensor(MASK), labels=torch.tensor(LABELS))
    output.loss.backward()
    (value, logits), gradient = run(config, params, overlay)
    close(logits, output.logits.detach().numpy())
    assert np.abs(np.asarray(models.apply(config, params, IDS, MASK)) - np.asarray(logits))[REAL].max() > 0.05
    assert abs(float(value) - output.loss.item()) <= 1e-5
    same_gradients(overlay, gradient, {key: w.grad.numpy() for key, w in values.items()})


def test_what_peft_leaves_out_of_an_xlora_folder_is_named(bases, tmp_path):  # noqa: F811
    """peft 0.21 drops classifier layers when it saves; reading such a folder lists what is missing."""
    _, config, params = bases["llama"]
    save_adapter(tmp_path / "x", init_overlay("xlora", config, params, jax.random.key(0), r=2))
    from safetensors.numpy import save_file

    save_file({}, tmp_path / "x" / "adapter_model.safetensors")
    with pytest.raises(QtjaxError, match="2 missing: base_model.internal_xlora_classifier") as error:
        load_adapter(tmp_path / "x", config, params)
    assert "\n" not in str(error.value)
