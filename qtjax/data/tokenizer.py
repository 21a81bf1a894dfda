"""Tokenizers: loaded by transformers from a model folder, never with code from that folder."""

import json
import os
from pathlib import Path
from typing import Any

import numpy as np

from qtjax.errors import QtjaxError, near_names
from qtjax.hub import give_up_early

EMBEDDED = "smol"

# Files of which at least one makes a folder a tokenizer's.
_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "tekken.json")
_AS_WRITTEN = ("TokenizersBackend", "PreTrainedTokenizerFast")  # two names of one class of transformers 5, which adds nothing to tokenizer.json


def load_tokenizer(path: str) -> Any:
    """The tokenizer of an HF folder, of a hub name, or of the embedded model ("smol").

    Returns: a transformers tokenizer backed by `tokenizers` (offsets and batches need it).
    Raises QtjaxError: no such folder, a folder without a tokenizer, a hub that cannot be reached, a slow-only tokenizer.
    """
    name = path
    if path == EMBEDDED:
        from qtjax.smol import model_folder

        path = str(model_folder())
    folder = Path(path).expanduser()
    if folder.is_dir() and not any((folder / file).is_file() for file in _FILES):
        held = ", ".join(sorted(f.name for f in folder.iterdir())[:8]) or "nothing"
        raise QtjaxError(f"{name}: the folder has no tokenizer ({' or '.join(_FILES[:2])}); it holds {held}; copy the tokenizer's files there")
    if not folder.is_dir() and (path.startswith((".", "/", "~")) or path.count("/") > 1 or not path):
        names = [f.name for f in folder.parent.iterdir()] if folder.parent.is_dir() else []
        raise QtjaxError(f"{name or 'model.path'}: no such folder{near_names(folder.name, names)}")
    if not folder.is_dir():
        give_up_early()
    # transformers remarks on every start that torch is missing; here nothing needs it.
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    if _as_written(folder):
        from transformers import PreTrainedTokenizerFast as loader
    else:
        from transformers import AutoTokenizer as loader

    try:
        tokenizer = loader.from_pretrained(str(folder) if folder.is_dir() else path, trust_remote_code=False)
    except Exception as error:  # damaged files, the hub client and the converters each raise their own classes
        reason = " ".join(str(error).split())[:200]
        remedy = "the tokenizer's files are damaged or of an unknown kind" if folder.is_dir() else (
            "no such folder here, and no such model on the Hugging Face hub that can be reached or is cached; where there is no"
            " network, download it elsewhere and give the folder"
        )  # fmt: skip
        raise QtjaxError(f"{name}: {remedy} ({type(error).__name__}: {reason})") from None
    if not getattr(tokenizer, "is_fast", False):
        raise QtjaxError(f"{name}: its tokenizer has no tokenizer.json form, which spans of trained text need; convert it with transformers")
    return tokenizer


def _as_written(folder: Path) -> bool:
    """Whether the tokenizer of a folder (of a llama or mistral model, or of none) is its tokenizer.json and nothing else.

    AutoTokenizer would come to the same after a second or two of imports, torch among them where it is installed.
    """
    try:
        said = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    whole = (folder / "tokenizer.json").is_file() and not (folder / "tekken.json").exists()
    return whole and isinstance(said, dict) and said.get("tokenizer_class") in _AS_WRITTEN and "auto_map" not in said


def check_vocabulary(tokenizer: Any, vocab_size: int, input_ids: np.ndarray | None = None) -> None:
    """Raises QtjaxError when a token id is not below `vocab_size`, the rows of the model's embedding.

    Args:
      input_ids: the ids of a tokenized dataset; given, only ids that occur count (a tokenizer may know
        tokens that no text uses, such as an added pad token). Otherwise every id that the tokenizer can produce.
    """
    if input_ids is not None:
        highest = int(input_ids.max(initial=-1))
        token = tokenizer.convert_ids_to_tokens(highest) if highest >= vocab_size else ""
    else:
        token, highest = max(tokenizer.get_vocab().items(), key=lambda item: item[1])
    if highest >= vocab_size:
        raise QtjaxError(
            f"token {token!r} has id {highest}, but the model's vocab_size is {vocab_size}: the tokenizer is not this model's;"
            " use the tokenizer from the model's folder, or a model whose embedding has a row for every token"
        )


def closing_ids(tokenizer: Any) -> frozenset[int]:
    """Ids that can close an assistant turn: EOS and the added tokens (chat markers such as <|im_end|> among them), without BOS, pad and unknown."""
    eos = tokenizer.eos_token_id
    never = {tokenizer.bos_token_id, tokenizer.unk_token_id, tokenizer.pad_token_id} - {eos}
    # Some vocabularies add runs of spaces as tokens; those are text.
    added = {i for i, token in tokenizer.added_tokens_decoder.items() if str(token).strip()}
    return frozenset((added | {eos}) - never - {None})
