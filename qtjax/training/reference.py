"""The data set's tokens under another model, scored once before training: the reference that rho-1 and token-cleaning
compare with (prune.reference_model), or a smaller model whose scores stand for the trained one's (prune.score_model)."""

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


def check_other_model(config: Config, field: str, tokenizer: Any) -> None:
    """Raises QtjaxError when the model that `field` names cannot be read, has another vocabulary or too few positions."""
    path = config.flat()[field]
    shape, theirs = read_config(resolve_folder(path)), load_tokenizer(path)
    if theirs.get_vocab() != tokenizer.get_vocab():
        raise QtjaxError(
            f"{field} = {path!r}: has another vocabulary ({len(theirs.get_vocab()):,} tokens) than model.path ="
            f" {config.model.path!r} ({len(tokenizer.get_vocab()):,}); its losses are of other tokens, take a model of the same family"
        )
    if config.data.max_length > shape.max_position_embeddings:
        raise QtjaxError(
            f"{field} = {path!r}: has {shape.max_position_embeddings} positions, fewer than data.max_length ="
            f" {config.data.max_length}; lower that, or take another model"
        )


def other_model_scores(config: Config, field: str, dataset: TokenizedDataset, mesh: Mesh, folder: Path, rater: str = "") -> np.ndarray:
    """float32 [signals, total]: every token's nll and entropy (nats), and with a rater its rating, under the model that
    `field` names; 0 where it is no target.

    Kept in `folder` under a name made of the data's fingerprint and the model's path, so that a resumed run reads it back.
    """
    path = config.flat()[field]
    name = hashlib.sha256(f"{dataset.fingerprint} {path} {rater}".encode()).hexdigest()[:16]
    file = folder / f"{field.partition('.')[2]}-{name}.npy"
    out = np.zeros((3 if rater else 2, len(dataset.input_ids)), np.float32)
    if file.is_file():
        with disk_errors(file, "reading"):
            kept = np.load(file, allow_pickle=False)
        if kept.shape == out.shape:
            return kept
    m = config.model
    shape, params = load_pretrained(path, m.dtype, mesh=mesh, param_dtype=m.param_dtype)
    samples = [Sample(ids, mask, np.arange(len(ids), dtype=np.int32)) for ids, mask, _ in map(dataset.sample, range(len(dataset)))]
    row_length = config.train.row_length or config.data.max_length
    with LateProgress(f"scoring with {path}", len(dataset)) as bar:
        launches = scored_rows(
            shape, params, samples, row_length=row_length, rows=config.train.rows, mesh=mesh, rater=rater, progress=bar.advance
        )
        for packed, scored in launches:
            there = packed.loss_mask
            where = dataset.offsets[packed.sample[there]] + packed.position_ids[there]
            for signal, scores in zip(out, scored):
                signal[where] = scores[there]
    if jax.process_index() == 0:
        data = io.BytesIO()
        np.save(data, out, allow_pickle=False)
        write_atomic(file, data.getvalue())
    return out


__all__ = ["check_other_model", "other_model_scores"]
