"""EU scores of a whole dataset under one set of weights, and what Q-Tuning would keep of each scoring batch."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pyarrow as pa
from jax.sharding import Mesh

from qtjax.config import Config
from qtjax.data.dataset import TokenizedDataset
from qtjax.data.iterate import BatchPlan
from qtjax.evals.loss import whole_sequences
from qtjax.evals.rows import likelihood
from qtjax.models import ModelConfig
from qtjax.pruning import select_samples, spearman
from qtjax.records.samples import to_table
from qtjax.tree import Tree


def survey(
    config: Config,
    model_config: ModelConfig,
    params: Tree,
    dataset: TokenizedDataset,
    *,
    overlay: Any = None,
    mesh: Mesh | None = None,
    progress: Callable[[int], None] | None = None,
) -> tuple[pa.Table, float]:
    """Scores every sample once, then decides batch by batch as the first epoch of training would.

    The batches are those of training with the same seed (train.seed, prune.batch_size); the weights are the same for
    all of them, so that the scores compare.
    Returns: (table of records.samples.SCHEMA, one row a sample in the order of `dataset`; `step` is the batch, from 1;
      `row` the source row; perplexity and entropy NaN for samples without targets), and the mean over batches of the
      Spearman correlation of perplexity and entropy (NaN where undefined).
    """
    prune = config.prune
    found = likelihood(
        model_config, params, whole_sequences(dataset, range(len(dataset))), row_length=config.train.row_length or config.data.max_length,
        rows=config.train.rows, overlay=overlay, mesh=mesh, progress=progress,
    )  # fmt: skip
    with np.errstate(invalid="ignore", divide="ignore", over="ignore"):
        perplexity = np.exp(found.nll / found.targets).astype(np.float32)
        entropy = (found.entropy / found.targets).astype(np.float32)
    plan = BatchPlan(len(dataset), prune.batch_size, config.train.seed)
    tables, orders, correlations = [], [], []
    for step in range(plan.steps_per_epoch):
        batch = plan.global_batch(step)
        valid = batch >= 0
        ppl, ent = (np.where(valid, scores[batch], np.nan) for scores in (perplexity, entropy))
        choice = select_samples(
            ppl, ent, keep=prune.sample_keep, policy=prune.policy, supplement=prune.supplement, valid=valid
        )
        count = np.where(valid, found.targets[batch], 0)
        keep, quadrant = np.asarray(choice.keep), np.asarray(choice.quadrant)
        pruned = keep & (quadrant == 2) & (prune.token_pruner != "none")
        tokens = np.where(pruned, np.maximum(1, np.floor(prune.token_keep * count + 1e-6)), count)
        columns = {
            "epoch": 0, "row": np.where(valid, dataset.row_index[batch], -1), "perplexity": ppl, "entropy": ent,
            "count": count, "quadrant": quadrant, "median_quadrant": choice.median_quadrant, "keep": keep,
            "supplement": choice.supplement, "kept_tokens": np.where(keep, tokens, 0),
        }  # fmt: skip
        tables.append(to_table(step + 1, columns))
        orders.append(batch[valid])
        correlations.append(float(spearman(ppl, ent, valid)))
    table = pa.concat_tables(tables).take(np.argsort(np.concatenate(orders), kind="stable"))
    known = [c for c in correlations if np.isfinite(c)]
    return table, float(np.mean(known)) if known else float("nan")
