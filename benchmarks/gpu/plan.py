"""Which rows there are, in which order, with which settings; and what to do when time or memory runs out."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.gpu.shapes import Size

KINDS = ("full", "lora", "q-tuning", "score")
GUESS = {"qtjax": 50.0, "torch": 35.0}  # seconds of a row, start and compilation included, before one of its framework has been run
SAVING = 5.0  # seconds kept for ending a row that runs over, and for the tables
TIMED = 5.0  # seconds of timed steps that a row takes, fewer when little is left

# (tokens of a microbatch, what is kept for the backward pass), the first that is thought to fit 80 GB and be fast, then what needs less.
# qtjax: remat none | dots | full. torch: all | checkpoint.
#
# Bytes of a step of the 1.7B model: 16 for every parameter (weights, two moments, accumulated gradients: 27 GB), 4 for the microbatch's
# gradients and 2 for the bfloat16 weights (10 GB), and with "dots" 26 D for every token and layer (8,192 tokens: 10 GB). The 8B model
# under LoRA: 2 for every parameter (16 GB), and with "dots" the products of base and adapter both, 172 KB for every token and layer
# (4,096 tokens: 23 GB; 8,192 would be 45). Compiled for an H100 ahead of time, with attention that holds [heads, L, L]: 51 GB and 42 GB
# at L = 2048, 57 GB and 45 GB at 4096, scoring the 8B model 19 GB. Without remat torch keeps about 50 D (20 GB) and 240 KB (31 GB) for
# every token and layer, and logits of 14 V bytes a token.
_STEP = 32768  # tokens of a step that these go with; a smaller size scales them
_SETTINGS = {
    ("full", "qtjax"): ((8192, "dots"), (8192, "full"), (4096, "full")),
    ("q-tuning", "qtjax"): ((8192, "dots"), (8192, "full"), (4096, "full")),
    ("lora", "qtjax"): ((4096, "dots"), (4096, "full")),
    ("score", "qtjax"): ((8192, "none"), (4096, "none")),
    ("full", "torch"): ((8192, "all"), (4096, "all"), (8192, "checkpoint"), (4096, "checkpoint")),
    ("lora", "torch"): ((4096, "all"), (8192, "checkpoint"), (4096, "checkpoint")),
    ("score", "torch"): ((8192, "all"), (4096, "all")),
}


@dataclass(frozen=True)
class Row:
    """One measurement. framework: qtjax | torch; weights: of full training, float32 master weights or bfloat16 ones; settings: (rows of
    a microbatch, memory) to try in turn."""

    kind: str
    model: str
    length: int
    framework: str
    settings: tuple[tuple[int, str], ...]
    weights: str = "float32"

    @property
    def name(self) -> str:
        """For one line of text."""
        own = f" ({self.weights} weights)" if self.framework == "torch" and self.kind == "full" else ""
        return f"{self.kind} {self.model} x {self.length}, {self.framework}{own}"


def rows_of(size: Size, kinds: Sequence[str], lengths: Sequence[int], torch: bool, microbatch: int = 0, remat: str = "") -> list[Row]:
    """The most important first, torch beside each of ours; torch's bfloat16 weights, which train something else, last.

    Args: microbatch, remat: in place of qtjax's own settings; 0, "": left.
    """

    def row(kind: str, model: str, length: int, framework: str, weights: str = "float32") -> Row:
        settings = [(tokens * size.tokens // _STEP, memory) for tokens, memory in _SETTINGS[kind, framework]]
        if framework == "qtjax" and (microbatch or remat):
            settings = [(microbatch or settings[0][0], remat or settings[0][1])]
        return Row(kind, model, length, framework, tuple((max(tokens // length, 1), memory) for tokens, memory in settings), weights)

    out = []
    for length in lengths:
        for kind in kinds:
            for model in {"score": (size.lora, size.full), "lora": (size.lora,)}.get(kind, (size.full,)):
                out.append(row(kind, model, length, "qtjax"))
                if torch and kind != "q-tuning":
                    out.append(row(kind, model, length, "torch"))
    if torch and "full" in kinds:
        out += [row("full", size.full, length, "torch", "bfloat16") for length in lengths]
    return out


class Budget:
    """Seconds left of a whole call, counted from `begin` on `clock`."""

    def __init__(self, seconds: float, clock: Callable[[], float] = time.monotonic, begin: float | None = None):
        self.clock, self.end = clock, (clock() if begin is None else begin) + seconds

    def left(self) -> float:
        return self.end - self.clock() - SAVING


Launch = Callable[[Row, int, str, float, float], dict[str, Any]]  # (row, rows of a microbatch, memory, seconds to time, limit) -> answer


def run_rows(rows: Sequence[Row], launch: Launch, budget: Budget, refused: Callable[[Row], str], heard: Callable[[Row, dict[str, Any]], None]) -> None:
    """Runs them in order; a row for which too little time is left is skipped, and shorter ones after it may still run.

    Args: refused(row): why it must not run, "" if it may. heard(row, result): called after each; a result has a status (done | missing |
    refused | skipped | no memory | no time | failed), `said` where it is not done, and how often memory ran out.
    """
    took: dict[str, float] = {}
    for row in rows:
        why, needed = refused(row), took.get(row.framework, GUESS[row.framework])
        if why:
            heard(row, {"status": "refused", "said": why})
        elif budget.left() < needed:
            heard(row, {"status": "skipped", "said": f"{max(budget.left(), 0):.0f} s left, a row of {row.framework} takes about {needed:.0f}"})
        else:
            begin = budget.clock()
            result, tries = attempt(row, launch, budget, needed)
            heard(row, result)
            took[row.framework] = (budget.clock() - begin) / tries


def attempt(row: Row, launch: Launch, budget: Budget, needed: float) -> tuple[dict[str, Any], int]:
    """(result of the first setting that fits the device's memory, how many were tried), while there is time to try."""
    for tries, (rows, memory) in enumerate(row.settings, start=1):
        left = budget.left()
        result = launch(row, rows, memory, min(TIMED, left / 10), left)
        full = result["status"] == "no memory"
        result |= {"rows": rows, "memory": memory, "out_of_memory": tries - (not full)}
        if not full or budget.left() < needed:
            break
    return result, tries
