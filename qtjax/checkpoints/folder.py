"""From what a user calls a model (folder, hub name, "smol") to a local folder, its config.json and its tensors."""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np

from qtjax.checkpoints import hf, msgpack
from qtjax.checkpoints.assemble import StoredTensor
from qtjax.errors import QtjaxError
from qtjax.hub import give_up_early
from qtjax.models import ModelConfig

_EMBEDDED = "smol"
_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "tekken.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
    "additional_chat_templates/*.jinja",
)
# Named one by one: many repositories also hold a second copy of the weights (consolidated.safetensors, original/).
_HUB_PATTERNS = ("config.json", "generation_config.json", *TOKENIZER_FILES)
_PICKLES = ("pytorch_model*.bin", "pytorch_model*.pt", "*.pth")
_FREQUENCIES = re.compile(r"model\.(layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq")
_HEAD, _EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"


def base_name(path: str) -> str:
    """What an adapter's config may call the model at `path`: "" for the embedded one, which no other program finds by its name."""
    return "" if path == _EMBEDDED else path


def resolve_folder(path: str | Path, *, weights: bool = True) -> Path:
    """A local folder for a folder, "smol" (the embedded model) or a hub name "org/name" (downloaded into the hub cache).

    Args: weights: False downloads config.json alone. A local folder wins over a hub name. Raises QtjaxError if there is neither, or
    if the hub cannot be reached.
    """
    name = str(path)
    folder = Path(name).expanduser()
    if folder.is_dir():
        return folder
    if folder.exists():
        raise QtjaxError(f"model path {name!r} is a file: give the folder that holds config.json and the weights")
    if name == _EMBEDDED:
        from qtjax.smol import model_folder

        return Path(model_folder())
    if not _HUB_NAME.fullmatch(name):
        raise QtjaxError(
            f"model path {name!r}: no such folder; give an HF folder (config.json, model.safetensors), a hub name"
            " 'organisation/name', or 'smol'"
        )
    return _download(name, weights)


def _download(name: str, weights: bool) -> Path:
    from huggingface_hub import hf_hub_download, snapshot_download

    give_up_early()
    try:
        if not weights:
            return Path(hf_hub_download(name, "config.json")).parent
        folder = Path(snapshot_download(name, allow_patterns=[*_HUB_PATTERNS, "model*.safetensors", hf.INDEX]))
        if not (folder / hf.WEIGHTS).exists() and not (folder / hf.INDEX).exists():
            folder = Path(snapshot_download(name, allow_patterns=[*_HUB_PATTERNS, "flax_model*.msgpack*"]))
    except Exception as error:  # the hub client raises a dozen kinds (offline, gated, unknown, disk) of several libraries
        reason = " ".join(str(error).split())
        raise QtjaxError(
            f"model path {name!r}: no such folder here, and the Hugging Face hub did not give it"
            f" ({type(error).__name__}: {reason[:160]}); offline, give a local folder or 'smol'"
        ) from None
    return folder


def read_config(folder: Path) -> ModelConfig:
    """The folder's config.json. Raises QtjaxError if it is missing, not JSON, or describes another kind of model."""
    path = folder / "config.json"
    if not path.is_file():
        if (folder / "adapter_config.json").is_file():
            raise QtjaxError(f"{folder}: holds an adapter, not a model; load its base model, then qtjax.load_adapter")
        raise QtjaxError(f"{folder}: no config.json in it; give the folder of a whole Hugging Face model")
    raw = read_json(path)
    return ModelConfig.from_hf(raw, where=str(path))


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file. Raises QtjaxError with the line if it is none."""
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise QtjaxError(f"{path}: not readable JSON ({' '.join(str(error).split())})") from None
    if not isinstance(raw, dict):
        raise QtjaxError(f"{path}: must hold a JSON object, holds a {type(raw).__name__}")
    return raw


def open_weights(folder: Path, config: ModelConfig) -> dict[str, StoredTensor]:
    """{Hugging Face name: tensor} of whatever weights the folder holds, safetensors before Flax msgpack.

    Left out: buffers that older transformers saved (rotary inv_freq), and the head of a tied model where it equals the
    embedding. Raises QtjaxError if there are no weights, only pickles, or a tied model's head differs.
    """
    if any((folder / name).exists() for name in (hf.WEIGHTS, hf.INDEX)):
        stored = hf.open_safetensors(folder)
    elif any((folder / name).exists() for name in (msgpack.WEIGHTS, msgpack.INDEX)):
        stored = msgpack.open_msgpack(folder)
    else:
        raise QtjaxError(f"{folder}: {_no_weights(folder)}")
    stored = {name: t for name, t in stored.items() if not _FREQUENCIES.fullmatch(name)}
    if config.tie_word_embeddings and _HEAD in stored and _EMBEDDING in stored:
        if not _same(stored[_HEAD], stored[_EMBEDDING]):
            raise QtjaxError(
                f"{folder}: config.json ties the head to the embedding, but lm_head.weight differs from"
                " model.embed_tokens.weight; set tie_word_embeddings to false, or drop the tensor that is wrong"
            )
        del stored[_HEAD]
    return stored


def _same(head: StoredTensor, embedding: StoredTensor, rows: int = 8192) -> bool:
    """Compared a block of rows at a time; an (in, out) head is turned first."""
    shape = head.shape if head.transposed else head.shape[::-1]
    if shape != embedding.shape or len(shape) != 2:
        return False
    for start in range(0, shape[0], rows):
        block, columns = slice(start, min(start + rows, shape[0])), slice(0, shape[1])
        ours = head.read((block, columns)) if head.transposed else head.read((columns, block)).T
        if not np.array_equal(ours, embedding.read((block, columns))):
            return False
    return True


def _no_weights(folder: Path) -> str:
    pickles = sorted(p.name for pattern in _PICKLES for p in folder.glob(pattern))
    if pickles:
        return (
            f"holds only pickled weights ({pickles[0]}), which can run code and are not read; where torch is installed,"
            " convert once with: python -c \"from transformers import AutoModelForCausalLM as M;"
            " M.from_pretrained('FOLDER').save_pretrained('NEW_FOLDER')\""
        )
    others = sorted(p.name for p in folder.glob("*.safetensors"))
    if others:
        return f"no {hf.WEIGHTS} and no {hf.INDEX} in it (only {', '.join(others[:3])}); rename it, or restore the index"
    return f"no weights in it: expected {hf.WEIGHTS}, {hf.INDEX}, {msgpack.WEIGHTS} or {msgpack.INDEX}"
