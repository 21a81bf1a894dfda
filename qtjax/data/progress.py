"""A progress bar that shows itself only when the work turns out to take a while."""

import time
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn


class LateProgress:
    """`with LateProgress("tokenizing", total) as bar: bar.advance(n)`: on standard error, with ETA, after `delay` seconds.

    enabled: False shows nothing. Output that is no terminal gets no bar.
    """

    def __init__(self, what: str, total: int, *, delay: float = 2.0, enabled: bool = True, console: Console | None = None):
        self._what, self._total, self._delay, self._enabled = what, total, delay, enabled
        self._console = console or Console(stderr=True)
        self._done = 0
        self._bar: Progress | None = None
        self._task = None

    def __enter__(self) -> "LateProgress":
        self._began = time.monotonic()
        return self

    def advance(self, count: int) -> None:
        self._done += count
        wanted = self._enabled and self._console.is_terminal
        if wanted and self._bar is None and time.monotonic() - self._began > self._delay and self._done < self._total:
            self._bar = Progress(
                TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(),
                console=self._console, transient=True,
            )  # fmt: skip
            self._bar.start()
            self._task = self._bar.add_task(self._what, total=self._total)
        if self._bar is not None:
            self._bar.update(self._task, completed=self._done)

    @property
    def shown(self) -> bool:
        """Whether the work took long enough for the bar to appear."""
        return self._bar is not None

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._bar is not None:
            self._bar.stop()
