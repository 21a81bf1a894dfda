"""Chat templates: rendered by transformers itself, with the characters of every answer found in the rendering.

Most templates carry no marks around what the assistant says, so an answer's place is derived from renderings alone: it begins
where the generation prompt of the messages before it ends, and its turn ends where the rendering of the messages up to it ends.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from qtjax.data.examples import Example
from qtjax.errors import QtjaxError


class Turn(NamedTuple):
    """Characters of one trained answer in the full rendering.

    start: end of the generation prompt. text_end: end of the answer's own text, or of `start` where the template rewrote it.
    end: end of the assistant's turn. verbatim: the answer's text stands unchanged in the rendering.
    """

    start: int
    text_end: int
    end: int
    verbatim: bool


class ChatTemplate(str):
    """Jinja text that knows where it came from, for messages."""

    origin: str = ""

    @classmethod
    def of(cls, text: str, origin: str) -> "ChatTemplate":
        template = cls(text)
        template.origin = origin
        return template


def resolve_template(tokenizer: Any, setting: str) -> ChatTemplate | None:
    """The Jinja text of data.chat_template: 'auto' (the tokenizer's own, or None), 'none', or a file. Raises QtjaxError for a missing file."""
    if setting == "none":
        return None
    if setting == "auto":
        # A tokenizer may hold several named templates; transformers then picks by name and by tools.
        return ChatTemplate.of(tokenizer.get_chat_template(), "of the tokenizer") if tokenizer.chat_template else None
    try:
        return ChatTemplate.of(Path(setting).expanduser().read_text(encoding="utf-8"), setting)
    except (OSError, UnicodeDecodeError) as error:
        raise QtjaxError(f"data.chat_template = {setting!r}: cannot be read ({error}); must be 'auto', 'none' or a Jinja file") from None


def render(
    tokenizer: Any,
    messages: Sequence[dict[str, Any]],
    template: str,
    where: str,
    *,
    tools: Sequence[Any] = (),
    add_generation_prompt: bool = False,
) -> str:
    """The text that transformers renders. Raises QtjaxError with row and role when the template refuses the messages."""
    try:
        return tokenizer.apply_chat_template(
            list(messages),
            tools=list(tools) or None,
            chat_template=template,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
        )
    except Exception as error:  # templates are programs: they raise by themselves, and fail on what they do not expect
        roles = ", ".join(m["role"] for m in messages) or "none"
        reason = " ".join(str(error).split())[:200]
        raise QtjaxError(
            f"{where}: the chat template {_name(template)} refuses messages with roles {roles} ({reason}); reshape the row, or set data.chat_template"
        ) from None


def _name(template: str) -> str:
    """Where a template came from, or its head, to tell it from others in a message."""
    head = " ".join(template.split())
    return getattr(template, "origin", "") or repr(head[:40] + ("..." if len(head) > 40 else ""))


def render_turns(tokenizer: Any, example: Example, template: str, where: str) -> tuple[str, list[Turn]]:
    """The full rendering of a conversation and the place of each trained answer, in order.

    Raises QtjaxError when the template refuses the messages, when a generation prompt is not a prefix of the full rendering (the
    answer's place would be a guess), or when the template leaves a tool call out.
    """
    messages = example.messages
    full = render(tokenizer, messages, template, where, tools=example.tools)
    turns: list[Turn] = []
    for i, message in enumerate(messages):
        if not example.trained[i]:
            continue
        prompt = render(tokenizer, messages[:i], template, where, tools=example.tools, add_generation_prompt=True)
        if not full.startswith(prompt):
            raise QtjaxError(
                f"{where}, message {i}: the generation prompt of the chat template {_name(template)} is not a prefix of the full rendering"
                f" (it ends in {prompt[-30:]!r} where the rendering has {full[max(len(prompt) - 30, 0) : len(prompt)]!r}), so the"
                " answer cannot be told from the prompt; set data.chat_template to another (in a file laid out for reading, line breaks and"
                " indentation are output too)"
            )
        start, end = len(prompt), len(full)
        if i + 1 < len(messages):
            until = render(tokenizer, messages[: i + 1], template, where, tools=example.tools)
            # A template may render a turn differently when others follow; the next text then bounds the turn.
            end = len(until) if full.startswith(until) else _next_text(full, messages, i, start)
        turns.append(_turn(full, message, start, max(end, start), f"{where}, message {i}"))
    return full, turns


def _next_text(full: str, messages: Sequence[dict[str, Any]], i: int, start: int) -> int:
    """Where the text of the next message that has one begins, after answer i's own text; else the end."""
    text = messages[i]["content"].strip()
    at = full.find(text, start)
    after = at + len(text) if at >= 0 else start
    following = next((m["content"].strip() for m in messages[i + 1 :] if m["content"].strip()), "")
    at = full.find(following, after) if following else -1
    return at if at >= 0 else len(full)


def _turn(full: str, message: dict[str, Any], start: int, end: int, where: str) -> Turn:
    said = full[start:end]
    for call in message.get("tool_calls", ()):
        name = call.get("function", call).get("name", "")
        if name not in said:
            raise QtjaxError(
                f"{where}: the chat template leaves out the call of tool {name!r}, so there would be nothing to train;"
                " use a template that renders tool calls, or write the call as the message's content"
            )
    text = message["content"].strip()
    at = said.find(text) if text and not message.get("tool_calls") else -1
    return Turn(start, start + at + len(text), end, True) if at >= 0 else Turn(start, start, end, False)
