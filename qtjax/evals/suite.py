"""The held-out data of a config, prepared once, and the evaluations that the doors run on it before and after training."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jax.sharding import Mesh

from qtjax.config import Config
from qtjax.data.dataset import TokenizedDataset
from qtjax.data.examples import Example, to_example
from qtjax.data.prepare import held_out_rows
from qtjax.data.progress import LateProgress
from qtjax.data.rows import Rows, from_objects
from qtjax.data.tasks import task_of
from qtjax.data.templates import resolve_template
from qtjax.data.tokenize import dataset_format, prompt_and_answer, tokenize
from qtjax.data.tokenizer import check_vocabulary
from qtjax.errors import QtjaxError, near_names
from qtjax.evals.choice import MultipleChoice, multiple_choice
from qtjax.evals.choice_rows import Question, read_question
from qtjax.evals.exact_match import ExactMatch, Prompt, exact_match
from qtjax.evals.loss import HeldOutLoss, held_out_loss
from qtjax.models import ModelConfig
from qtjax.tree import Tree

TASKS = ("loss", "exact_match", "choice")
Result = HeldOutLoss | ExactMatch | MultipleChoice


@dataclass(frozen=True)
class HeldOut:
    """What evaluations read; a part that no task asks for is None.

    dataset: tokenized held-out samples. prompts: questions to answer. questions: multiple choice. stop_ids: tokens that
    end a generated answer. skipped: rows that exact match leaves out, having no answer or no room for one.
    """

    dataset: TokenizedDataset | None
    prompts: list[Prompt] | None
    questions: list[Question] | None
    stop_ids: tuple[int, ...]
    skipped: int = 0


def parse_tasks(text: str) -> tuple[str, ...]:
    """"loss,exact_match" -> names of TASKS. Raises QtjaxError for an unknown or missing name."""
    names = tuple(name.strip() for name in text.split(",") if name.strip())
    for name in names or ("",):
        if name not in TASKS:
            raise QtjaxError(f"task {name!r}: must be one or more of {','.join(TASKS)}{near_names(name, TASKS)}")
    return names


def spread(count: int, most: int) -> np.ndarray:
    """int64: at most `most` (0: all) of 0..count-1, evenly spaced, since files are often sorted by subject."""
    if not most or most >= count:
        return np.arange(count)
    return (np.arange(most) * count) // most


def stop_ids(tokenizer: Any, eos_token_id: Sequence[int], dataset: TokenizedDataset | None) -> tuple[int, ...]:
    """The tokens that close answers in `dataset`, and the end tokens of tokenizer and model."""
    closing = [] if dataset is None else np.unique(dataset.input_ids[dataset.closing]).tolist()
    eos = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    return tuple(sorted({*closing, *eos, *eos_token_id}))


def load_held_out(
    config: Config,
    model_config: ModelConfig,
    tokenizer: Any,
    tasks: Sequence[str] = TASKS[:2],
    *,
    choice_form: str = "auto",
    scratch: Path | None = None,
) -> HeldOut:
    """Reads and tokenizes the held-out rows for `tasks`.

    Takes eval.max_samples evenly spaced rows for loss and choice, eval.generate_samples (0: as many) for exact match.
    scratch: folder for what is too large for memory, removed with its last reader; None: the system's for temporary files.
    Raises QtjaxError: whatever loading raises, rows that a task cannot use, a tokenizer that is not the model's.
    """
    rows = held_out_rows(config.data, scratch)
    chosen = rows.select(spread(len(rows), config.eval.max_samples))
    dataset = prompts = questions = None
    skipped = 0
    if "choice" in tasks:
        questions = [
            read_question(chosen[i], choice_form, chosen.where(i))._replace(task_id=task_of(chosen[i], config.data, chosen.where(i)))
            for i in range(len(chosen))
        ]
    if {"loss", "exact_match"} & set(tasks):
        dataset = tokenize(tokenizer, chosen, config.data, scratch=scratch)
        check_vocabulary(tokenizer, model_config.vocab_size, dataset.input_ids)
    if "exact_match" in tasks:
        asked = rows.select(spread(len(rows), config.eval.generate_samples or config.eval.max_samples))
        prompts = _prompts(config, tokenizer, asked)
        room = model_config.max_position_embeddings - config.eval.max_new_tokens
        fitting = [p for p in prompts if 0 < len(p.ids) <= room]
        prompts, skipped = fitting, len(asked) - len(fitting)
    return HeldOut(dataset, prompts, questions, stop_ids(tokenizer, model_config.eos_token_id, dataset), skipped)


def _prompts(config: Config, tokenizer: Any, rows: Rows) -> list[Prompt]:
    fmt, template = dataset_format(rows, config.data), resolve_template(tokenizer, config.data.chat_template)
    out = []
    for i in range(len(rows)):
        row = rows[i]
        example = to_example(row, config.data, rows.where(i), fmt)
        if isinstance(example, Example):
            ids, completion = prompt_and_answer(
                tokenizer, example, template, rows.where(i), system_prompt=config.data.system_prompt
            )
            out.append(Prompt(ids.tolist(), completion, row, task_of(row, config.data, rows.where(i))))
    return out


def evaluate(
    config: Config,
    model_config: ModelConfig,
    params: Tree,
    tokenizer: Any,
    held_out: HeldOut,
    *,
    overlay: Any = None,
    mesh: Mesh | None = None,
    rule: str = "auto",
    progress: bool = True,
) -> dict[str, Result]:
    """Runs every task that `held_out` was prepared for: {"loss": HeldOutLoss, "exact_match": ..., "choice": ...}.

    Calling it again with other parameters of the same shapes compiles nothing. progress: bars with ETA on standard
    error for what takes more than a few seconds.
    """
    shape = {"row_length": config.row_length, "rows": config.train.rows}
    run = {"overlay": overlay, "mesh": mesh}
    out: dict[str, Result] = {}
    if held_out.dataset is not None:
        with LateProgress("held-out loss", len(held_out.dataset), enabled=progress) as bar:
            out["loss"] = held_out_loss(model_config, params, held_out.dataset, **shape, **run, progress=bar.advance)
    if held_out.prompts is not None:
        with LateProgress("answering", len(held_out.prompts), enabled=progress) as bar:
            out["exact_match"] = exact_match(
                model_config, params, tokenizer, held_out.prompts, max_new_tokens=config.eval.max_new_tokens,
                batch_size=config.eval.batch_size, stop_ids=held_out.stop_ids, rule=rule, **run, progress=bar.advance,
            )  # fmt: skip
    if held_out.questions is not None:
        count = sum(len(q.choices) for q in held_out.questions)
        with LateProgress("multiple choice", count, enabled=progress) as bar:
            out["choice"] = multiple_choice(
                model_config, params, tokenizer, held_out.questions, config.data, **shape, **run, progress=bar.advance
            )
    return out


def stop_ids_of_chat(config: Config, model_config: ModelConfig, tokenizer: Any) -> tuple[int, ...]:
    """`stop_ids` where there is no dataset: what closes an answer is read off one rendered exchange."""
    row = {"prompt": "Hello", "completion": "Hi"}
    sample = tokenize(tokenizer, from_objects("an exchange", [row]), config.data, progress=False)
    return stop_ids(tokenizer, model_config.eos_token_id, sample)
