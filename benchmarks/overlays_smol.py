"""What every overlay learns: the embedded model on the embedded data under Q-Tuning, the same budget for each method.

    python -m benchmarks.overlays_smol                     # all methods, three epochs each: about a minute a method
    python -m benchmarks.overlays_smol --methods lora,dora --epochs 8

Each row is one `python -m qtjax.train --config configs/smol.py --overlay.method M` with the learning rate printed beside it (one
rate a family, not tuned by method). X-LoRA trains three LoRA experts first, on a third of the rows each; Laplace fits its
posterior after training. Runs stand in --folder and are not repeated; --picture draws quality against trained values.
"""

import argparse
import json
import os
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from qtjax.config import override, read_config, validate
from qtjax.errors import QtjaxError, door
from qtjax.overlays import METHODS
from qtjax.training import story

# Learning rates by family: vectors and prompts start from larger or fewer values and want larger steps.
RATES = {
    "full": 2e-3, "ia3": 2e-2, "ln_tuning": 1e-2, "bitfit": 1e-2, "vera": 2e-2, "fourierft": 2e-2, "vblora": 1e-2, "prompt": 3e-2,
    "ptuning": 5e-3, "mpt": 3e-2, "prefix": 1e-2, "llama_adapter": 1e-2, "oft": 5e-3, "boft": 5e-3, "xlora": 1e-2, "diffprune": 2e-3,
}  # fmt: skip
RATE = 5e-3
SETTINGS = {
    "adalora": "init_r=12 target_r=8 tinit=10 tfinal=30 deltaT=5", "oft": "oft_block_size=16", "boft": "boft_block_size=8", "vera": "r=64",
    "fourierft": "n_frequency=512 init_weights=true", "vblora": "num_vectors=64 vector_length=32 r=8", "houlsby": "bottleneck=16", "prompt": "num_virtual_tokens=16",
    "ptuning": "num_virtual_tokens=16 encoder_hidden_size=128", "mpt": "num_virtual_tokens=16", "prefix": "num_virtual_tokens=16",
    "llama_adapter": "adapter_len=16 adapter_layers=4", "diffprune": "target_modules=all-linear kept_fraction=0.05 alpha_rate=50",
}  # fmt: skip


def run_one(method: str, folder: Path, epochs: float, console: Console) -> dict[str, Any]:
    """One training run, or its table where it is finished."""
    config = read_config("configs/smol.py")
    rate = RATES.get(method, RATE)
    changes = {
        "train.epochs": epochs, "train.learning_rate": rate, "train.compare_full_data": 0, "run.folder": str(folder / method),
        "run.tensorboard": False, "eval.generate_samples": 128, "run.compile_cache": str(folder / "compile_cache"),
        "overlay.method": "none" if method == "full" else method, "overlay.fields": SETTINGS.get(method, ""),
        "model.quantization": "nf4" if method == "qlora" else "none",
    }  # fmt: skip
    with open(os.devnull, "w") as quiet:
        summary = story.run(validate(override(config, changes)), Console(file=quiet), quiet=True)
    evaluation = summary["evaluation"]
    return {
        "method": method, "trained": summary["trained_values"], "rate": rate, "base": evaluation["base"], "after": evaluation["after"],
        "seconds": summary["seconds"], "calibration": summary.get("calibration"),
    }  # fmt: skip


def table(report: dict) -> Table:
    drawn = Table(title=f"smol on smol-instruct, Q-Tuning 25 % x 50 %, {report['epochs']:g} epochs each")
    for name in ("method", "trained values", "rate", "held-out loss", "exact match", "steps s", "total s"):
        drawn.add_column(name, justify="left" if name == "method" else "right")
    base = report["results"][0]["base"]
    drawn.add_row("base", "", "", f"{base['loss']:.3f}", f"{base['exact_match']:.1%}", "", "")
    for row in report["results"]:
        steps = sum(row["seconds"][k] for k in ("scoring", "packing", "training"))
        drawn.add_row(
            row["method"], f"{row['trained']:,}", f"{row['rate']:g}", f"{row['after']['loss']:.3f}", f"{row['after']['exact_match']:.1%}",
            f"{steps:.0f}", f"{row['seconds']['total']:.0f}",
        )  # fmt: skip
    return drawn


def draw(report: dict, file: Path) -> None:
    """Held-out loss against trained values, the best at each size joined."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = sorted(report["results"], key=lambda r: r["trained"])
    figure, axes = pyplot.subplots(figsize=(9, 5.5), dpi=120)
    for row in rows:
        axes.plot(row["trained"], row["after"]["loss"], "o", color="#2b6cb0" if row["method"] != "full" else "#c05621")
        axes.annotate(row["method"], (row["trained"], row["after"]["loss"]), textcoords="offset points", xytext=(5, 4), fontsize=8)
    front, best = [], float("inf")
    for row in rows:
        if row["after"]["loss"] < best:
            best = row["after"]["loss"]
            front.append((row["trained"], best))
    axes.plot(*zip(*front), "--", color="#718096", linewidth=1, label="best at its size or below")
    axes.set(xscale="log", yscale="log", xlabel="trained values", ylabel="held-out loss (nats per token)")
    axes.set_title(f"smol on smol-instruct, Q-Tuning 25 % x 50 %, {report['epochs']:g} epochs, base {rows[0]['base']['loss']:.2f}")
    axes.grid(True, which="both", alpha=0.25)
    axes.legend(loc="upper right")
    figure.tight_layout()
    figure.savefig(file)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.overlays_smol", description=__doc__.splitlines()[0])
    parser.add_argument("--methods", default="", help="comma-separated; empty: full fine-tuning and all overlays")
    parser.add_argument("--epochs", type=float, default=3.0, help="passes over the data (default: %(default)s)")
    parser.add_argument("--folder", default="runs/overlays", help="where the runs stand (default: %(default)s)")
    parser.add_argument("--json", default="", help="file to write the numbers to; empty: none")
    parser.add_argument("--picture", default="", help="PNG of loss against trained values; empty: none")
    given = parser.parse_args()
    names = [n for n in given.methods.split(",") if n] or ["full", *METHODS]
    for name in names:
        if name not in METHODS and name != "full":
            raise QtjaxError(f"--methods {name}: not a method; known: full, {', '.join(METHODS)}")
    console, results = Console(width=None if Console().is_terminal else 120), []
    report = {"epochs": given.epochs, "results": results}
    for name in names:
        console.print(f"[dim]{name}[/dim]")
        results.append(run_one(name, Path(given.folder), given.epochs, console))
        if given.json:  # after every run: a stop loses nothing
            Path(given.json).write_text(json.dumps(report, indent=2) + "\n")
    console.print(table(report))
    if given.picture:
        draw(report, Path(given.picture))


if __name__ == "__main__":
    door(main)
