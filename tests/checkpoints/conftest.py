"""Small Hugging Face folders written with safetensors alone, names spelled out by hand."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

CONFIG = dict(
    model_type="llama", vocab_size=40, hidden_size=16, intermediate_size=24, num_hidden_layers=3, num_attention_heads=4,
    num_key_value_heads=2, head_dim=4, rms_norm_eps=1e-5, rope_theta=10000.0, max_position_embeddings=64,
    tie_word_embeddings=False, attention_bias=False, mlp_bias=False, bos_token_id=1, eos_token_id=2,
)  # fmt: skip


def tensors_of(config: dict, seed: int = 0) -> dict[str, np.ndarray]:
    """Random float32 tensors in torch's names and (out, in) layout."""
    rng = np.random.default_rng(seed)
    d, f, v = config["hidden_size"], config["intermediate_size"], config["vocab_size"]
    q, kv = config["num_attention_heads"] * config["head_dim"], config["num_key_value_heads"] * config["head_dim"]
    shapes = {"model.embed_tokens.weight": (v, d), "model.norm.weight": (d,)}
    if not config["tie_word_embeddings"]:
        shapes["lm_head.weight"] = (v, d)
    for i in range(config["num_hidden_layers"]):
        layer = f"model.layers.{i}"
        shapes |= {f"{layer}.input_layernorm.weight": (d,), f"{layer}.post_attention_layernorm.weight": (d,)}
        attention = {"q_proj": (q, d), "k_proj": (kv, d), "v_proj": (kv, d), "o_proj": (d, q)}
        mlp = {"gate_proj": (f, d), "up_proj": (f, d), "down_proj": (d, f)}
        for block, biased, modules in (
            ("self_attn", config["attention_bias"], attention),
            ("mlp", config["mlp_bias"], mlp),
        ):
            for name, shape in modules.items():
                shapes[f"{layer}.{block}.{name}.weight"] = shape
                if biased:
                    shapes[f"{layer}.{block}.{name}.bias"] = shape[:1]
    return {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}


class HFFolder:
    """A folder to be damaged: `.config` and `.tensors` as written; `.write(...)` again after changing them."""

    def __init__(self, path: Path, **changes):
        self.path, self.config = path, CONFIG | changes
        self.tensors = tensors_of(self.config)

    def write(self, files: int = 1, dtype="float32") -> Path:
        import ml_dtypes  # noqa: F401  registers bfloat16

        self.path.mkdir(exist_ok=True)
        (self.path / "config.json").write_text(json.dumps(self.config))
        arrays = {k: v.astype(np.dtype(dtype)) for k, v in self.tensors.items()}
        if files == 1:
            save_file(arrays, self.path / "model.safetensors", metadata={"format": "pt"})
            return self.path
        weight_map = {}
        for i, names in enumerate(np.array_split(sorted(arrays), files), 1):
            file = f"model-{i:05d}-of-{files:05d}.safetensors"
            save_file({n: arrays[n] for n in names}, self.path / file, metadata={"format": "pt"})
            weight_map |= {str(n): file for n in names}
        index = {"metadata": {"total_size": sum(a.nbytes for a in arrays.values())}, "weight_map": weight_map}
        (self.path / "model.safetensors.index.json").write_text(json.dumps(index))
        return self.path


@pytest.fixture
def hf_folder(tmp_path) -> Callable[..., HFFolder]:
    """hf_folder(field=value, ...) -> HFFolder, not written yet."""
    return lambda **changes: HFFolder(tmp_path / "model", **changes)
