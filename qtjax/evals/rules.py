"""When a generated answer counts as right: one small function a rule, in a registry by name."""

import re
import string
from collections.abc import Callable, Mapping
from typing import Any

from qtjax.errors import QtjaxError, near_names
from qtjax.smol import instruct

Rule = Callable[[str, str], bool]

# A sign counts only where no digit stands before it: "16-3" holds 16 and 3.
_NUMBER = re.compile(r"(?:(?<![\d.])[-+])?\$?(?:\d[\d,]*(?:\.\d+)?|\.\d+)")
_LABEL = re.compile(r"\b(?:answer|option|solution|ending)\d+\b|\b(?:true|false)\b")


def normalise(text: str) -> str:
    """Lower case, no ASCII punctuation, no English article, single spaces (SQuAD's normalisation, arXiv 1606.05250)."""
    plain = text.lower().translate(str.maketrans("", "", string.punctuation))
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", plain).split())


def final_number(text: str) -> float | None:
    """The first number after the last "####" (GSM8K's mark), else the last number of the text; None without one.

    Thousands separators and a dollar sign are ignored, so "$1,200" is 1200.
    """
    marked = _NUMBER.findall(text.rpartition("####")[2]) if "####" in text else []
    found = marked[:1] or _NUMBER.findall(text)[-1:]
    return float(found[0].replace(",", "").replace("$", "")) if found else None


def _number(reference: str, generated: str) -> bool:
    expected, found = final_number(reference), final_number(generated)
    # 1e-6 relative: references spell the same number as "4", "4.0" or rounded decimals.
    return expected is not None and found is not None and abs(found - expected) <= 1e-6 * max(1.0, abs(expected))


def _label(reference: str, generated: str) -> bool:
    found = _LABEL.findall(generated.lower())
    return bool(found) and found[0] == reference.strip().lower()


def _equal(reference: str, generated: str) -> bool:
    return normalise(generated) == normalise(reference) != ""


def _contains(reference: str, generated: str) -> bool:
    wanted = normalise(reference)
    return wanted != "" and f" {wanted} " in f" {normalise(generated)} "


RULES: dict[str, Rule] = {
    "smol-instruct": instruct.check,  # what follows "the answer is", normalised, equals the row's answer
    "number": _number,  # the final numbers are equal (GSM8K's "#### 72")
    "label": _label,  # the first "answer3"-like label of the generation is the reference (LLM-Adapters' scoring)
    "equal": _equal,  # equal after `normalise`
    "contains": _contains,  # the reference's words stand in the generation, in order and adjacent, after `normalise`
}


def rule_named(name: str) -> Rule:
    """Raises QtjaxError for an unknown name, listing near ones."""
    if name not in RULES:
        raise QtjaxError(f"rule {name!r}: must be auto or one of {', '.join(RULES)}{near_names(name, RULES)}")
    return RULES[name]


def reference_of(row: Mapping[str, Any], completion: str) -> str:
    """The row's own short `answer` where it has one beside the completion, else the completion."""
    answer = row.get("answer")
    return str(answer) if isinstance(answer, str | int | float) and str(answer).strip() else completion


def rule_for(row: Mapping[str, Any], completion: str) -> str:
    """Which rule fits a row.

    smol-instruct rows (with `task`, `provenance`, `answer`) -> "smol-instruct"; a reference with "####" or that is
    itself a number -> "number"; a label such as "answer2" or "true" -> "label"; a short answer beside a longer
    completion -> "contains"; else the whole completion -> "equal".
    """
    reference = reference_of(row, completion)
    if {"task", "provenance", "answer"} <= row.keys():
        return "smol-instruct"
    if "####" in reference or _NUMBER.fullmatch(reference.strip()):
        return "number"
    if _LABEL.fullmatch(reference.strip().lower()):
        return "label"
    return "equal" if reference.strip() == completion.strip() else "contains"
