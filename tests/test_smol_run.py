"""The README's first command, as a user runs it: the shipped model learns the shipped data, offline."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.mark.slow
def test_the_default_run_learns_and_reports(tmp_path):
    """Exact match rises well above the base's, every part of the closing table is there, and the run folder is complete."""
    folder = tmp_path / "run"
    command = [sys.executable, "-m", "qtjax.train", "--config", "configs/smol.py", "--run.folder", str(folder)]
    environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}  # the tests' own, not a user's
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=1500, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]
    summary = json.loads((folder / "summary.json").read_text())
    base, after = summary["evaluation"]["base"], summary["evaluation"]["after"]
    assert base["exact_match"] < 0.05 and after["exact_match"] > 0.2
    assert after["loss"] < base["loss"] - 2
    assert summary["samples"]["kept"] == summary["samples"]["seen"] // 4
    assert set(summary["provenance"]) == {"clean", "mislabelled", "redundant", "padded"}
    assert sum(p["seen"] for p in summary["provenance"].values()) == summary["samples"]["seen"]
    assert summary["speed_up"]["value"] > 0 and {"scoring", "packing", "training", "total"} <= set(summary["seconds"])
    for said in ("exact match", "Q2 misconception", "supplement", "mislabelled", "redundant", "speed-up", "packing"):
        assert said in done.stdout
    for file in ("pictures/eu_plane.png", "pictures/curves.png", "model/model.safetensors", "metrics.jsonl", "base.json"):
        assert (folder / file).stat().st_size > 0
    assert list((folder / "eu").glob("*.parquet")) and list((folder / "tensorboard").iterdir())
    again = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, env=environment)
    assert again.returncode == 0 and "finished already" in again.stderr and "exact match" in again.stdout
