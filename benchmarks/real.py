"""Q-Tuning against full data on real rows and a real small checkpoint: held-out loss and seconds, side by side in one run.

    python -m benchmarks.real --model FOLDER --gsm8k-train FILE --gsm8k-test FILE --arc-train FILE --arc-test FILE --out FOLDER

Each run is one `qtjax.training.story.run` in a process of its own, alternating Q-Tuning and full data; compiled programs
are shared through a cache that a first, discarded pass fills, so that seconds hold no compilation. Finished runs are
read back, so an interrupted table continues. Prints a Markdown table and writes results.json into --out.
"""

import json
import subprocess
import sys
import time
from pathlib import Path

from benchmarks.machine import machine
from qtjax.config import Config, override, to_json, validate
from qtjax.errors import QtjaxError, door
from qtjax.flags import parse_flags

# Full fine-tuning of a 260,032-parameter model; LoRA wants a larger rate, as usual.
_METHODS = {
    "full": {"overlay.method": "none", "train.learning_rate": 1e-3},
    "LoRA r=8": {"overlay.method": "lora", "overlay.r": 8, "overlay.lora_alpha": 16.0, "train.learning_rate": 3e-3},
}
_PRUNING = {
    "Q-Tuning 25 x 50": {"prune.sample_pruner": "q-tuning", "prune.sample_keep": 0.25, "prune.token_keep": 0.5},
    "full data": {"prune.sample_pruner": "none", "prune.token_pruner": "none"},
}


def configs(given: dict) -> dict[tuple[str, str, str], Config]:
    """(data, method, pruning) -> config."""
    data = {
        "GSM8K": {"data.path": given["gsm8k-train"], "data.eval_path": given["gsm8k-test"], "data.max_length": 512},
        "ARC-Easy": {"data.path": given["arc-train"], "data.eval_path": given["arc-test"], "data.max_length": 512},
    }
    for flags in data.values():
        if not flags["data.path"] or not flags["data.eval_path"]:
            raise QtjaxError("--gsm8k-train, --gsm8k-test, --arc-train and --arc-test: all four files are needed")
    common = {
        "model.path": given["model"], "data.max_samples": given["samples"], "train.epochs": float(given["epochs"]),
        "prune.batch_size": 64, "train.row_length": 512, "train.rows": 8, "train.shapes": 3, "eval.max_samples": 128,
        "run.export": False, "run.tensorboard": False, "train.checkpoint_every": 1000, "train.seed": given["seed"],
        "run.compile_cache": str(Path(given["out"]) / "compile_cache"),
    }  # fmt: skip
    out = {}
    for d, data_flags in data.items():
        for m, method in _METHODS.items():
            for p, pruning in _PRUNING.items():
                folder = Path(given["out"]) / f"{d}-{m}-{p}".replace(" ", "_").replace("=", "")
                changes = common | data_flags | method | pruning | {"run.folder": str(folder)}
                out[d, m, p] = validate(override(Config(), changes))
    return out


def run_one(config: Config) -> dict:
    """The summary of one run, trained in a fresh process."""
    script = (
        "import sys; from rich.console import Console; from qtjax.config import from_json; from qtjax.train import use_compile_cache\n"
        "from qtjax.training.story import run\n"
        "config = from_json(sys.stdin.read()); use_compile_cache(config); run(config, Console(stderr=True), quiet=True)"
    )
    done = subprocess.run([sys.executable, "-c", script], input=to_json(config), text=True, stdout=subprocess.DEVNULL)
    if done.returncode:
        raise QtjaxError(f"{config.run.folder}: the run ended with status {done.returncode}; its message is above")
    return json.loads((Path(config.run.folder) / "summary.json").read_text())


def row(key: tuple[str, str, str], summary: dict) -> str:
    """One line of the Markdown table."""
    seconds, tokens = summary["seconds"], summary["tokens"]
    spent = seconds["scoring"] + seconds["packing"] + seconds["training"]
    base, after = (summary["evaluation"][k]["loss"] for k in ("base", "after"))
    kept = f"{summary['samples']['kept']:,} | {tokens['kept'] / tokens['seen']:.1%}"
    return f"| {' | '.join(key)} | {base:.3f} | {after:.3f} | {kept} | {seconds['scoring']:.0f} | {spent:.0f} |"


def main() -> None:
    given = parse_flags(
        "python -m benchmarks.real", __doc__.splitlines()[0], None,
        {
            "model": ("", "HF folder of the checkpoint"), "gsm8k-train": ("", "gsm8k_train.jsonl"),
            "gsm8k-test": ("", "gsm8k_test.jsonl"), "arc-train": ("", "ARC-Easy train.json"),
            "arc-test": ("", "ARC-Easy test.json"), "out": ("runs/real", "folder of the runs"),
            "samples": (512, "training rows of each set"), "epochs": (1.0, "passes over them"), "seed": (0, "of shuffling"),
        },
    )  # fmt: skip
    table = configs(given)
    results = {}
    for d in sorted({key[0] for key in table}):
        for m in _METHODS:  # fills the compilation cache; what it trains is thrown away
            warm = override(table[d, m, "Q-Tuning 25 x 50"], {"train.max_steps": 1, "eval.max_samples": 8})
            warm = override(warm, {"run.folder": warm.run.folder + "-warm"})
            if not (Path(warm.run.folder) / "summary.json").exists():
                run_one(warm)
    for key, config in table.items():
        begin = time.time()
        results[key] = run_one(config)
        print(f"{' '.join(key)}: {time.time() - begin:.0f} s", file=sys.stderr)
    lines = [
        f"{given['samples']} rows, {given['epochs']:g} epochs, {machine()}", "",
        "| data | trained | pruning | held-out loss before | after | samples trained | tokens kept | scoring s | all steps s |",
        "|---|---|---|---:|---:|---:|---:|---:|---:|",
        *(row(key, summary) for key, summary in results.items()),
    ]  # fmt: skip
    print("\n".join(lines))
    file = Path(given["out"]) / "results.json"
    file.write_text(json.dumps({" / ".join(key): summary for key, summary in results.items()}, indent=2) + "\n")


if __name__ == "__main__":
    door(main)
