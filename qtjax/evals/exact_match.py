"""Exact match: held-out prompts answered greedily, each answer judged by its row's rule."""

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from jax.sharding import Mesh

from qtjax.evals.answers import answer
from qtjax.evals.rules import reference_of, rule_for, rule_named
from qtjax.models import ModelConfig
from qtjax.tree import Tree


class Prompt(NamedTuple):
    """One question: token ids of the prompt up to where the answer begins, the completion that the data gives, its row and task."""

    ids: Sequence[int]
    completion: str
    row: Mapping[str, Any]
    task_id: int = 0


class Answered(NamedTuple):
    """`reference` is what `rule` compared `generated` with; ended: the answer closed itself within max_new_tokens."""

    prompt: str
    reference: str
    generated: str
    rule: str
    correct: bool
    task: str
    ended: bool


class ExactMatch(NamedTuple):
    """accuracy, ended (answers that closed themselves within max_new_tokens): fractions 0-1, NaN without prompts; by_task:
    task -> (accuracy, count), where rows have a `task`."""

    accuracy: float
    ended: float
    count: int
    by_task: dict[str, tuple[float, int]]
    answers: list[Answered]

    def summary(self) -> dict[str, Any]:
        """JSON-able, without the answers."""
        by_task = {task: {"accuracy": a, "count": n} for task, (a, n) in self.by_task.items()}
        return {"accuracy": self.accuracy, "ended": self.ended, "count": self.count, "by_task": by_task}


def exact_match(
    config: ModelConfig,
    params: Tree,
    tokenizer: Any,
    prompts: Sequence[Prompt],
    *,
    max_new_tokens: int,
    batch_size: int,
    stop_ids: Sequence[int],
    rule: str = "auto",
    overlay: Any = None,
    mesh: Mesh | None = None,
    progress: Callable[[int], None] | None = None,
) -> ExactMatch:
    """Answers every prompt greedily and judges it.

    Args:
      max_new_tokens, batch_size, stop_ids, mesh, progress: as in `answers.answer`.
      rule: a name of `rules.RULES`, or "auto": each row's own (`rules.rule_for`).
    Returns: ExactMatch with one Answered per prompt, in order.
    Raises QtjaxError: an unknown rule, an empty or too long prompt.
    """
    names = [rule_for(p.row, p.completion) if rule == "auto" else rule for p in prompts]
    rules = [rule_named(name) for name in names]
    new = answer(
        config, params, [p.ids for p in prompts], max_new_tokens=max_new_tokens, batch_size=batch_size,
        stop_ids=stop_ids, overlay=overlay, task_ids=[p.task_id for p in prompts], mesh=mesh, progress=progress,
    )  # fmt: skip
    texts = tokenizer.batch_decode(new, skip_special_tokens=True)
    answered = []
    for prompt, name, judge, text, ids in zip(prompts, names, rules, texts, new, strict=True):
        reference = reference_of(prompt.row, prompt.completion)
        asked, task = tokenizer.decode(prompt.ids, skip_special_tokens=True), str(prompt.row.get("task") or "")
        answered.append(Answered(asked, reference, text, name, judge(reference, text), task, len(ids) < max_new_tokens))
    groups = defaultdict(list)
    for a in answered:
        groups[a.task].append(a.correct)
    by_task = {task: (sum(g) / len(g), len(g)) for task, g in sorted(groups.items()) if task}
    count = len(answered)
    accuracy, ended = (sum(x) / count if count else float("nan") for x in ([a.correct for a in answered], [a.ended for a in answered]))
    return ExactMatch(accuracy, ended, count, by_task, answered)
