"""Progress of training on standard error: a bar on a terminal, a line now and then elsewhere, nothing when quiet."""

import time
from collections import deque
from collections.abc import Callable, Mapping
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

_LINES = 40  # lines of plain output over a whole run, about


class TrainingProgress:
    """`with TrainingProgress(total, start=done) as bar: bar.update(step, metrics)`.

    Args:
      total: optimizer steps of the whole run.
      start: steps already done when this process began (a resumed run); they do not count for speed and ETA.
      quiet: show nothing.
      every: plain output (no terminal): a line every so many steps; 0: about 40 lines over the run. The first and the last
        step of the process always have one.
      console: where to; standard error.
      clock: seconds, monotonic.
    """

    def __init__(
        self,
        total: int,
        *,
        start: int = 0,
        quiet: bool = False,
        every: int = 0,
        console: Console | None = None,
        clock: Callable[[], float] = time.monotonic,
    ):
        self.total, self.start = total, start
        self._quiet, self._clock = quiet, clock
        self._every = every or max(1, total // _LINES)
        self._console = console or Console(stderr=True)
        # The seconds and tokens of the latest steps. The first step of a process compiles, so it is left out once
        # there are others.
        self._recent: deque[tuple[float, float]] = deque(maxlen=50)
        self._steps = 0
        self._bar: Progress | None = None

    def __enter__(self) -> "TrainingProgress":
        self._last = self._clock()
        if not self._quiet and self._console.is_terminal and not self._console.is_dumb_terminal:
            self._bar = Progress(
                BarColumn(bar_width=16), MofNCompleteColumn(), TextColumn("{task.description}"), console=self._console
            )
            self._task = self._bar.add_task("compiling", total=self.total, completed=self.start)
            self._bar.start()
        return self

    def update(self, step: int, metrics: Mapping[str, Any]) -> None:
        """After optimizer step number `step` (from 1) with its metrics."""
        now = self._clock()
        if self._steps == 1:
            self._recent.clear()
        self._recent.append((now - self._last, tokens_of(metrics)))
        self._last, self._steps = now, self._steps + 1
        if self._quiet:
            return
        text = self.describe(step, metrics)
        if self._bar:
            self._bar.update(self._task, completed=step, description=text)
        elif self._steps == 1 or step % self._every == 0 or step == self.total:
            self._console.print(f"step {step}/{self.total}  {text}", highlight=False, soft_wrap=True, markup=False)

    def describe(self, step: int, metrics: Mapping[str, Any]) -> str:
        """ "loss 1.234  kept 25%/21% (samples/tokens)  12,345 tok/s  ETA 1:02"."""
        seconds = sum(s for s, _ in self._recent)
        parts = [f"loss {metrics['loss']:.4g}"]
        if metrics.get("samples") and metrics.get("target_tokens"):
            samples = metrics.get("kept_samples", metrics["samples"]) / metrics["samples"]
            tokens = metrics.get("kept_tokens", metrics["target_tokens"]) / metrics["target_tokens"]
            parts.append(f"kept {samples:.0%}/{tokens:.0%} tok")
        if seconds > 0:
            parts.append(f"{sum(t for _, t in self._recent) / seconds:,.0f} tok/s")
        parts.append(f"ETA {clock_time(seconds / len(self._recent) * (self.total - step))}")
        return "  ".join(parts)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar:
            self._bar.stop()


def tokens_of(metrics: Mapping[str, Any]) -> float:
    """Tokens of data that a step worked through: the scored ones (survivors among them), or, unscored, the trained ones."""
    return metrics.get("scored_tokens") or (metrics.get("fill") or 0) * (metrics.get("trained_slots") or 0)


def clock_time(seconds: float) -> str:
    """65 -> "1:05", 3700 -> "1:01:40"."""
    minutes, rest = divmod(round(max(0.0, seconds)), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
