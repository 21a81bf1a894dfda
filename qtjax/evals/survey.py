"""EU scores of a whole dataset under one set of weights, and what the config's pruners would keep of each scoring batch."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pyarrow as pa
from jax.sharding import Mesh

from qtjax.config import Config
from qtjax.data.dataset import TokenizedDataset
from qtjax.evals.decisions import decisions
from qtjax.models import ModelConfig
from qtjax.pruning import spearman
from qtjax.pruning.ranks import quadrants_of_scores
from qtjax.records.samples import to_table
from qtjax.scoring import sample_scores
from qtjax.training.batch import ScoringBatch
from qtjax.training.step import Decision
from qtjax.tree import Tree


def survey(
    config: Config,
    model_config: ModelConfig,
    params: Tree,
    dataset: TokenizedDataset,
    *,
    overlay: Any = None,
    mesh: Mesh | None = None,
    reference: np.ndarray | None = None,
    progress: Callable[[int], None] | None = None,
) -> tuple[pa.Table, float]:
    """Scores every sample once, then decides batch by batch as the first epoch of training would.

    The batches are those of training with the same seed (train.seed, prune.batch_size); the weights are the same for
    all of them, so that the scores compare.
    Returns: (table of records.samples.SCHEMA, one row a sample in the order of `dataset`; `step` is the batch, from 1;
      `row` the source row; perplexity and entropy of every sample, NaN for those without targets), and the mean over
      batches of the Spearman correlation of perplexity and entropy (NaN where undefined).
    """
    tables, orders, correlations = [], [], []
    decided = decisions(
        config, model_config, params, dataset, overlay=overlay, mesh=mesh, reference=reference, score_all=True, progress=progress
    )
    for step, batch, nll, entropy, decision in decided:
        scores = sample_scores(nll, entropy, batch.targets)
        eligible = batch.valid & np.isfinite(scores.perplexity) & np.isfinite(scores.entropy)
        median = quadrants_of_scores(scores.perplexity, scores.entropy, eligible)
        tables.append(to_table(step + 1, record_columns(dataset, batch, decision) | {
            "perplexity": scores.perplexity, "entropy": scores.entropy, "median_quadrant": median,
        }))  # fmt: skip
        orders.append(batch.indices[batch.valid])
        correlations.append(float(spearman(scores.perplexity, scores.entropy, batch.valid)))
    table = pa.concat_tables(tables).take(np.argsort(np.concatenate(orders), kind="stable"))
    known = [c for c in correlations if np.isfinite(c)]
    return table, float(np.mean(known)) if known else float("nan")


def record_columns(dataset: TokenizedDataset, batch: ScoringBatch, decision: Decision) -> dict[str, Any]:
    """The columns of records.samples.SCHEMA of a batch of the first epoch, `step` left out."""
    names = ("perplexity", "entropy", "count", "quadrant", "median_quadrant", "keep", "supplement", "kept_tokens")
    rows = np.where(batch.valid, dataset.row_index[np.maximum(batch.indices, 0)], -1)
    return {"epoch": 0, "row": rows} | {name: np.asarray(getattr(decision, name)) for name in names}
