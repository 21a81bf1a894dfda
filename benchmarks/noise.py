"""A copy of a data set in which a known share of the rows has another row's answer."""

import json
from pathlib import Path
from typing import Any

import numpy as np

from qtjax.atomic import write_atomic
from qtjax.config import DataSection
from qtjax.data.prepare import training_rows
from qtjax.errors import QtjaxError

INJECTED = "injected"


def write_noisy(data: DataSection, share: float, seed: int, file: Path) -> None:
    """Writes the training rows of `data` as JSON lines, round(share x rows) of them with another row's answer.

    A wrong answer comes from a row of the same `task`, where rows have one, and differs from the right one; such rows have
    the `provenance` "injected". Rows of the provenance "mislabelled" are left out first, so that `share` (0-1) is the
    whole share of wrong answers. Raises QtjaxError for rows without one answer, or a task with one answer only.
    """
    source = training_rows(data)
    where = [i for i in range(len(source)) if source[i].get("provenance") != "mislabelled"]
    rows = [source[i] for i in where]
    answers = [_answer(row, data, source.where(i)) for row, i in zip(rows, where)]
    chosen = np.random.default_rng(seed).permutation(len(rows))[: round(share * len(rows))]
    draw = np.random.default_rng((seed, 1))
    by_task: dict[str, list[int]] = {}
    for i, row in enumerate(rows):
        by_task.setdefault(str(row.get("task", "")), []).append(i)
    noisy = [{**row, "provenance": row.get("provenance", "given")} for row in rows]
    for i in sorted(int(i) for i in chosen):
        others = [j for j in by_task[str(rows[i].get("task", ""))] if answers[j] != answers[i]]
        if not others:
            raise QtjaxError(f"{source.where(where[i])}: all rows of its task have the same answer, so that there is no wrong one")
        noisy[i] = _with_answer(rows[i], data, answers[int(draw.choice(others))]) | {"provenance": INJECTED}
    write_atomic(file, "".join(json.dumps(row, ensure_ascii=False, default=str) + "\n" for row in noisy))


def _column(row: dict[str, Any], data: DataSection) -> str | None:
    names = (name for name in (data.completion_column, "completion", "output") if name and isinstance(row.get(name), str))
    return next(names, None)


def _answer(row: dict[str, Any], data: DataSection, where: str) -> str:
    messages = row.get("messages")
    if isinstance(messages, list) and messages and messages[-1].get("role") == "assistant":
        return messages[-1]["content"]
    if messages is None and (column := _column(row, data)):
        return row[column]
    raise QtjaxError(f"{where}: noise needs one answer a row: a text column completion or output, or messages that end with the assistant's")


def _with_answer(row: dict[str, Any], data: DataSection, answer: str) -> dict[str, Any]:
    if isinstance(row.get("messages"), list):
        return {**row, "messages": [*row["messages"][:-1], {**row["messages"][-1], "content": answer}]}
    return {**row, _column(row, data): answer}
