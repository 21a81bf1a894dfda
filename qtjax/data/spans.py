"""From characters to tokens: which tokens of a rendering are trained, and which of them closes each answer."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from qtjax.data.templates import Turn


class Marks(NamedTuple):
    """loss_mask bool [L], closing bool [L], and how many answers have no token that closes them."""

    loss_mask: np.ndarray
    closing: np.ndarray
    unclosed: int


def mark_turns(ids: np.ndarray, offsets: np.ndarray, text: str, turns: Sequence[Turn], closers: np.ndarray) -> Marks:
    """The trained tokens of a rendering.

    An answer's first trained token is the first that reaches past the generation prompt; its last is the first closer after
    the answer's text, inside the turn. Where the turn holds no closer (templates that end turns by text
    alone) the turn's text is trained up to its trailing whitespace, and counted as unclosed.

    Args:
      ids: int [L]; offsets: int [L, 2], characters of each token in `text` (both columns non-decreasing).
      turns: from `render_turns`; closers: bool [V], True for ids that can close an answer.
    """
    begins, ends = offsets[:, 0], offsets[:, 1]
    loss_mask = np.zeros(len(ids), bool)
    closing = np.zeros(len(ids), bool)
    closes = closers[ids]
    unclosed = 0
    for turn in turns:
        # By order, not by overlap: byte-level tokenizers give a bare space an empty range.
        first = int(np.searchsorted(ends, turn.start, side="right"))
        stop = int(np.searchsorted(begins, turn.end, side="left"))
        after = int(np.searchsorted(begins, turn.text_end, side="left"))
        if not turn.verbatim:
            after = _past_text(closes, begins, ends, text, first, stop)
        found = np.flatnonzero(closes[max(after, first) : stop])
        if len(found):
            last = max(after, first) + int(found[0])
            closing[last] = True
        else:
            unclosed += 1
            last = int(np.searchsorted(begins, len(text[: turn.end].rstrip()), side="left")) - 1
        loss_mask[first : last + 1] = True
    # Nothing predicts the first token of a sequence.
    loss_mask[:1] = False
    closing &= loss_mask
    return Marks(loss_mask, closing, unclosed)


def _past_text(closes: np.ndarray, begins: np.ndarray, ends: np.ndarray, text: str, first: int, stop: int) -> int:
    """The slot after the turn's last token of real text: where the template rewrote the answer, or rendered a tool
    call, special tokens may stand before the text as well as after it."""
    for i in range(stop - 1, first - 1, -1):
        if not closes[i] and text[begins[i] : ends[i]].strip():
            return i + 1
    return first
