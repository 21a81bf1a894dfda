"""Polytropon and X-LoRA between qtjax and peft, on a windowed Mistral and a tied LLaMA."""

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from tests.overlays.live_peft import bases_fixture, peft_trainables, same_gradients, torch, torch_base
from tests.overlays.randomized import randomized
from tests.overlays.test_deltas_peft import BASES, ROWS

from qtjax.checkpoints import load_adapter, save_adapter
from qtjax.errors import QtjaxError
from qtjax.overlays import init_overlay

pytestmark = pytest.mark.parity
peft = pytest.importorskip("peft")

TASKS = np.array([2, 0])
bases = bases_fixture(BASES)


def run(config, params, overlay, task_ids=None):
    """((loss, logits), gradient of every trainable) of next-token prediction on real tokens."""

    def loss(trained):
        logits = ROWS.logits(config, params, overlay.replace(params=trained), task_ids)
        return ROWS.loss(logits), logits

    return jax.value_and_grad(loss, has_aux=True)(overlay.params)


@pytest.mark.parametrize("base", ["mistral", "llama"])
def test_poly_and_peft_read_each_other(bases, base, tmp_path):
    """peft saves, qtjax loads, and the other way round: same logits by task, loss, gradients, counts."""
    folder, config, params = bases[base]
    settings = dict(r=3, n_tasks=3, n_skills=2, n_splits=2, target_modules=["q_proj", "v_proj", "down_proj"])
    torch.manual_seed(2)
    model = peft.get_peft_model(torch_base(folder), peft.PolyConfig(task_type="CAUSAL_LM", **settings)).eval()
    own = peft_trainables(model)
    with torch.no_grad():
        for weight in own.values():
            weight.copy_(torch.randn_like(weight) * 0.5)
    model.save_pretrained(tmp_path / "theirs")
    overlay = load_adapter(tmp_path / "theirs", config, params)
    output = ROWS.run_torch(model, labels=True, task_ids=torch.tensor(TASKS))
    output.loss.backward()
    (value, logits), gradient = run(config, params, overlay, TASKS)
    ROWS.close(logits, output.logits.detach().numpy())
    assert abs(float(value) - output.loss.item()) <= 1e-5
    same_gradients(overlay, gradient, {key: weight.grad.numpy() for key, weight in own.items()})
    assert overlay.trainable_count == sum(w.numel() for w in own.values())

    # a task of its own at every token, as in packed rows, is the same side path
    by_token = ROWS.logits(config, params, overlay, np.repeat(TASKS[:, None], ROWS.ids.shape[1], 1))
    ROWS.close(by_token, output.logits.detach().numpy())

    made = randomized(init_overlay("poly", config, params, jax.random.key(0), **settings))
    save_adapter(tmp_path / "ours", made)
    again = peft.PeftModel.from_pretrained(torch_base(folder), tmp_path / "ours").eval()
    ROWS.close(ROWS.logits(config, params, made, TASKS), ROWS.torch_logits(again, task_ids=torch.tensor(TASKS)))


@pytest.mark.parametrize("base, fields", [
    ("mistral", dict(xlora_depth=1, softmax_temperature=0.7)),
    ("llama", dict(xlora_depth=3, xlora_size=7, layerwise_scalings=True, top_k_lora=2, enable_softmax=False, enable_softmax_topk=True)),
])  # fmt: skip
def test_xlora_mixes_experts_as_peft_does(bases, base, fields, tmp_path):
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
    file = tmp_path / "made" / "adapter_model.safetensors"
    names = load_file(file)
    values = {f"base_model.internal_xlora_classifier{k.split('internal_xlora_classifier')[1]}": w for k, w in own.items()}
    assert set(names) == set(values)
    save_file({key: values[key].detach().numpy() for key in names}, file)
    overlay = load_adapter(tmp_path / "made", config, params)
    output = ROWS.run_torch(model, labels=True)
    output.loss.backward()
    (value, logits), gradient = run(config, params, overlay)
    ROWS.close(logits, output.logits.detach().numpy())
    assert ROWS.apart(ROWS.logits(config, params), logits) > 0.05
    assert abs(float(value) - output.loss.item()) <= 1e-5
    same_gradients(overlay, gradient, {key: w.grad.numpy() for key, w in values.items()})


def test_what_peft_leaves_out_of_an_xlora_folder_is_named(bases, tmp_path):
    """peft 0.21 drops classifier layers when it saves; reading such a folder lists what is missing."""
    _, config, params = bases["llama"]
    experts = [init_overlay("lora", config, params, jax.random.key(n), r=2) for n in range(2)]
    save_adapter(tmp_path / "x", init_overlay("xlora", config, params, jax.random.key(0), adapters=experts))
    save_file({}, tmp_path / "x" / "adapter_model.safetensors")
    with pytest.raises(QtjaxError, match="2 missing: base_model.internal_xlora_classifier") as error:
        load_adapter(tmp_path / "x", config, params)
    assert "\n" not in str(error.value)
