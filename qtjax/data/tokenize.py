"""Examples to token ids with trained spans, in batches; long samples cut, hopeless ones skipped, all of it counted."""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from qtjax.config import DataSection
from qtjax.data.dataset import DataStats, TokenizedDataset
from qtjax.data.examples import Example, Skip, resolve_format, to_example
from qtjax.data.growing import Growing, Triple
from qtjax.data.progress import LateProgress
from qtjax.data.rows import Row, Rows
from qtjax.data.spans import mark_turns
from qtjax.data.tasks import task_of
from qtjax.data.templates import render, render_turns, resolve_template
from qtjax.data.tokenizer import closing_ids
from qtjax.errors import QtjaxError

# Handed to the tokenizer at once, whichever is reached first: enough to keep its threads busy, little enough for a smooth
# progress bar and for the offsets of all tokens in memory.
CHUNK_ROWS = 1000
CHUNK_CHARACTERS = 4_000_000

UNCLOSED = "answers without an end-of-turn token"
EMPTY_TURNS = "empty assistant turns left untrained"
SPLIT = "texts split at max_length"
BEYOND = "no answer token within max_length"


def tokenize(
    tokenizer: Any, rows: Rows, data: DataSection, *, progress: bool = True, folder: Path | None = None, scratch: Path | None = None
) -> TokenizedDataset:
    """Every row rendered, tokenized and marked.

    With a chat template: exactly the ids of transformers' apply_chat_template. Without: BOS + tokens(prompt) +
    tokens(completion) + EOS. Format `text`: BOS + tokens(text) + EOS, every token but the first trained; a text longer than
    max_length makes several samples that overlap by one token, so that each token is a target once.

    Args: folder, scratch: where the samples are written, as in `Growing`.
    Raises QtjaxError: a row that cannot be read (with its place), a conversation without a chat template, no sample left.
    """
    encoder = _Encoder(tokenizer, data)
    fmt = dataset_format(rows, data)
    index = rows.index
    skipped: Counter[str] = Counter()

    def encode(items: list[tuple[int, Row, Example]]) -> None:
        try:
            encoded = encoder.encode([e for _, _, e in items], [rows.where(i) for i, _, _ in items])
        except TypeError:
            for i, _, example in items:
                _refuse_broken_text(example, rows.where(i))
            raise
        samples: list[Triple] = []
        places: list[int] = []
        tasks: list[int] = []
        for (i, row, _), result in zip(items, encoded, strict=True):
            if isinstance(result, Skip):
                skipped[result.reason] += 1
            else:
                samples.extend(result)
                places.extend([int(index[i])] * len(result))
                tasks.extend([task_of(row, data, rows.where(i))] * len(result))
        growing.add(samples, places, tasks)

    with LateProgress("tokenizing", len(rows), enabled=progress) as bar, Growing(folder, scratch) as growing:
        items: list[tuple[int, Row, Example]] = []
        characters = begun = 0
        for i in range(len(rows)):
            row = rows[i]
            example = to_example(row, data, rows.where(i), fmt)
            if isinstance(example, Skip):
                skipped[example.reason] += 1
            else:
                items.append((i, row, example))
                characters += sum(map(len, example.texts))
            if i + 1 - begun == CHUNK_ROWS or characters > CHUNK_CHARACTERS or i + 1 == len(rows):
                encode(items)
                bar.advance(i + 1 - begun)
                items, characters, begun = [], 0, i + 1
        if not growing.samples:
            reasons = ", ".join(f"{reason} {count}" for reason, count in skipped.items())
            raise QtjaxError(
                f"{rows.name}: no sample is left to train on, all {len(rows)} rows were skipped ({reasons}); check data.completion_column and data.max_length"
            )
        return growing.finish(DataStats(rows=len(rows), cut=encoder.cut, skipped=dict(skipped), noted=dict(encoder.noted)))


def dataset_format(rows: Rows, data: DataSection) -> str:
    """The shape of the rows, from the first of the leading rows that shows it (a first row may be an empty conversation)."""
    first: QtjaxError | None = None
    for i in range(min(len(rows), 100)):
        try:
            return resolve_format(rows[i], data, rows.where(i))
        except QtjaxError as error:
            first = first or error
    raise first or QtjaxError(f"{rows.name}: holds no rows")


def prompt_and_answer(
    tokenizer: Any, example: Example, template: str | None, where: str, *, system_prompt: str = ""
) -> tuple[np.ndarray, str]:
    """What to generate from, and what was to be said: (prompt ids int32 [l], text of the last trained answer).

    With a template the prompt ends in the generation prompt; without, it is BOS + tokens(prompt).
    Raises QtjaxError for a plain text, which has no answer, and for conversations without a template.
    """
    if example.text:
        raise QtjaxError(f"{where}: a plain text has no prompt to answer; use rows with a prompt and an answer")
    if template is None:
        _refuse_conversation(example, where)
        return np.asarray(_special(tokenizer.bos_token_id) + _ids(tokenizer, [example.prompt])[0], np.int32), example.completion
    chat = example.as_messages(system_prompt)
    last = max(i for i, trained in enumerate(chat.trained) if trained)
    text = render(tokenizer, chat.messages[:last], template, where, tools=chat.tools, add_generation_prompt=True)
    return np.asarray(_ids(tokenizer, [text])[0], np.int32), chat.messages[last]["content"]


def _special(token_id: int | None) -> list[int]:
    return [] if token_id is None else [token_id]


def _ids(tokenizer: Any, texts: Sequence[str]) -> list[list[int]]:
    if not texts:
        return []
    return tokenizer(list(texts), add_special_tokens=False, return_attention_mask=False, verbose=False)["input_ids"]


def _refuse_broken_text(example: Example, where: str) -> None:
    """JSON can spell half of a surrogate pair (\\ud800), which is no text; tokenizers refuse a whole batch for it without saying where."""
    for text in example.texts:
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise QtjaxError(f"{where}: holds {text[error.start]!r}, half of a character, which is no text; mend or drop the row") from None


def _refuse_conversation(example: Example, where: str) -> None:
    if example.messages:
        raise QtjaxError(
            f"{where}: a conversation needs a chat template, and the tokenizer has none (or data.chat_template is 'none');"
            " give a Jinja file with data.chat_template, or rows with a prompt and an answer"
        )


class _Encoder:
    """Encodes chunks of examples and counts what it cuts and notes on the way."""

    def __init__(self, tokenizer: Any, data: DataSection):
        self.tokenizer = tokenizer
        self.max_length = data.max_length
        self.system_prompt = data.system_prompt
        self.template = resolve_template(tokenizer, data.chat_template)
        if self.system_prompt and self.template is None:
            raise QtjaxError(
                "data.system_prompt is set, but without a chat template there is no place for it; set data.chat_template, or write it into the prompts"
            )
        self.bos, self.eos = _special(tokenizer.bos_token_id), _special(tokenizer.eos_token_id)
        closers = closing_ids(tokenizer)
        self.closers = np.zeros(max([len(tokenizer), *closers]) + 1, bool)
        self.closers[list(closers)] = True
        self.cut = 0
        self.noted: Counter[str] = Counter()

    def encode(self, examples: Sequence[Example], where: Sequence[str]) -> list[list[Triple] | Skip]:
        """One result per example, in order: its samples (one, or the pieces of a long text), or why there is none."""
        results: list[list[Triple] | Skip] = [Skip(BEYOND)] * len(examples)
        texts = [i for i, e in enumerate(examples) if e.text]
        rest = [i for i, e in enumerate(examples) if not e.text]
        for i, ids in zip(texts, _ids(self.tokenizer, [examples[i].text for i in texts])):
            results[i] = self._text(ids)
        encode = self._plain if self.template is None else self._chat
        for i, result in zip(rest, encode([examples[i] for i in rest], [where[i] for i in rest])):
            results[i] = result
        return results

    def _text(self, tokens: list[int]) -> list[Triple] | Skip:
        ids = np.asarray(self.bos + tokens + self.eos, np.int32)
        if len(ids) < 2:
            return Skip("empty text")
        closing = np.zeros(len(ids), bool)
        closing[-1] = bool(self.eos)
        pieces = []
        # The last token of a piece opens the next one as context: no target is lost, none is trained twice.
        for begin in range(0, len(ids) - 1, self.max_length - 1):
            piece = slice(begin, begin + self.max_length)
            mask = np.ones(len(ids[piece]), bool)
            mask[0] = False
            pieces.append((ids[piece], mask, closing[piece] & mask))
        self.noted.update({SPLIT: 1} if len(pieces) > 1 else {})
        return pieces

    def _plain(self, examples: Sequence[Example], where: Sequence[str]) -> list[list[Triple] | Skip]:
        for example, place in zip(examples, where):
            _refuse_conversation(example, place)
        prompts = _ids(self.tokenizer, [e.prompt for e in examples])
        answers = _ids(self.tokenizer, [e.completion for e in examples])
        out = []
        for prompt, answer in zip(prompts, answers, strict=True):
            ids = np.asarray(self.bos + prompt + answer + self.eos, np.int32)
            mask = np.arange(len(ids)) >= max(len(self.bos) + len(prompt), 1)
            closing = np.zeros(len(ids), bool)
            closing[-1] = bool(self.eos)
            self.noted.update({} if self.eos else {UNCLOSED: 1})
            out.append(self._fit(ids, mask, closing))
        return out

    def _chat(self, examples: Sequence[Example], where: Sequence[str]) -> list[list[Triple] | Skip]:
        if not examples:
            return []
        chats = [e.as_messages(self.system_prompt) for e in examples]
        rendered = [render_turns(self.tokenizer, chat, self.template, place) for chat, place in zip(chats, where)]
        batch = self.tokenizer(
            [text for text, _ in rendered],
            add_special_tokens=False,  # the template writes BOS itself
            return_offsets_mapping=True,
            return_attention_mask=False,
            verbose=False,
        )
        out = []
        for chat, (text, turns), tokens, offsets in zip(chats, rendered, batch["input_ids"], batch["offset_mapping"], strict=True):
            ids = np.asarray(tokens, np.int32)
            marks = mark_turns(ids, np.asarray(offsets, np.int64).reshape(-1, 2), text, turns, self.closers)
            self.noted.update({UNCLOSED: marks.unclosed} if marks.unclosed else {})
            self.noted.update({EMPTY_TURNS: chat.empty_turns} if chat.empty_turns else {})
            out.append(self._fit(ids, marks.loss_mask, marks.closing))
        return out

    def _fit(self, ids: np.ndarray, mask: np.ndarray, closing: np.ndarray) -> list[Triple] | Skip:
        kept = slice(0, self.max_length)
        if not mask[kept].any():
            return Skip(BEYOND)
        self.cut += bool(mask[self.max_length :].any())
        return [(ids[kept], mask[kept], closing[kept])]
