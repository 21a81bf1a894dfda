"""AdaLoRA against peft itself: its allocator over a whole schedule, and adapters both ways on models of other shapes."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tests.overlays.live_peft import base_fixture, padded_rows, peft_trainables, same_gradients, torch, torch_base

from qtjax.checkpoints import adapter_state_dict, load_adapter, save_adapter
from qtjax.overlays import init_overlay, merge, method_named

pytestmark = pytest.mark.parity
peft = pytest.importorskip("peft")

SMALL = dict(
    vocab_size=53, hidden_size=48, intermediate_size=56, num_hidden_layers=3, num_attention_heads=6,
    num_key_value_heads=3, max_position_embeddings=64, initializer_range=0.15, bos_token_id=1, eos_token_id=2,
)  # fmt: skip
BASES = {
    "mistral-window": ("Mistral", SMALL | dict(sliding_window=5, head_dim=12)),
    "llama-tied": ("Llama", SMALL | dict(tie_word_embeddings=True, num_key_value_heads=2, intermediate_size=40)),
}
SETTINGS = dict(init_r=6, target_r=2, tinit=3, tfinal=5, deltaT=3, total_step=20, lora_alpha=9, beta1=0.8, beta2=0.7)
ROWS = padded_rows(53, 20, 15)
REAL, close, logits, torch_logits = ROWS.real, ROWS.close, ROWS.logits, ROWS.torch_logits
METHOD = method_named("adalora")
base = base_fixture(BASES, first_seed=11)


def peft_model(folder, target="all-linear", **more):
    torch.manual_seed(1)
    config = peft.AdaLoraConfig(task_type="CAUSAL_LM", target_modules=target, **(SETTINGS | more))
    model = peft.get_peft_model(torch_base(folder), config).eval()
    with torch.no_grad():
        for key, weight in model.named_parameters():
            if "lora_" in key:
                weight.copy_(torch.randn_like(weight) * 0.3)
    return model


def trained_by_peft(model, steps):
    """Plain descent on the model's own loss with peft's update_and_allocate after each step, yielding after every one."""
    for step in range(1, steps + 1):
        model.zero_grad()
        ROWS.run_torch(model, labels=True).loss.backward()
        gradients = {k: w.grad.numpy().copy() for k, w in peft_trainables(model).items()}
        with torch.no_grad():
            for weight in peft_trainables(model).values():
                weight.sub_(0.05 * weight.grad)
        model.base_model.update_and_allocate(step)
        yield step, gradients


def laid_out(leaves, found):
    from qtjax.overlays.leaves import trees

    return trees(leaves, found)[0]


def test_allocator_makes_peft_s_choices_over_a_whole_schedule(base, tmp_path):
    """On peft's weights and gradients of every step: the same E and A, B after it, and the same rank_pattern in the end."""
    folder, config, params = base
    model = peft_model(folder)
    model.save_pretrained(tmp_path / "start")
    overlay = load_adapter(tmp_path / "start", config, params)
    leaves = METHOD.leaves(overlay.spec)

    @jax.jit
    def one(trees, state, gradients, step):
        trees = jax.tree.map(lambda w, g: w - 0.05 * g, trees, gradients)
        return METHOD.after_step(overlay.spec, trees, state, gradients, step)

    trees, state, left = overlay.params, METHOD.state(overlay.spec, overlay.params), []
    for step, gradients in trained_by_peft(model, 20):
        trees, state = one(trees, state, laid_out(leaves, gradients), jnp.int32(step))
        theirs = {k: w.detach().numpy() for k, w in peft_trainables(model).items()}
        ours = adapter_state_dict(overlay.replace(params=trees))
        for key, value in theirs.items():
            np.testing.assert_array_equal(ours[key] == 0, value == 0, f"{key} after step {step}")
            np.testing.assert_allclose(ours[key], value, rtol=1e-5, atol=1e-6, err_msg=f"{key} after step {step}")
        left.append(sum(int((v != 0).sum()) for k, v in theirs.items() if k.endswith("lora_E")))
    assert left[0] == left[2] == 6 * 21 and left[-1] == 2 * 21 and len(set(left)) >= 4
    for name, saver in (("peft", model.save_pretrained), ("ours", lambda f: save_adapter(f, overlay.replace(params=trees)))):
        saver(tmp_path / name)
    patterns = [json.loads((tmp_path / n / "adapter_config.json").read_text())["rank_pattern"] for n in ("peft", "ours")]
    assert patterns[0] == patterns[1]
    back = load_adapter(tmp_path / "peft", config, params)
    close(logits(config, params, back), torch_logits(model))


@pytest.mark.parametrize("more", [dict(), dict(target=["q_proj", "down_proj"], layers_to_transform=[0, 2])])
def test_peft_saves_and_qtjax_loads(base, tmp_path, more):
    """peft saves -> load_adapter: same logits, loss with the penalty, gradients by name, count; merged logits as well."""
    folder, config, params = base
    model = peft_model(folder, **more)
    model.save_pretrained(tmp_path)
    overlay = load_adapter(tmp_path, config, params)
    expected = torch_logits(model)
    assert np.abs(expected - np.asarray(logits(config, params)))[REAL].max() > 0.1
    close(logits(config, params, overlay), expected)
    close(logits(*merge(config, params, overlay)), expected)

    their_loss = ROWS.run_torch(model, labels=True).loss
    their_loss.backward()

    def loss(trainable):
        own = overlay.replace(params=trainable)
        return ROWS.loss(logits(config, params, own)) + own.penalty()

    value, gradient = jax.value_and_grad(loss)(overlay.params)
    assert abs(float(value) - their_loss.item()) <= 1e-5
    theirs = {k: w.grad.numpy() for k, w in peft_trainables(model).items()}
    ours = same_gradients(overlay, gradient, theirs)
    assert set(ours) == set(theirs)
    assert overlay.trainable_count == sum(w.size for w in theirs.values())


@pytest.mark.parametrize("pruned", [False, True])
def test_qtjax_saves_and_peft_loads(base, tmp_path, pruned):
    """Random trainables, whole or pruned (one matrix to rank 0): peft loads the folder and has the same logits."""
    folder, config, params = base
    overlay = init_overlay("adalora", config, params, jax.random.key(2), **SETTINGS)
    rng = np.random.default_rng(5)
    trees = jax.tree.map(lambda w: jnp.asarray(rng.normal(0, 0.3, w.shape), jnp.float32), overlay.params)
    if pruned:
        trees["layers"]["self_attn"]["k_proj"]["lora_E"] *= rng.random((3, 6)) < 0.5
        trees["layers"]["mlp"]["up_proj"]["lora_E"] = trees["layers"]["mlp"]["up_proj"]["lora_E"].at[1].set(0)
    overlay = overlay.replace(params=trees)
    save_adapter(tmp_path, overlay)
    model = peft.PeftModel.from_pretrained(torch_base(folder), tmp_path).eval()
    close(logits(config, params, overlay), torch_logits(model))
    close(logits(config, params, load_adapter(tmp_path, config, params)), torch_logits(model))
