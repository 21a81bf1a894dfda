"""The run folder: whatever happens, its records hold each step once, up to the restored one."""

import dataclasses
import errno
import json
import math
import os
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from qtjax import atomic
from qtjax.config import Config, override
from qtjax.errors import QtjaxError
from qtjax.training.run_folder import RunFolder, read_metrics, read_summary


def config_of(path, **changes):
    return override(Config(), {"run.folder": str(path), **{k.replace("__", "."): v for k, v in changes.items()}})


def begin(path):
    """A run folder with one step done."""
    with RunFolder.open(config_of(path)) as folder:
        folder.log_step(1, {"loss": 1.0})


def columns_of(step, size=3):
    """Records that depend on the step alone, one of the `size` rows being padding."""
    rng = np.random.default_rng(step)
    row = rng.integers(0, 1000, size)
    row[-1] = -1
    return {
        "epoch": step // 10,
        "row": row,
        "perplexity": rng.random(size, np.float32),
        "entropy": rng.random(size, np.float32),
        "count": rng.integers(0, 9, size),
        "quadrant": rng.integers(0, 5, size),
        "median_quadrant": rng.integers(0, 5, size),
        "keep": rng.random(size) < 0.5,
        "supplement": rng.random(size) < 0.5,
        "kept_tokens": rng.integers(0, 9, size),
    }


def do_step(folder, step, scored=True):
    folder.log_step(step, {"loss": 1 / step, "level": math.nan, "samples": step})
    if scored:
        folder.log_samples(step, columns_of(step))


def event_steps(path):
    """Steps of all event files, decoded by hand: framing, then field 2 (varint) of each record."""
    steps = []
    for file in (path / "tensorboard").glob("*"):
        data = file.read_bytes()
        while data:
            (length,) = struct.unpack("<Q", data[:8])
            body, data = data[12 : 12 + length], data[16 + length :]
            if body[9] != 0x10:
                continue  # the header record
            step, shift = 0, 0
            for byte in body[10:]:
                step |= (byte & 0x7F) << shift
                shift += 7
                if byte < 0x80:
                    break
            steps.append(step)
    return steps


def assert_holds(folder, step, eu_step=None):
    """Metrics and events hold steps 1..step, EU records steps 1..eu_step with the right rows."""
    eu_step = step if eu_step is None else eu_step
    metrics = folder.read_metrics()
    assert [m["step"] for m in metrics] == list(range(1, step + 1))
    assert [m["loss"] for m in metrics] == [1 / s for s in range(1, step + 1)]
    assert event_steps(folder.path) == list(range(1, step + 1))
    table = folder.read_samples()
    assert table["step"].to_pylist() == [s for s in range(1, eu_step + 1) for _ in range(2)]
    rows = [r for s in range(1, eu_step + 1) for r in columns_of(s)["row"][:-1]]
    assert table["row"].to_pylist() == rows
    expected = np.concatenate(
        [np.zeros(0, np.float32), *(columns_of(s)["perplexity"][:-1] for s in range(1, eu_step + 1))]
    )
    np.testing.assert_array_equal(table["perplexity"].to_numpy(), expected)


@settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.data())
def test_cut_back_law(data):
    """Any sequence of steps, flushes, kills and restarts from a flushed step ends with each step exactly once."""
    with tempfile.TemporaryDirectory() as base:
        config = config_of(Path(base) / "run")
        folder = RunFolder.open(config)
        step, committed = 0, [0]
        for _ in range(data.draw(st.integers(1, 25))):
            action = data.draw(st.sampled_from(["step", "step", "step", "flush", "kill", "torn kill", "cut"]))
            if action == "step":
                step += 1
                do_step(folder, step)
            elif action == "flush":
                folder.flush()
                committed.append(step)
            else:
                if action == "torn kill":
                    with open(folder.path / "metrics.jsonl", "ab") as file:
                        file.write(b'{"step": %d, "lo' % (step + 1))
                    (folder.path / ".config.json.1.tmp").write_bytes(b"half")
                    (folder.path / "eu" / ".steps-000001-000002.parquet.1.tmp").write_bytes(b"half")
                if action != "cut":
                    folder.close()  # what waits in memory is gone, the lock too: as after SIGKILL
                    folder = RunFolder.open(config)
                step = data.draw(st.sampled_from(committed))
                committed = [s for s in committed if s <= step]
                folder.cut_back(step)
                assert_holds(folder, step)
                assert not list(folder.path.rglob("*.tmp"))
        folder.flush()
        assert_holds(folder, step)
        folder.close()


@pytest.mark.parametrize("interrupted_after", range(8))
def test_an_interrupted_cut_back_can_be_repeated(tmp_path, monkeypatch, interrupted_after):
    """Killed after any of its removals and renames, cut_back leaves a folder from which every earlier step is reached."""
    config = config_of(tmp_path / "run")
    with RunFolder.open(config) as folder:
        for step in range(1, 13):
            do_step(folder, step)
            if step % 4 == 0:
                folder.flush()

    class Killed(BaseException):
        pass

    calls = []

    def dies(function):
        def call(*args, **kwargs):
            calls.append(1)
            if len(calls) > interrupted_after:
                raise Killed
            return function(*args, **kwargs)

        return call

    folder = RunFolder.open(config)
    with monkeypatch.context() as patch:
        patch.setattr(atomic.os, "replace", dies(os.replace))
        patch.setattr(Path, "unlink", dies(Path.unlink))
        patch.setattr(os, "ftruncate", dies(os.ftruncate))
        try:
            folder.cut_back(6)
        except Killed:
            pass
    folder.close()
    table = RunFolder.open(config, writes=False).read_samples()
    assert len(set(zip(table["step"].to_pylist(), table["row"].to_pylist()))) == table.num_rows, (
        "a reader sees no row twice"
    )
    for step in (6, 4, 0):
        with RunFolder.open(config) as folder:
            folder.cut_back(step)
            assert_holds(folder, step)


_LOOP = """
import sys
sys.path.insert(0, sys.argv[2])
from test_run_folder import RunFolder, config_of, do_step
folder = RunFolder.open(config_of(sys.argv[1]))
start = int(sys.argv[3])
folder.cut_back(start)
for step in range(start + 1, 100000):
    do_step(folder, step)
    if step % 7 == 0:
        folder.flush()
        print(step, flush=True)
"""


def test_a_killed_process_leaves_whole_records(tmp_path):
    """SIGKILL at three arbitrary moments: the next process gets the lock, and cut_back to the last flushed step is exact."""
    path, start = tmp_path / "run", 0
    for patience in (0.05, 0.17, 0.11):
        arguments = [sys.executable, "-c", _LOOP, str(path), str(Path(__file__).parent), str(start)]
        root = str(Path(atomic.__file__).parents[1])
        with subprocess.Popen(
            arguments, stdout=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": root}
        ) as process:
            first = process.stdout.readline()
            time.sleep(patience)
            process.send_signal(signal.SIGKILL)
            flushed = [int(line) for line in (first + process.stdout.read()).split("\n") if line]
        start = flushed[-1]
        with RunFolder.open(config_of(path)) as folder:
            assert folder.last_step >= start
            folder.cut_back(start)
            assert_holds(folder, start)


def test_records_that_do_not_reach_the_checkpoint_are_an_error(tmp_path):
    """A lost metrics file or EU shard is named in one line, and nothing is changed."""
    config = config_of(tmp_path / "run")
    with RunFolder.open(config) as folder:
        for step in range(1, 7):
            do_step(folder, step)
            if step % 2 == 0:
                folder.flush()
    middle = tmp_path / "run/eu/steps-000003-000004.parquet"
    shutil.move(middle, tmp_path / "aside")
    with RunFolder.open(config) as folder:
        with pytest.raises(QtjaxError, match="cover steps 1 to 2, but the checkpoint is of step 5"):
            folder.cut_back(5)
        assert folder.last_step == 6
    shutil.move(tmp_path / "aside", middle)
    (tmp_path / "run/metrics.jsonl").unlink()
    with (
        RunFolder.open(config) as folder,
        pytest.raises(QtjaxError, match="holds steps 1 to 0, but the checkpoint is of step 5"),
    ):
        folder.cut_back(5)
    assert pq.read_table(tmp_path / "run/eu").num_rows == 12


def test_scores_may_be_missing_for_some_steps(tmp_path):
    """A run that scores only now and then keeps those records, and a run that never scores writes no shard."""
    config = config_of(tmp_path / "a")
    with RunFolder.open(config) as folder:
        for step in range(1, 10):
            do_step(folder, step, scored=step in (4, 5))
            if step % 3 == 0:
                folder.flush()
        assert folder.read_samples()["step"].to_pylist() == [4, 4, 5, 5]
        folder.cut_back(4)
        assert folder.read_samples()["step"].to_pylist() == [4, 4]
    with RunFolder.open(config_of(tmp_path / "b")) as folder:
        do_step(folder, 1, scored=False)
        folder.flush()
        assert os.listdir(tmp_path / "b/eu") == []
        assert folder.read_samples().num_rows == 0


def test_no_step_is_recorded_twice_or_left_out(tmp_path):
    """Steps out of order and unknown columns are refused at the call."""
    with RunFolder.open(config_of(tmp_path / "run")) as folder:
        do_step(folder, 1)
        with pytest.raises(ValueError, match="does not follow"):
            folder.log_step(1, {})
        with pytest.raises(ValueError, match="already cover"):
            folder.log_samples(1, columns_of(1))
        with pytest.raises(ValueError, match="does not follow"):
            folder.log_step(3, {})
        with pytest.raises(ValueError, match="columns"):
            folder.log_samples(2, {"row": np.zeros(2)})
        with pytest.raises(ValueError, match="shape"):
            folder.log_samples(2, {**columns_of(2), "count": np.zeros(5)})


def test_another_config_is_named_field_by_field(tmp_path):
    """A folder of another config is one line with each differing field, both values and the remedy; its place may differ."""
    begin(tmp_path / "run")
    RunFolder.open(config_of(tmp_path / "run", run__compile_cache="elsewhere")).close()
    shutil.move(tmp_path / "run", tmp_path / "moved")
    RunFolder.open(config_of(tmp_path / "moved")).close()
    with pytest.raises(QtjaxError) as error:
        RunFolder.open(config_of(tmp_path / "moved", train__learning_rate=3e-4, prune__mode="drop"))
    message = str(error.value)
    assert "train.learning_rate is 0.0001 there, 0.0003 here" in message
    assert "prune.mode is 'mask' there, 'drop' here" in message
    assert "choose another run.folder" in message and "\n" not in message
    assert message.count(" there") == 2


def test_a_run_may_go_on_on_another_mesh_and_says_so(tmp_path):
    """What a machine asks for (mesh, remat, unrolled layers, a kept scoring pass, checkpoints kept) may be other than before: said in words, and once
    the run goes on the folder's own; a start that comes to nothing leaves config.json as it was."""
    begin(tmp_path / "run")
    other = config_of(
        tmp_path / "run", mesh__fsdp=4, mesh__data=2, model__remat="full", train__keep_checkpoints=5, prune__reuse_forward=True
    )
    stored = lambda: json.loads((tmp_path / "run" / "config.json").read_text())["mesh"]["fsdp"]  # noqa: E731
    said = ["model.remat full instead of none", "prune.reuse_forward True instead of False", "train.keep_checkpoints 5 instead of 2", "mesh.data 2 instead of -1", "mesh.fsdp 4 instead of 1"]
    with RunFolder.open(other) as folder:
        assert folder.moved == said and RunFolder.open(other, writes=False).moved == said
    assert stored() == 1
    with RunFolder.open(other) as folder:
        folder.cut_back(1)
    assert stored() == 4
    with RunFolder.open(other) as folder:
        assert folder.moved == []
    with pytest.raises(QtjaxError, match="train.seed is 0 there, 1 here; choose"):
        RunFolder.open(config_of(tmp_path / "run", mesh__fsdp=2, train__seed=1))


def test_a_config_of_another_version_is_named_too(tmp_path):
    """Fields that only one side knows count as differences."""
    begin(tmp_path)
    stored = json.loads((tmp_path / "config.json").read_text())
    stored["train"]["gone"] = 1
    del stored["train"]["seed"]
    (tmp_path / "config.json").write_text(json.dumps(stored))
    with pytest.raises(QtjaxError, match="train.seed is no field there, 0 here; train.gone is 1 there, no field here"):
        RunFolder.open(config_of(tmp_path))
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(QtjaxError, match="not readable as JSON"):
        RunFolder.open(config_of(tmp_path))


def test_one_process_at_a_time(tmp_path):
    """A second opening of the same folder is one line naming the owner, until the first one lets go."""
    config = config_of(tmp_path / "run")
    with (
        RunFolder.open(config),
        pytest.raises(QtjaxError, match=f"in use by another process .process {os.getpid()} on "),
    ):
        RunFolder.open(config)
    RunFolder.open(config).close()


def test_a_start_that_failed_does_not_bind_the_folder(tmp_path):
    """Before the first step another config may take the folder over; a model's folder is never taken, nor locked."""
    RunFolder.open(config_of(tmp_path / "run", data__path="typo.jsonl")).close()
    with RunFolder.open(config_of(tmp_path / "run", data__path="rows.jsonl")) as folder:
        assert json.loads((folder.path / "config.json").read_text())["data"]["path"] == "rows.jsonl"
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text(json.dumps({"model_type": "llama", "architectures": ["LlamaForCausalLM"]}))
    with pytest.raises(QtjaxError, match="not a run's"):
        RunFolder.open(config_of(model))
    assert [p.name for p in model.iterdir()] == ["config.json"]


def test_a_failed_opening_lets_go(tmp_path):
    """After an opening that raised, the folder is free."""
    begin(tmp_path)
    with pytest.raises(QtjaxError, match="another config"):
        RunFolder.open(config_of(tmp_path, train__seed=5))
    RunFolder.open(config_of(tmp_path)).close()


def test_another_config_before_the_first_step_takes_nothing_over(tmp_path):
    """How the untrained model did belongs to the config that is replaced; experts trained under it are a beginning."""
    RunFolder.open(config_of(tmp_path)).close()
    (tmp_path / "base.json").write_text("{}")
    RunFolder.open(config_of(tmp_path, mesh__fsdp=2)).close()  # another machine
    assert (tmp_path / "base.json").exists()
    RunFolder.open(config_of(tmp_path, model__path="other")).close()
    assert not (tmp_path / "base.json").exists() and read_config_of(tmp_path) == "other"
    RunFolder.open(config_of(tmp_path / "experts" / "0")).close()  # not begun either
    RunFolder.open(config_of(tmp_path, model__path="third")).close()
    begin(tmp_path / "experts" / "0")
    with pytest.raises(QtjaxError, match="another config: model.path is 'third' there, 'fourth' here"):
        RunFolder.open(config_of(tmp_path, model__path="fourth"))


def read_config_of(path):
    return json.loads((path / "config.json").read_text())["model"]["path"]


def test_foreign_records_are_not_taken_over(tmp_path):
    """Records without a config are left alone; other files (a log beside the run) do no harm."""
    (tmp_path / "nohup.out").write_text("")
    (tmp_path / "metrics.jsonl").write_text("precious")
    with pytest.raises(QtjaxError, match="holds metrics.jsonl but no config.json"):
        RunFolder.open(config_of(tmp_path))
    assert (tmp_path / "metrics.jsonl").read_text() == "precious"
    (tmp_path / "metrics.jsonl").unlink()
    RunFolder.open(config_of(tmp_path)).close()


@pytest.mark.parametrize("call", ["write", "fsync", "replace"])
def test_a_full_disk_is_one_line_and_damages_nothing(tmp_path, monkeypatch, call):
    """A disk that fills up during any write: one line with path and remedy; freed, the same process goes on, nothing lost."""
    with RunFolder.open(config_of(tmp_path / "run")) as folder:
        for step in range(1, 4):
            do_step(folder, step)
        folder.flush()
        do_step(folder, 4)

        def full(*_args, **_kwargs):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        with monkeypatch.context() as patch:
            patch.setattr(os, call, full)
            with pytest.raises(QtjaxError) as error:
                folder.flush()
            message = str(error.value)
            assert "disk is full" in message and str(tmp_path) in message and "\n" not in message
            with pytest.raises(QtjaxError, match="disk is full"):
                folder.write_summary({"a": 1})
            if call == "write":
                with pytest.raises(QtjaxError, match="disk is full"):
                    folder.log_step(5, {"loss": 0.0})
        assert not folder.finished
        folder.flush()
        assert_holds(folder, 4)


def test_a_folder_that_cannot_be_made_is_one_line(tmp_path):
    """A file where the run folder should be is named."""
    (tmp_path / "file").write_text("")
    with pytest.raises(QtjaxError, match="file.run: Not a directory"):
        RunFolder.open(config_of(tmp_path / "file" / "run"))


def test_summary_marks_the_end(tmp_path):
    """The summary is there only after write_summary; NaN becomes null; before, asking for it is one line."""
    with RunFolder.open(config_of(tmp_path)) as folder:
        assert not folder.finished
        with pytest.raises(QtjaxError, match="has not finished"):
            folder.summary()
        folder.write_summary({"a": np.float32(0.5), "b": [math.nan, math.inf], "c": {1: np.int64(3)}})
        assert folder.finished
        assert folder.summary() == {"a": 0.5, "b": [None, None], "c": {"1": 3}} == read_summary(tmp_path)


def test_metrics_keep_what_was_not_measured(tmp_path):
    """NaN is read back as NaN, and each line carries its time."""
    with RunFolder.open(config_of(tmp_path)) as folder:
        do_step(folder, 1)
    (line,) = read_metrics(tmp_path)
    assert math.isnan(line["level"]) and abs(line["time"] - time.time()) < 60


def test_tensorboard_can_be_switched_off(tmp_path):
    """run.tensorboard = False writes no event files and changes nothing else."""
    with RunFolder.open(config_of(tmp_path, run__tensorboard=False)) as folder:
        folder.cut_back(0)
        do_step(folder, 1)
        folder.flush()
    assert not (tmp_path / "tensorboard").exists()


def test_other_hosts_write_nothing(tmp_path):
    """A host that does not write can open the folder beside the one that does, and leaves no trace."""
    config = config_of(tmp_path)
    with RunFolder.open(config) as first:
        do_step(first, 1)
        first.flush()
        before = {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*")}
        with RunFolder.open(config, writes=False) as other:
            do_step(other, 2)
            other.cut_back(0)
            other.flush()
            other.write_summary({})
            assert other.last_step == 1 and not other.finished
        assert {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*")} == before
    with pytest.raises(QtjaxError, match="another config"):
        RunFolder.open(dataclasses.replace(config, train=dataclasses.replace(config.train, seed=9)), writes=False)
