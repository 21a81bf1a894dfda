"""LoHa, LoKr, FourierFT, VeRA and VB-LoRA between qtjax and peft, both ways, on bases beside the recorded ones."""

import warnings

import jax
import numpy as np
import pytest
from tests.overlays.live_peft import bases_fixture, padded_rows, peft_trainables, same_gradients, torch, torch_base
from tests.overlays.randomized import randomized

from qtjax.checkpoints import load_adapter, save_adapter
from qtjax.overlays import init_overlay

pytestmark = pytest.mark.parity
peft = pytest.importorskip("peft")

SMALL = dict(
    vocab_size=37, num_hidden_layers=2, max_position_embeddings=64, initializer_range=0.15, bos_token_id=1, eos_token_id=2,
    num_attention_heads=4, tie_word_embeddings=True,
)  # fmt: skip
BASES = {  # window 5 over 16 tokens; unequal sizes in every direction
    "mistral": ("Mistral", SMALL | dict(
        hidden_size=48, intermediate_size=56, num_key_value_heads=2, head_dim=8, sliding_window=5)),
    "llama": ("Llama", SMALL | dict(
        hidden_size=32, intermediate_size=40, num_key_value_heads=1, attention_bias=True, mlp_bias=True)),
}  # fmt: skip
ROWS = padded_rows(37, 16, 12)
bases = bases_fixture(BASES)
SOME = ["q_proj", "v_proj", "mlp.down_proj"]
# (base, method, peft's config class, settings)
CASES = {
    "loha-thin": ("mistral", "loha", "LoHaConfig", dict(r=2, alpha=6, target_modules=SOME)),
    "loha-patterns": ("llama", "loha", "LoHaConfig", dict(
        r=3, alpha=6, target_modules="all-linear", rank_pattern={"1.self_attn.q_proj": 5}, alpha_pattern={"mlp.*": 2})),
    "lokr-mixed": ("mistral", "lokr", "LoKrConfig", dict(
        r=2, alpha=6, decompose_both=True, target_modules=SOME, rank_pattern={"layers.1.self_attn.q_proj": 30})),
    "lokr-factor": ("llama", "lokr", "LoKrConfig", dict(
        r=3, alpha=6, decompose_factor=4, target_modules=SOME, layers_to_transform=[1], init_weights="lycoris")),
    "fourierft": ("mistral", "fourierft", "FourierFTConfig", dict(
        n_frequency=40, scaling=90.0, random_loc_seed=11, target_modules=SOME,
        n_frequency_pattern={"1.self_attn.q_proj": 25})),
    "fourierft-regex": ("llama", "fourierft", "FourierFTConfig", dict(
        n_frequency=60, scaling=40.0, target_modules=r".*layers\.1\..*_proj")),
    "vera": ("mistral", "vera", "VeraConfig", dict(r=9, target_modules=SOME, save_projection=False, projection_prng_key=5)),
    "vera-saved": ("llama", "vera", "VeraConfig", dict(r=70, target_modules=r".*layers\.1\.mlp\..*_proj", d_initial=0.3)),
    "vblora": ("mistral", "vblora", "VBLoRAConfig", dict(r=3, num_vectors=7, vector_length=8, topk=2, target_modules=SOME)),
    "vblora-topk": ("llama", "vblora", "VBLoRAConfig", dict(
        r=2, num_vectors=7, vector_length=8, topk=3, save_only_topk_weights=True, target_modules=SOME,
        layers_to_transform=[0])),
}  # fmt: skip
LARGE = dict(spectrum=3.0, vblora_vector_bank=0.6, logits_A=1.0, logits_B=1.0, lambda_d=1.0, lambda_b=1.0)


def run(config, params, overlay):
    """(loss, logits) and the gradient of every trainable."""

    def loss(trained):
        logits = ROWS.logits(config, params, overlay.replace(params=trained))
        return ROWS.loss(logits), logits

    return jax.value_and_grad(loss, has_aux=True)(overlay.params)


@pytest.mark.parametrize("name", CASES)
def test_peft_and_qtjax_read_each_other(bases, name, tmp_path):
    """peft saves, qtjax loads: same logits, loss, gradients by name, counts. qtjax saves, peft loads: same logits."""
    base, method, config_class, settings = CASES[name]
    folder, config, params = bases[base]
    torch.manual_seed(1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # VeRA without projections warns that it relies on the seed
        model = peft.get_peft_model(torch_base(folder), getattr(peft, config_class)(task_type="CAUSAL_LM", **settings)).eval()
    own = peft_trainables(model)
    own = {"base_model.vblora_vector_bank" if "bank" in k else k: w for k, w in own.items()}  # named after the first module
    scale = {"loha": 0.4, "lokr": 0.4, "fourierft": 3.0, "vera": 1.0, "vblora": 1.0}[method]
    with torch.no_grad():
        for key, weight in own.items():
            weight.copy_(torch.randn_like(weight) * (0.6 if "bank" in key else scale))
    model.save_pretrained(tmp_path / "theirs")
    overlay = load_adapter(tmp_path / "theirs", config, params)
    output = ROWS.run_torch(model, labels=True)
    output.loss.backward()
    expected = output.logits.detach().numpy()
    (value, logits), gradient = run(config, params, overlay)
    ROWS.close(logits, expected)
    assert ROWS.apart(ROWS.logits(config, params), expected) > 0.1
    assert abs(float(value) - output.loss.item()) <= 1e-5
    theirs = {key: weight.grad.numpy() for key, weight in own.items()}
    ours = same_gradients(overlay, gradient, theirs)
    assert overlay.trainable_count == sum(w.size for w in theirs.values())
    worst = max(np.linalg.norm(ours[key] - theirs[key]) / np.linalg.norm(theirs[key]) for key in theirs)
    print(f"{name}: logits {ROWS.apart(logits, expected):.1e} gradient {worst:.1e}")

    made = randomized(init_overlay(method, config, params, jax.random.key(0), **settings), **LARGE)
    assert made.spec.sites == overlay.spec.sites  # peft may write the same targets as full names
    (_, logits), _ = run(config, params, made)
    save_adapter(tmp_path / "ours", made, base_model_name=str(folder))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore" if settings.get("save_projection") is False else "error", UserWarning)
        model = peft.PeftModel.from_pretrained(torch_base(folder), tmp_path / "ours").eval()
    ROWS.close(logits, ROWS.torch_logits(model))
