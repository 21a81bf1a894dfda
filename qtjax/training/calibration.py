"""Laplace-LoRA at the end of a run: the posterior is fitted, and calibration measured with and without it.

The question asked of every held-out prompt is the first token of its answer, among the first tokens that occur.
"""

from collections import Counter
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from qtjax.data.dataset import TokenizedDataset
from qtjax.errors import QtjaxError
from qtjax.evals.loss import whole_sequences
from qtjax.models import ModelConfig
from qtjax.overlays import Overlay
from qtjax.overlays.posterior import calibration_error, class_logits, fit_laplace, predictive
from qtjax.tree import Tree

ROWS = 256  # prompts that the posterior is fitted on, and at most as many that it is measured on
CLASSES = 16  # most frequent first tokens


class Prompts(NamedTuple):
    """input_ids, attention_mask int32 [B, L], padded on the right; labels int [B], index into the classes."""

    input_ids: np.ndarray
    attention_mask: np.ndarray
    labels: np.ndarray


def first_tokens(dataset: TokenizedDataset, most: int = CLASSES) -> np.ndarray:
    """int32 [C], the most frequent first answer tokens, ascending."""
    counts = Counter(int(s.input_ids[np.argmax(s.loss_mask)]) for s in whole_sequences(dataset) if s.loss_mask.any())
    return np.sort(np.array([token for token, _ in counts.most_common(most)], np.int32))


def prompts(dataset: TokenizedDataset, classes: np.ndarray, most: int = ROWS) -> Prompts:
    """Up to `most` evenly spaced samples whose answer begins with one of `classes`, cut before it."""
    places = []
    for i, sample in enumerate(whole_sequences(dataset)):
        at = int(np.argmax(sample.loss_mask)) if sample.loss_mask.any() else 0
        if at and sample.input_ids[at] in classes:
            places.append((i, at))
    places = [places[i] for i in np.unique(np.linspace(0, len(places) - 1, min(most, len(places))).astype(int))] if places else []
    kept = [(dataset.sample(i)[0], at) for i, at in places]
    kept = [(ids[:at], int(np.searchsorted(classes, ids[at]))) for ids, at in kept]
    length = max((len(ids) for ids, _ in kept), default=1)
    ids, mask = np.zeros((len(kept), length), np.int32), np.zeros((len(kept), length), np.int32)
    for i, (prompt, _) in enumerate(kept):
        ids[i, : len(prompt)], mask[i, : len(prompt)] = prompt, 1
    return Prompts(ids, mask, np.array([label for _, label in kept], int))


def fit_posterior(
    config: ModelConfig, params: Tree, overlay: Overlay, training: TokenizedDataset
) -> tuple[Overlay, np.ndarray]:
    """(the overlay with its posterior fitted to the training data, the classes [C] that it was fitted on).

    Raises QtjaxError when the data ask no question of `first_tokens`' kind.
    """
    classes = first_tokens(training)
    fit = prompts(training, classes)
    if len(classes) < 2 or not len(fit.labels):
        raise QtjaxError(
            "overlay.method = 'laplace': all answers of the training data begin with the same token, so there is nothing to be"
            " calibrated; use lora"
        )
    return fit_laplace(_differentiable(config), params, overlay, fit.input_ids, fit.attention_mask, classes, prior="evidence"), classes


def calibrate(
    config: ModelConfig, params: Tree, overlay: Overlay, training: TokenizedDataset, held_out: TokenizedDataset | None
) -> tuple[Overlay, dict[str, Any] | None]:
    """(the overlay with its posterior fitted, what it changes): None without held-out data that ask such a question.

    The summary: rows, classes; calibration_error, accuracy (fractions 0-1) and nll (nats per row) before, with the trained
    weights alone, and after, under the posterior (probit); prior_precision by evidence.
    """
    config = _differentiable(config)
    fitted, classes = fit_posterior(config, params, overlay, training)
    test = None if held_out is None else prompts(held_out, classes)
    if test is None or not len(test.labels):
        return fitted, None
    logits = jax.jit(class_logits, static_argnums=0)(config, params, overlay, test.input_ids, test.attention_mask, jnp.asarray(classes))
    after = predictive(config, params, fitted, test.input_ids, test.attention_mask, classes).probabilities
    return fitted, {
        "rows": len(test.labels), "classes": len(classes), "prior_precision": fitted.spec.prior.prior_precision,
        "before": _measured(jax.nn.softmax(logits), test.labels), "after": _measured(after, test.labels),
    }  # fmt: skip


def _differentiable(config: ModelConfig) -> ModelConfig:
    """Plain attention in cuDNN's place, whose backward pass JAX cannot run for many outputs at once."""
    return config.replace(attention="xla", max_segments=0) if config.attention == "cudnn" else config


def _measured(probabilities: Any, labels: np.ndarray) -> dict[str, float]:
    p = np.asarray(probabilities, np.float64)
    return {
        "calibration_error": calibration_error(p, labels),
        "accuracy": float((p.argmax(axis=1) == labels).mean()),
        "nll": float(-np.log(np.maximum(p[np.arange(len(labels)), labels], 1e-30)).mean()),
    }
