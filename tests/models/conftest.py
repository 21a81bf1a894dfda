"""Random reference models of transformers, saved as folders: what qtjax must compute like."""

from collections.abc import Callable
from pathlib import Path

import pytest

TINY = dict(
    vocab_size=96,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=128,
    bos_token_id=1,
    eos_token_id=2,
    tie_word_embeddings=False,
)
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500.0,  # with head_dim 8 the wavelengths then fall below, inside and above the blended band
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
# name -> (family, fields that differ from TINY)
SPECS = {
    "llama-gqa-untied": ("Llama", {}),
    "llama-mha-tied": ("Llama", {"tie_word_embeddings": True, "num_key_value_heads": 4}),
    "llama-biases": ("Llama", {"attention_bias": True, "mlp_bias": True}),
    "llama-llama3-rope": ("Llama", {"rope_parameters": LLAMA3}),
    "llama-linear-rope": ("Llama", {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e4}}),
    "llama-gelu-head-dim": ("Llama", {"hidden_act": "gelu", "head_dim": 16}),
    "llama-gelu-tanh": ("Llama", {"hidden_act": "gelu_pytorch_tanh", "rms_norm_eps": 1e-3}),
    "mistral-window": ("Mistral", {"sliding_window": 8, "head_dim": 24}),
    "mistral-no-window": ("Mistral", {"sliding_window": None}),
}


@pytest.fixture(scope="session")
def torch():
    """The torch module; where it is not installed (extra: parity) the test is skipped."""
    return pytest.importorskip("torch")


@pytest.fixture(scope="session")
def reference(torch, tmp_path_factory) -> Callable[[str], tuple[Path, object]]:
    """reference(name) -> (HF folder, transformers model in float32), with every weight, bias and norm random."""
    import transformers

    made: dict[str, tuple[Path, object]] = {}

    def make(name: str):
        if name not in made:
            family, fields = SPECS[name]
            config = getattr(transformers, f"{family}Config")(**(TINY | fields))
            torch.manual_seed(sorted(SPECS).index(name))
            model = getattr(transformers, f"{family}ForCausalLM")(config).float().eval()
            with torch.no_grad():
                for path, weight in model.named_parameters():
                    # Large enough that logits are of order one and attention is far from uniform.
                    weight.normal_(1.0 if "norm" in path else 0.0, 0.3)
            folder = tmp_path_factory.mktemp(name)
            model.save_pretrained(folder)
            made[name] = (folder, model)
        return made[name]

    return make
