"""python -m qtjax.evaluate --config configs/smol.py: held-out loss, exact match, multiple choice of a model or a run."""

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from qtjax.atomic import write_json
from qtjax.config import load_config
from qtjax.errors import QtjaxError, door


def main(argv: Sequence[str] | None = None, console: Console | None = None) -> None:
    config, own = load_config(
        "python -m qtjax.evaluate",
        "Evaluates a model, an adapter or a training run on held-out data: the config's, or without --config the run's own.",
        argv,
        {
            "checkpoint": ("", "run folder, PEFT adapter, HF folder or hub name; empty: model.path"),
            "tasks": ("loss,exact_match", "comma-separated: loss, exact_match, choice"),
            "rule": ("auto", "how exact match judges: auto, smol-instruct, number, label, equal, contains"),
            "choice-form": ("auto", "how choices are asked: auto, cloze, chat, label"),
            "show": (3, "generated answers printed"),
            "out": ("", "JSON file to write; empty: print only"),
        },
        run_flag="checkpoint",
    )
    from qtjax import evals
    from qtjax.data.prepare import data_line
    from qtjax.evals.choice_rows import FORMS
    from qtjax.evals.rules import rule_named
    from qtjax.training.open_model import open_mesh, open_model

    tasks = evals.parse_tasks(own["tasks"])
    if own["rule"] != "auto":
        rule_named(own["rule"])
    if own["choice-form"] not in FORMS:
        raise QtjaxError(f"--choice-form {own['choice-form']!r}: must be one of {', '.join(FORMS)}")
    if own["out"] and not Path(own["out"]).absolute().parent.is_dir():
        raise QtjaxError(f"--out {own['out']}: its folder does not exist; make it first")
    console, began = console or Console(), time.monotonic()
    mesh = open_mesh(config.mesh, own["checkpoint"])
    model = open_model(config.model, own["checkpoint"], mesh=mesh)
    held_out = evals.load_held_out(config, model.config, model.tokenizer, tasks, choice_form=own["choice-form"])
    results = evals.evaluate(
        config, model.config, model.params, model.tokenizer, held_out, overlay=model.overlay, mesh=mesh, rule=own["rule"]
    )
    results = {task: results[task] for task in tasks}
    console.print(data_line(config.data, held_out=True), highlight=False, soft_wrap=True, markup=False)
    console.print(results_table(results, model.name))
    if held_out.skipped:
        console.print(f"{held_out.skipped} rows left out of exact match: no answer, or no room for one", highlight=False)
    if held_out.prompts is not None and own["show"] > 0:
        console.print(answers_table(results["exact_match"].answers[: own["show"]]))
    if own["out"]:
        record: dict[str, Any] = {"model": model.name, "seconds": round(time.monotonic() - began, 1)}
        record |= {task: result.summary() for task, result in results.items()}
        if held_out.prompts is not None:
            record["exact_match"] |= {"skipped": held_out.skipped, "answers": [a._asdict() for a in results["exact_match"].answers]}
        write_json(own["out"], record)
        console.print(f"written: {own['out']}", highlight=False, soft_wrap=True)


def results_table(results: dict[str, Any], name: str) -> Table:
    """One line a number: what it is, its value, over how much."""
    table = Table("held out", "value", "over", title=name, title_justify="left")
    table.columns[1].justify = "right"
    if "loss" in results:
        r = results["loss"]
        table.add_row("loss (nats per trained token)", f"{r.loss:.4f}", f"{r.tokens:,} tokens, {r.samples:,} samples")
        table.add_row("perplexity", f"{r.perplexity:.3f}", "")
    if "exact_match" in results:
        r = results["exact_match"]
        table.add_row("exact match", f"{r.accuracy:.1%}", f"{r.count:,} answers, {r.ended:.1%} ended by themselves")
        for task, (accuracy, count) in r.by_task.items():
            table.add_row(f"  {task}", f"{accuracy:.1%}", f"{count:,}")
    if "choice" in results:
        r = results["choice"]
        table.add_row("multiple choice, acc", f"{r.acc:.1%}", f"{r.count:,} questions, ± {r.stderr:.1%}")
        table.add_row("  acc_norm (per character)", f"{r.acc_norm:.1%}", f"chance {r.chance:.1%}")
        table.add_row("  acc_token (per token)", f"{r.acc_token:.1%}", f"{r.cut:,} prompts cut" if r.cut else "")
    return table


def answers_table(answers: Sequence[Any]) -> Table:
    """Generated answers beside what was asked for; long texts are cut."""
    from rich.text import Text

    table = Table("", "prompt", "generated", "reference")
    for a in answers:
        cells = (a.prompt, a.generated, a.reference)
        table.add_row("right" if a.correct else "wrong", *(Text(" ".join(cell.split())[:120]) for cell in cells))
    return table


if __name__ == "__main__":
    door(main)
