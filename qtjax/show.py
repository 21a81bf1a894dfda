"""`python -m qtjax.show --config configs/smol.py --count 3`: examples as the model sees them, trained tokens coloured."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from rich.console import Console
from rich.text import Text

from qtjax.config import load_config
from qtjax.data.prepare import held_out_rows, training_rows
from qtjax.data.tokenize import tokenize
from qtjax.data.tokenizer import load_tokenizer
from qtjax.errors import QtjaxError, door

TRAINED, CLOSING, CONTEXT = "bold green", "bold reverse magenta", "dim"


def pieces(tokenizer: Any, ids: np.ndarray, trained: np.ndarray, closing: np.ndarray) -> list[tuple[str, str]]:
    """(text, "context" | "trained" | "closing") for runs of equal kind, in order; put together, the texts are the decoded sample."""
    kinds = np.where(closing, 2, np.where(trained, 1, 0))
    cuts = [*(np.flatnonzero(np.diff(kinds)) + 1).tolist(), len(ids)] if len(ids) else []
    out: list[tuple[str, str]] = []
    before = ""
    for end in cuts:
        # Decoding from the start keeps spaces and characters of several tokens as they are in the whole.
        text = tokenizer.decode(ids[:end].tolist(), skip_special_tokens=False, clean_up_tokenization_spaces=False)
        out.append((text[len(before) :], ("context", "trained", "closing")[kinds[end - 1]]))
        before = text
    return out


def render_sample(parts: Sequence[tuple[str, str]], *, marks: bool) -> Text:
    """A coloured text; with `marks` (no colours at hand) trained runs stand between ⟦ and ⟧."""
    styles = {"context": CONTEXT, "trained": TRAINED, "closing": CLOSING}
    text = Text()
    inside = False
    for said, kind in parts:
        if marks and (kind != "context") != inside:
            text.append("⟧" if inside else "⟦")
            inside = not inside
        text.append(said, style=styles[kind])
    if inside:
        text.append("⟧")
    return text


def main(argv: Sequence[str] | None = None, console: Console | None = None) -> None:
    config, own = load_config(
        "python -m qtjax.show",
        "Prints examples as the model sees them, the trained tokens coloured.",
        argv,
        {
            "count": (3, "examples to print"),
            "start": (0, "row to begin with, counted from 0"),
            "held-out": (False, "rows of the held-out data instead of the training data"),
        },
    )
    for name, least in (("count", 1), ("start", 0)):
        if own[name] < least:
            raise QtjaxError(f"--{name} {own[name]}: must be {least} or more")
    console = console or Console()
    rows = held_out_rows(config.data) if own["held-out"] else training_rows(config.data)
    if own["start"] >= len(rows):
        raise QtjaxError(f"--start {own['start']}: must be below {len(rows)}, the number of rows")
    tokenizer = load_tokenizer(config.model.path)
    chosen = rows[own["start"] : own["start"] + own["count"]]
    data = tokenize(tokenizer, chosen, config.data)
    places = {int(chosen.index[i]): chosen.where(i) for i in range(len(chosen))}
    marks = console.color_system is None or console.no_color
    for i in range(len(data)):
        ids, trained, closing = data.sample(i)
        console.rule(f"{places[int(data.row_index[i])]}  ·  {len(ids)} tokens, {int(trained.sum())} trained", align="left")
        console.print(render_sample(pieces(tokenizer, ids, trained, closing), marks=marks), soft_wrap=True)
    console.rule()
    legend = Text("⟦trained⟧ context", style="") if marks else Text.assemble(("trained", TRAINED), " ", ("closes the answer", CLOSING), " ", ("context", CONTEXT))
    console.print(legend)
    console.print(data.stats.line(), highlight=False, markup=False)


if __name__ == "__main__":
    door(main)
