"""Multitask prompt tuning (Wang et al. 2023, arXiv 2303.02861): one prompt, scaled by a low-rank matrix of each task.

p_t = P * (cols_t rows_t), elementwise; P [p, D] ~ N(0, 1), cols [T, p, R] and rows [T, R, D] ~ N(0, 0.02^2), as in PEFT
(the paper starts from distilled prompts). `task_ids` say which task: int [B], or [B, L] where a packed row holds
several: the prompts of all T tasks then stand before the row, and a token sees those of its own. With one task they may
be left out (PEFT insists on them).

PEFT's other initialisations read the file of an earlier training or a tokenizer and are refused by name.
"""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from qtjax.models import Edits
from qtjax.overlays.base import Base, Context, Method
from qtjax.overlays.fields import require, setting, to_peft
from qtjax.overlays.leaves import Leaf, normal
from qtjax.overlays.prompt import TEXT_FIELDS, prompt_leaf, refuse_text
from qtjax.overlays.sites import claims
from qtjax.overlays.tokens import Sizes, TokenFields, described, exact, read_tokens, whole
from qtjax.tree import Tree

_SOURCE_FIELDS = ("prompt_tuning_init_state_dict_path", "prompt_tuning_init_task")
_INITS = ("RANDOM", "TEXT", "AVERAGE_SOURCE_TASKS", "EXACT_SOURCE_TASK", "ONLY_SOURCE_SHARED")


@dataclass(frozen=True)
class MptFields(TokenFields):
    """num_tasks: T; num_ranks: R of each task's factor."""

    num_tasks: int = setting(1, "int>0")
    num_ranks: int = setting(1, "int>0")
    prompt_tuning_init: str = setting("RANDOM", "choice", _INITS)


@dataclass(frozen=True)
class MptSpec:
    """Settings by PEFT's names and the base model's sizes."""

    fields: MptFields
    sizes: Sizes


def _read(base: Base, given: Mapping[str, Any], strict: bool) -> MptSpec:
    remedy = "use 'RANDOM', and load_adapter to go on from an earlier training"
    if strict:
        refuse_text(given, remedy)
        path = given.get(_SOURCE_FIELDS[0])
        require(path is None, _SOURCE_FIELDS[0], path, f"no file is read for a fresh overlay; {remedy}")
    settings, sizes = read_tokens("mpt", MptFields, base, given, strict, descriptive=(*TEXT_FIELDS, *_SOURCE_FIELDS))
    kind = settings.prompt_tuning_init
    require(not strict or kind == "RANDOM", "prompt_tuning_init", kind, f"needs files and is not supported; {remedy}")
    return MptSpec(dataclasses.replace(settings, prompt_tuning_init="RANDOM"), sizes)


def _leaves(spec: MptSpec) -> list[Leaf]:
    count, tasks, ranks = spec.fields.num_virtual_tokens, spec.fields.num_tasks, spec.fields.num_ranks
    cols, rows = (tasks, count, ranks), (tasks, ranks, spec.sizes.token_dim)
    return [
        prompt_leaf(spec.sizes, count, normal(1.0)),
        whole("prefix_task_cols", cols, (None, None, None), "prefix_task_cols", normal(0.02)),
        whole("prefix_task_rows", rows, (None, None, "embed"), "prefix_task_rows", normal(0.02)),
    ]


def _expand(spec: MptSpec, params: Tree, frozen: Tree, context: Context) -> Edits:
    del spec, frozen, context
    return Edits({}, virtual=params["prompt_embeddings"] * exact(params["prefix_task_cols"], params["prefix_task_rows"]))


def _to_peft(spec: MptSpec) -> dict[str, Any]:
    off = dict.fromkeys(TEXT_FIELDS) | {"prompt_tuning_init_state_dict_path": None, "prompt_tuning_init_task": 0}
    return {"peft_type": "MULTITASK_PROMPT_TUNING", **to_peft(spec.fields), **off, **described(spec.sizes)}


METHOD = Method(
    fields=MptFields,
    read=_read,
    leaves=_leaves,
    expand=_expand,
    to_peft=_to_peft,
    claims=claims("MULTITASK_PROMPT_TUNING"),
    unmergeable="a prompt is tokens before the row, no weight",
    tasks=lambda spec: spec.fields.num_tasks,
)
