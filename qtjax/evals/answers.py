"""Many prompts answered in few shapes: left-padded batches in at most a few length buckets, each compiled once."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from itertools import combinations
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from qtjax import models, parallel
from qtjax.errors import QtjaxError
from qtjax.models import ModelConfig
from qtjax.tree import Tree

BUCKETS = 3  # every bucket is one more compilation
PADDED = 0.5  # another bucket only where more than this fraction of the prompt slots would hold padding
MULTIPLE = 8  # bucket lengths, tokens: nearly equal sets of prompts share a compilation


def bucket_lengths(lengths: Sequence[int], most: int = BUCKETS) -> list[int]:
    """Padded lengths, ascending, multiples of 8: the fewest (at most `most`) with at most half of the slots padding.

    With a given number of buckets the padding is the least possible.
    """
    rounded = np.array([parallel.round_up(max(n, 1), MULTIPLE) for n in lengths])
    real, edges = int(sum(lengths)), np.unique(rounded)
    if len(edges) > 32:  # candidate edges; 32 choose 2 is searched in milliseconds
        edges = np.unique(np.quantile(edges, np.linspace(0, 1, 32), method="higher"))
    for count in range(1, min(most, len(edges)) + 1):
        chosen = [(*inner, edges[-1]) for inner in combinations(edges[:-1], count - 1)]
        slots = [int(np.asarray(c)[np.searchsorted(c, rounded)].sum()) for c in chosen]
        best = int(np.argmin(slots))
        if slots[best] * (1 - PADDED) <= real:
            break
    return [int(edge) for edge in chosen[best]]


def _batches(lengths: Sequence[int], batch_size: int) -> Iterator[tuple[int, list[int]]]:
    """(padded length, indices) with every index once, shortest bucket first."""
    edges = bucket_lengths(lengths)
    bucket = np.searchsorted(edges, np.asarray(lengths))
    for b, edge in enumerate(edges):
        members = np.flatnonzero(bucket == b).tolist()
        for at in range(0, len(members), batch_size):
            yield edge, members[at : at + batch_size]


def answer(
    config: ModelConfig,
    params: Tree,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    batch_size: int,
    stop_ids: Sequence[int],
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
    overlay: Any = None,
    task_ids: Sequence[int] | None = None,
    mesh: Mesh | None = None,
    progress: Callable[[int], None] | None = None,
) -> list[list[int]]:
    """Continues every prompt; all batches of one length share one compiled program.

    Args:
      prompts: token ids, not empty. max_new_tokens: at most so many per prompt. batch_size: prompts at a time, rounded
        up to the devices of `mesh`; a short last batch is filled with copies, so that its shape is no new one.
      stop_ids: a continuation ends before the first of these; they are not part of the result.
      task_ids: each prompt's task, for overlays that tell tasks apart.
      temperature: 0 is greedy. seed: of sampling. progress: called with the number of prompts answered since the last call.
    Returns: new token ids per prompt, in the order of `prompts`.
    Raises QtjaxError: an empty prompt, or one that leaves no room under max_position_embeddings.
    """
    for i, prompt in enumerate(prompts):
        if not len(prompt):
            raise QtjaxError(f"prompt {i}: is empty and the tokenizer adds no BOS; give at least one token")
        if len(prompt) + max_new_tokens > config.max_position_embeddings:
            raise QtjaxError(
                f"prompt {i}: {len(prompt)} tokens and max_new_tokens = {max_new_tokens} pass the model's"
                f" max_position_embeddings = {config.max_position_embeddings}; shorten one of them"
            )
    if overlay is not None:
        models.check_task_ids(overlay.tasks, None if task_ids is None else np.asarray(task_ids, np.int32), (len(prompts),))
    tells_tasks = overlay is not None and overlay.tasks and task_ids is not None
    stop = tuple(sorted(set(int(i) for i in stop_ids)))
    ways = 1 if mesh is None else parallel.batch_size(mesh)
    # A power-of-two batch no larger than needed: few prompts do not pay for a full batch.
    batch_size = parallel.round_up(min(batch_size, 1 << max(len(prompts) - 1, 0).bit_length()), ways)
    out: list[list[int]] = [[] for _ in prompts]
    with jax.set_mesh(mesh) if mesh is not None else nullcontext():
        for number, (length, members) in enumerate(_batches([len(p) for p in prompts], batch_size)):
            filled = members + members[-1:] * (batch_size - len(members))
            ids, mask = np.zeros((batch_size, length), np.int32), np.zeros((batch_size, length), bool)
            for b, i in enumerate(filled):
                ids[b, length - len(prompts[i]) :], mask[b, length - len(prompts[i]) :] = prompts[i], True
            tasks = np.asarray([task_ids[i] for i in filled], np.int32) if tells_tasks else None
            if mesh is not None:
                sharding = parallel.batch_sharding(mesh)
                ids, mask, tasks = (
                    x if x is None else jax.make_array_from_callback(x.shape, sharding, x.__getitem__) for x in (ids, mask, tasks)
                )
            new = models.generate(
                config, params, ids, mask, max_new_tokens=max_new_tokens, temperature=temperature, top_p=top_p,
                eos_token_id=stop, pad_token_id=stop[0] if stop else 0,
                key=jax.random.fold_in(jax.random.key(seed), number), overlay=overlay, task_ids=tasks,
            )  # fmt: skip
            tokens = multihost_utils.process_allgather(new, tiled=True) if jax.process_count() > 1 else new
            for i, row in zip(members, np.asarray(tokens).tolist()):
                out[i] = row[: next((t for t, token in enumerate(row) if token in stop), len(row))]
            if progress:
                progress(len(members))
    return out
