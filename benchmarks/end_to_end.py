"""What pruning saves, end to end: whole optimizer steps of full data and of Q-Tuning at several budgets, beside the model 1 / (c + k).

    python -m benchmarks.end_to_end --data gsm8k_train.jsonl --prompt-column question --completion-column answer --tokenizer tokenizer.model
    python -m benchmarks.end_to_end --data t0_p3_50k.jsonl.gz --model FOLDER --methods full --json e2e.json --picture e2e.png

Every setting is a session as `python -m qtjax.train` opens it, on the same rows in the same order. All take step 1, then all step 2, and
so on, so that what else the machine does falls on all alike. A step is scoring, decision, packing, training and update; left out are
compilation and the first step of every epoch, which a process's first use of everything falls on. c = seconds of scoring / seconds of
full data, k = tokens trained on / all tokens, both of this run; "targets": the same of answers' tokens, which the head's part of a step
goes with instead (what is kept may answer at greater length than the rest). Speed-ups are ratios of CPU seconds over the same steps, wall
clock beside them. "reused" scores in its first epoch of three and is compared with three epochs; "one forward" keeps what the layers gave
in the scoring pass (prune.reuse_forward), which saves more where training computes its layers twice: --remat full, for all lines. Ctrl-C
ends it after the step that all have taken; what was measured by then is shown.
"""

import contextlib
import json
import math
import shutil
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import jax
from rich import box
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from benchmarks.machine import machine
from benchmarks.peers.inputs import SMALL, write_small
from qtjax.config import Config, override, validate
from qtjax.errors import QtjaxError, door
from qtjax.flags import parse_flags
from qtjax.pages import with_own_pages
from qtjax.train import use_compile_cache
from qtjax.training.run import open_session, stop_requested
from qtjax.training.run_folder import RunFolder

METHODS = {
    "full": {"overlay.method": "none", "train.learning_rate": 3e-4},
    "lora": {"overlay.method": "lora", "overlay.r": 8, "overlay.lora_alpha": 16.0, "train.learning_rate": 1e-3},
}
FULL_DATA = {"prune.sample_pruner": "none", "prune.token_pruner": "none"}
REUSED = 3  # epochs that one scoring pass serves
PAPER = {"12.5x50": 1.38, "25x50": 1.29}  # arXiv 2509.23873, its own measured speed-ups over full data
SHARE_OF_MODEL = 0.9
REUSED_BAR = 3.0


class Setting(NamedTuple):
    """One line of the table. changes: to the common config. epochs: passes over the rows."""

    name: str
    budget: str
    mode: str
    changes: dict[str, Any]
    epochs: int = 1


@dataclass
class Spent:
    """A setting's steps: CPU and wall seconds of each, and of its scoring; tokens and slots launched, targets learnt; losses: mean nll of
    each step; kept: samples trained on, and those that could be."""

    cpu: list[float] = field(default_factory=list)
    wall: list[float] = field(default_factory=list)
    score_cpu: list[float] = field(default_factory=list)
    tokens: int = 0
    slots: int = 0
    targets: int = 0
    losses: list[float] = field(default_factory=list)
    kept: list[tuple[int, int]] = field(default_factory=list)


def settings(budgets: str, modes: str, alone: bool = False) -> list[Setting]:
    """Full data, every budget in every mode, and unless these `alone` the first one with its scores reused and, masked, its scoring pass kept.

    Raises QtjaxError for other spellings.
    """
    out = [Setting("full data", "", "", FULL_DATA)]
    for budget in budgets.split(","):
        sample, _, token = budget.strip().partition("x")
        try:
            keep = {"prune.sample_keep": float(sample) / 100, "prune.token_keep": float(token) / 100}
            validate(override(Config(), keep))
        except (ValueError, QtjaxError):
            raise QtjaxError(f"--budgets {budget!r}: must be percent of samples x percent of tokens, for example 12.5x50") from None
        for mode in modes.split(","):
            if mode not in ("mask", "drop"):
                raise QtjaxError(f"--modes {mode!r}: must be mask, drop or both: mask,drop")
            out.append(Setting(f"Q-Tuning {budget}", budget, mode, keep | {"prune.mode": mode}))
    if alone:
        return out
    first = out[1]
    masked = [each for each in out[1:] if each.mode == "mask"]  # of what is dropped, layers give something else
    out += [each._replace(name=f"{each.name}, one forward", changes=each.changes | {"prune.reuse_forward": True}) for each in masked[:1]]
    return [*out, first._replace(name=f"{first.name}, reused", changes=first.changes | {"prune.score_every": REUSED}, epochs=REUSED)]


class Session:
    """One setting's run, a step at a time."""

    def __init__(self, config: Config, console: Console):
        self.folder = RunFolder.open(config)
        self.session = open_session(config, self.folder, console)
        self.loop, self.last, self.spent = self.session.loop, self.session.total_steps, Spent()

    def step(self, number: int) -> None:
        """Optimizer step number + 1, measured where it is not the first one of an epoch."""
        begin, wall = time.process_time(), time.perf_counter()
        metrics, _ = self.loop.step(number, self.last)
        if number % self.loop.plan.steps_per_epoch == 0:
            return
        self.spent.cpu.append(time.process_time() - begin)
        self.spent.wall.append(time.perf_counter() - wall)
        self.spent.score_cpu.append(self.loop.clock.cpu["score"])
        self.spent.tokens += metrics["trained_tokens"]
        self.spent.slots += metrics["trained_slots"]
        self.spent.targets += metrics["kept_tokens"]
        self.spent.losses.append(metrics["loss"])
        self.spent.kept.append((metrics["kept_samples"], metrics["eligible"]))

    def close(self) -> None:
        """Lets go of the run."""
        self.session.close()
        self.folder.close()


def run(config: Config, chosen: Sequence[Setting], folder: Path, say: Callable[[str], Any], asked: Sequence[int]) -> tuple[dict[str, Spent], bool]:
    """{name and mode: what it spent}; the same step of all settings one after the other, in an order that turns from step to step.

    Also whether all steps were taken. asked: not empty once somebody wants it to stop, which it does after a step that all settings took,
    one that is measured at least. Raises KeyboardInterrupt where that is before the first step.
    """
    console, sessions, complete = Console(quiet=True), {}, True
    with contextlib.ExitStack() as opened:
        for setting in chosen:
            if asked:
                raise KeyboardInterrupt
            key = key_of(setting)
            own = setting.changes | {"run.folder": str(folder / key.replace(" ", "_").replace(",", "")), "train.epochs": float(setting.epochs)}
            sessions[key] = Session(validate(override(config, own)), console)
            opened.callback(sessions[key].close)
            say(f"{key}: compiled")
        steps = {key: each.last for key, each in sessions.items()}
        for number in range(max(steps.values())):
            if asked and number > 1:
                complete = False
                break
            keys = [key for key in sessions if number < steps[key]]
            for key in keys[number % len(keys) :] + keys[: number % len(keys)]:
                sessions[key].step(number)
                say(f"{key}: step {number + 1} of {steps[key]}")
    return {key: each.spent for key, each in sessions.items()}, complete


def key_of(setting: Setting) -> str:
    """A name for one line."""
    return f"{setting.name} {setting.mode}".strip()


def check(chosen: Sequence[Setting], spent: dict[str, Spent]) -> None:
    """Raises QtjaxError unless every step learnt from what it should have: finite losses, exactly the budget's samples."""
    for setting in chosen:
        own = spent[key_of(setting)]
        if not all(math.isfinite(loss) and loss > 0 for loss in own.losses):
            raise QtjaxError(f"{key_of(setting)}: losses {own.losses}: not finite, so that its seconds count for nothing")
        keep = setting.changes.get("prune.sample_keep", 1.0)
        for kept, samples in own.kept:
            if kept != (wanted := max(1, math.floor(keep * samples + 1e-9))):
                raise QtjaxError(f"{key_of(setting)}: kept {kept} samples of {samples}, not {wanted}")


def lines(chosen: Sequence[Setting], spent: dict[str, Spent]) -> list[dict[str, Any]]:
    """What the table shows: c, k, the model 1 / (c + k), and the speed-ups measured in CPU seconds and in wall clock."""
    full = spent[key_of(chosen[0])]
    out = []
    for setting in chosen:
        own, epochs = spent[key_of(setting)], setting.epochs
        first = len(full.cpu)
        passes = own.score_cpu[:first] if setting.changes.get("prune.sample_keep") else []
        c, k = sum(passes) / sum(full.cpu) / epochs, own.tokens / full.tokens / epochs
        row = {
            "setting": setting.name, "mode": setting.mode, "epochs": epochs, "steps": len(own.cpu), "c": c, "k": k,
            "targets": own.targets / full.targets / epochs, "fill": own.tokens / own.slots, "cpu_seconds": sum(own.cpu), "wall_seconds": sum(own.wall),
            "tokens": own.tokens, "losses": [own.losses[0], own.losses[-1]],
        }  # fmt: skip
        if setting is not chosen[0]:
            row |= {"model": 1 / (c + k), "speedup": epochs * sum(full.cpu) / sum(own.cpu), "wall_speedup": epochs * sum(full.wall) / sum(own.wall)}
            row["by_step"] = [full.cpu[i % first] / own.cpu[i] for i in range(len(own.cpu))]
            row["bars"] = bars(setting, row)
        out.append(row)
    return out


def bars(setting: Setting, row: dict[str, Any]) -> list[tuple[str, bool]]:
    """(rule, met) of one line; the issue's bars are for full fine-tuning of a model of at least 15M parameters."""
    if setting.epochs > 1:
        return [(f"{REUSED_BAR:g}x", row["speedup"] >= REUSED_BAR)] if setting.budget == "12.5x50" else []
    out = []
    if not setting.changes.get("prune.reuse_forward"):  # 1 / (c + k) counts a forward pass twice
        out.append((f"{SHARE_OF_MODEL:g} of it", row["speedup"] >= SHARE_OF_MODEL * row["model"]))
    if setting.budget in PAPER:
        out.append((f"{PAPER[setting.budget]:g}x", row["speedup"] > PAPER[setting.budget]))
    return out


def table(method: str, rows: list[dict[str, Any]], heading: str) -> Table:
    """One method's lines."""
    drawn = Table(title=f"{method}: {heading}", box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, title_justify="left")
    for name in ("setting", "mode", "c", "k", "targets", "fill", "CPU s", "1/(c+k)", "speed-up", "wall", "of the model", "bars"):
        drawn.add_column(name, justify="left" if name in ("setting", "mode", "bars") else "right", no_wrap=name == "setting")
    for row in rows:
        cells = [row["setting"], row["mode"], f"{row['c']:.3f}", f"{row['k']:.3f}", f"{row['targets']:.3f}", f"{row['fill']:.1%}", f"{row['cpu_seconds']:.1f}"]
        if "model" in row:
            cells += [f"{row['model']:.2f}x", f"{row['speedup']:.2f}x", f"{row['wall_speedup']:.2f}x", f"{row['speedup'] / row['model']:.0%}"]
            cells.append(", ".join(f"{rule}: {'met' if met else 'NOT met'}" for rule, met in row["bars"]))
        drawn.add_row(*cells)
    return drawn


def draw(report: dict[str, Any], file: Path) -> None:
    """Measured speed-ups as bars, the model as a tick on each."""
    import matplotlib.pyplot as plt

    from qtjax.report.style import BLUE, INK, save, tidy

    methods = report["results"]
    figure, axes = plt.subplots(1, len(methods), figsize=(4.8 * len(methods), 0.42 * max(map(len, methods.values())) + 1.2), squeeze=False)
    for axis, (method, rows) in zip(axes[0], methods.items()):
        rows = [row for row in rows if "model" in row][::-1]
        places = range(len(rows))
        axis.barh(places, [row["speedup"] for row in rows], color=BLUE, height=0.6)
        axis.scatter([row["model"] for row in rows], places, marker="|", s=180, color=INK, label="1 / (c + k)")
        axis.axvline(1, color=INK, linewidth=0.8, linestyle=":")
        axis.set_yticks(places, [f"{row['setting'].removeprefix('Q-Tuning ')} {row['mode']}" for row in rows], fontsize=8)
        axis.set_xlabel("times as fast as full data, scoring included", fontsize=9)
        axis.set_title(method)
        tidy(axis)
        axis.legend(loc="upper right", frameon=False, fontsize=8)
    figure.tight_layout()
    save(figure, file)


def main(argv: Sequence[str] | None = None) -> None:
    given = parse_flags(
        "python -m benchmarks.end_to_end", __doc__.splitlines()[0], argv,
        {
            "data": ("", "training file"), "prompt-column": ("", "its prompt column; empty: by format"),
            "completion-column": ("", "its answer column; empty: by format"),
            "model": (SMALL, f"HF folder, or {SMALL}: a LLaMA of that size with random weights"), "tokenizer": ("", f"sentencepiece model of 32,000 tokens, for {SMALL}"),
            "methods": ("full,lora", "full, lora or both"), "budgets": ("12.5x50,25x50,25x70,50x70", "percent of samples x of tokens"),
            "modes": ("mask,drop", "mask, drop or both"), "budgets-alone": (False, "leave out the lines 'reused', of three epochs, and 'one forward'"),
            "steps": (6, "optimizer steps of full data that are timed; 0: one epoch"), "batch": (64, "samples of a step"),
            "max-length": (512, "tokens of a sample and of a row"), "rows": (8, "packed rows of a launch"), "json": ("", "file for the numbers"),
            "picture": ("", "PNG"), "dtype": ("float32", "compute dtype"), "remat": ("none", "model.remat of all lines"),
        },
    )  # fmt: skip
    if not given["data"]:
        raise QtjaxError("--data: is missing; give a file of prompts and answers")
    unknown = [m for m in given["methods"].split(",") if m not in METHODS]
    if unknown:
        raise QtjaxError(f"--methods {unknown[0]!r}: must be full, lora or both: full,lora")
    chosen = settings(given["budgets"], given["modes"], given["budgets-alone"])
    console = Console(width=None if Console().is_terminal else 140)
    out, cache = Path(tempfile.mkdtemp(prefix="end_to_end-")), jax.config.jax_compilation_cache_dir
    try:
        report = measure(given, chosen, out)
    finally:
        jax.config.update("jax_compilation_cache_dir", cache)
        shutil.rmtree(out, ignore_errors=True)
    for method, rows in report["results"].items():
        measured = report["measured"][method]
        early = "" if measured["complete"] else ", stopped before the end"
        console.print(table(method, rows, f"{measured['samples']} samples, {measured['steps']} steps of {given['batch']}{early}; {report['machine']}"))
    for method in given["methods"].split(","):
        if method not in report["results"]:
            console.print(f"{method}: stopped before it was measured")
    if given["json"]:
        Path(given["json"]).write_text(json.dumps(report, indent=1) + "\n")
    if given["picture"]:
        draw(report, Path(given["picture"]))


def measure(given: dict[str, Any], chosen: Sequence[Setting], out: Path) -> dict[str, Any]:
    """Everything that is shown, {"results": {method: lines}}."""
    model = str(write_small(out, given["tokenizer"])) if given["model"] == SMALL else given["model"]
    common = {
        "model.path": model, "model.dtype": given["dtype"], "model.remat": given["remat"], "data.path": given["data"], "data.prompt_column": given["prompt-column"],
        "data.completion_column": given["completion-column"], "data.chat_template": "none", "data.eval_fraction": 0.0,
        "data.max_length": given["max-length"], "data.max_samples": (given["steps"] + 1) * given["batch"] if given["steps"] else 0, "prune.batch_size": given["batch"],
        "train.rows": given["rows"], "train.checkpoint_every": 10**6, "train.warmup_fraction": 0.0, "run.tensorboard": False,
        "run.export": False, "run.compile_cache": str(out / "compile_cache"),
    }  # fmt: skip
    results, measured = {}, {}
    with stop_requested() as asked, Progress(console=Console(stderr=True), transient=True) as progress:
        for method in given["methods"].split(","):
            config = validate(override(Config(), common | METHODS[method]))
            use_compile_cache(config)
            task = progress.add_task(method, total=None)
            try:
                spent, complete = run(
                    config, chosen, out / method, lambda text: progress.update(task, description=f"{method}, {text}", advance=1), asked
                )  # fmt: skip
            except KeyboardInterrupt:
                if not results:
                    raise
                break
            own = [setting for setting in chosen if setting.epochs == 1 or complete]  # of three epochs a part says nothing
            check(own, spent)
            results[method] = lines(own, spent)
            kept = spent["full data"].kept
            measured[method] = {"steps": len(kept), "samples": sum(count for _, count in kept), "complete": complete}
            if asked:
                break
    return {"settings": given, "machine": machine(), "jax": jax.__version__, "measured": measured, "results": results}


if __name__ == "__main__":
    with_own_pages(keep=True)
    door(main)
