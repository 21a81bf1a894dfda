"""How time and memory grow: with the length of a row, the rows of a launch, the parameters of the model, and the rows of data.

    python -m benchmarks.scaling                                    # four panels, about half an hour on two cores
    python -m benchmarks.scaling --panels length --lengths 128,512,1024
    python -m benchmarks.scaling --quick --json scaling.json --picture scaling.png

Of the first three: one training step of one launch (zeros, accumulate, update) and one scoring launch, as a run compiles them, in
float32 without remat, every token trained or scored, a sample a row (the 1M model's layers are unrolled, as a run's are at its width).
Seconds per 1,000 tokens, of all cores (CPU) and of the clock; the compiler's temporaries of the largest program; the most memory that
the process took by then, compilation included (scoring is compiled and run first). Every size has a process of its own. Within a panel
they run in turn, round after round, so that what else the machine does falls on all of them; seconds are medians over the rounds.

Of data: a JSONL file of so many rows is tokenized into files, as a run keeps them in its folder, and read for an epoch in shuffled
batches, as a loop reads it. "own": memory that belongs to no file (mapped files the system may drop), which should not grow with the rows.

Checked before any number is printed: two samples have the same loss in every program as by plain logits within 1e-4, sizes that
share a model also the same loss and gradient norm; what is timed stays finite; an epoch reads every sample once, and the rows that
files share as the same tokens.
"""

import contextlib
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from rich import box
from rich.console import Console
from rich.table import Table

from benchmarks.guarded import SHAPES
from benchmarks.machine import machine
from qtjax.atomic import write_json
from qtjax.errors import QtjaxError, door, near_names
from qtjax.flags import parse_flags
from qtjax.pages import with_own_pages

PANELS = {"length": "tokens of a row", "batch": "rows of a launch", "model": "parameters", "data": "rows of data"}
AGREE = 1e-4  # of the loss, relative; of a gradient's norm ten times that
LAYERS, VOCABULARY = 8, 8192  # of the model panel
QUICK = {
    "lengths": "32,64,128", "tokens": 256, "batches": "1,4", "batch-length": 32, "models": "0.4,1", "model-rows": 1, "model-length": 32,
    "data": "0.1,0.4", "rounds": 2,
}  # fmt: skip


def shape_of(parameters: float) -> dict[str, Any]:
    """A LLaMA of about so many parameters: LAYERS layers, VOCABULARY tokens (tied), width a multiple of 32, three times that in the MLP."""
    layer = 4 + 3 * 3  # kernels of a layer, in squares of the width
    width = (math.sqrt(VOCABULARY**2 + 4 * LAYERS * layer * parameters) - VOCABULARY) / (2 * LAYERS * layer)
    width = max(round(width / 32), 1) * 32
    return dict(
        vocab_size=VOCABULARY, hidden_size=width, intermediate_size=3 * width, num_hidden_layers=LAYERS, num_attention_heads=width // 32,
        num_key_value_heads=width // 32, head_dim=32, tie_word_embeddings=True,
    )  # fmt: skip


def sizes_of(panel: str, own: dict[str, Any]) -> list[dict[str, Any]]:
    """What each process of a panel is given, by `size`. Raises QtjaxError for sizes that cannot be."""
    base = SHAPES["small" if own["quick"] else "15M"]
    if panel == "length":
        lengths, tokens = _numbers("lengths", own["lengths"], int), own["tokens"]
        for length in lengths:
            if length % lengths[0] or tokens % length or tokens < 2 * lengths[0]:
                raise QtjaxError(
                    f"--lengths {own['lengths']} --tokens {tokens}: {length} must be a multiple of the shortest and divide --tokens,"
                    " which holds two of the shortest"
                )
        return [dict(size=n, rows=tokens // n, length=n, sample=lengths[0], shape=base) for n in lengths]
    if panel == "batch":
        return [
            dict(size=n, rows=n, length=own["batch-length"], sample=own["batch-length"] // 2, shape=base)
            for n in _numbers("batches", own["batches"], int)
        ]
    if panel == "model":
        rows, length = own["model-rows"], own["model-length"]
        return [
            dict(size=m, rows=rows, length=length, sample=length // 2, shape=shape_of(m * 1e6)) for m in _numbers("models", own["models"], float)
        ]
    counts = [round(1000 * n) for n in _numbers("data", own["data"], float)]
    if not counts[0] or len(set(counts)) < len(counts):
        raise QtjaxError(f"--data {own['data']}: is in thousands; must be at least 0.001, and no two the same number of rows")
    return [dict(size=n, rows=n, length=256, batch=128, first=min(counts[0], 1000)) for n in counts]


def _numbers(flag: str, text: str, kind: Callable[[str], Any]) -> list[Any]:
    """ "1,2,4": ascending and above 0."""
    try:
        numbers = [kind(part) for part in text.split(",")]
    except ValueError:
        numbers = []
    if not numbers or numbers != sorted(set(numbers)) or not 0 < numbers[0] <= numbers[-1] < math.inf:
        raise QtjaxError(f"--{flag} {text}: must be {'whole ' * (kind is int)}numbers above 0, ascending, comma-separated, for example 1,2,4")
    return numbers


class Process:
    """benchmarks.scaling_one of one size, which answers a line with a line."""

    def __init__(self, what: str, given: dict[str, Any]):
        self.what, self.errors = what, tempfile.TemporaryFile("w+")
        call = [sys.executable, "-m", "benchmarks.scaling_one", json.dumps(given)]
        env = os.environ | {"JAX_PLATFORMS": "cpu", "TF_CPP_MIN_LOG_LEVEL": "2"}
        self.process = subprocess.Popen(
            call, cwd=Path(__file__).parents[1], env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.errors, text=True
        )

    def read(self) -> dict[str, Any]:
        """The next line. Raises QtjaxError where the process ended instead."""
        line = self.process.stdout.readline()
        if line:
            return json.loads(line)
        status = self.process.wait()
        self.errors.seek(0)
        said = (self.errors.read().strip().splitlines() or ["no message"])[-1].removeprefix("error: ")
        killed = "; it was killed, perhaps for its memory: leave this size out" if status == -9 else ""
        raise QtjaxError(f"{self.what}: its process ended with status {status}: {said}{killed}")

    def ask(self, word: str) -> dict[str, Any]:
        with contextlib.suppress(BrokenPipeError):  # what became of it is said by `read`
            self.process.stdin.write(word + "\n")
            self.process.stdin.flush()
        return self.read()

    def close(self) -> None:
        self.process.kill()
        self.process.communicate()
        self.errors.close()


@contextlib.contextmanager
def started(panel: str, given: dict[str, Any]) -> Iterator[Process]:
    process = Process(f"{panel} {given['size']:,}", given)
    try:
        yield process
    finally:
        process.close()


def measure_models(panel: str, sizes: list[dict[str, Any]], rounds: int, console: Console) -> list[dict[str, Any]]:
    """A row for each size. Raises QtjaxError where sizes that share a model disagree on the loss."""
    with contextlib.ExitStack() as ending:
        processes, rows = [], []
        for given in sizes:  # one after the other: what compiles takes both cores
            console.print(f"[dim]{panel} {given['size']:,}: compiling and checking[/dim]", highlight=False)
            processes.append(ending.enter_context(started(panel, given)))
            row = {"size": given["size"], "rows": given["rows"], "length": given["length"]} | processes[-1].read()
            rows.append(row | {"n": row["parameters"] if panel == "model" else row["size"]})
        if panel != "model":
            agree(panel, rows)
        seconds = [{"train": [], "score": []} for _ in rows]
        for turn in range(rounds):
            console.print(f"[dim]{panel}: round {turn + 1} of {rounds}[/dim]")
            for process, mine in zip(processes, seconds):
                for name, found in mine.items():
                    found.append(process.ask(name))
    for row, mine in zip(rows, seconds):
        for name, found in mine.items():
            row[name] |= {clock: per_thousand([each[clock] for each in found], row["rows"] * row["length"]) for clock in ("cpu", "wall")}
            row[name]["all"] = found
    return rows


def agree(panel: str, rows: Sequence[dict[str, Any]]) -> None:
    """Raises QtjaxError where not all sizes have the first one's loss and gradient norm."""
    first = rows[0]["check"]
    for row in rows:
        for name, within in (("loss", AGREE), ("grad_norm", 10 * AGREE)):
            if not abs(row["check"][name] - first[name]) <= within * abs(first[name]):
                raise QtjaxError(
                    f"{panel} {row['size']:,}: {name} {row['check'][name]:.6g} of the samples that all sizes share, {first[name]:.6g} at"
                    f" {rows[0]['size']:,}: the programs differ, no time counts"
                )


def per_thousand(seconds: Sequence[float], count: int) -> float:
    """Median seconds per 1,000 of what one launch holds `count` of."""
    return 1000 * statistics.median(seconds) / count


def write_rows(file: Path, count: int) -> None:
    """So many questions and answers; row i is the same in every file."""
    words = "red blue green one two three four cat dog bird sun moon tree house river stone".split()
    with open(file, "w", encoding="utf-8") as lines:
        for i in range(count):
            at = np.random.Philox(key=np.array([7, i], np.uint64)).random_raw(40) % len(words)
            asked, answered = 5 + int(at[0]), 3 + 2 * int(at[1])
            said = [words[k] for k in at[2:]]
            row = {"prompt": f"{i}: what follows {' '.join(said[:asked])}?", "completion": " ".join(said[asked : asked + answered])}
            lines.write(json.dumps(row) + "\n")


def measure_data(sizes: list[dict[str, Any]], console: Console) -> list[dict[str, Any]]:
    """A row for each size, seconds per 1,000 rows. Raises QtjaxError where files that share rows gave other tokens."""
    out = []
    with tempfile.TemporaryDirectory() as folder:
        for given in sizes:
            console.print(f"[dim]data {given['rows']:,}: writing, tokenizing, reading[/dim]", highlight=False)
            file = Path(folder) / "rows.jsonl"
            write_rows(file, given["rows"])
            with started("data", given | {"file": str(file)}) as process:
                row = {"size": given["rows"], "n": given["rows"], "bytes": file.stat().st_size} | process.read()
            for part in ("tokenized", "epoch"):
                row[part] |= {clock: per_thousand([row[part][clock]], given["rows"]) for clock in ("cpu", "wall")}
            out.append(row)
            if row["check"] != out[0]["check"]:
                raise QtjaxError(f"data {given['rows']:,}: its first rows gave other tokens than those of {out[0]['size']:,}; no number counts")
    return out


def exponent(rows: Sequence[dict[str, Any]], part: str, name: str) -> float:
    """e of value ~ n^e between the last two sizes; NaN of a single size, or where a value is 0."""
    if len(rows) < 2:
        return math.nan
    (x, a), (y, b) = ((row["n"], row[part][name]) for row in rows[-2:])
    return math.log(b / a) / math.log(y / x) if x != y and a and b else math.nan


def model_table(panel: str, rows: Sequence[dict[str, Any]], title: str) -> Table:
    columns = ("CPU s", "wall s", "x first", "temp MiB", "peak MiB")
    drawn = _table(title, panel, ["rows x length", *(f"{name}:\n{column}" for name in ("train", "score") for column in columns)])
    for row in rows:
        cells = [f"{row['rows']} x {row['length']:,}"]
        for name in ("train", "score"):
            mine, first = row[name], rows[0][name]
            cells += [f"{mine['cpu']:.3f}", f"{mine['wall']:.3f}", f"{mine['cpu'] / first['cpu']:.2f}", _mib(mine["temporaries"]), _mib(mine["peak"])]
        drawn.add_row(f"{row['parameters'] / 1e6:.1f}M" if panel == "model" else f"{row['size']:,}", *cells)
    return drawn


def data_table(rows: Sequence[dict[str, Any]], title: str) -> Table:
    columns = ("CPU s", "wall s", "own MiB", "peak MiB")
    names = [f"{name}:\n{column}" for name in ("tokenize", "epoch") for column in columns]
    drawn = _table(title, "data", ["file MB", "tokens", *names, "start:\nown MiB"])
    for row in rows:
        cells = [f"{row['bytes'] / 1e6:,.1f}", f"{row['tokens']:,}"]
        for part in ("tokenized", "epoch"):
            mine = row[part]
            cells += [f"{mine['cpu']:.3f}", f"{mine['wall']:.3f}", _mib(mine["own"]), _mib(mine["peak"])]
        drawn.add_row(f"{row['size']:,}", *cells, _mib(row["before"]["own"]))
    return drawn


def _table(title: str, panel: str, names: Sequence[str]) -> Table:
    drawn = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1))
    for name in (PANELS[panel], *names):
        drawn.add_column(name, justify="right", no_wrap=True)
    return drawn


def _mib(size: int | None) -> str:
    return "-" if size is None else f"{size / 2**20:,.1f}" if size < 10 * 2**20 else f"{size / 2**20:,.0f}"


def growth(panel: str, rows: Sequence[dict[str, Any]]) -> str:
    """How the last doubling went, in words."""
    if len(rows) < 2:
        return ""
    if panel == "data":
        more, own = rows[-1]["size"] - rows[0]["size"], [row["epoch"]["own"] for row in (rows[0], rows[-1])]
        kept = "unknown on this system" if None in own else f"{(own[1] - own[0]) / more:+,.0f} bytes for a row more"
        return f"own memory after an epoch, from {rows[0]['size']:,} to {rows[-1]['size']:,} rows: {kept}"
    said = [
        f"{name}: CPU ~ n^{exponent(rows, name, 'cpu'):.2f}, temporaries ~ n^{exponent(rows, name, 'temporaries'):.2f}" for name in ("train", "score")
    ]
    return f"between the last two sizes, n = {PANELS[panel]}: {'; '.join(said)}"


FLAGS = {
    "panels": ("length,batch,model,data", "what to vary"), "lengths": ("128,256,512,1024,2048,4096", "tokens of a row, 15M model"),
    "tokens": (4096, "tokens of a launch while the length varies"), "batches": ("1,2,4,8,16,32", "rows of a launch, 15M model"),
    "batch-length": (256, "tokens of each of them"), "models": ("1,4,15,30,60", "million parameters"), "model-rows": (4, "rows of their launches"),
    "model-length": (256, "tokens of each of them"), "data": ("1,10,100,1000", "thousand rows of data"), "rounds": (5, "alternating repetitions"),
    "quick": (False, "tiny sizes, in a minute; a size that is given counts"), "json": ("", "file to write the numbers to; empty: none"),
    "picture": ("", "PNG to draw; empty: none"),
}  # fmt: skip


def settings(argv: Sequence[str] | None) -> tuple[dict[str, Any], dict[str, list[dict[str, Any]]]]:
    """(flags, sizes by panel). Raises QtjaxError for what cannot be measured."""
    own = parse_flags("python -m benchmarks.scaling", __doc__.splitlines()[0], argv, FLAGS)
    if own["quick"]:
        own |= {name: value for name, value in QUICK.items() if own[name] == FLAGS[name][0]}
    for name in ("tokens", "batch-length", "model-rows", "model-length", "rounds"):
        least = 4 if "length" in name else 1
        if own[name] < least:
            raise QtjaxError(f"--{name} {own[name]}: must be {least} or more")
    panels = own["panels"].split(",")
    for panel in panels:
        if panel not in PANELS:
            raise QtjaxError(f"--panels {own['panels']}: {panel!r} is none{near_names(panel, PANELS)}; they are {', '.join(PANELS)}")
    return own, {panel: sizes_of(panel, own) for panel in panels}


def main(argv: Sequence[str] | None = None) -> None:
    own, sizes = settings(argv)
    jax.config.update("jax_platforms", "cpu")
    console = Console(width=None if Console().is_terminal else 140)
    report: dict[str, Any] = {"machine": machine(), "jax": jax.__version__, "rounds": own["rounds"], "tokens": own["tokens"], "panels": {}}
    for panel, given in sizes.items():
        rows = measure_data(given, console) if panel == "data" else measure_models(panel, given, own["rounds"], console)
        report["panels"][panel] = rows
        per = "1,000 rows" if panel == "data" else f"1,000 tokens, medians of {own['rounds']} rounds"
        title = f"By {PANELS[panel]}, seconds per {per}: {report['machine']}, jax {jax.__version__}"
        console.print(data_table(rows, title) if panel == "data" else model_table(panel, rows, title))
        console.print(growth(panel, rows), "", highlight=False, sep="\n", soft_wrap=True)
        if own["json"]:  # after each panel: what a later one may break stays
            write_json(own["json"], report)
    if own["picture"]:
        from benchmarks.scaling_picture import draw

        draw(report, own["picture"])


if __name__ == "__main__":
    with_own_pages(keep=False)  # memory that is kept would hide what a size needs
    door(main)
