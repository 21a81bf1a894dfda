"""What every row's script shares, whoever's interpreter runs it: its job, the samples, and what is measured of the process.

Imports numpy and the standard library only. A job is a JSON file:

    model        HF folder                          batch, steps, warmup   samples a step, steps in all, untimed ones first
    data         samples.npz (see `Samples`)        max_length             tokens of the longest sample allowed
    out          JSON file to write                 learning_rate          constant, AdamW without weight decay, gradients clipped to norm 1
    method       full or lora                       adapter                PEFT folder that LoRA starts from
    started      time.time() of the process' start  stop_after             steps after which to end; 0: all
    options      the row's own settings
"""

import json
import resource
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np


class Samples(NamedTuple):
    """ids: list of int64 [l]; targets: list of bool [l], True where a token is trained on; order: int [steps, batch]."""

    ids: list
    targets: list
    order: np.ndarray

    def tokens(self, indices: Any) -> int:
        """Useful tokens: real ones, of prompts and answers."""
        return sum(len(self.ids[i]) for i in indices)

    def count(self, indices: Any) -> int:
        """Targets."""
        return int(sum(self.targets[i].sum() for i in indices))


def read_job() -> dict[str, Any]:
    """The job named on the command line."""
    return json.loads(Path(sys.argv[1]).read_text())


def read_samples(path: str) -> Samples:
    """The samples of a job's `data`: flat ids and targets, cut at offsets."""
    with np.load(path) as data:
        ids, targets, offsets, order = (data[name] for name in ("ids", "targets", "offsets", "order"))
    cut = lambda flat: np.split(flat, offsets[1:-1])  # noqa: E731
    return Samples(cut(ids.astype(np.int64)), cut(targets), order)


def padded(samples: Samples, indices: Any, length: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(ids int64 [B, L], targets bool [B, L], real bool [B, L]), padded on the right to the longest, or to `length`."""
    length = length or max(len(samples.ids[i]) for i in indices)
    ids = np.zeros((len(indices), length), np.int64)
    targets, real = np.zeros(ids.shape, bool), np.zeros(ids.shape, bool)
    for row, i in enumerate(indices):
        n = len(samples.ids[i])
        ids[row, :n], targets[row, :n], real[row, :n] = samples.ids[i], samples.targets[i], True
    targets[:, 0] = False  # nothing stands before it
    return ids, targets, real


def peak_bytes() -> int:
    """Most memory that this process has held. VmHWM begins anew with a program; ru_maxrss would begin with the driver's."""
    status = Path("/proc/self/status")
    if status.exists():
        return next(int(line.split()[1]) << 10 for line in status.read_text().splitlines() if line.startswith("VmHWM"))
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << (0 if sys.platform == "darwin" else 10)


class Meter:
    """Marks the end of every step: CPU seconds of all threads, wall seconds, loss per target, which samples."""

    def __init__(self, job: dict[str, Any]):
        self.job, self.marks = job, []

    def mark(self, loss: float | None, samples: Any, tokens: int) -> bool:
        """One step is over, and what it computed is there. Returns whether to go on."""
        self.marks.append({
            "cpu": time.process_time(), "wall": time.time() - self.job["started"], "loss": loss, "tokens": int(tokens),
            "samples": [int(i) for i in samples],
        })  # fmt: skip
        return not self.job.get("stop_after") or len(self.marks) < self.job["stop_after"]

    def write(self, **more: Any) -> None:
        """The result, with what a row says beside its marks."""
        out = {"marks": self.marks, "peak_bytes": peak_bytes(), "python": sys.version.split()[0], **more}
        Path(self.job["out"]).write_text(json.dumps(out))
