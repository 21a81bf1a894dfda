"""LoRA's inits, embedding, head, modules_to_save, and DoRA, between qtjax and peft itself, on bases of other kinds."""

import json
import warnings

import jax
import numpy as np
import pytest
from tests.overlays.live_peft import base_fixture, padded_rows, peft_trainables, same_gradients, torch, torch_base

from qtjax.checkpoints import adapter_state_dict, load_adapter, save_adapter, save_pretrained
from qtjax.overlays import init_overlay, merge, method_named
from qtjax.tree import flatten, unflatten

pytestmark = pytest.mark.parity
peft = pytest.importorskip("peft")

SMALL = dict(
    vocab_size=37, hidden_size=24, intermediate_size=28, num_hidden_layers=3, max_position_embeddings=64,
    initializer_range=0.2, bos_token_id=1, eos_token_id=2,
)  # fmt: skip
BASES = {
    "mistral-window": ("Mistral", SMALL | dict(num_attention_heads=4, num_key_value_heads=1, sliding_window=5)),
    "llama-tied": ("Llama", SMALL | dict(num_attention_heads=3, num_key_value_heads=3, tie_word_embeddings=True)),
}
ADAPTERS = {
    "embedding-head": dict(r=3, lora_alpha=5, target_modules=["q_proj", "embed_tokens", "lm_head"]),
    "head": dict(r=4, lora_alpha=4, target_modules=["lm_head"], use_rslora=True, modules_to_save=["embed_tokens"]),
    "saved": dict(
        r=2, target_modules=["q_proj", "up_proj"], modules_to_save=["lm_head", "norm", "1.mlp.down_proj", "k_proj"]
    ),
    "saved-some-norms": dict(r=2, target_modules=["o_proj"], modules_to_save=["2.input_layernorm", "embed_tokens"]),
    "dora": dict(use_dora=True, r=4, lora_alpha=8, target_modules="all-linear"),
    "dora-patterns": dict(
        use_dora=True, r=4, lora_alpha=6, target_modules=["v_proj", "gate_proj", "down_proj"], layers_to_transform=[0, 2],
        rank_pattern={r"layers\.0\.mlp\.gate_proj": 2, "v_proj": 3}, alpha_pattern={"down_proj": 9},
        modules_to_save=["lm_head"],
    ),
}  # fmt: skip
INITS = {
    "pissa": dict(
        r=4, lora_alpha=6, init_lora_weights="pissa", target_modules=["q_proj", "down_proj", "lm_head", "embed_tokens"]
    ),
    "pissa-subspace": dict(r=3, init_lora_weights="pissa_niter_4", use_rslora=True, rank_pattern={"up_proj": 2}),
    "olora": dict(r=4, lora_alpha=4, init_lora_weights="olora", alpha_pattern={"v_proj": 7}, lora_dropout=0.1),
    "olora-full-rank": dict(r=24, lora_alpha=12, init_lora_weights="olora", target_modules=["up_proj", "o_proj"]),
    "orthogonal": dict(r=4, init_lora_weights="orthogonal", layers_to_transform=[0, 2], target_modules=["q_proj"]),
    "dora-pissa": dict(
        use_dora=True, r=4, lora_alpha=10, init_lora_weights="pissa", layers_to_transform=[1],
        target_modules=["k_proj", "up_proj"],
    ),
}
ROWS = padded_rows(37, 14, 10)
REAL, close, logits, torch_logits = ROWS.real, ROWS.close, ROWS.logits, ROWS.torch_logits
base = base_fixture(BASES, first_seed=11)


def method_of(fields):
    return "dora" if fields.get("use_dora") else "lora"


def moved(overlay, scale=0.15):
    """Every trained value moved at random, padding left alone."""
    flat, generator = dict(flatten(overlay.params)), np.random.default_rng(0)
    for leaf in method_named(overlay.method).leaves(overlay.spec):
        if leaf.trained:
            step = generator.normal(size=leaf.shape).astype(np.float32) * scale
            real = leaf.mask()
            flat[leaf.path] = flat[leaf.path] + (step if real is None else np.where(real, step, 0))
    return overlay.replace(params=unflatten(flat))


@pytest.mark.parametrize("name", ADAPTERS)
@pytest.mark.filterwarnings("ignore")
def test_peft_saves_and_qtjax_loads(base, name, tmp_path):
    """peft saves -> load_adapter: same logits, loss, gradients by name and count; merged logits too, tied or not."""
    folder, config, params = base
    torch.manual_seed(1)
    model = peft.get_peft_model(torch_base(folder), peft.LoraConfig(task_type="CAUSAL_LM", **ADAPTERS[name])).eval()
    with torch.no_grad():
        for weight in model.parameters():
            if weight.requires_grad:
                weight.add_(torch.randn_like(weight) * 0.2)
    model.save_pretrained(tmp_path)
    overlay = load_adapter(tmp_path, config, params)
    assert overlay.method == method_of(ADAPTERS[name])
    expected = torch_logits(model)
    assert np.abs(expected - np.asarray(logits(config, params)))[REAL].max() > 0.1
    close(logits(config, params, overlay), expected)
    close(logits(*merge(config, params, overlay)), expected)

    their_loss = ROWS.run_torch(model, labels=True).loss
    their_loss.backward()

    def loss(trainable):
        return ROWS.loss(logits(config, params, overlay.replace(params=trainable)))

    value, gradient = jax.value_and_grad(loss)(overlay.params)
    assert abs(float(value) - their_loss.item()) <= 1e-5
    theirs = {}
    for key, weight in peft_trainables(model).items():
        theirs[key.replace(".modules_to_save", "").replace("vector.weight", "vector")] = weight.grad.numpy()
    ours = same_gradients(overlay, gradient, theirs)
    assert set(theirs) == {key for key in ours if "base_layer" not in key}
    assert overlay.trainable_count == sum(w.size for w in theirs.values())


@pytest.mark.parametrize("name", [*ADAPTERS, *INITS])
def test_qtjax_trains_and_peft_loads(base, name, tmp_path):
    """init -> moved trainables -> save_adapter -> peft loads it on the untouched base, no warning, same logits."""
    folder, config, params = base
    fields = (ADAPTERS | INITS)[name]
    fresh = init_overlay(method_of(fields), config, params, jax.random.key(5), **fields)
    np.testing.assert_allclose(logits(config, params, fresh)[REAL], logits(config, params)[REAL], atol=5e-5)
    overlay = moved(fresh)
    expected = logits(config, params, overlay)
    assert np.abs(np.asarray(expected - logits(config, params)))[REAL].max() > 0.05
    close(logits(*merge(config, params, overlay)), expected)
    save_adapter(tmp_path / "adapter", overlay, base_model_name=str(folder))
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        warnings.filterwarnings("ignore", message=".*tie|.*tied")  # peft's own notice about tied embeddings
        model = peft.PeftModel.from_pretrained(torch_base(folder), tmp_path / "adapter").eval()
    close(expected, torch_logits(model))
    save_pretrained(tmp_path / "merged", *merge(config, params, overlay))
    close(expected, torch_logits(torch_base(tmp_path / "merged")))
    back = load_adapter(tmp_path / "adapter", config, params)
    assert back.spec == overlay.spec
    jax.tree.map(np.testing.assert_array_equal, (back.params, back.frozen), (overlay.params, overlay.frozen))


@pytest.mark.parametrize("name", [name for name in INITS if name not in ("pissa-subspace", "orthogonal")])
def test_initial_factors_are_peft_s(base, name, tmp_path):
    """A0 B0 equals the product that peft starts from (singular vectors and QR columns up to sign), site by site."""
    folder, config, params = base
    fields = INITS[name]
    if config.tie_word_embeddings and "lm_head" in fields.get("target_modules", ()):
        return  # peft changes the tied tensor before it reads it again
    ours = adapter_state_dict(init_overlay(method_of(fields), config, params, jax.random.key(5), **fields))
    settings = peft.LoraConfig(task_type="CAUSAL_LM", **({"target_modules": "all-linear"} | fields))
    model = peft.get_peft_model(torch_base(folder), settings)
    theirs = {k: v.detach().numpy() for k, v in peft.get_peft_model_state_dict(model).items()}
    keys = [key for key in theirs if key.endswith("lora_A.weight")]
    assert keys
    for key in keys:
        other = key.replace("lora_A", "lora_B")
        np.testing.assert_allclose(ours[other] @ ours[key], theirs[other] @ theirs[key], atol=1e-5)
        np.testing.assert_array_equal(ours[key], ours[key.replace("lora_A", "initial_A")])


def test_the_file_for_peft_alone_is_an_adapter_of_twice_the_rank(base, tmp_path):
    """Without the file of trainables the folder still loads here, as plain LoRA of rank 2r with the same logits."""
    folder, config, params = base
    overlay = moved(init_overlay("lora", config, params, jax.random.key(5), **INITS["olora-full-rank"]))
    save_adapter(tmp_path, overlay)
    (tmp_path / "qtjax_trainable.safetensors").unlink()
    settings = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (settings["r"], settings["lora_alpha"], settings["init_lora_weights"]) == (48, 24, True)
    back = load_adapter(tmp_path, config, params)
    assert back.frozen == {} and back.trainable_count == 2 * overlay.trainable_count
    close(logits(config, params, back), logits(config, params, overlay))
