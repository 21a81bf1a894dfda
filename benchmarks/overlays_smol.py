"""What every overlay learns: the embedded model on the embedded data under Q-Tuning, the same budget for each method.

    python -m benchmarks.overlays_smol                     # all methods, three epochs each: about a minute a method
    python -m benchmarks.overlays_smol --methods lora,dora --epochs 8

Each row is one `python -m qtjax.train --config configs/smol.py --overlay.method M` with the learning rate printed beside it (one
rate a family, not tuned by method). X-LoRA trains three LoRA experts first, on a third of the rows each; Laplace fits its
posterior after training. Runs stand in --folder and are not repeated; --picture draws quality against trained values.
"""

import argparse
import json
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
    summary = story.run(validate(override(config, changes)), Console(quiet=True), quiet=True)
    evaluation = summary["evaluation"]
    return {
        "method": method, "trained": summary["trained_values"], "rate": rate, "base": evaluation["base"], "after": evaluation["after"],
        "seconds": summary["seconds"], "calibration": summary.get("calibration"), "fields": SETTINGS.get(method, ""),
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
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    from qtjax.report.style import BLUE, GREY, INK, VERMILION, save, tidy

    rows = sorted(report["results"], key=lambda r: r["trained"])
    figure = Figure(figsize=(9.5, 6), layout="constrained")
    canvas, axes = FigureCanvasAgg(figure), figure.add_subplot()
    tidy(axes)
    axes.set(xscale="log", yscale="log", xlabel="trained values", ylabel="held-out loss (nats per token)")
    for row in rows:
        axes.plot(row["trained"], row["after"]["loss"], "o", color=VERMILION if row["method"] == "full" else BLUE)
    front, best = [], float("inf")
    for row in rows:
        if row["after"]["loss"] < best:
            best = row["after"]["loss"]
            front.append((row["trained"], best))
    axes.plot(*zip(*front), "--", color=GREY, linewidth=1, label="best at its size or below", zorder=1)
    axes.set_title(
        f"smol on smol-instruct, Q-Tuning 25 % x 50 %, {report['epochs']:g} epochs, base {rows[0]['base']['loss']:.2f}", loc="left", color=INK
    )
    axes.margins(x=0.1, y=0.08)
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 3, 5)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    axes.legend(loc="upper right", frameon=False)
    canvas.draw()
    points = [axes.transData.transform((row["trained"], row["after"]["loss"])) for row in rows]
    taken = [(x - 5, y - 5, x + 5, y + 5) for x, y in points]
    for row in rows:  # each name where it covers neither a point nor another name
        for dx, dy, side in ((7, 2, "left"), (-7, 2, "right"), (7, -11, "left"), (-7, -11, "right"), (0, 9, "center"), (0, -17, "center"), (7, 14, "left")):
            name = axes.annotate(
                row["method"], (row["trained"], row["after"]["loss"]), textcoords="offset points", xytext=(dx, dy), ha=side, fontsize=8.5
            )
            box = name.get_window_extent(canvas.get_renderer())
            if not any(box.x0 < x1 and x0 < box.x1 and box.y0 < y1 and y0 < box.y1 for x0, y0, x1, y1 in taken):
                break
            name.remove()
        else:
            name = axes.annotate(row["method"], (row["trained"], row["after"]["loss"]), textcoords="offset points", xytext=(7, 2), fontsize=8.5)
            box = name.get_window_extent(canvas.get_renderer())
        taken.append((box.x0, box.y0, box.x1, box.y1))
    save(figure, file)


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
