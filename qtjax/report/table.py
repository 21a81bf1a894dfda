"""The table at the end of a run, for the terminal (at most 80 columns) and as Markdown.

The summary is one JSON object; every part but "steps", "samples" and "tokens" may be missing or null, and its lines are
then left out:

    title        str     what was trained on what, e.g. "smol on smol-instruct, LoRA"
    steps        int     optimizer steps
    policy       str     "paper" | "article"
    samples      {"seen", "eligible", "kept", "q2", "q3", "q4", "supplement": int,
                  "supplement_median": {"1", "2", "3", "4": int}}    counts over all steps; q2..q4 without the supplement
    tokens       {"seen", "kept": int}      trained (answer) tokens of all samples, and those that stayed in the loss
    closing      {"seen", "pruned": int}    tokens that close an answer (end of turn, EOS) in kept samples
    fill         float   real tokens / slots launched in training, 0-1
    evaluation   {"samples": int, "generated": int,                        held-out samples: loss, exact match
                  "base" | "after" | "full_data": {"loss": nats per token, "exact_match": 0-1 or null}}
    calibration  {"rows", "classes": int, "prior_precision": float, "before" | "after": {"calibration_error", "accuracy": 0-1,
                  "nll": nats per prompt}} or null    Laplace-LoRA: the first answer token, without and with the posterior
    seconds      {"scoring", "packing", "training": float, "total": float}    wall clock; the rest of total is "other"
    speed_up     {"value": float, "full_data_seconds", "pruned_seconds": float, "how": str}
    provenance   {name: {"seen": int, "kept": int}}     how rows came about, if the data say so; counted over all steps
    data         {"samples": int, "cut": int, "skipped": {reason: int}}      samples ready; answers cut; rows left out
    model_folder str     where the trained model is

`qtjax.report.totals.totals` makes steps, samples, tokens, closing, fill and seconds from the metrics.
"""

import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rich import box
from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from qtjax.report.quadrants import QUADRANT_NAMES

_WIDTH = 76


@dataclass(frozen=True)
class Block:
    """One small table: column names, rows of texts (the first column is a label), an explanation below."""

    title: str
    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    note: str = ""


def blocks(summary: Mapping[str, Any]) -> list[Block]:
    """The tables of a summary, in reading order."""
    made = [_held_out(summary), _calibration(summary), _kept(summary), _time(summary), _provenance(summary)]
    return [block for block in made if block and block.rows]


def summary_table(summary: Mapping[str, Any]) -> RenderableType:
    """What `rich.console.Console.print` shows; at most 80 columns wide, plain ASCII in its texts."""
    parts: list[RenderableType] = []
    if summary.get("title"):
        parts.append(
            Padding(
                Text(f"{summary['title']}: {summary['steps']:,} steps", style="bold", overflow="fold"), (0, 0, 1, 0)
            )
        )
    for block in blocks(summary):
        table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, width=_WIDTH)
        for i, name in enumerate([block.title, *block.header[1:]]):
            left = (
                {"justify": "left", "min_width": 38, "overflow": "fold"} if i == 0 else {"justify": "right", "ratio": 1}
            )
            table.add_column(Text(name, style="bold"), **left)
        for row in block.rows:
            table.add_row(*(Text(cell) for cell in row))
        parts.append(Padding(table, (0, 0, 0 if block.note else 1, 0)))
        if block.note:
            parts.append(Padding(Text("\n".join(textwrap.wrap(block.note, _WIDTH)), style="dim"), (0, 0, 1, 0)))
    for line in _closing_lines(summary):
        parts.append(
            Text(
                "\n".join(textwrap.wrap(line, _WIDTH, break_long_words=False, break_on_hyphens=False)), overflow="fold"
            )
        )
    return Group(*parts)


def summary_markdown(summary: Mapping[str, Any]) -> str:
    """The same as GitHub Markdown; ends with a line feed."""
    lines = [f"### {summary['title']}: {summary['steps']:,} steps", ""] if summary.get("title") else []
    for block in blocks(summary):
        lines += [f"**{block.title}**", "", _md(block.header), "|---|" + "---:|" * (len(block.header) - 1)]
        lines += [_md(row) for row in block.rows]
        lines += ["", *([block.note, ""] if block.note else [])]
    for line in _closing_lines(summary):
        lines += [line, ""]
    return "\n".join(lines).rstrip("\n") + "\n"


def _md(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|").replace("  ", "&emsp;") for cell in cells) + " |"


def _percent(part: float | None, whole: float | None = 1.0) -> str:
    return "-" if part is None or not whole else f"{part / whole:.1%}"


def _number(value: float | None, form: str) -> str:
    return "-" if value is None or value != value else format(value, form)


def _held_out(summary: Mapping[str, Any]) -> Block | None:
    evaluation = summary.get("evaluation") or {}
    named = [
        (name, evaluation[key])
        for key, name in (("base", "base"), ("after", "after"), ("full_data", "full data"))
        if evaluation.get(key)
    ]
    if not named:
        return None
    rows = [("loss (nats per token)", *(_number(values.get("loss"), ".4f") for _, values in named))]
    if any(values.get("exact_match") is not None for _, values in named):
        rows.append(("exact match", *(_percent(values.get("exact_match")) for _, values in named)))
    note = f"{evaluation['samples']:,} held-out samples" if evaluation.get("samples") else ""
    if note and evaluation.get("generated"):
        note += f", {evaluation['generated']:,} of them answered for exact match"
    notes = [note + "."] if note else []
    losses = [evaluation[key]["loss"] for key in ("base", "after") if evaluation.get(key)]
    if len(losses) == 2 and losses[0] == losses[1]:
        notes.append("NOTHING WAS LEARNED: the loss is the base's to the last bit. Try other learning rates or overlay settings.")
    return Block("Held-out data", ("", *(name for name, _ in named)), rows, " ".join(notes))


def _calibration(summary: Mapping[str, Any]) -> Block | None:
    found = summary.get("calibration") or {}
    if not found:
        return None
    before, after = found["before"], found["after"]
    rows = [
        ("calibration error", _percent(before["calibration_error"]), _percent(after["calibration_error"])),
        ("accuracy", _percent(before["accuracy"]), _percent(after["accuracy"])),
        ("nll (nats per prompt)", _number(before["nll"], ".4f"), _number(after["nll"], ".4f")),
    ]
    note = (
        f"First token of the answer to {found['rows']:,} held-out prompts, {found['classes']} classes; prior precision"
        f" {found['prior_precision']:.3g}, by evidence."
    )
    return Block("Calibration", ("", "trained weights", "posterior"), rows, note)


def _kept(summary: Mapping[str, Any]) -> Block | None:
    samples, tokens = summary["samples"], summary["tokens"]
    seen, kept = samples["seen"], samples["kept"]
    rows = [("samples kept", f"{kept:,}", f"{seen:,}", _percent(kept, seen))]
    article = summary.get("policy") == "article"
    for q, what in ((2, "tokens pruned"), (4, "whole"), (3, "whole")):
        if samples.get(f"q{q}") or q == 2 or (q == 3) == article:
            rows.append(
                (
                    f"  Q{q} {QUADRANT_NAMES[q]}, {what}",
                    f"{samples.get(f'q{q}', 0):,}",
                    "",
                    _percent(samples.get(f"q{q}", 0), seen),
                )
            )
    supplement = samples.get("supplement", 0)
    rows.append(("  supplement, whole", f"{supplement:,}", "", _percent(supplement, seen)))
    if not any(samples.get(name) for name in ("q2", "q3", "q4", "supplement")):
        rows = rows[:1]  # full data, or a pruner without quadrants
    rows.append(
        ("trained tokens kept", f"{tokens['kept']:,}", f"{tokens['seen']:,}", _percent(tokens["kept"], tokens["seen"]))
    )
    closing = summary.get("closing") or {}
    if closing.get("seen") and tokens["kept"] < tokens["seen"]:
        rows.append(
            (
                "  closing (EOS) tokens pruned",
                f"{closing['pruned']:,}",
                f"{closing['seen']:,}",
                _percent(closing["pruned"], closing["seen"]),
            )
        )
    notes = []
    medians = samples.get("supplement_median") or {}
    if supplement and any(medians.values()):
        shares = ", ".join(f"Q{q} {_percent(medians[str(q)], supplement)}" for q in (1, 2, 3, 4) if medians.get(str(q)))
        notes.append(
            f"The supplement, {_percent(supplement, kept)} of the kept samples, lies by the batch medians in {shares}."
        )
    ineligible = seen - samples.get("eligible", seen)
    if ineligible:
        notes.append(f"{ineligible:,} samples had no usable score.")
    if summary.get("fill") is not None:
        notes.append(f"Fill (real tokens / slots launched in training): {_percent(summary['fill'])}.")
    return Block("What was kept, over all steps", ("", "kept", "of", "share"), rows, " ".join(notes))


def _time(summary: Mapping[str, Any]) -> Block | None:
    seconds = summary.get("seconds") or {}
    named = {name: seconds[name] for name in ("scoring", "packing", "training") if seconds.get(name) is not None}
    if not named:
        return None
    total = seconds.get("total") or sum(named.values())
    if seconds.get("total"):
        named["other"] = max(0.0, total - sum(named.values()))
    rows = [(name, f"{value:,.1f}", _percent(value, total)) for name, value in named.items()]
    rows.append(("total", f"{total:,.1f}", _percent(total, total)))
    notes = ["Other: loading, compiling, evaluation, saving."] if "other" in named else []
    speed = summary.get("speed_up") or {}
    if speed.get("value"):
        rows.append(("full-data training on the same work", f"{speed['full_data_seconds']:,.1f}", ""))
        rows.append(("speed-up of the pruned steps", f"{speed['value']:.2f}x", ""))
        notes.append(f"Speed-up: {speed['full_data_seconds']:,.1f} s / {speed['pruned_seconds']:,.1f} s"
                     f"{', ' + speed['how'] if speed.get('how') else ''}.")  # fmt: skip
    return Block("Time", ("", "seconds", "share"), rows, " ".join(notes))


def _provenance(summary: Mapping[str, Any]) -> Block | None:
    origin = summary.get("provenance") or {}
    rows = [
        (name, f"{c['kept']:,}", f"{c['seen'] - c['kept']:,}", _percent(c["seen"] - c["kept"], c["seen"]))
        for name, c in origin.items()
    ]
    samples = summary["samples"]
    note = f"Of all rows together {_percent(samples['seen'] - samples['kept'], samples['seen'])} were dropped."
    return Block("Rows by provenance, over all steps", ("", "kept", "dropped", "drop rate"), rows, note)


def _closing_lines(summary: Mapping[str, Any]) -> list[str]:
    lines = []
    data = summary.get("data") or {}
    if data.get("samples") is not None:
        line = f"Data: {data['samples']:,} samples, {data.get('cut', 0):,} answers cut to the limit"
        skipped = {reason: n for reason, n in (data.get("skipped") or {}).items() if n}
        line += f", {sum(skipped.values()):,} rows skipped"
        line += f" ({', '.join(f'{reason}: {n:,}' for reason, n in skipped.items())})" if skipped else ""
        lines.append(line + ".")
    if summary.get("model_folder"):
        lines.append(f"Model: {summary['model_folder']}")
    return lines
