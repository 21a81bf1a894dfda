"""From what the rows' processes wrote to numbers: the check that comes before any of them, medians over rounds, bars."""

import statistics
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from benchmarks.peers.rows import LORA, SCORE, Bar, Row

CLOSE = 1e-3  # of the loss, relative
SCORES_CLOSE = 1e-4  # nats


class Round(NamedTuple):
    """What one process measured over its timed steps. cpu: seconds of all threads per 1,000 useful tokens; speed: useful tokens
    per second of wall clock; peak: bytes; first: seconds from its start to the end of the first step; cold: the same with an empty
    compile cache, where the row has one."""

    cpu: float
    speed: float
    peak: int
    first: float
    cold: float | None = None


class Checked(NamedTuple):
    """said: what was compared and how far off it is, or why the row does not agree (good False)."""

    good: bool
    said: str


def round_of(result: Mapping[str, Any], untimed: int, cold: float | None = None) -> Round:
    """A Round of a process' marks, the first `untimed` of which are warm-up."""
    marks = result["marks"]
    before, after = marks[untimed - 1], marks[-1]
    tokens = sum(mark["tokens"] for mark in marks[untimed:])
    return Round(
        1000 * (after["cpu"] - before["cpu"]) / tokens, tokens / (after["wall"] - before["wall"]), result["peak_bytes"], marks[0]["wall"], cold
    )


def median(rounds: Sequence[Round]) -> Round:
    """The median of each number."""
    colds = [r.cold for r in rounds if r.cold is not None]
    return Round(*(statistics.median(column) for column in list(zip(*rounds))[:4]), statistics.median(colds) if colds else None)


def check_training(row: Row, marks: Sequence[Mapping[str, Any]], reference: Mapping[str, Any], targets: Mapping[int, int]) -> Checked:
    """Whether a row trains what the plain torch loop trains: its first steps' losses, or, where its batches are its own, the
    first step's loss against the reference's scores of just those samples.

    Args: reference: losses {"full", "lora"} by step, initial_nll by sample. targets: number of targets by sample.
    """
    losses = [mark["loss"] for mark in marks]
    method = "lora" if row.kind == LORA else "full"
    if row.own_batches:
        held = marks[0]["samples"]
        wanted = [sum(reference["initial_nll"][str(i)] for i in held) / sum(targets[i] for i in held)]
        what = "1st loss, of its own batch"
    else:
        wanted = reference["losses"][method]
        what = f"{len(wanted)} losses"
    if len(losses) < len(wanted):
        return Checked(False, f"{len(losses)} steps, {len(wanted)} are compared")
    apart = [abs(mine - theirs) / abs(theirs) if np.isfinite(mine) else float("inf") for mine, theirs in zip(losses, wanted)]
    worst = int(np.argmax(apart))
    if apart[worst] > CLOSE:
        return Checked(False, f"loss {worst + 1}: {losses[worst]:.5f}, torch {wanted[worst]:.5f}")
    return Checked(True, f"{what}: {apart[worst]:.0e}")


def check_scores(found: Mapping[str, np.ndarray], reference: Mapping[str, np.ndarray]) -> Checked:
    """Whether nll and entropy of every target are the reference's, within SCORES_CLOSE nats."""
    worst = 0.0
    for name in ("nll", "entropy"):
        mine, theirs = found[name], reference[name]
        if mine.shape != theirs.shape:
            return Checked(False, f"{len(mine)} targets, torch {len(theirs)}")
        apart = float(np.max(np.abs(mine - theirs), initial=0.0))
        if not apart <= SCORES_CLOSE:
            return Checked(False, f"{name} off by {apart:.1e} nats")
        worst = max(worst, apart)
    return Checked(True, f"nll, entropy: {worst:.0e}")


class Verdict(NamedTuple):
    """ratio: how many times better `own` is than the best other; wall: the same by wall clock (speed only); met: None where no
    bar is asked or something was not measured; other: the row that it was compared with; said: why there is no number."""

    bar: Bar
    ratio: float | None
    wall: float | None
    met: bool | None
    other: str
    said: str = ""


def judge(bar: Bar, medians: Mapping[str, Round]) -> Verdict:
    """A bar by the medians of the rows that were measured and agree; the best other is sought by CPU and by wall clock apart."""
    others = {name: medians[name] for name in bar.others if name in medians}
    if bar.own not in medians or not others:
        missing = bar.own if bar.own not in medians else bar.others[0] + (" or its variants" if len(bar.others) > 1 else "")
        return Verdict(bar, None, None, None, "", f"no number of {missing}")
    own, wall = medians[bar.own], None
    cost = {"speed": lambda r: r.cpu, "memory": lambda r: r.peak, "first": lambda r: r.first}[bar.measure]
    other = min(others, key=lambda name: cost(others[name]))
    ratio = cost(others[other]) / cost(own)
    if bar.measure == "speed":
        wall = own.speed / max(r.speed for r in others.values())
    return Verdict(bar, ratio, wall, None if bar.least is None else ratio >= bar.least, other)


def untimed_marks(row: Row, warmup: int) -> int:
    """Marks of a process before the timed ones: qtjax scores its untimed samples in one or two goes, all others step by step."""
    return min(warmup, 2) if row.kind == SCORE and row.env == "qtjax" else warmup
