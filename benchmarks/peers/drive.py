"""Runs the rows: one process after the other, round after round, so that what else the machine does falls on all of them alike."""

import json
import os
import shutil
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.peers.inputs import Work, lora_config
from benchmarks.peers.results import Checked, Round, check_scores, check_training, round_of, untimed_marks
from benchmarks.peers.rows import ALPHA, FULL, LORA, RANK, SCORE, Row
from qtjax.config import override, to_json
from qtjax.errors import QtjaxError
from qtjax.report.progress import clock_time

SCRIPTS = Path(__file__).parent / "scripts"
ROOT = Path(__file__).parents[2]
COMPARED = 3  # first steps whose losses are compared
LONGEST = 3600  # seconds after which a process is given up
# Threads of torch's OpenMP turn in a loop while they wait, by default, which counts as CPU seconds and on a shared machine is most of
# them: told to sleep, torch needed 1.4 CPU seconds where it had needed 5 (15M model, load 12 on 2 cores).
QUIET = {
    "OMP_WAIT_POLICY": "PASSIVE", "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false",
    "TRANSFORMERS_VERBOSITY": "error", "CUDA_VISIBLE_DEVICES": "", "JAX_PLATFORMS": "cpu",
}  # fmt: skip


class Failed(Exception):
    """A row's process ended badly; the message is the last thing that it said."""


def launch(python: str, script: str, job: dict[str, Any], folder: Path, variables: Mapping[str, str] = {}) -> dict[str, Any]:
    """Runs a script on a job in a process of its own; what it wrote. Raises Failed."""
    folder.mkdir(parents=True, exist_ok=True)
    out = folder / "result.json"
    out.unlink(missing_ok=True)
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | QUIET | dict(variables)
    if script.startswith("qtjax"):  # this checkout's code, wherever the benchmark was started
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    job = job | {"out": str(out), "folder": str(folder), "scores": str(folder / "scores.npz"), "started": time.time()}
    (folder / "job.json").write_text(json.dumps(job))
    with open(folder / "log.txt", "w") as log:
        try:
            command = [python, str(SCRIPTS / script), str(folder / "job.json")]
            done = subprocess.run(command, stdout=log, stderr=subprocess.STDOUT, env=environment, timeout=LONGEST)
        except subprocess.TimeoutExpired:
            raise Failed(f"not done after {LONGEST} s") from None
    if done.returncode or not out.exists():
        raise Failed(last_line(folder / "log.txt", done.returncode))
    return json.loads(out.read_text())


def last_line(log: Path, status: int) -> str:
    """What a process said last, or how it ended where it said nothing."""
    said = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    return said[-1][:200] if said else f"ended with status {status}" + (" (killed: out of memory?)" if status == -9 else "")


class Bench:
    """One model's rows. `outcomes` holds each row's rounds so far, `checked` what was compared, `failed` why there is none."""

    def __init__(self, work: Work, given: Mapping[str, Any], pythons: Mapping[str, str], out: Path):
        self.work, self.given, self.pythons, self.folder = work, given, pythons, out / Path(work.name).name
        self.rounds: dict[str, list[Round]] = {}
        self.checked: dict[str, Checked] = {}
        self.failed: dict[str, str] = {}
        self.details: dict[str, dict[str, Any]] = {}
        self.reference: dict[str, Any] = {}
        with np.load(work.data) as data:
            offsets, targets = data["offsets"], data["targets"]
            self.targets = {i: int(targets[a:b].sum()) for i, (a, b) in enumerate(zip(offsets[:-1], offsets[1:]))}

    def job(self, row: Row | None, **more: Any) -> dict[str, Any]:
        """What every script is told."""
        given = self.given
        return {
            "model": str(Path(self.work.model).absolute()), "data": str(Path(self.work.data).absolute()), "batch": given["batch"],
            "steps": given["steps"], "warmup": given["warmup"], "max_length": given["max-length"], "learning_rate": given["learning-rate"],
            "adapter": str((self.folder / "adapter").absolute()), "method": "lora" if row and row.kind == LORA else "full",
            "options": dict(row.options) if row else {}, **more,
        }  # fmt: skip

    def prepare(self, rows: Sequence[Row]) -> None:
        """The reference that all rows are checked against. Raises QtjaxError where it fails: then nothing can be checked."""
        lora = any(row.kind == LORA for row in rows)
        full = any(row.kind == FULL for row in rows)
        options = {"lora": lora, "full": full, "steps": min(COMPARED, self.given["steps"]), "rank": RANK, "alpha": ALPHA}
        try:
            self.reference = launch(self.pythons["torch"], "torch_reference.py", self.job(None, options=options), self.folder / "reference")
        except Failed as error:
            raise QtjaxError(f"{self.work.name}: the torch reference failed ({error}); its log is {self.folder / 'reference' / 'log.txt'}") from None

    def run(self, row: Row) -> None:
        """One round of a row: its process, the check, its numbers. A row that failed or does not agree is not run again."""
        if row.name in self.failed or (row.name in self.checked and not self.checked[row.name].good):
            return
        if row.env not in self.pythons:
            return
        folder, cold = self.folder / row.name, None
        try:
            if row.env == "qtjax":
                job = self.job(row, config=self._config(row, folder))
                shutil.rmtree(folder / "compile_cache", ignore_errors=True)
                first = launch(self.pythons[row.env], row.script, job | {"stop_after": 1}, folder / "cold", row.variables)
                cold = first["marks"][0]["wall"]
            else:
                job = self.job(row)
            result = launch(self.pythons[row.env], row.script, job, folder, row.variables)
        except Failed as error:
            self.failed[row.name] = str(error)
            return
        if row.kind == SCORE:
            with np.load(folder / "scores.npz") as found, np.load(self.folder / "reference" / "scores.npz") as reference:
                self.checked[row.name] = check_scores(found, reference)
        else:
            self.checked[row.name] = check_training(row, result["marks"], self.reference, self.targets)
        if self.checked[row.name].good:
            self.rounds.setdefault(row.name, []).append(round_of(result, untimed_marks(row, self.given["warmup"]), cold))
            self.details[row.name] = {k: v for k, v in result.items() if k not in ("marks", "peak_bytes")}
            self.details[row.name]["losses"] = [mark["loss"] for mark in result["marks"]]
        else:
            self.rounds.pop(row.name, None)  # a row that once did not agree has no numbers

    def _config(self, row: Row, folder: Path) -> str:
        config = override(self.work.config, {
            "run.folder": str((folder / "run").absolute()), "run.compile_cache": str((folder / "compile_cache").absolute()),
            "model.path": str(Path(self.work.model).absolute()), "data.path": str(Path(self.given["data"]).absolute()),
        })  # fmt: skip
        return to_json(lora_config(config, str((self.folder / "adapter").absolute())) if row.kind == LORA else config)


def rounds(benches: Sequence[Bench], rows: Sequence[Row], count: int, say: Callable[[str], None], after: Callable[[], None]) -> None:
    """All rounds of all rows; says what was done and how long the rest will take, and calls `after` after each round."""
    seconds: dict[tuple[str, str], float] = {}
    left = [(turn, bench, row) for turn in range(count) for bench in benches for row in rows]
    for at, (turn, bench, row) in enumerate(left):
        begin = time.monotonic()
        bench.run(row)
        seconds[bench.work.name, row.name] = time.monotonic() - begin
        usual = float(np.mean(list(seconds.values())))
        rest = sum(seconds.get((other.work.name, later.name), usual) for _, other, later in left[at + 1 :])
        say(f"{at + 1}/{len(left)} round {turn + 1} {Path(bench.work.name).name} {row.name}: {_said(bench, row)}, ETA {clock_time(rest)}")
        if at + 1 == len(left) or left[at + 1][0] != turn:
            after()


def _said(bench: Bench, row: Row) -> str:
    if row.name in bench.failed:
        return bench.failed[row.name]
    if row.name not in bench.rounds:
        return bench.checked[row.name].said if row.name in bench.checked else "not installed"
    last = bench.rounds[row.name][-1]
    return f"{last.cpu:.3f} CPU s per 1,000 tokens, {last.speed:,.0f} tokens/s"
