"""From the config's data section to rows and tokenized datasets: what every door calls.

A run keeps its training data, tokenized, in its folder: started again it reads them there instead of making them again.
"""

import dataclasses
import hashlib
import os
import shutil
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from qtjax.atomic import disk_errors, sync_folder
from qtjax.config import DataSection
from qtjax.data.dataset import TokenizedDataset
from qtjax.data.iterate import hold_out
from qtjax.data.rows import Rows
from qtjax.data.sources import load_rows
from qtjax.data.templates import resolve_template
from qtjax.data.tokenize import tokenize
from qtjax.errors import QtjaxError

# Raised when `tokenize` comes to make other samples of the same rows: what older rules made is then made again.
_RULES = 1
# Fields that say which rows are read, and not what becomes of them; the rows themselves have a fingerprint.
_WHICH_ROWS = ("path", "split", "eval_path", "eval_split", "eval_fraction", "part", "max_samples")


def training_rows(data: DataSection, scratch: Path | None = None) -> Rows:
    """The rows to train on: `data.path` without what `held_out_rows` takes from it, at most data.max_samples of them.

    scratch: as in `load_rows`.
    """
    rows = _source(data, data.path, data.split, scratch)
    if not data.eval_path and data.eval_fraction:
        rows = rows.select(hold_out(len(rows), data.eval_fraction)[0])
    if data.part:
        part, parts = map(int, data.part.split("/"))
        rows = rows.select(np.arange(part - 1, len(rows), parts))
    return rows[: data.max_samples] if data.max_samples else rows


def held_out_rows(data: DataSection, scratch: Path | None = None) -> Rows:
    """The rows to evaluate on: `data.eval_path`, or `data.eval_fraction` of `data.path`, the same ones for every seed.

    max_samples cuts training rows only, so that results with different amounts of training data compare.
    Raises QtjaxError when the config holds nothing out.
    """
    if data.eval_path:
        return _source(data, data.eval_path, data.eval_split, scratch)
    rows = _source(data, data.path, data.split, scratch)
    chosen = hold_out(len(rows), data.eval_fraction)[1]
    if not len(chosen):
        raise QtjaxError("nothing is held out: data.eval_path is empty and data.eval_fraction leaves no row; set one of them")
    return rows.select(chosen)


def data_line(data: DataSection, *, held_out: bool) -> str:
    """One line that says which rows `training_rows` or `held_out_rows` are, so that nobody reads numbers of other data."""
    if held_out:
        return f"data: {data.eval_path}" if data.eval_path else f"data: {data.eval_fraction:.3g} of {data.path}, held out"
    return f"data: {data.path}" + (f" without {data.eval_fraction:.3g} held out" if data.eval_fraction and not data.eval_path else "")


def training_data(data: DataSection, tokenizer: Any, *, progress: bool = True) -> TokenizedDataset:
    """`training_rows`, tokenized; raises what loading and tokenizing raise."""
    return tokenize(tokenizer, training_rows(data), data, progress=progress)


def held_out_data(data: DataSection, tokenizer: Any, *, progress: bool = True) -> TokenizedDataset:
    """`held_out_rows`, tokenized; raises what loading and tokenizing raise."""
    return tokenize(tokenizer, held_out_rows(data), data, progress=progress)


def keep_training_data(data: DataSection, tokenizer: Any, folder: Path, *, progress: bool = True) -> Path:
    """The folder inside `folder` that holds `training_data` (`TokenizedDataset.load`): written now, or found whole from an
    earlier start with the same rows, tokenizer and settings.

    Takes 5 bytes a token and 24 a sample of disk; what other rows or settings left there is removed. Raises what loading
    and tokenizing raise, and QtjaxError when the disk refuses; a half-written folder is never found.
    """
    with disk_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
    rows = training_rows(data, folder)
    kept = folder / f"training-{_fingerprint(rows, data, tokenizer)}"
    if kept.is_dir():
        try:
            TokenizedDataset.load(kept)
            return kept
        except QtjaxError:
            pass  # damaged: made again
    with disk_errors(folder, "clearing"):
        for pattern in ("training-*", ".training-*.tmp", ".tokens-*.tmp"):
            for old in folder.glob(pattern):
                shutil.rmtree(old)
    temporary = folder / f".{kept.name}.{os.getpid()}.tmp"
    try:
        tokenize(tokenizer, rows, data, progress=progress, folder=temporary)
        with disk_errors(kept):
            sync_folder(temporary)
            os.replace(temporary, kept)
            sync_folder(folder)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    return kept


def _fingerprint(rows: Rows, data: DataSection, tokenizer: Any) -> str:
    """Of everything that the samples depend on: rows, tokenizer, template, settings, and the programs that read them."""
    settings = {name: value for name, value in dataclasses.asdict(data).items() if name not in _WHICH_ROWS}
    settings["chat_template"] = resolve_template(tokenizer, data.chat_template)
    ids = (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id, tokenizer.pad_token_id)
    programs = (_RULES, version("transformers"), version("tokenizers"))
    known = repr((rows.fingerprint, sorted(settings.items()), ids, programs)) + tokenizer.backend_tokenizer.to_str()
    return hashlib.sha256(known.encode()).hexdigest()[:16]


def _source(data: DataSection, path: str, split: str, scratch: Path | None) -> Rows:
    return load_rows(path, split, [c for c in (data.prompt_column, data.completion_column) if c], scratch=scratch)
