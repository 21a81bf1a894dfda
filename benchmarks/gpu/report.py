"""From rows to shares of the card's rate, ratios, verdicts and a table."""

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from rich.table import Table

from benchmarks.gpu.plan import Row
from benchmarks.gpu.shapes import FORMULAS, Size, token_flops

BARS = {"full": 0.5, "lora": 0.5, "score": 0.6}  # of the matrix rate
FASTER = 1.2  # times torch
NAMES = {"full": "full step", "lora": "LoRA step", "score": "scoring", "q-tuning": "Q-Tuning 25 x 50"}


def measured(row: Row, size: Size, result: dict[str, Any], matrix_rate: float, published: float | None) -> dict[str, Any]:
    """The row's numbers: tokens a second by its median step, and their share of the measured and the published rate."""
    speed = result["tokens"] / statistics.median(result["seconds"])
    out = result | {"tokens_per_second": speed}
    if row.kind in FORMULAS:
        flops = token_flops(row.kind, size.models[row.model], row.length, size.rank)
        out |= {"flops_per_token": flops, "mfu": speed * flops / matrix_rate, "mfu_published": speed * flops / published if published else None}
    if row.kind == "q-tuning":
        out["speedup"] = result["full_seconds"] / statistics.median(result["seconds"])
        out["model_speedup"] = 1 / (result["c"] + result["k"])
    return out


def compared(rows: Sequence[dict[str, Any]], bars: bool) -> None:
    """Adds to each finished row of torch how many times as fast ours is, to ours the same, and with `bars` the verdicts.

    Verdicts are against torch with float32 master weights, which trains the same thing, and only of the models that the bars are for.
    """

    def place(row: Mapping[str, Any]) -> tuple[Any, ...]:
        return row["kind"], row["model"], row["length"]

    done = [row for row in rows if row["status"] == "done"]
    ours = {place(row): row for row in done if row["framework"] == "qtjax"}
    for row in done:
        mine = ours.get(place(row))
        if row["framework"] == "torch" and mine is not None:
            row["times_torch"] = mine["tokens_per_second"] / row["tokens_per_second"]
            if row["weights"] == "float32":
                mine["times_torch"] = row["times_torch"]
    for row in ours.values():
        if bars and row["kind"] in BARS:
            row["met"] = {"mfu": bool(row["mfu"] >= BARS[row["kind"]])}
            if "times_torch" in row:
                row["met"]["times_torch"] = bool(row["times_torch"] >= FASTER)


def table(report: Mapping[str, Any]) -> Table:
    """One line a row; what could not be measured says so."""
    rate = f"matrix product {report['matrix_rate'] / 1e12:.3g} TFLOP/s" + (
        f" measured, {report['published_rate'] / 1e12:g} published" if report["published_rate"] else " measured"
    )
    drawn = Table(title=f"{report['tokens']:,} tokens a step or pass, bfloat16; {report['machine']}; {rate}")
    for name in ("what", "by", "model", "rows x length", "tokens/s", "MFU", "of peak", "GiB", "x torch", "bars"):
        drawn.add_column(name, justify="left" if name in ("what", "by", "model", "rows x length", "bars") else "right")
    for row in report["rows"]:
        drawn.add_row(*cells(row))
    drawn.caption = "\n".join([*formulas(report), *notes(report["rows"])])
    drawn.caption_justify = "left"
    return drawn


def cells(row: Mapping[str, Any]) -> list[str]:
    by = "torch, bf16" if row["weights"] == "bfloat16" else row["framework"]
    microbatch = f"{row['rows']} x {row['length']}, {row['memory']}" if "rows" in row else f"- x {row['length']}"
    head = [NAMES[row["kind"]], by, row["model"], microbatch]
    if row["status"] != "done":
        return [*head, row["status"], "", "", "", "", ""]
    mfu, of_peak = (f"{row[name]:.1%}" if row.get(name) is not None else "" for name in ("mfu", "mfu_published"))
    memory = f"{row['memory_bytes'] / 2**30:.1f}" if row["memory_bytes"] else ""
    times = f"{row['times_torch']:.2f}" if "times_torch" in row and row["framework"] == "qtjax" else ""
    return [*head, f"{row['tokens_per_second']:,.0f}", mfu, of_peak, memory, times, verdicts(row)]


def verdicts(row: Mapping[str, Any]) -> str:
    said = {"mfu": f">= {BARS.get(row['kind'], 0):.0%}", "times_torch": f">= {FASTER}x"}
    return ", ".join(f"[{'green' if met else 'red'}]{said[name]} {'met' if met else 'missed'}[/]" for name, met in row.get("met", {}).items())


def formulas(report: Mapping[str, Any]) -> list[str]:
    kinds = [kind for kind in FORMULAS if any(row["kind"] == kind for row in report["rows"])]
    lines = [f"{NAMES[kind]}: {FORMULAS[kind]}" for kind in kinds]
    legend = "N layers' matrices, D width, V vocabulary, t targets a token (L - 1) / L, R adapter, L length, A heads x head dim"
    if not lines:
        return []
    return [
        f"FLOPs a token, the causal half of attention: {'; '.join(lines)}", legend,
        "MFU: of the matrix product measured in this call; of peak: of the published rate; x torch: tokens a second over torch's",
        "rows x length of a microbatch, and what the backward pass finds kept (qtjax's remat; torch: all, or each layer's input: checkpoint)",
    ]  # fmt: skip


def notes(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    out = []
    for row in rows:
        name = f"{NAMES[row['kind']]} {row['model']} x {row['length']}, {row['framework']}" + ", bf16 weights" * (row["weights"] == "bfloat16")
        if row["status"] != "done":
            out.append(f"{name}: {row['status']}: {row['said']}")
        if row["status"] == "done" and row["kind"] == "q-tuning":
            out.append(
                f"{name}: {row['speedup']:.2f}x full data on the same samples; 1 / (c + k) = {row['model_speedup']:.2f}"
                f" with c = {row['c']:.3f}, k = {row['k']:.3f}: {row['speedup'] / row['model_speedup']:.2f} of it"
            )
        if row["weights"] == "bfloat16" and "times_torch" in row:
            out.append(f"{name}, which keep neither master weights nor float32 moments: qtjax has {row['times_torch']:.2f} times its tokens a second")
        if row.get("out_of_memory"):
            out.append(f"{name}: out of memory {row['out_of_memory']} time{'s' * (row['out_of_memory'] > 1)}")
    return out
