"""A run that was stopped, anywhere and anyhow, ends as if it never had been."""

import gc
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
import pyarrow.parquet as pq
import pytest
from rich.console import Console

from qtjax.checkpoints.run_state import RunState
from qtjax.config import to_json
from qtjax.errors import QtjaxError
from qtjax.records.samples import read_samples
from qtjax.training import story
from qtjax.training.loop import Loop
from qtjax.training.restore import load_run
from qtjax.training.run_folder import read_metrics
from qtjax.tree import flatten

QUIET = Console(quiet=True)
FAST = {"data.eval_fraction": 0.0, "run.tensorboard": True}


def trail(folder) -> tuple[list[dict], list, dict[str, np.ndarray]]:
    """What must not depend on interruptions: metrics without clocks, EU records, final parameters."""
    metrics = [{k: v for k, v in m.items() if k != "time" and not k.startswith("seconds_")} for m in read_metrics(folder)]
    records = read_samples(Path(folder) / "eu").to_pylist()
    _, _, params, _ = load_run(folder)
    return metrics, records, {p: np.asarray(leaf) for p, leaf in flatten(params).items()}


def assert_same(folder, reference) -> None:
    """Bitwise equal parameters, equal metrics and records, each step once."""
    (metrics, records, params), (metrics_r, records_r, params_r) = trail(folder), reference
    assert [m["step"] for m in metrics] == list(range(1, len(metrics_r) + 1))
    assert metrics == metrics_r
    assert repr(records) == repr(records_r)  # repr: NaN equals itself
    for path in params_r:
        np.testing.assert_array_equal(params[path], params_r[path], err_msg=path)


def test_a_crashed_run_ends_bitwise_like_one_never_interrupted(tiny_config, tmp_path, power_cut, monkeypatch):
    """Crashes between checkpoints, twice: the restarted run repeats the lost steps with the same data and decisions."""
    whole = tiny_config(**FAST, **{"run.folder": str(tmp_path / "whole")})
    story.run(whole, QUIET, quiet=True)
    reference = trail(whole.run.folder)
    broken = tiny_config(**FAST, **{"run.folder": str(tmp_path / "broken")})
    for at in (1, 4):  # before the first checkpoint (step 3) and after it
        power_cut(lambda: story.run(broken, QUIET, quiet=True), lambda loop, number, at=at: number == at)
    summary = story.run(broken, QUIET, quiet=True)
    assert_same(broken.run.folder, reference)
    assert summary["steps"] == len(reference[0])

    # a finished run started again does not train: it returns its summary
    monkeypatch.setattr(Loop, "step", lambda *_: pytest.fail("a finished run trained again"))
    assert story.run(broken, QUIET, quiet=True)["steps"] == summary["steps"]

    # another config on the same folder is refused by the fields that differ
    other = tiny_config(**FAST, **{"run.folder": broken.run.folder, "train.learning_rate": 0.5})
    with pytest.raises(QtjaxError, match="train.learning_rate"):
        story.run(other, QUIET, quiet=True)


@pytest.mark.parametrize("chooses", [{}, {"prune.sample_pruner": "random", "prune.token_pruner": "perplexity"}])
def test_a_crashed_run_with_lagged_scores_ends_bitwise_like_one_never_interrupted(tiny_config, tmp_path, power_cut, chooses):
    """score_lag: the scores of the next batch travel in the checkpoint, since the weights that gave them are gone; also where
    only what was chosen without scores is scored."""
    lag = {"prune.score_lag": 1, "prune.batch_size": 20} | chooses
    whole = tiny_config(**FAST, **lag, **{"run.folder": str(tmp_path / "whole")})
    story.run(whole, QUIET, quiet=True)
    reference = trail(whole.run.folder)
    broken = tiny_config(**FAST, **lag, **{"run.folder": str(tmp_path / "broken")})
    for at in (1, 3, 5):  # before the first checkpoint, right after it (step 3), and between two
        power_cut(lambda: story.run(broken, QUIET, quiet=True), lambda loop, number, at=at: number == at)
    saved = Path(broken.run.folder) / "checkpoints"
    assert [p.name for p in saved.iterdir() if (p / "pending").is_dir()] == ["3"]
    assert load_run(broken.run.folder)[0] == broken  # exported or evaluated half-way, nobody asks what was pending
    story.run(broken, QUIET, quiet=True)
    assert_same(broken.run.folder, reference)
    assert not (saved / "6" / "pending").exists()  # the last step has no next batch


def test_a_damaged_checkpoint_is_skipped_and_other_data_is_refused(tiny_config, tmp_path, power_cut):
    """A truncated or empty newest checkpoint falls back to the one before it; changed data is an error, not a mix."""
    config = tiny_config(**FAST, **{"train.checkpoint_every": 2})
    power_cut(lambda: story.run(config, QUIET, quiet=True), lambda loop, number: number == 5)
    checkpoints = Path(config.run.folder) / "checkpoints"
    assert sorted(p.name for p in checkpoints.iterdir() if p.name.isdigit()) == ["2", "4"]
    for file in (checkpoints / "4").rglob("*"):
        if file.is_file() and file.stat().st_size > 200:
            os.truncate(file, file.stat().st_size // 3)
    (checkpoints / "9").mkdir()  # an empty folder that looks like a later step

    rows = Path(config.data.path).read_text().splitlines()
    changed = tmp_path / "rows.jsonl"
    changed.write_text("\n".join(rows[:-1] + [rows[-1].replace("say", "SAY")]) + "\n")
    original = Path(config.data.path)
    kept = original.read_bytes()
    shutil.copy(changed, original)
    try:
        with pytest.raises(QtjaxError, match="other samples"):
            story.run(config, QUIET, quiet=True)
    finally:
        original.write_bytes(kept)

    lines = Console(record=True, file=open(os.devnull, "w"), width=200)
    story.run(config, lines, quiet=True)
    said = lines.export_text()
    assert "from step 2" in said and re.search(r"unreadable checkpoints of steps 9, 4 \(.+\); they are set aside", said)
    assert (checkpoints / "9.unreadable").is_dir() and any((checkpoints / "4.unreadable").rglob("*"))
    whole = tiny_config(**FAST, **{"train.checkpoint_every": 2, "run.folder": str(tmp_path / "whole")})
    story.run(whole, QUIET, quiet=True)
    assert_same(config.run.folder, trail(whole.run.folder))


@pytest.mark.parametrize("method", [{}, {"overlay.method": "lora", "overlay.r": 3}])
def test_a_run_that_goes_on_holds_one_state(tiny_config, power_cut, monkeypatch, method):
    """What was made for a fresh run is let go before the checkpoint is read; and memory that does not suffice for reading it is no damage."""
    config = tiny_config(**FAST, **method)
    power_cut(lambda: story.run(config, QUIET, quiet=True), lambda loop, number: number == 4)
    left, read = [], RunState.restore

    def like(tree: Any) -> int:
        gc.collect()
        shapes = {leaf.shape for leaf in jax.tree.leaves(tree) if leaf.ndim == 3}  # of all layers
        return len(shapes) and sum(array.shape in shapes for array in jax.live_arrays())

    def restore(self, target, **options):
        left.append(like(target["trainable"]))
        return read(self, target, **options)

    monkeypatch.setattr(RunState, "restore", restore)
    lacking = jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 17179869184 bytes.")
    with monkeypatch.context() as small, pytest.raises(QtjaxError, match="out of memory.*no room for 16.00 GiB"):
        small.setattr(ocp.CheckpointManager, "restore", lambda *_, **__: (_ for _ in ()).throw(lacking))
        story.run(config, QUIET, quiet=True)
    assert story.run(config, QUIET, quiet=True)["steps"] == 8
    assert left == [0, 0]


def test_a_disk_that_is_full_says_so_and_keeps_older_checkpoints(tmp_path, monkeypatch):
    """A save that the disk refuses is one line; the checkpoint before it can still be restored."""
    state = RunState(tmp_path / "checkpoints")
    tree = {"a": jax.numpy.arange(4.0)}
    state.save(1, tree, {"n": 1})
    state.wait()

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(state._manager, "save", full)
    with pytest.raises(QtjaxError, match="No space left"):
        state.save(2, tree, {"n": 2})
    monkeypatch.undo()
    found = state.restore(tree)
    assert found.step == 1 and found.meta == {"n": 1}
    np.testing.assert_array_equal(found.state["a"], tree["a"])
    state.close()


def _start(config_file: Path, folder: Path) -> subprocess.Popen:
    command = [sys.executable, "-m", "qtjax.train", "--config", str(config_file), "--run.folder", str(folder), "--quiet"]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def _finish(config_file: Path, folder: Path) -> None:
    process = _start(config_file, folder)
    out, err = process.communicate(timeout=600)
    assert process.returncode == 0, err


def _wait_for(process: subprocess.Popen, happened, timeout: float = 600) -> None:
    deadline = time.time() + timeout
    while not happened():
        assert process.poll() is None, f"ended before it could be killed: {process.stderr.read()}"
        assert time.time() < deadline
        time.sleep(0.002)


def _lines(folder: Path) -> int:
    file = folder / "metrics.jsonl"
    return file.read_bytes().count(b"\n") if file.exists() else 0


@pytest.mark.slow
def test_sigkill_at_several_moments_changes_nothing(tiny_config, tmp_path):
    """SIGKILL after the first step, while a checkpoint is being written, late in the run, and SIGTERM: same ending."""
    config_file = tmp_path / "config.py"
    config = tiny_config(**FAST, **{"run.compile_cache": str(tmp_path / "cache"), "train.epochs": 4.0})
    config_file.write_text(
        f"from qtjax.config import from_json\ndef get_config():\n    return from_json('''{to_json(config)}''')\n"
    )
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    _finish(config_file, whole)
    saving = broken / "checkpoints"
    moments = {
        "after step 1": lambda: _lines(broken) >= 1,
        "while saving": lambda: saving.exists() and any("tmp" in p.name for p in saving.iterdir()),
        "after step 7": lambda: _lines(broken) >= 7,
    }
    for happened in moments.values():
        process = _start(config_file, broken)
        _wait_for(process, happened)
        process.send_signal(signal.SIGKILL)
        process.wait()
    process = _start(config_file, broken)
    _wait_for(process, lambda: _lines(broken) >= 9)
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=600)
    assert process.returncode == 130 and "continues" in err
    _finish(config_file, broken)
    assert_same(broken, trail(whole))
    assert json.loads((broken / "summary.json").read_text())["steps"] == 16
    assert sum(pq.read_metadata(f).num_rows for f in (broken / "eu").glob("*.parquet")) == 4 * 60
