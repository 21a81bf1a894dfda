"""Rows of multiple-choice files -> a prompt and its candidate answers."""

import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from qtjax.errors import QtjaxError

FORMS = ("auto", "cloze", "chat", "label")

_LABELLED = re.compile(r"\b(answer|option|solution|ending)(\d+)\s*:\s*", re.IGNORECASE)
_LEAD = re.compile(r"^please choose .*?(?:question|sentence|context|solution)s?\s*:\s*", re.IGNORECASE | re.DOTALL)


class Question(NamedTuple):
    """`choices` follow `prompt`; `answer` indexes them.

    trained: prompt and choice are rendered and tokenized as a training sample is (chat template, if there is one);
    otherwise as plain text with a space between.
    """

    prompt: str
    choices: tuple[str, ...]
    answer: int
    trained: bool = False
    task_id: int = 0


def read_question(row: Mapping[str, Any], form: str = "auto", where: str = "row") -> Question:
    """Reads one row of a known shape.

    Shapes: {"question": {"stem", "choices": [{"label", "text"}]}, "answerKey"} (CommonsenseQA, ARC's originals);
    {"instruction": "... Answer1: x Answer2: y ...", "output", "answer"} (LLM-Adapters); and the generic
    {"prompt" | "question", "choices": [...] (or Hugging Face's {"text": [...], "label": [...]}), "answer" | "answerKey":
    index counted from 0, letter, or the text}.

    Args:
      form: "cloze" asks for the choice's text after the plain text "Question: ...\\nAnswer:" (lm-eval's ARC prompt; a row
        with "prompt" is asked as it stands); "chat" asks for it as the answer to the bare question, rendered as in
        training; "label" asks what an LLM-Adapters row trains, its labelled instruction and its output sentence with each
        label in turn; "auto" is "label" for those rows and "cloze" for the others.
    Raises: QtjaxError naming `where` for a row of no known shape, fewer than two choices, or an answer not among them.
    """
    if form not in FORMS:
        raise QtjaxError(f"form {form!r}: must be one of {', '.join(FORMS)}")
    if isinstance(row.get("instruction"), str) and len(_LABELLED.findall(row["instruction"])) >= 2:
        return _adapters(row, form, where)
    if form == "label":
        raise QtjaxError(f"{where}: form 'label' needs choices inside the instruction (Answer1: ... Answer2: ...); use cloze")
    question = row.get("question")
    stem, listed = (question, row) if not isinstance(question, Mapping) else (question.get("stem"), question)
    texts, labels = _choices(listed.get("choices"), where)
    answer = row["answerKey"] if "answerKey" in row else row.get("answer")
    if isinstance(row.get("prompt"), str):
        prompt = row["prompt"]
    elif isinstance(stem, str):
        prompt = stem.strip() if form == "chat" else _cloze(stem)
    else:
        raise QtjaxError(f"{where}: a multiple-choice row needs a text 'question' or 'prompt', has {', '.join(row)}")
    return Question(prompt, texts, _index(answer, texts, labels, where), form == "chat")


def _cloze(stem: str) -> str:
    return f"Question: {stem.strip()}\nAnswer:"


def _choices(raw: Any, where: str) -> tuple[tuple[str, ...], tuple[str, ...]]:
    letters = tuple("ABCDEFGHIJKLMNOPQRSTUVWXYZ")
    if isinstance(raw, Mapping) and isinstance(raw.get("text"), Sequence):
        texts, labels = tuple(raw["text"]), tuple(raw.get("label", letters[: len(raw["text"])]))
    elif isinstance(raw, Sequence) and not isinstance(raw, str):
        labelled = all(isinstance(c, Mapping) and "text" in c for c in raw)
        texts = tuple(c["text"] for c in raw) if labelled else tuple(raw)
        labels = tuple(str(c.get("label", letters[i])) for i, c in enumerate(raw)) if labelled else letters[: len(texts)]
    else:
        raise QtjaxError(f"{where}: a multiple-choice row needs 'choices', a list of texts or of {{label, text}}")
    if len(texts) < 2 or not all(isinstance(t, str) and t.strip() for t in texts):
        raise QtjaxError(f"{where}: 'choices' must hold two or more texts, holds {list(texts)!r:.80}")
    return texts, labels


def _index(answer: Any, texts: Sequence[str], labels: Sequence[str], where: str) -> int:
    if isinstance(answer, int) and not isinstance(answer, bool) and 0 <= answer < len(texts):
        return answer
    if isinstance(answer, str):
        for known in (labels, texts):
            if answer.strip() in known:
                return list(known).index(answer.strip())
        if answer.strip().isdigit() and int(answer) < len(texts):
            return int(answer)
    raise QtjaxError(
        f"{where}: answer {answer!r} is none of the choices: give an index from 0 to {len(texts) - 1},"
        f" a label ({', '.join(labels[: len(texts)])}) or the choice's text"
    )


def _adapters(row: Mapping[str, Any], form: str, where: str) -> Question:
    instruction, output, answer = row["instruction"], str(row.get("output", "")), str(row.get("answer", ""))
    body = instruction.split("\n\nAnswer format:")[0]
    found = list(_LABELLED.finditer(body))
    ends = [m.start() for m in found[1:]] + [len(body)]
    texts = tuple(body[m.end() : end].strip() for m, end in zip(found, ends))
    labels = tuple(m.group(0).split(":")[0].strip().lower() for m in found)
    if answer not in labels or len(texts) < 2:
        raise QtjaxError(f"{where}: answer {answer!r} is none of the labels in the instruction ({', '.join(labels)})")
    index = labels.index(answer)
    stem = _LEAD.sub("", body[: found[0].start()]).strip()
    if form in ("cloze", "chat"):
        return Question(stem if form == "chat" else _cloze(stem), texts, index, form == "chat")
    sentence = output if answer in output else answer
    return Question(instruction, tuple(sentence.replace(answer, label) for label in labels), index, True)
