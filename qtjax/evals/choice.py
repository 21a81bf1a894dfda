"""Multiple choice by likelihood: the choice that the model finds most probable after the question."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
from jax.sharding import Mesh

from qtjax.config import DataSection
from qtjax.data.packing import Sample
from qtjax.data.rows import from_objects
from qtjax.data.tokenize import tokenize
from qtjax.data.tokenizer import check_vocabulary
from qtjax.errors import QtjaxError
from qtjax.evals.choice_rows import Question
from qtjax.evals.rows import likelihood
from qtjax.models import ModelConfig
from qtjax.tree import Tree

Encoded = tuple[np.ndarray, np.ndarray]  # input_ids int32 [l], loss_mask bool [l]


class MultipleChoice(NamedTuple):
    """Accuracies (fraction 0-1, NaN without questions) by what is maximised over the choices.

    acc: the summed log-likelihood; acc_norm: that divided by the choice's characters (both as lm-evaluation-harness
    defines them); acc_token: the mean per token. Ties go to the earlier choice. chance: expected accuracy of guessing.
    stderr: standard error of acc. cut: choices whose prompt lost tokens on the left to fit a row.
    nll: per question float64 [choices], nats.
    """

    acc: float
    acc_norm: float
    acc_token: float
    chance: float
    stderr: float
    count: int
    cut: int
    nll: list[np.ndarray]

    def summary(self) -> dict[str, Any]:
        """JSON-able, without the single likelihoods."""
        return {k: v for k, v in self._asdict().items() if k != "nll"}


def multiple_choice(
    config: ModelConfig,
    params: Tree,
    tokenizer: Any,
    questions: Sequence[Question],
    data: DataSection,
    *,
    row_length: int,
    rows: int = 8,
    overlay: Any = None,
    mesh: Mesh | None = None,
    progress: Callable[[int], None] | None = None,
) -> MultipleChoice:
    """Scores every choice of every question.

    Args:
      data: chat_template and system_prompt for questions in the trained style.
      row_length: tokens per packed row; longer samples lose the beginning of their prompt. rows: rows per launch.
      overlay, mesh, progress (counts choices): as in `rows.likelihood`.
    Returns: MultipleChoice. The token that closes an answer is not scored.
    Raises QtjaxError: a choice that does not fit a row, a tokenizer that is not the model's.
    """
    encoded, cut = [], 0
    tasks = [q.task_id for q in questions for _ in q.choices]
    for task, (ids, mask) in zip(tasks, encode(tokenizer, questions, data), strict=True):
        cut += len(ids) > row_length
        ids, kept = ids[-row_length:], mask[-row_length:].copy()
        kept[0] = False
        if kept.sum() < mask.sum():
            raise QtjaxError(f"a choice of {int(mask.sum())} tokens does not fit a row of {row_length}; raise train.row_length")
        check_vocabulary(tokenizer, config.vocab_size, ids)
        encoded.append(Sample(ids, kept, np.arange(len(ids), dtype=np.int32), task))
    found = likelihood(
        config, params, encoded, row_length=row_length, rows=rows, overlay=overlay, mesh=mesh, progress=progress
    )
    ends = np.cumsum([len(q.choices) for q in questions])
    spans = [slice(end - len(q.choices), end) for q, end in zip(questions, ends)]
    nll = [found.nll[s] for s in spans]
    characters = [np.array([len(c) for c in q.choices]) for q in questions]
    answers = np.array([q.answer for q in questions])

    def accuracy(scores: list[np.ndarray]) -> float:
        return float(np.mean([s.argmin() for s in scores] == answers)) if len(answers) else float("nan")

    acc, n = accuracy(nll), len(questions)
    return MultipleChoice(
        acc=acc,
        acc_norm=accuracy([s / c for s, c in zip(nll, characters)]),
        acc_token=accuracy([s / found.targets[span] for s, span in zip(nll, spans)]),
        chance=float(np.mean([1 / len(q.choices) for q in questions])) if n else float("nan"),
        stderr=float(np.sqrt(acc * (1 - acc) / (n - 1))) if n > 1 else float("nan"),
        count=n,
        cut=cut,
        nll=nll,
    )


def encode(tokenizer: Any, questions: Sequence[Question], data: DataSection) -> list[Encoded]:
    """Token ids and the mask of the choice's tokens, for every choice of every question, in order.

    Questions in the trained style are encoded as training does (chat template, or BOS + prompt + choice), without the
    closing token. The others are encoded as lm-evaluation-harness does: prompt and " " + choice in one text, of which
    the tokens beyond those of the prompt alone are the choice's.
    """
    pairs = [(q, choice) for q in questions for choice in q.choices]
    trained = [i for i, (q, _) in enumerate(pairs) if q.trained]
    out: list[Encoded | None] = [None] * len(pairs)
    if trained:
        plain = dataclasses.replace(
            data, format="prompt_completion", prompt_column="prompt", completion_column="completion", max_length=1 << 30
        )
        objects = [{"prompt": pairs[i][0].prompt, "completion": pairs[i][1]} for i in trained]
        dataset = tokenize(tokenizer, from_objects("choices", objects), plain, progress=False)
        for k, i in enumerate(trained):
            ids, mask, closing = dataset.sample(k)
            out[i] = (ids, mask & ~closing)
    rest = [i for i in range(len(pairs)) if out[i] is None]
    if rest:
        contexts = [pairs[i][0].prompt.rstrip() for i in rest]
        wholes = [f"{context} {pairs[i][1]}" for context, i in zip(contexts, rest)]
        bos = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
        before, after = (tokenizer(t, add_special_tokens=False)["input_ids"] for t in (contexts, wholes))
        for i, context, whole in zip(rest, before, after, strict=True):
            ids = np.asarray(bos + whole, np.int32)
            # A merge across the border may leave no token to the choice; its last one is then scored.
            start = min(len(bos) + len(context), len(ids) - 1)
            out[i] = (ids, np.arange(len(ids)) >= max(start, 1))
    return out
