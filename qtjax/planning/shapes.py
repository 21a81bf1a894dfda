"""A model's shape for a plan: its config.json and nothing else, and of the models in configs/ also without a network."""

import textwrap
from pathlib import Path
from typing import Any

from qtjax.checkpoints import read_config, resolve_folder
from qtjax.errors import QtjaxError
from qtjax.models import ModelConfig


def _llama(vocab: int, hidden: int, ffn: int, layers: int, heads: int, kv: int, positions: int, theta: float, **more: Any) -> dict[str, Any]:
    return {
        "model_type": "llama", "vocab_size": vocab, "hidden_size": hidden, "intermediate_size": ffn, "num_hidden_layers": layers,
        "num_attention_heads": heads, "num_key_value_heads": kv, "max_position_embeddings": positions, "rope_theta": theta,
        "rms_norm_eps": 1e-5, **more,
    }  # fmt: skip


# As their config.json on the hub says; those that are gated cannot be asked without an account.
PUBLISHED = {
    "meta-llama/Llama-2-7b-hf": _llama(32000, 4096, 11008, 32, 32, 32, 4096, 10000.0),
    "meta-llama/Meta-Llama-3-8B": _llama(128256, 4096, 14336, 32, 32, 8, 8192, 500000.0),
    "mistralai/Mistral-7B-v0.1": _llama(32000, 4096, 14336, 32, 32, 8, 32768, 10000.0, model_type="mistral", sliding_window=4096),
    "HuggingFaceTB/SmolLM2-1.7B": _llama(49152, 2048, 8192, 24, 32, 32, 8192, 130000.0, tie_word_embeddings=True),
}


def model_shape(path: str) -> tuple[ModelConfig, str]:
    """(the shape of the model, where it was found: "" for its own config.json).

    No weights are asked for. Raises QtjaxError, with what to do, for a hub name that is neither within reach nor PUBLISHED.
    """
    try:
        return read_config(resolve_folder(path, weights=False)), ""
    except QtjaxError as error:
        if "/" not in path or Path(path).expanduser().exists() or path.startswith(("/", ".", "~")):
            raise
        if path in PUBLISHED:
            return ModelConfig.from_hf(PUBLISHED[path], where=path), "shape as published; the hub did not give its config.json"
        reason = textwrap.shorten(str(error).partition("did not give it (")[2].partition("); offline")[0] or str(error), 90, placeholder=" ...")
        raise QtjaxError(
            f"model.path = {path!r}: no such folder, and the hub did not give its config.json ({reason}); a plan needs no more than that"
            " file: save it in a folder of its own and give --model.path FOLDER"
        ) from None
