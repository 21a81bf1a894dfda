"""The data set's tokens under another model, scored once before training: the reference that rho-1 and token-cleaning
compare with (prune.reference_model), or a smaller model whose scores stand for the trained one's (prune.score_model)."""

import hashlib
import json
import os
import time
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from qtjax.atomic import disk_errors, sync_folder, write_all, write_json
from qtjax.checkpoints import load_pretrained, read_config, resolve_folder
from qtjax.config import Config
from qtjax.data.dataset import TokenizedDataset
from qtjax.data.progress import LateProgress
from qtjax.data.tokenizer import load_tokenizer
from qtjax.errors import QtjaxError
from qtjax.evals.loss import whole_sequences
from qtjax.evals.rows import scored_rows
from qtjax.parallel import first_alone, wait_for_all


_BLOCK = 1 << 22  # bytes written at a time


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
    """scores float32 [signals, total], memory-mapped: every token's nll and entropy (nats), and a rating where one was asked
    for; 0 where it is no target. seconds: what the pass took, without compilation."""

    scores: np.ndarray
    seconds: float


def other_model_scores(config: Config, field: str, dataset: TokenizedDataset, mesh: Mesh, folder: Path, rater: str = "") -> OtherScores:
    """The data set under the model that `field` names; with a rater also its rating.

    All processes share the work. What they find is the first one's to write, into a file in `folder` under a name made of the
    data's fingerprint, the model's path, its files' sizes and times and the dtypes; the others, and a resumed run, read it there.
    """
    path = config.flat()[field]
    files = [(f.name, f.stat().st_size, f.stat().st_mtime_ns) for f in sorted(Path(resolve_folder(path)).iterdir()) if f.is_file()]
    m = config.model
    own = hashlib.sha256(f"{dataset.fingerprint} {path} {files} {rater} {m.dtype} {m.param_dtype}".encode()).hexdigest()[:16]
    shape = (3 if rater else 2, len(dataset.input_ids))

    def kept(name: str) -> Path:
        return folder / f"{field.partition('.')[2]}-{name}.npy"

    # Process 0 looks for all: where one read and another computed, they would wait for each other for ever. And it names the file,
    # since of a model from a hub every host may have a copy of its own date.
    found, _, name = first_alone("look for kept scores", lambda: f"{'there' if _read(kept(own), shape) else ''} {own}").partition(" ")
    file = kept(name)
    if found != "there":
        _score(config, path, dataset, mesh, file, shape, rater)
        wait_for_all(f"score with {path}")
    found = _read(file, shape)
    if found is None:
        raise QtjaxError(f"{file}: was written and cannot be read; {folder} must lie on a disk that all processes share")
    return found


def _seconds(file: Path) -> Path:
    return file.with_suffix(".json")


def _read(file: Path, shape: tuple[int, int]) -> OtherScores | None:
    """None where there is no such file, or another one."""
    try:
        scores, seconds = np.load(file, mmap_mode="r", allow_pickle=False), json.loads(_seconds(file).read_text())["seconds"]
    except (OSError, ValueError, KeyError):
        return None
    return OtherScores(scores.view(np.ndarray), float(seconds)) if scores.shape == shape and scores.dtype == np.float32 else None


def _score(config: Config, path: str, dataset: TokenizedDataset, mesh: Mesh, file: Path, shape: tuple[int, int], rater: str) -> None:
    """One pass of the model at `path` over all samples; process 0 writes `file`, whole or not at all."""
    m = config.model
    model_config, params = load_pretrained(path, m.dtype, mesh=mesh, param_dtype=m.param_dtype)
    temporary = file.with_name(f".{file.name}.{os.getpid()}.tmp")
    try:
        with disk_errors(file), LateProgress(f"scoring with {path}", len(dataset)) as bar:
            # With all its room from the start: a disk that fills up under a mapped file kills the process without a word.
            out = _reserved(temporary, shape) if jax.process_index() == 0 else None
            launches = scored_rows(
                model_config, params, whole_sequences(dataset), row_length=config.row_length, rows=config.train.rows, mesh=mesh, rater=rater,
                progress=bar.advance,
            )  # fmt: skip
            launched, begin = 0, time.perf_counter()
            for packed, scored in launches:
                launched += 1
                begin = time.perf_counter() if launched == 1 else begin  # the first one compiles
                there = packed.loss_mask
                where = dataset.offsets[packed.sample[there]] + packed.position_ids[there]
                for signal, scores in zip(out if out is not None else (), scored):
                    signal[where] = scores[there]
            seconds = (time.perf_counter() - begin) * launched / max(launched - 1, 1)
            if out is not None:
                out.flush()
                write_json(_seconds(file), {"seconds": seconds})
                os.replace(temporary, file)
                sync_folder(file.parent)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def _reserved(file: Path, shape: tuple[int, int]) -> np.memmap:
    """A mapped .npy file of zeros that has its room on the disk. Raises OSError where there is none."""
    out = np.lib.format.open_memmap(file, "w+", np.float32, shape)
    with file.open("r+b", buffering=0) as opened:
        opened.seek(out.offset)
        for at in range(0, out.nbytes, _BLOCK):
            write_all(opened.fileno(), bytes(min(_BLOCK, out.nbytes - at)))
    return out


__all__ = ["OtherScores", "check_other_model", "other_model_scores"]
