"""One size of benchmarks.scaling in a process of its own, so that its memory is its own:  python -m benchmarks.scaling_one JSON

Prints one JSON object a line. Of a model's size: what was compiled and checked, then, for each "train" or "score" that it reads,
the seconds of one launch; it ends with its input. Of a data size: everything at once.
"""

import json
import math
import resource
import sys
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.compiled import compilable
from qtjax import models
from qtjax.config import DataSection, MeshSection
from qtjax.data.dataset import TokenizedDataset
from qtjax.data.iterate import BatchPlan
from qtjax.data.prepare import keep_training_data
from qtjax.data.tokenizer import load_tokenizer
from qtjax.errors import QtjaxError, door
from qtjax.parallel import make_mesh, replicated, rows_on_device
from qtjax.training.batch import read_batch
from qtjax.training.state import init_state

LEAST = 0.2  # seconds that are timed at once; shorter launches are repeated
CHECKED = 2  # samples of which every size must find the same loss
AGREE = 1e-4  # relative


def memory() -> dict[str, int | None]:
    """Bytes of this process. peak: the most that lay in memory so far; own: what lies there now and belongs to no file (mapped files
    the system may drop), None where the system does not say."""
    status = Path("/proc/self/status")
    lines = dict(line.split(":", 1) for line in status.read_text().splitlines()) if status.exists() else {}
    told = {name: int(lines[field].split()[0]) * 1024 if field in lines else None for name, field in (("peak", "VmHWM"), ("own", "RssAnon"))}
    if told["peak"] is None:  # second choice: on Linux, after a fork, it begins with the parent's
        told["peak"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return told


def packed(vocab: int, rows: int, length: int, sample: int, count: int) -> dict[str, np.ndarray]:
    """Rows [rows, length] that hold `count` random samples of `sample` tokens one after the other, the same ones whatever the shape;
    every token but a sample's first is trained."""
    slots = np.arange(rows * length)
    there, position = slots < count * sample, slots % sample
    ids = np.random.default_rng(0).integers(0, vocab, count * sample)
    flat = {
        "input_ids": np.resize(ids, len(slots)) * there, "position_ids": position * there,
        "segment_ids": (slots % length // sample + 1) * there, "task_ids": np.zeros(len(slots)), "weights": there & (position > 0),
    }  # fmt: skip
    return {name: each.reshape(rows, length).astype(np.float32 if name == "weights" else np.int32) for name, each in flat.items()}


class Steps:
    """Scoring and training of one model on rows of one shape, as qtjax compiles them, on one device.

    train: one optimizer step of one launch, that is zeros, accumulate and update.
    """

    def __init__(self, shape: models.ModelConfig, rows: int, length: int):
        self.mesh, self.rows = make_mesh(MeshSection(), jax.devices()[:1]), rows
        settings = {"data.max_length": length, "prune.batch_size": rows, "train.rows": rows, "train.shapes": 1}
        self.run, self.jobs = compilable(shape, settings, self.mesh)
        self.programs: dict[str, Any] = {}
        self.start()

    def start(self) -> None:
        """Weights and moments as drawn."""
        self.state = None
        params = models.init_params(self.run.subject.config, jax.random.key(0))
        self.state = init_state(self.run.subject, self.mesh, params, self.run.optimizer)

    def compile(self, *names: str) -> None:
        with jax.set_mesh(self.mesh):
            self.programs |= {name: self.jobs[name]() for name in names}

    def score(self, rows: dict[str, jax.Array]) -> dict[str, float]:
        """Sums of nll and entropy, in nats."""
        nll, entropy = self.programs[f"score {self.rows}"](self.state.trainable, {}, rows)
        return {"nll": float(nll.sum()), "entropy": float(entropy.sum())}

    def train(self, rows: dict[str, jax.Array]) -> dict[str, float]:
        """Sum of the loss before the step, and norm of the mean gradient."""
        gradients, total = self.programs["zeros"]()
        gradients, total, _ = self.programs[f"accumulate {self.rows}"](self.state.trainable, {}, gradients, total, rows, None)
        targets = jax.device_put(np.float32((rows["weights"] > 0).sum()), replicated(self.mesh))
        self.state, measured = self.programs["update"](self.state, gradients, targets)
        return {"loss": float(total), "grad_norm": float(measured["grad_norm"])}


def check(steps: Steps, vocab: int, length: int, sample: int) -> dict[str, float]:
    """Loss and gradient norm on samples that all sizes share. Raises QtjaxError where packed rows, the fused head and the programs do
    not find the loss of plain attention and plain logits, a sample a row."""
    given = packed(vocab, steps.rows, length, sample, CHECKED)
    rows = rows_on_device(steps.mesh, given)
    ids = jnp.asarray(given["input_ids"].reshape(-1)[: CHECKED * sample].reshape(CHECKED, sample))
    logits = models.apply(steps.run.subject.config.replace(attention="xla"), steps.state.trainable, ids)
    logp = jnp.take_along_axis(jax.nn.log_softmax(logits[:, :-1]), ids[:, 1:, None], axis=2)
    plain = -float(logp.sum())
    scored, trained = steps.score(rows), steps.train(rows)
    for name, found in (("score", scored["nll"]), ("accumulate", trained["loss"])):
        if not abs(found - plain) <= AGREE * abs(plain):
            raise QtjaxError(f"{name}: the loss of {CHECKED} samples is {found:.6g}, by plain logits {plain:.6g}: something is wrong, no time counts")
    return {"loss": plain / (CHECKED * (sample - 1)), "grad_norm": trained["grad_norm"]}


def finite(found: dict[str, float]) -> None:
    """Raises QtjaxError for what is not."""
    if not all(map(math.isfinite, found.values())):
        raise QtjaxError(f"not finite: {found}; no time counts")


def timed(function: Any, rows: dict[str, jax.Array], times: int) -> dict[str, float]:
    """Seconds of one launch, of the clock and of all cores together: the mean of so many in a row. What comes out must be finite."""
    wall, cpu = time.perf_counter(), time.process_time()
    for _ in range(times):
        found = function(rows)
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    finite(found)
    return {"wall": wall / times, "cpu": cpu / times}


def model_size(given: dict[str, Any]) -> None:
    """given: shape (of a ModelConfig), rows, length, sample (tokens of those that are checked)."""
    shape = models.ModelConfig(**given["shape"])
    vocab, count, length = shape.vocab_size, given["rows"], given["length"]
    steps = Steps(shape, count, length)
    rows = rows_on_device(steps.mesh, packed(vocab, count, length, length, count))  # a row is one sample
    said: dict[str, Any] = {"parameters": sum(x.size for x in jax.tree.leaves(steps.state.trainable))}
    functions, times = {"score": steps.score, "train": steps.train}, {}
    for name, programs in (("score", [f"score {count}"]), ("train", ["zeros", f"accumulate {count}", "update"])):
        steps.compile(*programs)
        temporaries = max(steps.programs[each].memory_analysis().temp_size_in_bytes for each in programs)
        finite(functions[name](rows))
        times[name] = math.ceil(LEAST / max(timed(functions[name], rows, 1)["wall"], 1e-3))
        said[name] = {"temporaries": temporaries, "peak": memory()["peak"]}
    steps.start()
    say(said | {"check": check(steps, vocab, length, given["sample"])})
    for line in sys.stdin:
        say(timed(functions[line.strip()], rows, times[line.strip()]))


def data_size(given: dict[str, Any]) -> None:
    """given: file, rows, length (data.max_length), batch, first (rows that all sizes share). Raises QtjaxError where an epoch does not
    read every sample once."""
    tokenizer, before = load_tokenizer("smol"), memory()
    wall, cpu = time.perf_counter(), time.process_time()
    data = DataSection(path=given["file"], max_length=given["length"], eval_fraction=0.0)
    dataset = TokenizedDataset.load(keep_training_data(data, tokenizer, Path(given["file"]).parent / "run", progress=False))
    tokenized = {"wall": time.perf_counter() - wall, "cpu": time.process_time() - cpu} | memory()
    plan = BatchPlan(len(dataset), given["batch"])
    times, tokens, ids, first = np.zeros(len(dataset), np.int8), 0, 0, np.zeros(given["first"], np.int64)
    wall, cpu = time.perf_counter(), time.process_time()
    for step in range(plan.steps_per_epoch):
        batch = read_batch(dataset, plan.batch(step), given["length"])
        there = batch.indices >= 0
        own, sums = batch.indices[there], batch.input_ids[there].sum(axis=1)
        times[own] += 1
        tokens, ids = tokens + int(batch.lengths.sum()), ids + int(sums.sum())
        shared = own < len(first)
        first[own[shared]] = sums[shared]
    epoch = {"wall": time.perf_counter() - wall, "cpu": time.process_time() - cpu} | memory()
    whole = (given["rows"], dataset.stats.tokens, int(dataset.input_ids.sum(dtype=np.int64)))
    if (len(dataset), tokens, ids) != whole or (times != 1).any():
        raise QtjaxError(f"an epoch over {given['rows']} rows read {len(dataset)} samples and {tokens} tokens, not each once; no number counts")
    say({"tokens": tokens, "before": before, "tokenized": tokenized, "epoch": epoch, "check": {"first": first.tolist()}})


def say(found: dict[str, Any]) -> None:
    """A line for the parent."""
    print(json.dumps(found), flush=True)


def main() -> None:
    given = json.loads(sys.argv[1])
    (data_size if "file" in given else model_size)(given)


if __name__ == "__main__":
    door(main)
