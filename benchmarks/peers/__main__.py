"""qtjax and its peers side by side in one run on one machine: TRL, plain torch, peft, Tunix, each in its own environment.

    python -m benchmarks.peers --data gsm8k_train.jsonl --tokenizer tokenizer.model --models 15m,stories260K --envs runs/envs --out runs/peers
    python -m benchmarks.peers ... --rows qtjax,torch,trl --rounds 1 --json peers.json --picture peers.png

Models: 15m is a LLaMA of 15 million random parameters (vocabulary 32000, D 288, F 768, 6 layers, 6 heads, tied) with the
tokenizer of --tokenizer; others are HF folders. The rows of --data are tokenized once, by qtjax, and every row of the table
trains on these tokens in the same order, as many samples a step, in float32 on the CPU, loss on the answers only, AdamW at one
constant rate, gradients clipped to norm 1. LoRA starts from one adapter, which peft writes (r 8, alpha 16, all seven projections).

Processes follow one another, round after round; each is warm before it is timed. A row whose first losses (scores) stray from the
plain torch loop's is marked and its numbers are not shown. Ratios are of medians over the rounds of this one run. qtjax runs twice a
round: up to the first step with an empty compile cache, then with the cache that this left. Threads of OpenMP sleep while they wait.

torch, tuned: transformers' logits_to_keep, each step in forward passes of 4 samples of similar length, fused AdamW, and glibc told to
keep freed memory and to use huge pages, as qtjax.train tells it. By length: beside that, batches of similar length, as transformers'
group_by_length makes them. torch-eager, torch-compile and trl-compile are measured when --rows names them, or all.
"""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
from rich.console import Console

from benchmarks.machine import machine
from benchmarks.peers import output
from benchmarks.peers.drive import Bench, rounds
from benchmarks.peers.environments import python_of
from benchmarks.peers.inputs import SMALL, work
from benchmarks.peers.rows import ROWS, Row, chosen
from qtjax.atomic import disk_errors, write_json
from qtjax.config import Config
from qtjax.errors import QtjaxError, door, near_names
from qtjax.flags import parse_flags, typed

FLAGS = {
    "models": (SMALL, f"comma-separated: {SMALL}, or HF folders"),
    "data": ("", "JSONL of prompts and answers"),
    "prompt-column": ("question", "its column of prompts"),
    "completion-column": ("answer", "its column of answers"),
    "tokenizer": ("", f"sentencepiece model of 32,000 tokens, or an HF folder that has one, for the model {SMALL}"),
    "envs": ("runs/peers/envs", "folder of the peers' environments, installed on demand; empty: this interpreter for all"),
    "out": ("runs/peers", "folder for models, samples, jobs and logs"),
    "rows": ("", f"comma-separated, of {', '.join(ROWS)}; all; empty: the usual ones"),
    "batch": (16, "samples per optimizer step"),
    "steps": (8, "optimizer steps of a process"),
    "warmup": (2, "of them untimed"),
    "rounds": (3, "alternating rounds"),
    "max-length": (512, "tokens a sample may have; longer answers are cut"),
    "learning-rate": (1e-4, "AdamW's, constant"),
    "set": ([], "a setting of qtjax's own config for its rows, as train.rows=4"),
    "json": ("", "file for the numbers; empty: none"),
    "picture": ("", "PNG to draw; empty: none"),
}  # fmt: skip


def settings(argv: Sequence[str] | None) -> dict[str, Any]:
    """The command line, checked. Raises QtjaxError."""
    given = parse_flags("python -m benchmarks.peers", __doc__.splitlines()[0], argv, FLAGS)
    for name in ("batch", "steps", "rounds", "warmup"):
        if given[name] < 1:
            raise QtjaxError(f"--{name} {given[name]}: must be 1 or more")
    if given["warmup"] >= given["steps"]:
        raise QtjaxError(f"--warmup {given['warmup']}: leaves none of {given['steps']} steps to time; raise --steps")
    if not given["data"] or not Path(given["data"]).is_file():
        raise QtjaxError(f"--data {given['data']!r}: no such file; name a JSONL file of prompts and answers")
    names = [name.strip() for name in given["models"].split(",") if name.strip()]
    for name in names:
        if name != SMALL and not (Path(name) / "config.json").is_file():
            raise QtjaxError(f"--models {name!r}: neither {SMALL} nor an HF folder with config.json{near_names(name, [SMALL])}")
    if not names or len({Path(name).name for name in names}) < len(names):
        raise QtjaxError(f"--models {given['models']!r}: must name at least one model, and each once")
    given["models"], known, changes = names, Config().flat(), {}
    for text in given["set"]:
        name, equals, value = text.partition("=")
        if name not in known or not equals:
            raise QtjaxError(f"--set {text!r}: must be a config field and its value, as train.rows=4{near_names(name, known)}")
        changes[name] = typed(f"--set {name} =", type(known[name]), value, name)
    return given | {"set": changes}


def run(given: dict[str, Any], rows: Sequence[Row], console: Console, pythons: dict[str, str] | None = None) -> tuple[list[Bench], dict[str, Any]]:
    """Everything measured; (benches, the numbers). Args: pythons: {environment: interpreter}; None: those of --envs."""
    out, not_there = Path(given["out"]), {}
    say = lambda text: console.print(text, highlight=False, soft_wrap=True, markup=False)  # noqa: E731
    with disk_errors(out, "making the folder"):
        out.mkdir(parents=True, exist_ok=True)
    works = [work(name, given, out) for name in given["models"]]  # before anything is installed: what is wrong with the data costs nothing
    if pythons is None:
        pythons = {"torch": python_of("torch", given["envs"], say)}  # every row is checked against it
        for env in dict.fromkeys(row.env for row in rows):
            try:
                pythons[env] = python_of(env, given["envs"], say)
            except QtjaxError as error:
                not_there[env] = str(error)
    benches, on = [Bench(each, given, pythons, out) for each in works], machine()
    for bench in benches:
        say(f"{Path(bench.work.name).name}: {bench.work.useful:,} useful tokens, {bench.work.targets:,} of them answers; torch reference")
        bench.prepare(rows)

    def keep() -> None:
        if given["json"]:
            write_json(Path(given["json"]), output.report(benches, rows, given, on, not_there))

    rounds(benches, rows, given["rounds"], say, keep)
    for bench in benches:
        timed = f"{given['steps'] - given['warmup']} steps timed, medians of {given['rounds']} round{'s' * (given['rounds'] > 1)}"
        heading = f"{Path(bench.work.name).name}: {given['batch']} samples a step, {timed}; {on}"
        tables = Console(width=None if Console().is_terminal else 140, quiet=console.quiet)
        tables.print(output.table(bench, rows, heading, not_there))
        if output.verdicts(bench, rows):
            tables.print(output.bar_table(bench, rows))
    if given["picture"]:
        output.draw(benches, rows, f"Useful tokens per CPU second, {given['batch']} samples a step; {on}", Path(given["picture"]))
    return benches, output.report(benches, rows, given, on, not_there)


def main(argv: Sequence[str] | None = None) -> None:
    given = settings(argv)
    jax.config.update("jax_platforms", "cpu")  # as in all rows: what is named as the machine is what they ran on
    run(given, chosen(given["rows"]), Console(file=sys.stderr))


if __name__ == "__main__":
    door(main)
