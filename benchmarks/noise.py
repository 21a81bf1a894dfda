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
    rows = [row for row in training_rows(data) if row.get("provenance") != "mislabelled"]
    answers = [_answer(row, data) for row in rows]
    chosen = np.random.default_rng(seed).permutation(len(rows))[: round(share * len(rows))]
    draw = np.random.default_rng((seed, 1))
    by_task: dict[str, list[int]] = {}
    for i, row in enumerate(rows):
        by_task.setdefault(str(row.get("task", "")), []).append(i)
    noisy = [{**row, "provenance": row.get("provenance", "given")} for row in rows]
    for i in sorted(int(i) for i in chosen):
        others = [j for j in by_task[str(rows[i].get("task", ""))] if answers[j] != answers[i]]
        if not others:
            raise QtjaxError(f"{data.path} row {i}: all rows of its task have the same answer, so that there is no wrong one")
        noisy[i] = _with_answer(rows[i], data, answers[int(draw.choice(others))]) | {"provenance": INJECTED}
    write_atomic(file, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in noisy))


def _column(row: dict[str, Any], data: DataSection) -> str:
    for name in (data.completion_column, "completion", "output"):
        if name and isinstance(row.get(name), str):
            return name
    raise QtjaxError(f"{data.path}: noise needs one answer a row: a text column completion or output, or messages")


def _answer(row: dict[str, Any], data: DataSection) -> str:
    return row["messages"][-1]["content"] if isinstance(row.get("messages"), list) else row[_column(row, data)]


def _with_answer(row: dict[str, Any], data: DataSection, answer: str) -> dict[str, Any]:
    if isinstance(row.get("messages"), list):
        return {**row, "messages": [*row["messages"][:-1], {**row["messages"][-1], "content": answer}]}
    return {**row, _column(row, data): answer}
