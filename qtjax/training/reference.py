"""The data set's tokens under another model, scored once before training: the reference that rho-1 and token-cleaning
compare with (prune.reference_model), or a smaller model whose scores stand for the trained one's (prune.score_model)."""

import hashlib
import io
import time
from pathlib import Path
from typing import Any, NamedTuple

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


class OtherScores(NamedTuple):
    """scores float32 [signals, total]: every token's nll and entropy (nats), and a rating where one was asked for; 0 where it
    is no target. seconds: what the pass took, without compilation."""

    scores: np.ndarray
    seconds: float


def other_model_scores(config: Config, field: str, dataset: TokenizedDataset, mesh: Mesh, folder: Path, rater: str = "") -> OtherScores:
    """The data set under the model that `field` names; with a rater also its rating.

    Kept in `folder` under a name made of the data's fingerprint, the model's path and its files' sizes and times, so that a
    resumed run reads it back.
    """
    path = config.flat()[field]
    files = [(f.name, f.stat().st_size, f.stat().st_mtime_ns) for f in sorted(Path(resolve_folder(path)).iterdir()) if f.is_file()]
    name = hashlib.sha256(f"{dataset.fingerprint} {path} {files} {rater}".encode()).hexdigest()[:16]
    file = folder / f"{field.partition('.')[2]}-{name}.npz"
    out = np.zeros((3 if rater else 2, len(dataset.input_ids)), np.float32)
    if file.is_file():
        with disk_errors(file, "reading"), np.load(file, allow_pickle=False) as kept:
            found = OtherScores(kept["scores"], float(kept["seconds"]))
        if found.scores.shape == out.shape:
            return found
    m = config.model
    shape, params = load_pretrained(path, m.dtype, mesh=mesh, param_dtype=m.param_dtype)
    samples = [Sample(ids, mask, np.arange(len(ids), dtype=np.int32)) for ids, mask, _ in map(dataset.sample, range(len(dataset)))]
    row_length = config.train.row_length or config.data.max_length
    with LateProgress(f"scoring with {path}", len(dataset)) as bar:
        launches = scored_rows(
            shape, params, samples, row_length=row_length, rows=config.train.rows, mesh=mesh, rater=rater, progress=bar.advance
        )
        launched, begin = 0, time.perf_counter()
        for packed, scored in launches:
            launched += 1
            begin = time.perf_counter() if launched == 1 else begin  # the first one compiles
            there = packed.loss_mask
            where = dataset.offsets[packed.sample[there]] + packed.position_ids[there]
            for signal, scores in zip(out, scored):
                signal[where] = scores[there]
    seconds = (time.perf_counter() - begin) * launched / max(launched - 1, 1)
    if jax.process_index() == 0:
        data = io.BytesIO()
        np.savez(data, scores=out, seconds=np.float64(seconds))
        write_atomic(file, data.getvalue())
    return OtherScores(out, seconds)


__all__ = ["OtherScores", "check_other_model", "other_model_scores"]
