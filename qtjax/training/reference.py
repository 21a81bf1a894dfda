"""The data set's tokens under a reference model, scored once before training: what rho-1 and token-cleaning compare with."""

import hashlib
import io
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from qtjax.atomic import disk_errors, write_atomic
from qtjax.checkpoints import load_pretrained, read_config, resolve_folder
from qtjax.config import Config
from qtjax.data.dataset import TokenizedDataset
from qtjax.data.packing import Sample
from qtjax.data.progress import LateProgress
from qtjax.data.tokenizer import load_tokenizer
from qtjax.errors import QtjaxError
from qtjax.evals.rows import scored_rows


def check_reference(config: Config, tokenizer: Any) -> None:
    """Raises QtjaxError when prune.reference_model cannot be read, has another vocabulary or too few positions."""
    path = config.prune.reference_model
    shape, theirs = read_config(resolve_folder(path)), load_tokenizer(path)
    if theirs.get_vocab() != tokenizer.get_vocab():
        raise QtjaxError(
            f"prune.reference_model = {path!r}: has another vocabulary ({len(theirs.get_vocab()):,} tokens) than model.path ="
            f" {config.model.path!r} ({len(tokenizer.get_vocab()):,}); its losses are of other tokens, take a model of the same family"
        )
    if config.data.max_length > shape.max_position_embeddings:
        raise QtjaxError(
            f"prune.reference_model = {path!r}: has {shape.max_position_embeddings} positions, fewer than data.max_length ="
            f" {config.data.max_length}; lower that, or take another reference"
        )


def reference_nll(config: Config, dataset: TokenizedDataset, mesh: Mesh, folder: Path) -> np.ndarray:
    """float32 [total], nats: every token's nll under prune.reference_model, 0 where it is no target.

    Kept in `folder` under a name made of the data's fingerprint and the model's path, so that a resumed run reads it back.
    """
    name = hashlib.sha256(f"{dataset.fingerprint} {config.prune.reference_model}".encode()).hexdigest()[:16]
    file = folder / f"reference_nll-{name}.npy"
    if file.is_file():
        with disk_errors(file, "reading"):
            kept = np.load(file, allow_pickle=False)
        if kept.shape == dataset.input_ids.shape:
            return kept
    m = config.model
    shape, params = load_pretrained(config.prune.reference_model, m.dtype, mesh=mesh, param_dtype=m.param_dtype)
    out = np.zeros(len(dataset.input_ids), np.float32)
    samples = [Sample(ids, mask, np.arange(len(ids), dtype=np.int32)) for ids, mask, _ in map(dataset.sample, range(len(dataset)))]
    row_length = config.train.row_length or config.data.max_length
    with LateProgress("scoring with the reference model", len(dataset)) as bar:
        launches = scored_rows(
            shape, params, samples, row_length=row_length, rows=config.train.rows, mesh=mesh, progress=bar.advance
        )
        for packed, (nll, _) in launches:
            there = packed.loss_mask
            out[dataset.offsets[packed.sample[there]] + packed.position_ids[there]] = nll[there]
    if jax.process_index() == 0:
        data = io.BytesIO()
        np.save(data, out, allow_pickle=False)
        write_atomic(file, data.getvalue())
    return out


__all__ = ["check_reference", "reference_nll"]
