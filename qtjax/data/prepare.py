"""From the config's data section to rows and tokenized datasets: what every door calls."""

from typing import Any

import numpy as np

from qtjax.config import DataSection
from qtjax.data.dataset import TokenizedDataset
from qtjax.data.iterate import hold_out
from qtjax.data.rows import Rows
from qtjax.data.sources import load_rows
from qtjax.data.tokenize import tokenize
from qtjax.errors import QtjaxError


def training_rows(data: DataSection) -> Rows:
    """The rows to train on: `data.path` without what `held_out_rows` takes from it, at most data.max_samples of them."""
    rows = _source(data, data.path, data.split)
    if not data.eval_path and data.eval_fraction:
        rows = rows.select(hold_out(len(rows), data.eval_fraction)[0])
    if data.part:
        part, parts = map(int, data.part.split("/"))
        rows = rows.select(np.arange(part - 1, len(rows), parts))
    return rows[: data.max_samples] if data.max_samples else rows


def held_out_rows(data: DataSection) -> Rows:
    """The rows to evaluate on: `data.eval_path`, or `data.eval_fraction` of `data.path`, the same ones for every seed.

    max_samples cuts training rows only, so that results with different amounts of training data compare.
    Raises QtjaxError when the config holds nothing out.
    """
    if data.eval_path:
        return _source(data, data.eval_path, data.eval_split)
    rows = _source(data, data.path, data.split)
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


def _source(data: DataSection, path: str, split: str) -> Rows:
    return load_rows(path, split, [c for c in (data.prompt_column, data.completion_column) if c])
