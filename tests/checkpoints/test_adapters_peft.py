"""Adapters between qtjax and peft itself, both ways, on models that peft's recorded cases do not cover."""

import jax
import numpy as np
import pytest
from tests.overlays.live_peft import base_fixture, padded_rows, peft_trainables, same_gradients, torch, torch_base

from qtjax.checkpoints import adapter_state_dict, load_adapter, save_adapter, save_pretrained
from qtjax.overlays import init_overlay, merge

pytestmark = pytest.mark.parity
peft = pytest.importorskip("peft")

SMALL = dict(
    vocab_size=53, hidden_size=48, intermediate_size=56, num_hidden_layers=3, num_attention_heads=6,
    num_key_value_heads=3, max_position_embeddings=64, initializer_range=0.15, bos_token_id=1, eos_token_id=2,
)  # fmt: skip
BASES = {
    "mistral-window-tied": ("Mistral", SMALL | dict(sliding_window=5, tie_word_embeddings=True, head_dim=12)),
    "llama-tied-biases": ("Llama", SMALL | dict(tie_word_embeddings=True, attention_bias=True, mlp_bias=True)),
}
ADAPTERS = {
    "all-linear": dict(r=4, lora_alpha=16, target_modules="all-linear"),
    "names": dict(r=3, lora_alpha=5, target_modules=["q_proj", "mlp.down_proj"], layers_to_transform=[0, 2]),
    "regex": dict(r=8, lora_alpha=4, target_modules=r".*layers\.[12]\..*(k|up)_proj", use_rslora=True),
    "patterns": dict(
        r=6, lora_alpha=12, target_modules=["v_proj", "o_proj", "gate_proj"], exclude_modules=["1.self_attn.v_proj"],
        rank_pattern={r"layers\.0\.self_attn\.v_proj": 2, "o_proj": 3}, alpha_pattern={"gate_proj": 3, "^model.layers.2.self_attn.*": 20},
    ),
}  # fmt: skip
# The first pattern that matches wins, so the order in the file matters; peft sorts it on saving and so changes its own
# adapter's scales, which is why this one is only saved by qtjax.
OVERLAPPING = dict(r=4, lora_alpha=8, target_modules="v_proj,up_proj", alpha_pattern={"up_proj": 2, "^model.layers.2.*": 40})
ROWS = padded_rows(53, 20, 15)
REAL, close, logits = ROWS.real, ROWS.close, ROWS.logits
base = base_fixture(BASES)


@pytest.mark.parametrize("name", ADAPTERS)
def test_peft_saves_and_qtjax_loads(base, name, tmp_path):
    """peft saves -> load_adapter: same logits, same loss, same gradients by name; merged logits are peft's as well."""
    folder, config, params = base
    torch.manual_seed(1)
    model = peft.get_peft_model(torch_base(folder), peft.LoraConfig(task_type="CAUSAL_LM", **ADAPTERS[name])).eval()
    with torch.no_grad():
        for key, weight in model.named_parameters():
            if "lora_" in key:
                weight.copy_(torch.randn_like(weight) * 0.1)  # at 0.2 torch's own rounding moves the windowed model's logits by the bar
    model.save_pretrained(tmp_path)
    overlay = load_adapter(tmp_path, config, params)
    expected = ROWS.torch_logits(model)
    assert np.abs(expected - np.asarray(logits(config, params)))[REAL].max() > 0.1
    close(logits(config, params, overlay), expected)
    close(logits(*merge(config, params, overlay)), expected)

    their_loss = ROWS.run_torch(model, labels=True).loss
    their_loss.backward()

    def loss(trainable):
        return ROWS.loss(logits(config, params, overlay.replace(params=trainable)))

    value, gradient = jax.value_and_grad(loss)(overlay.params)
    assert abs(float(value) - their_loss.item()) <= 1e-5
    theirs = {k: w.grad.numpy() for k, w in peft_trainables(model).items()}
    ours = same_gradients(overlay, gradient, theirs)
    assert set(ours) == set(theirs)
    assert overlay.trainable_count == sum(w.size for w in theirs.values())


@pytest.mark.parametrize("name", [*ADAPTERS, "overlapping"])
def test_qtjax_trains_and_peft_loads(base, name, tmp_path):
    """init -> a few steps -> save_adapter -> peft loads it with no warning and the same logits; PEFT's own merge agrees."""
    import warnings

    folder, config, params = base
    overlay = init_overlay("lora", config, params, jax.random.key(5), **(ADAPTERS | {"overlapping": OVERLAPPING})[name])

    @jax.jit
    def step(overlay):
        value, gradient = jax.value_and_grad(lambda o: ROWS.loss(logits(config, params, o)))(overlay)
        return value, overlay.replace(params=jax.tree.map(lambda w, g: w - 0.5 * g, overlay.params, gradient.params))

    losses = []
    for _ in range(6):
        value, overlay = step(overlay)
        losses.append(float(value))
    assert losses[-1] < losses[0] - 0.01
    trained = logits(config, params, overlay)
    assert np.abs(np.asarray(trained - logits(config, params)))[REAL].max() > 0.02
    save_adapter(tmp_path / "adapter", overlay, base_model_name=str(folder))
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        model = peft.PeftModel.from_pretrained(torch_base(folder), tmp_path / "adapter").eval()
    close(trained, ROWS.torch_logits(model))
    close(trained, ROWS.torch_logits(model.merge_and_unload()))
    save_pretrained(tmp_path / "merged", *merge(config, params, overlay))
    close(trained, ROWS.torch_logits(torch_base(tmp_path / "merged")))
    back = load_adapter(tmp_path / "adapter", config, params)
    jax.tree.map(np.testing.assert_array_equal, back.params, overlay.params)


@pytest.mark.parametrize("name", ADAPTERS)
def test_peft_makes_the_same_tensors_from_the_same_settings(base, name):
    """peft and init_overlay, given the same settings, train tensors of the same names, shapes and scale."""
    folder, config, params = base
    settings = ADAPTERS[name]
    model = peft.get_peft_model(torch_base(folder), peft.LoraConfig(task_type="CAUSAL_LM", **settings))
    theirs = {k: tuple(v.shape) for k, v in peft.get_peft_model_state_dict(model).items()}
    overlay = init_overlay("lora", config, params, jax.random.key(0), **settings)
    assert {k: v.shape for k, v in adapter_state_dict(overlay).items()} == theirs
    scales = {
        site.linear.module(n): scale
        for site in overlay.spec.sites for n, (scale, rank) in enumerate(zip(site.scales, site.ranks)) if rank
    }  # fmt: skip
    modules = {k.removeprefix("base_model.model."): m for k, m in model.named_modules() if isinstance(m, peft.tuners.lora.LoraLayer)}
    assert scales == pytest.approx({k: m.scaling["default"] for k, m in modules.items()})
