"""QLoRA against torch: what was trained over packed kernels, in peft over their values, and merged in transformers."""

import jax
import numpy as np
import pytest
from tests.overlays import steps
from tests.overlays.live_peft import dequantised, make_base, padded_rows, torch, torch_base

from qtjax.checkpoints import load_adapter, load_pretrained, save_adapter, save_pretrained
from qtjax.models import Quantized
from qtjax.overlays import init_overlay, merge
from qtjax.tree import flatten

pytestmark = [pytest.mark.parity, pytest.mark.slow]
peft = pytest.importorskip("peft")
functional = pytest.importorskip("bitsandbytes.functional")

# Every matrix has a multiple of 64 inputs: bitsandbytes' AVX-512 kernel misreads others (test_qlora.py).
SMALL = dict(
    vocab_size=53, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
    max_position_embeddings=64, initializer_range=0.12, bos_token_id=1, eos_token_id=2,
)  # fmt: skip
BASES = {
    "mistral-window": ("Mistral", SMALL | dict(sliding_window=5)),
    "llama-tied": ("Llama", SMALL | dict(tie_word_embeddings=True)),
}
CASES = [
    ("mistral-window", "nf4", dict(r=4, lora_alpha=8, target_modules="all-linear")),
    ("llama-tied", "nf4", dict(r=3, use_rslora=True, target_modules=["q_proj", "down_proj"])),
    ("mistral-window", "int8", dict(r=2, target_modules=["v_proj", "up_proj"], modules_to_save=["norm"])),
    ("llama-tied", "int4", dict(r=4, lora_alpha=2, target_modules="all-linear")),
]  # fmt: skip
ROWS = padded_rows(SMALL["vocab_size"], 20, 15)


def by_bitsandbytes(folder):
    """transformers' model with every linear weight of its layers packed and unpacked by bitsandbytes."""
    model = torch_base(folder)
    with torch.no_grad():
        for name, module in model.model.layers.named_modules():
            if isinstance(module, torch.nn.Linear):
                packed = functional.quantize_4bit(module.weight.detach(), compress_statistics=True, quant_type="nf4")
                module.weight.copy_(functional.dequantize_4bit(*packed))
    return model


@pytest.fixture(scope="module", params=CASES, ids=["-".join(case[:2]) for case in CASES])
def case(request, tmp_path_factory):
    """(torch's base, packed config and params, the overlay after three optimizer steps, a folder)."""
    name, kind, fields = request.param
    folder = tmp_path_factory.mktemp(f"{name}-{kind}")
    whole, _, _ = make_base(folder / "base", *BASES[name], seed=3)
    config, params = load_pretrained(whole, quantization=kind)
    base = by_bitsandbytes(whole) if kind == "nf4" else torch_base(dequantised(folder / "values", config, params))
    fresh = init_overlay("qlora", config, params, jax.random.key(2), **fields)
    overlay, _ = steps.trained(config, params, fresh, 3)
    assert ROWS.apart(ROWS.logits(config, params, overlay), ROWS.logits(config, params, fresh)) > 0.1
    return base, config, params, overlay, folder


def test_peft_over_the_dequantised_base_computes_the_same(case):
    """Base packed and adapter trained and saved here: over the packed kernels' values (nf4: as bitsandbytes unpacks them)
    transformers has the same base logits, and peft, from the folder, the same logits with the adapter."""
    base, config, params, overlay, folder = case
    ROWS.close(ROWS.logits(config, params), ROWS.torch_logits(base))
    save_adapter(folder / "adapter", overlay)
    model = peft.PeftModel.from_pretrained(base, folder / "adapter").eval()
    ROWS.close(ROWS.logits(config, params, overlay), ROWS.torch_logits(model))
    model.unload()  # the base is the next test's again


def test_merged_and_exported_transformers_computes_the_side_path(case):
    """merge dequantises and folds in; the exported folder loads in transformers with the logits of the side path."""
    _, config, params, overlay, folder = case
    own, merged = merge(config, params, overlay)
    assert not any(isinstance(leaf, Quantized) for leaf in flatten(merged).values())
    save_pretrained(folder / "merged", own, merged)
    theirs = ROWS.torch_logits(torch_base(folder / "merged"))
    ROWS.close(ROWS.logits(config, params, overlay), theirs)
    assert ROWS.apart(ROWS.logits(config, params), theirs) > 0.1


def test_a_packed_base_that_is_loaded_again_takes_the_saved_adapter(case):
    """Packing the same folder again and loading the adapter gives bitwise the same arrays, so the same logits."""
    _, config, params, overlay, folder = case
    save_adapter(folder / "again", overlay)
    again_config, again = load_pretrained(folder / "base", quantization=config.quantization)
    loaded = load_adapter(folder / "again", again_config, again)
    jax.tree.map(np.testing.assert_array_equal, (again, loaded.params), (params, overlay.params))
