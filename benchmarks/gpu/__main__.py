"""One NVIDIA GPU, ten minutes, no network: training, scoring and Q-Tuning by shape, beside transformers and peft on the same card.

    python -m benchmarks.gpu --json gpu.json                           # on the GPU; torch in the same interpreter
    python -m benchmarks.gpu --torch-python ../torch/bin/python --compile-cache compiled --json gpu.json
    python -m benchmarks.gpu --rows score,q-tuning --lengths 4096      # what the first call had no time for
    python -m benchmarks.gpu --shape tiny                              # on a CPU: shows that it works, its numbers mean nothing

Models have the shapes of SmolLM2-1.7B and LLaMA-3-8B, random weights made on the device, random tokens, and every slot real. First,
small models of both families are computed in both frameworks and in plain float32; what does not agree is not measured. Then rows run
one after the other, the most important first, each in a process of its own, as long as the time lasts; --json is written after each.
"""

import shutil
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console

from benchmarks.gpu.check import problems, row_problem
from benchmarks.gpu.launch import Launcher
from benchmarks.gpu.plan import KINDS, Budget, Row, rows_of, run_rows
from benchmarks.gpu.report import FORMULAS, compared, measured, table
from benchmarks.gpu.shapes import CHECK_RATE, SIZES, Size, published_peak, small_kinds
from qtjax.atomic import write_json
from qtjax.errors import QtjaxError, door, near_names
from qtjax.flags import parse_flags

REMATS = ("none", "dots", "full")


def names(flag: str, text: str, known: Sequence[str]) -> list[str]:
    """A comma-separated list of some of the known. Raises QtjaxError."""
    given = [name.strip() for name in text.split(",") if name.strip()]
    for name in given:
        if name not in known:
            raise QtjaxError(f"--{flag} {name!r}: must be of {', '.join(known)}{near_names(name, known)}")
    return list(dict.fromkeys(given)) or list(known)


def check_flags(own: dict[str, Any]) -> tuple[Size, list[Row]]:
    """What is to be run. Raises QtjaxError for what cannot be."""
    if own["shape"] not in SIZES:
        raise QtjaxError(f"--shape {own['shape']!r}: must be one of {', '.join(SIZES)}{near_names(own['shape'], SIZES)}")
    if not own["seconds"] > 0:
        raise QtjaxError(f"--seconds {own['seconds']:g}: must be above 0, for example 540")
    size = SIZES[own["shape"]]
    lengths = [int(name) for name in names("lengths", own["lengths"], list(map(str, size.lengths)))]
    microbatch, remat = own["microbatch"], own["remat"]
    if microbatch and (microbatch < 0 or microbatch % max(lengths) or size.tokens % microbatch):
        raise QtjaxError(f"--microbatch {microbatch}: must be a multiple of {max(lengths)} that divides the step's {size.tokens} tokens")
    if remat and remat not in REMATS:
        raise QtjaxError(f"--remat {remat!r}: must be one of {', '.join(REMATS)}{near_names(remat, REMATS)}")
    json, cache, python = (own[name] for name in ("json", "compile-cache", "torch-python"))
    if json and (Path(json).is_dir() or not Path(json).absolute().parent.is_dir()):
        raise QtjaxError(f"--json {json}: must be a file in a folder that exists; make {Path(json).parent} or name another")
    if cache and Path(cache).exists() and not Path(cache).is_dir():
        raise QtjaxError(f"--compile-cache {cache}: is a file; name a folder, new or not")
    if python and shutil.which(python) is None:
        raise QtjaxError(f"--torch-python {python}: is no program; name the python of an environment that has torch, transformers and peft")
    return size, rows_of(size, names("rows", own["rows"], KINDS), lengths, not own["without-torch"], microbatch, remat)


def run(own: dict[str, Any], size: Size, rows: list[Row], budget: Budget, folder: Path, console: Console) -> dict[str, Any]:
    """The whole report; written to --json on the way."""
    pythons = {"qtjax": sys.executable, "torch": own["torch-python"] or sys.executable}
    launcher = Launcher(own["shape"], folder, Path(own["compile-cache"] or folder / "compiled").absolute(), pythons)

    def say(text: str) -> None:
        console.print(text, highlight=False, markup=False, soft_wrap=True)

    ours, theirs = check_small(own, size, budget, launcher, folder)
    without = theirs["said"] if theirs and theirs["status"] != "done" else ""
    peak = published_peak(ours["device"])
    wrong = problems(size, ours, theirs if theirs and not without else None)
    report: dict[str, Any] = {
        "machine": ours["machine"], "device": ours["device"], "matrix_rate": ours["matrix_rate"], "published_rate": peak, "tokens": size.tokens,
        "versions": ours["versions"] | (theirs or {}).get("versions", {}), "xla_flags": ours["xla_flags"], "flags": own, "formulas": FORMULAS,
        "checked": {"/".join(key): said for key, said in wrong.items()}, "without_torch": without, "rows": [],
    }  # fmt: skip
    say(f"{ours['machine']}: bfloat16 matrix product of {size.matrix} rows {ours['matrix_rate'] / 1e12:.3g} TFLOP/s; {budget.left():.0f} s left")
    say(f"small models agree but for: {'; '.join(map(': '.join, report['checked'].items()))}" if wrong else "small models agree: " + agreed(theirs, without))

    def refused(row: Row) -> str:
        return wrong.get((row.framework, row.kind, row.model), "") or (without if row.framework == "torch" else "")

    def heard(row: Row, result: dict[str, Any]) -> None:
        said = row_problem(row, size, result) if result["status"] == "done" else ""
        if said:
            result = {"status": "refused", "said": said}
        elif result["status"] == "done":
            result = measured(row, size, result, ours["matrix_rate"], peak)
        report["rows"].append({k: v for k, v in asdict(row).items() if k != "settings"} | result)
        compared(report["rows"], bars=own["shape"] == "full")
        if own["json"]:
            write_json(own["json"], report)
        outcome = f"{result['tokens_per_second']:,.0f} tokens/s" if result["status"] == "done" else f"{result['status']}: {result['said']}"
        say("\n".join([f"{row.name}: {outcome}; {max(budget.left(), 0):.0f} s left", *result.get("log", [])[-5:]]))

    run_rows(rows, launcher.row, budget, refused, heard)
    return report


def agreed(theirs: dict[str, Any] | None, without: str) -> str:
    return f"qtjax with plain float32 (torch: {without or 'not asked for'})" if without or not theirs else "qtjax, torch and plain float32"


def check_small(own: dict[str, Any], size: Size, budget: Budget, launcher: Launcher, folder: Path) -> tuple[dict[str, Any], dict[str, Any] | None]:
    """(ours.check, peer.check or None where torch is not asked for). Raises QtjaxError where ours does not run."""
    job = {"kind": "check", "folder": str(folder / "small"), "rate": CHECK_RATE, "kinds": {name: small_kinds(size, name) for name in size.models}}
    ours = launcher.job("qtjax", job, budget.left())
    if ours["status"] != "done":
        print("\n".join(ours.get("log", [])), file=sys.stderr)
        raise QtjaxError(f"--shape {own['shape']}: the check of small models did not run, so that nothing can be measured: {ours['said']}")
    if own["without-torch"]:
        return ours, None
    launcher.backend = ours["backend"]
    return ours, launcher.job("torch", job, budget.left())


def main(argv: Sequence[str] | None = None) -> None:
    begin = time.monotonic()
    own = parse_flags(
        "python -m benchmarks.gpu", __doc__.splitlines()[0], argv,
        {
            "shape": ("full", f"size of the models: {', '.join(SIZES)}"),
            "seconds": (540.0, "of the whole call; a row is skipped when too little is left"),
            "json": ("", "file to write the numbers to, after every row; empty: none"),
            "rows": ("", f"which kinds, comma-separated: {', '.join(KINDS)}; empty: all"),
            "lengths": ("", "lengths of a row, comma-separated, of those that the size has; empty: all"),
            "torch-python": ("", "interpreter with torch, transformers and peft; empty: this one"),
            "without-torch": (False, "leave torch's rows out"),
            "compile-cache": ("", "folder for compiled programs, with which a second call begins sooner; empty: none is left behind"),
            "microbatch": (0, "tokens of qtjax's microbatches; 0: chosen by row"),
            "remat": ("", "what qtjax's backward pass recomputes: none, dots, full; empty: chosen by row"),
        },
    )  # fmt: skip
    size, rows = check_flags(own)
    console = Console(width=None if Console().is_terminal else 140)
    with tempfile.TemporaryDirectory() as folder:
        report = run(own, size, rows, Budget(own["seconds"], begin=begin), Path(folder), console)
    console.print(table(report))


if __name__ == "__main__":
    door(main)
