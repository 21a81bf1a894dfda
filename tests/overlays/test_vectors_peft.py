"""(IA)^3, OFT, BOFT and LayerNorm tuning against live peft, both ways, on bases that the recorded cases do not cover."""

import json

import jax
import numpy as np
import pytest
from tests.overlays.live_peft import (
    base_fixture, make_base, padded_rows, peft_trainables, peft_with_butterflies, same_gradients, torch, torch_base,
)  # fmt: skip
from tests.overlays.tiny_model import shaken

from qtjax.checkpoints import adapter_state_dict, load_adapter, save_adapter, save_pretrained
from qtjax.errors import QtjaxError
from qtjax.overlays import init_overlay, merge

pytestmark = [pytest.mark.parity, pytest.mark.usefixtures(peft_with_butterflies.__name__)]
peft = pytest.importorskip("peft")

SMALL = dict(
    vocab_size=53, hidden_size=48, intermediate_size=56, num_hidden_layers=2, num_attention_heads=6,
    num_key_value_heads=3, max_position_embeddings=64, initializer_range=0.15, bos_token_id=1, eos_token_id=2,
)  # fmt: skip
BASES = {
    "mistral-window": ("Mistral", SMALL | dict(sliding_window=5, head_dim=12)),
    "llama-tied": ("Llama", SMALL | dict(num_key_value_heads=2, tie_word_embeddings=True, attention_bias=True)),
}
NAMES = ["q_proj", "v_proj", "o_proj", "down_proj"]
ADAPTERS = {
    "ia3": ("ia3", dict()),
    "ia3-regex": ("ia3", dict(target_modules=r".*1\..*_proj", feedforward_modules=r".*mlp\..*")),
    "oft": ("oft", dict(oft_block_size=8, target_modules="all-linear")),
    "oft-terms": (
        "oft", dict(oft_block_size=0, r=2, num_cayley_neumann_terms=3, target_modules=NAMES, layers_to_transform=[1]),
    ),
    "oft-exact": ("oft", dict(oft_block_size=4, use_cayley_neumann=False, block_share=True, target_modules=NAMES)),
    "oft-coft": ("oft", dict(oft_block_size=4, coft=True, eps=0.5, target_modules=NAMES)),
    "oft-adjusted": ("oft", dict(oft_block_size=5, target_modules=NAMES)),  # PEFT takes a divisor near 5
    "boft": ("boft", dict(boft_block_size=4, target_modules="all-linear")),
    "boft-butterfly": ("boft", dict(boft_block_size=2, boft_n_butterfly_factor=3, target_modules=NAMES)),
    "boft-number": ("boft", dict(boft_block_size=0, boft_block_num=4, boft_n_butterfly_factor=2, target_modules=NAMES)),
    "ln": ("ln_tuning", dict()),
    "ln-regex": ("ln_tuning", dict(target_modules=r"model\.norm|.*\.1\.post_attention_layernorm")),
}  # fmt: skip
CONFIGS = {"ia3": "IA3Config", "oft": "OFTConfig", "boft": "BOFTConfig", "ln_tuning": "LNTuningConfig"}
ROWS = padded_rows(53, 20, 15)
REAL, close, logits, torch_logits = ROWS.real, ROWS.close, ROWS.logits, ROWS.torch_logits
base = base_fixture(BASES)


def loss(trainable, overlay, config, params):
    return ROWS.loss(logits(config, params, overlay.replace(params=trainable)))


value_and_gradient = jax.jit(jax.value_and_grad(loss), static_argnames="config")


@pytest.mark.filterwarnings("ignore:Invalid `oft_block_size`")
@pytest.mark.parametrize("name", ADAPTERS)
def test_peft_saves_qtjax_loads_and_back(base, name, tmp_path):
    """peft saves -> load_adapter: its logits, loss, gradients, count; other values saved here -> peft's logits."""
    folder, config, params = base
    method, fields = ADAPTERS[name]
    torch.manual_seed(1)
    settings = getattr(peft, CONFIGS[method])(task_type="CAUSAL_LM", **fields)
    model = peft.get_peft_model(torch_base(folder), settings).eval()
    with torch.no_grad():
        for _, weight in model.named_parameters():
            if weight.requires_grad:
                weight.add_(torch.randn_like(weight) * 0.2)
    expected = torch_logits(model)
    model.save_pretrained(tmp_path / "theirs")
    overlay = load_adapter(tmp_path / "theirs", config, params)
    assert np.abs(expected - np.asarray(logits(config, params)))[REAL].max() > 0.1
    close(logits(config, params, overlay), expected)
    close(logits(*merge(config, params, overlay)), expected)

    their_loss = ROWS.run_torch(model, labels=True).loss
    their_loss.backward()
    value, gradient = value_and_gradient(overlay.params, overlay, config, params)
    assert abs(float(value) - their_loss.item()) <= 1e-5
    theirs = {k: w.grad.numpy() for k, w in peft_trainables(model).items()}
    ours = same_gradients(overlay, gradient, theirs)
    assert set(ours) == set(theirs)
    assert overlay.trainable_count == sum(w.size for w in theirs.values())

    moved = shaken(overlay, seed=4)
    save_adapter(tmp_path / "ours", moved, base_model_name=str(folder))
    theirs = peft.PeftModel.from_pretrained(torch_base(folder), tmp_path / "ours").eval()
    close(logits(config, params, moved), torch_logits(theirs))


@pytest.mark.filterwarnings("ignore:Unsupported layer type.*RMSNorm")  # of every norm that peft tunes, its own too
@pytest.mark.filterwarnings("error::UserWarning")
@pytest.mark.parametrize("name", ["ia3", "ia3-names", "oft", "boft-butterfly", "ln"])
def test_what_was_made_here_loads_in_peft_without_a_warning(base, name, tmp_path):
    """init -> other values -> save: peft reads the settings made here, defaults included, and computes the same."""
    folder, config, params = base
    method, fields = ADAPTERS.get(name, ("ia3", dict(target_modules=["mlp.down_proj", "k_proj"])))
    overlay = shaken(init_overlay(method, config, params, jax.random.key(1), **fields))
    save_adapter(tmp_path, overlay, base_model_name=str(folder))
    model = peft.PeftModel.from_pretrained(torch_base(folder), tmp_path).eval()
    close(logits(config, params, overlay), torch_logits(model))


def test_coft_trains_as_peft_does(base, tmp_path):
    """Three steps of gradient descent with COFT, projected after each: peft's values, which it projects in its forward."""
    folder, config, params = base
    fields = dict(oft_block_size=4, coft=True, eps=0.05, target_modules=["v_proj", "down_proj"])
    model = peft.get_peft_model(torch_base(folder), peft.OFTConfig(task_type="CAUSAL_LM", **fields)).eval()
    overlay = init_overlay("oft", config, params, jax.random.key(0), **fields)
    for _ in range(3):
        ROWS.run_torch(model, labels=True).loss.backward()
        with torch.no_grad():
            for _, weight in model.named_parameters():
                if weight.requires_grad:
                    weight -= 0.3 * weight.grad
                    weight.grad = None
        gradient = value_and_gradient(overlay.params, overlay, config, params)[1]
        stepped = jax.tree.map(lambda w, g: w - 0.3 * g, overlay.params, gradient)
        overlay = overlay.replace(params=overlay._own.after_step(overlay.spec, stepped, {}, gradient, 1)[0])
    expected = torch_logits(model)  # which projects
    close(logits(config, params, overlay), expected)
    ours = adapter_state_dict(overlay)
    for key, weight in peft.get_peft_model_state_dict(model).items():
        np.testing.assert_allclose(ours[key], weight.numpy(), rtol=2e-3, atol=1e-6)


@pytest.mark.parametrize("change", [{"peft_version": None}, {"peft_version": "0.17.1"}, {"use_cayley_neumann": None}])
def test_an_oft_file_of_another_series_is_refused(base, change, tmp_path):
    """Before 0.18 the same file meant another rotation: it is not read as if nothing had happened."""
    _, config, params = base
    save_adapter(tmp_path, init_overlay("oft", config, params, jax.random.key(0), oft_block_size=4))
    written = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps(written | change))
    with pytest.raises(QtjaxError, match="peft_version = .*series differently|use_cayley_neumann: is missing"):
        load_adapter(tmp_path, config, params)


@pytest.mark.parametrize("family, fields", [("Llama", SMALL), ("Mistral", SMALL | dict(sliding_window=None, head_dim=12))])
def test_biases_merged_here_load_in_transformers(family, fields, tmp_path):
    """bitfit -> merge -> save_pretrained: transformers' logits; a Mistral without a window has become a LLaMA."""
    _, config, params = make_base(tmp_path / "base", family, fields, 5)
    overlay = shaken(init_overlay("bitfit", config, params, jax.random.key(0)))
    save_pretrained(tmp_path / "merged", *merge(config, params, overlay))
    model = torch_base(tmp_path / "merged")
    assert type(model).__name__ == "LlamaForCausalLM" and model.config.attention_bias and model.config.mlp_bias
    expected = torch_logits(model)
    assert np.abs(expected - np.asarray(logits(config, params)))[REAL].max() > 0.1
    close(logits(config, params, overlay), expected)
