"""A run of several processes is the run of one: decisions, losses, parameters, checkpoints; and it does not outlive one of them."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from qtjax.records.samples import read_samples

ROOT = Path(__file__).resolve().parents[2]
FLAGS = [
    "--config", str(ROOT / "configs" / "smol.py"), "--data.max-samples", "128", "--prune.batch-size", "32", "--train.epochs", "2", "--train.checkpoint-every", "2",
    "--eval.max-samples", "16", "--eval.generate-samples", "0", "--train.compare-full-data", "1", "--run.tensorboard", "false", "--train.shapes", "1",
]  # fmt: skip


# qtjax.train, but its fourth step is an error: the user's (a disk that refuses one process only) or a bug.
RAISING = """
import sys
import jax
from qtjax.errors import QtjaxError, door
from qtjax.train import main
from qtjax.training.loop import Loop

def step(self, number, last, true=Loop.step):
    if number == 3:
        raise {error}
    return true(self, number, last)

Loop.step = step
door(main)
"""


def launch(folder: Path, *own: str, devices: int, error: str = "", cwd: Path = ROOT) -> subprocess.Popen:
    """qtjax.train on so many CPU devices; what it says goes to a file beside the run folder. The last of `own` is the process.

    The compilation cache is one for all tests: they compile the same programs."""
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={devices}"
    env = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT), "XLA_FLAGS": flags}
    with open(folder.with_suffix(f".{own[-1] if own else 0}.log"), "a") as said:
        program = ["-c", RAISING.format(error=error)] if error else ["-m", "qtjax.train"]
        return subprocess.Popen(
            [sys.executable, *program, *FLAGS, "--run.folder", str(folder), "--run.compile-cache", str(folder.parent.parent / "compiled"), *own],
            cwd=cwd, env=env, stdout=said, stderr=said,
        )  # fmt: skip


def launch_two(folder: Path, *own: str, errors: tuple[str, str] = ("", ""), cwds: tuple[Path, Path] = (ROOT, ROOT)) -> list[subprocess.Popen]:
    """Two processes of four devices each; errors: what a process raises in its fourth step; cwds: where it is started."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    joined = ("--coordinator", address, "--processes", "2", "--process")
    return [launch(folder, *own, *joined, str(i), devices=4, error=errors[i], cwd=cwds[i]) for i in range(2)]


def steps(folder: Path) -> list[dict]:
    file = folder / "metrics.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def wait_for_step(folder: Path, step: int, processes: list[subprocess.Popen]) -> None:
    """Returns once so many steps are logged; fails with what was said if the processes end before."""
    while len(steps(folder)) < step:
        said = "".join(log.read_text()[-2000:] for log in folder.parent.glob(f"{folder.name}.*.log"))
        assert all(process.poll() is None for process in processes), said
        time.sleep(0.1)


def same(one: Path, other: Path) -> None:
    """Decisions equal, perplexities and losses within 1e-5 of themselves (sums over devices in another order)."""
    a, b = (read_samples(folder / "eu") for folder in (one, other))
    for name in ("step", "row", "quadrant", "keep", "kept_tokens"):
        assert a[name].to_pylist() == b[name].to_pylist(), name
    np.testing.assert_allclose(b["perplexity"], a["perplexity"], rtol=1e-4)  # of exp(mean): 1e-5 in nats at about 10 nats
    np.testing.assert_allclose([m["loss"] for m in steps(other)], [m["loss"] for m in steps(one)], rtol=1e-5)
    p, q = (load_file(next((folder / "model").glob("*.safetensors"))) for folder in (one, other))
    for name in p:
        np.testing.assert_allclose(q[name], p[name], atol=5e-4, err_msg=name)  # eight Adam steps of up to 2e-3 amplify rounding
    x, y = (json.loads((folder / "summary.json").read_text())["evaluation"]["after"]["loss"] for folder in (one, other))
    assert y == pytest.approx(x, rel=1e-5)


@pytest.mark.slow
def test_two_processes_of_four_devices_are_one_of_eight(tmp_path):
    """A run of one process; the same of two; the same of two, stopped by a signal that reaches the second alone and gone on
    with as one process; the same of two, of which one is killed: the other stops within a minute and says which, and the
    two go on from the last checkpoint. All end alike."""
    one, two, stopped, killed = (tmp_path / name for name in ("one", "two", "stopped", "killed"))
    answers = ("--eval.generate-samples", "8")  # the loop that answers takes its time to compile: twice is enough
    assert launch(one, *answers, devices=8).wait() == 0
    assert [process.wait() for process in launch_two(two, *answers)] == [0, 0]
    same(one, two)
    assert json.loads((two / "summary.json").read_text())["speed_up"]["value"] > 0  # of the full data that both of them timed
    assert not (tmp_path / "two.1.log").read_text().count("step ")  # one speaks for both

    both = launch_two(stopped)
    wait_for_step(stopped, 1, both)
    both[1].send_signal(signal.SIGTERM)
    assert [process.wait() for process in both] == [130, 130]
    assert 0 < len(steps(stopped)) < len(steps(one))
    assert launch(stopped, devices=8).wait() == 0
    same(one, stopped)

    both = launch_two(killed)
    wait_for_step(killed, 3, both)
    both[1].kill()
    begin = time.monotonic()
    assert both[0].wait(timeout=90) != 0 and time.monotonic() - begin < 60
    assert "tasks are unhealthy (stopped sending heartbeats):\n1\n" in (tmp_path / "killed.0.log").read_text()
    assert [process.wait() for process in launch_two(killed)] == [0, 0]
    same(one, killed)


@pytest.mark.slow
def test_a_checkpoint_moves_between_meshes_and_process_counts(tmp_path):
    """One process on data 8, stopped in the first epoch; gone on with as two processes of four devices on fsdp 4, stopped in the second,
    whose decisions are made on the first one's scores; gone on with as one process on 2 x 2 x 2: it says so in one line, and ends like a
    run that never moved. The scores that the checkpoint holds are the first process's, once."""
    kept = ("--prune.score-every", "2", "--prune.score-lag", "1", "--train.checkpoint-every", "1")
    one, moved = tmp_path / "one", tmp_path / "moved"
    assert launch(one, *kept, devices=8).wait() == 0
    first = launch(moved, *kept, devices=8)
    wait_for_step(moved, 1, [first])
    first.send_signal(signal.SIGTERM)
    assert first.wait() == 130 and 1 <= (begun := len(steps(moved))) < 5
    both = launch_two(moved, *kept, "--mesh.fsdp", "4")
    wait_for_step(moved, 5, both)
    assert f"resume  from step {begun}; mesh.fsdp 4 instead of 1\n" in (tmp_path / "moved.0.log").read_text()
    both[1].send_signal(signal.SIGTERM)
    assert [process.wait() for process in both] == [130, 130]
    done = len(steps(moved))
    assert 5 <= done < 8
    mine, theirs = (
        sum(f.stat().st_size for f in (moved / "checkpoints" / str(done) / "pending").rglob(f"ocdbt.process_{i}/**/*") if f.is_file()) for i in range(2)
    )
    assert mine > 10 * theirs, (mine, theirs)
    last = launch(moved, *kept, "--mesh.fsdp", "2", "--mesh.tensor", "2", devices=8)
    assert last.wait() == 0
    assert f"resume  from step {done}; mesh.fsdp 2 instead of 4; mesh.tensor 2 instead of 1\n" in (tmp_path / "moved.2.log").read_text()
    assert json.loads((moved / "config.json").read_text())["mesh"] == {"data": -1, "fsdp": 2, "tensor": 2}
    assert all(m["scored_tokens"] == 0 for m in steps(moved)[4:])
    same(one, moved)


@pytest.mark.slow
def test_another_model_s_scores_are_written_once_and_read_by_all(tmp_path):
    """Two processes share the scoring pass, the first writes what both read; a restart reads it again. Decisions and losses are those of one process,
    with an adapter over a frozen base."""
    scored = ("--prune.score-model", "smol", "--train.checkpoint-every", "1", "--overlay.method", "lora", "--train.learning-rate", "1e-3")
    one, two = tmp_path / "one", tmp_path / "two"
    assert launch(one, *scored, devices=8).wait() == 0
    both = launch_two(two, *scored)
    wait_for_step(two, 1, both)
    both[0].send_signal(signal.SIGTERM)
    assert [process.wait() for process in both] == [130, 130]
    (file,) = two.glob("score_model-*.npy")
    written = file.stat().st_mtime_ns
    assert [process.wait() for process in launch_two(two, *scored)] == [0, 0]
    assert file.stat().st_mtime_ns == written
    np.testing.assert_allclose(np.load(file), np.load(next(one.glob("score_model-*.npy"))), rtol=1e-4, atol=1e-5)
    same(one, two)


@pytest.mark.slow
@pytest.mark.parametrize(("errors", "code", "said", "missed"), [
    (("", "RuntimeError('a bug in one process')"), 1, "a bug in one process", "tasks are unhealthy (stopped sending heartbeats):\n1\n"),
    (("", "jax.errors.JaxRuntimeError('INTERNAL: its own')"), 1, "INTERNAL: its own", "tasks are unhealthy (stopped sending heartbeats):\n1\n"),
    (("QtjaxError('its disk is full')", ""), 2, "error: its disk is full\n", "leader task was preempted/died"),
    (("QtjaxError('bad for all')",) * 2, 2, "error: bad for all\n", ""),
])  # fmt: skip
def test_an_error_in_one_process_ends_all_within_a_minute(tmp_path, errors, code, said, missed):
    """The process that raises says its error and is gone; the other, in a collective that waits for it, stops within a minute
    and says which one it misses; where all raise the same, each ends in good order and says it. The run goes on afterwards."""
    run = tmp_path / "run"
    both, raising = launch_two(run, errors=errors), next(i for i, error in enumerate(errors) if error)
    wait_for_step(run, 3, both)
    begin = time.monotonic()
    codes = [process.wait(timeout=120) for process in both]
    assert time.monotonic() - begin < 60
    logs = [(tmp_path / f"run.{i}.log").read_text() for i in range(2)]
    assert codes[raising] == code and said in logs[raising], logs[raising][-2000:]
    if missed:
        assert codes[1 - raising] != 0 and missed in logs[1 - raising], logs[1 - raising][-2000:]
    else:
        assert codes == [code] * 2 and all(said in log and "Check failure" not in log for log in logs), logs
    assert len(steps(run)) == 3
    assert launch(run, devices=8).wait() == 0
    assert [m["step"] for m in steps(run)] == list(range(1, 9))


@pytest.mark.slow
def test_a_mistake_is_one_line_on_every_process(tmp_path):
    """A run folder that the second process does not share with the first: both say whose it is and what to do. Bad data, which the
    first alone reads: it says where, the other points to it. Both end at once, with status 2."""
    for name in ("one", "other"):
        (tmp_path / name).mkdir()
    both = launch_two(tmp_path / "run", "--run.folder", "run", cwds=(tmp_path / "one", tmp_path / "other"))
    assert [process.wait(timeout=200) for process in both] == [2, 2]
    for i in range(2):
        said = (tmp_path / f"run.{i}.log").read_text()
        assert "error: run.folder = 'run': process 1 of 2 does not see what process 0 writes there; give a folder" in said, said[-2000:]
    assert not list((tmp_path / "one" / "run").glob(".seen*"))

    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"prompt": "a", "completion": "b"}\n{nonsense\n')
    both = launch_two(tmp_path / "run2", "--data.path", str(bad), "--data.eval-fraction", "0")
    assert [process.wait(timeout=200) for process in both] == [2, 2]
    assert "bad.jsonl:2: malformed JSON" in (tmp_path / "run2.0.log").read_text()
    assert "error: process 0 could not prepare the data: see what it says\n" in (tmp_path / "run2.1.log").read_text()
