"""From a row to an example: five shapes of rows, one meaning. Nothing is guessed silently: what cannot be read is an error
that names the row, what holds nothing to train is a skip with a reason that is counted."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from qtjax.config import DataSection
from qtjax.errors import QtjaxError, near_names

ROLES = {
    "system": "system", "developer": "system", "user": "user", "assistant": "assistant", "tool": "tool", "function": "tool",
}  # fmt: skip
SHAREGPT_ROLES = {
    "system": "system", "human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant",
    "function_call": "assistant", "observation": "tool", "tool": "tool",
}  # fmt: skip

# Names of the same thing in common datasets; the first that a row has counts.
_PAIRS = (("prompt", "completion"), ("question", "answer"), ("prompt", "response"))
_CONVERSATIONS = ("messages", "conversations", "conversation")
_INPUTS, _OUTPUTS = ("input", "context"), ("output", "response")


@dataclass(frozen=True)
class Example:
    """One sample before rendering: `messages`, or a (prompt, completion) pair, or a `text`.

    trained: for each message, whether its text is a target (assistant turns that are not empty and not weighted 0).
    tools: what the row offers as tools, handed to the chat template.
    empty_turns: assistant turns without text inside a conversation that has others; they stay as context.
    """

    messages: tuple[dict[str, Any], ...] = ()
    trained: tuple[bool, ...] = ()
    tools: tuple[Any, ...] = ()
    empty_turns: int = 0
    prompt: str = ""
    completion: str = ""
    text: str = ""

    @property
    def texts(self) -> list[str]:
        """Everything said in it, before any template."""
        return [self.prompt, self.completion, self.text, *(m["content"] for m in self.messages)]

    def as_messages(self, system_prompt: str = "") -> "Example":
        """The conversation: a pair becomes a user and an assistant turn, `system_prompt` opens one that has no system message."""
        messages, trained = self.messages, self.trained
        if not messages:
            messages = ({"role": "user", "content": self.prompt}, {"role": "assistant", "content": self.completion})
            trained = (False, True)
        if system_prompt and messages[0]["role"] != "system":
            messages, trained = ({"role": "system", "content": system_prompt}, *messages), (False, *trained)
        return Example(messages=messages, trained=trained, tools=self.tools, empty_turns=self.empty_turns)


class Skip(NamedTuple):
    """A row without anything to train; `reason` is what the statistics count it under."""

    reason: str


def resolve_format(row: Mapping[str, Any], data: DataSection, where: str) -> str:
    """The shape of a dataset's rows: data.format, or read off a row's columns. Raises QtjaxError when none fits."""
    if data.format != "auto":
        return data.format
    if data.prompt_column:
        named = row.get(data.prompt_column)
        return _conversation_shape(named) if not data.completion_column and _is_conversation(named) else "prompt_completion"
    if data.completion_column:
        return "text"
    for column in _CONVERSATIONS:
        if _is_conversation(row.get(column)):
            return _conversation_shape(row[column])
    if "instruction" in row and ("instances" in row or any(c in row for c in _OUTPUTS)):
        return "instruction"
    if any(p in row and c in row for p, c in _PAIRS):
        return "prompt_completion"
    if "text" in row:
        return "text"
    raise QtjaxError(
        f"{where}: no known shape in columns {_columns(row)}; name them with data.prompt_column and data.completion_column"
        " (c0, c1, ... for a table without a header), or set data.format"
    )


def to_example(row: Mapping[str, Any], data: DataSection, where: str, fmt: str = "") -> Example | Skip:
    """The example in a row.

    Args:
      row: one row of a source; where: "file:line", opens every message.
      fmt: what `resolve_format` said of the dataset; empty: of this row.
    Returns: Example, or Skip("empty answer" | "no answer" | "empty text").
    Raises QtjaxError: a column that is not there (existing ones are listed), an unknown role, content that is no text.
    """
    fmt = fmt or resolve_format(row, data, where)
    if fmt == "text":
        text = _text(row, _column(row, data.completion_column, ("text",), where), where)
        return Example(text=text) if text.strip() else Skip("empty text")
    if fmt == "instruction":
        return _instruction(row, data, where)
    if fmt in ("messages", "sharegpt"):
        column = _column(row, data.prompt_column, _CONVERSATIONS, where)
        roles = SHAREGPT_ROLES if fmt == "sharegpt" else ROLES
        return _conversation(row, _messages(row[column], roles, f"{where}, column {column!r}"), where)
    return _pair(row, data, where)


def _columns(row: Mapping[str, Any]) -> str:
    names = [repr(str(name)[:40]) for name in row]
    return ", ".join(names[:12]) + (f" and {len(names) - 12} more" if len(names) > 12 else "")


def _column(row: Mapping[str, Any], named: str, usual: Sequence[str], where: str) -> str:
    """The column that the config names, or the first usual one. Raises QtjaxError when the row has none."""
    if named:
        if named not in row:
            raise QtjaxError(
                f"{where}: has no column {named!r}{near_names(named, map(str, row))}; it has {_columns(row)}; columns are named for"
                " data.path and data.eval_path alike (--data.eval-path= holds out a part of data.path)"
            )
        return named
    for column in usual:
        if column in row:
            return column
    raise QtjaxError(
        f"{where}: has no column {' or '.join(map(repr, usual))}; it has {_columns(row)}; name it with"
        " data.prompt_column or data.completion_column"
    )


def _text(row: Mapping[str, Any], column: str, where: str) -> str:
    value = row[column]
    if value is None:
        return ""
    if isinstance(value, bool | int | float | str):
        return str(value)
    raise QtjaxError(f"{where}: column {column!r} must hold text, holds {_kind(value)}; name another column or set data.format")


def _kind(value: Any) -> str:
    return {list: "a list", dict: "an object", int: "a number", float: "a number", type(None): "nothing"}.get(type(value), f"a {type(value).__name__}")


def _instruction(row: Mapping[str, Any], data: DataSection, where: str) -> Example | Skip:
    instruction = _text(row, _column(row, data.prompt_column, ("instruction",), where), where)
    if not data.completion_column and not any(c in row for c in _OUTPUTS) and "instances" in row:
        # Self-Instruct keeps input and output in a list beside the instruction.
        instances = row["instances"]
        if not isinstance(instances, list) or len(instances) != 1 or not isinstance(instances[0], dict):
            raise QtjaxError(f"{where}: 'instances' must hold exactly one object with input and output; write one row per instance")
        row = instances[0]
    answer = _text(row, _column(row, data.completion_column, _OUTPUTS, where), where)
    given = next((_text(row, c, where) for c in _INPUTS if c in row), "")
    if not answer.strip():
        return Skip("empty answer")
    return Example(prompt=f"{instruction}\n{given}" if given.strip() else instruction, completion=answer)


def _pair(row: Mapping[str, Any], data: DataSection, where: str) -> Example | Skip:
    known = next((pair for pair in _PAIRS if all(c in row for c in pair)), None)
    usual = known or tuple(zip(*_PAIRS))
    prompt = _column(row, data.prompt_column, (usual[0],) if known else tuple(dict.fromkeys(usual[0])), where)
    answer = _column(row, data.completion_column, (usual[1],) if known else tuple(dict.fromkeys(usual[1])), where)
    if _is_conversation(row[prompt]) and _is_conversation(row[answer]):
        # Conversational pairs: what stands in the prompt is context, whoever said it.
        context = [m | {"weight": 0} for m in _messages(row[prompt], ROLES, f"{where}, column {prompt!r}")]
        return _conversation(row, [*context, *_messages(row[answer], ROLES, f"{where}, column {answer!r}")], where)
    completion = _text(row, answer, where)
    return Example(prompt=_text(row, prompt, where), completion=completion) if completion.strip() else Skip("empty answer")


def _is_conversation(value: Any) -> bool:
    # Arrow's older list-of-struct columns come back as an object of lists.
    if isinstance(value, dict):
        return {"role", "content"} <= set(value) or {"from", "value"} <= set(value)
    return isinstance(value, list) and all(isinstance(m, dict) for m in value) and bool(value)


def _conversation_shape(value: Any) -> str:
    first = value if isinstance(value, dict) else value[0]
    return "sharegpt" if "from" in first else "messages"


def _messages(value: Any, roles: Mapping[str, str], where: str) -> list[dict[str, Any]]:
    """Messages with the field's names: role, content (a string), and tool_calls, name, weight where given."""
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except json.JSONDecodeError as error:
            raise QtjaxError(f"{where}: must be a list of messages, is a text that is not JSON ({error.msg})") from None
    if isinstance(value, dict):
        value = [dict(zip(value, fields)) for fields in zip(*value.values())]
    if not isinstance(value, list):
        raise QtjaxError(f"{where}: must be a list of messages, is {_kind(value)}")
    return [_message(m, roles, f"{where}, message {i}") for i, m in enumerate(value)]


def _message(message: Any, roles: Mapping[str, str], where: str) -> dict[str, Any]:
    sharegpt = roles is SHAREGPT_ROLES
    role_key, content_key = ("from", "value") if sharegpt else ("role", "content")
    if not isinstance(message, dict) or role_key not in message:
        other = "messages" if sharegpt else "sharegpt"
        raise QtjaxError(f"{where}: must be an object with {role_key!r} and {content_key!r}; if it has others, try data.format = {other!r}")
    said = message[role_key]
    if said not in roles:
        raise QtjaxError(
            f"{where}: unknown role {said!r}{near_names(str(said), roles)}; known roles are {', '.join(roles)}; rename it or drop the row"
        )
    content = _content(message.get(content_key), where)
    out: dict[str, Any] = {"role": roles[said], "content": content}
    calls = message.get("tool_calls")
    if said == "function_call":
        calls = _function_calls(content)
        out["content"] = "" if calls else content
    if calls:
        out["tool_calls"] = calls
    out |= {key: message[key] for key in ("name", "tool_call_id") if message.get(key) is not None}
    weight = message.get("weight", message.get("loss_weight"))
    if weight is not None and out["role"] == "assistant":
        if weight not in (0, 1):
            raise QtjaxError(f"{where}: weight {weight!r} must be 0 (context only) or 1 (trained)")
        out["weight"] = int(weight)
    return out


def _content(content: Any, where: str) -> str:
    if content is None:
        return ""
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise QtjaxError(f"{where}: content must be text or a list of text parts, is {_kind(content)}")
    parts = []
    for part in content:
        text = (part.get("text") or part.get("value")) if isinstance(part, dict) and part.get("type") == "text" else None
        if isinstance(part, dict) and part.get("type") == "text" and isinstance(text or "", str):
            parts.append(text or "")
        else:
            kind = part.get("type") if isinstance(part, dict) else _kind(part)
            raise QtjaxError(f"{where}: content part of type {kind!r} cannot be trained on; only text parts can")
    return "".join(parts)


def _function_calls(content: str) -> list[dict[str, Any]]:
    """ShareGPT's function_call text, a JSON object or list with name and arguments, in OpenAI's form; [] if it is none."""
    try:
        calls = json.loads(content)
    except json.JSONDecodeError:
        return []
    calls = calls if isinstance(calls, list) else [calls]
    if not calls or not all(isinstance(c, dict) and "name" in c for c in calls):
        return []
    return [{"type": "function", "function": {"name": c["name"], "arguments": c.get("arguments", {})}} for c in calls]


def _conversation(row: Mapping[str, Any], messages: list[dict[str, Any]], where: str) -> Example | Skip:
    answers = [m["role"] == "assistant" and m.get("weight", 1) != 0 for m in messages]
    trained = tuple(a and bool(m["content"].strip() or m.get("tool_calls")) for a, m in zip(answers, messages))
    if not any(trained):
        return Skip("empty answer" if any(answers) else "no answer")
    tools = row.get("tools")
    if isinstance(tools, str):
        try:
            tools = json.loads(tools) if tools.strip() else None
        except json.JSONDecodeError as error:
            raise QtjaxError(f"{where}: column 'tools' is not JSON ({error.msg}, column {error.colno})") from None
    if tools is not None and not isinstance(tools, list):
        raise QtjaxError(f"{where}: column 'tools' must be a list, is {_kind(tools)}")
    plain = tuple({k: v for k, v in m.items() if k != "weight"} for m in messages)
    return Example(messages=plain, trained=trained, tools=tuple(tools or ()), empty_turns=sum(answers) - sum(trained))
