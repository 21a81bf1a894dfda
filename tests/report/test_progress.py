"""Progress shows step, loss, kept share, speed and remaining time, to a terminal and to a log."""

import io

import pytest
from rich.console import Console

from qtjax.report.progress import TrainingProgress, clock_time, tokens_of


class Clock:
    now = 100.0

    def __call__(self):
        return self.now


METRICS = {
    "loss": 1.23456,
    "samples": 32,
    "kept_samples": 8,
    "target_tokens": 1000,
    "kept_tokens": 210,
    "scored_tokens": 4000,
}


def run(steps, *, total=200, start=0, terminal=False, **fields):
    stream, clock = io.StringIO(), Clock()
    console = Console(file=stream, force_terminal=terminal, width=100, color_system=None)
    with TrainingProgress(total, start=start, console=console, clock=clock, **fields) as bar:
        for i in range(steps):
            clock.now += 60.0 if i == 0 else 2.0  # the first step of a process compiles
            bar.update(start + i + 1, METRICS)
    return stream.getvalue()


def test_plain_output_has_few_lines():
    """Without a terminal: the first step, every 5th of 200, and the last one, each on a line of its own."""
    lines = run(200).splitlines()
    assert [line.split("/")[0] for line in lines] == ["step 1"] + [f"step {i}" for i in range(5, 201, 5)]
    assert run(7, total=7, every=3).splitlines()[-1].startswith("step 7/7 ")
    assert len(run(7, total=7, every=3).splitlines()) == 4


def test_speed_and_remaining_time_leave_compilation_out():
    """After the first step, speed and ETA come from the steps since: 4000 tokens in 2 s, 150 steps of 2 s to go."""
    line = run(50).splitlines()[-1]
    assert line == "step 50/200  loss 1.235  kept 25%/21% tok  2,000 tok/s  ETA 5:00"


def test_resumed_runs_count_their_own_steps_only():
    """A run resumed at 100 of 200 with 10 steps done has 90 to go."""
    assert run(10, start=100, every=10).splitlines()[-1].endswith("ETA 3:00")
    assert run(10, start=100, every=10).splitlines()[0].startswith("step 101/200 ")


def test_quiet_says_nothing():
    """quiet shows nothing at all, on a terminal or not."""
    assert run(20, quiet=True) == run(20, quiet=True, terminal=True) == ""


def test_a_terminal_gets_a_bar():
    """On a terminal the last state of the bar shows the step and the same words."""
    text = run(200, terminal=True)
    assert "200/200" in text and "loss 1.235" in text and "2,000 tok/s" in text and "\n" in text


def test_an_error_leaves_the_terminal_usable():
    """The bar is stopped when the block raises: the cursor is shown again."""
    stream = io.StringIO()
    with pytest.raises(RuntimeError), TrainingProgress(5, console=Console(file=stream, force_terminal=True)):
        raise RuntimeError
    assert stream.getvalue().rstrip().endswith("\x1b[?25h")


def test_what_counts_as_tokens():
    """Scored tokens where something is scored; else the trained ones, slots times fill; nothing measured is 0."""
    assert tokens_of(METRICS) == 4000
    assert tokens_of({"scored_tokens": 0, "trained_slots": 200, "fill": 0.5}) == 100
    assert tokens_of({"loss": 1.0}) == 0
    assert [clock_time(s) for s in (0.4, 59.6, 65, 3700)] == ["0:00", "1:00", "1:05", "1:01:40"]
