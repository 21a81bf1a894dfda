"""qtjax's side of a row, in a process of its own: `python -m benchmarks.gpu.ours JOB.json`.

Builds what training builds (training/setup.py) from a shape and random weights made on the device, compiles the run's own programs
and drives the run's own loop. A job's fields are those of plan.Row and one of its settings; weights of `check` are written as folders
that transformers and peft read.
"""

import os
import platform
import statistics
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh

from benchmarks.gpu.shapes import SIZES, Size, shrunk
from benchmarks.gpu.timing import Missing, serve, timed
from benchmarks.machine import machine
from qtjax import models
from qtjax.checkpoints import save_adapter, save_pretrained
from qtjax.config import Config, DataSection, MeshSection, ModelSection, OverlaySection, PruneSection, TrainSection
from qtjax.data.dataset import DataStats, TokenizedDataset, assemble
from qtjax.data.iterate import BatchPlan
from qtjax.models import ModelConfig
from qtjax.parallel import make_mesh, param_shardings, rows_on_device
from qtjax.training.full_data import time_full_data
from qtjax.training.kernels import with_segments
from qtjax.training.loop import Loop
from qtjax.training.optimizer import learning_rate_schedule
from qtjax.training.programs import Programs, program_jobs
from qtjax.training.setup import Model, new_overlay, start
from qtjax.training.state import Subject, TrainState
from qtjax.tree import Tree, flatten, unflatten

STEPS = 1000  # of the schedule; fewer are run
BATCHES = 8  # scoring batches of different samples
PARTS = 4  # samples that a row of Q-Tuning holds
FULL_DATA = PruneSection(sample_pruner="none", token_pruner="none")
Q_TUNING = PruneSection(sample_keep=0.25, token_keep=0.5)
ADAPTER = np.array([0, 1], np.uint32)  # the key that an adapter is drawn with


def one_device() -> Mesh:
    """A mesh of the first device, whatever else the machine has."""
    return make_mesh(MeshSection(), jax.devices()[:1])


def computing(shape: ModelConfig, param_dtype: str, remat: str) -> ModelConfig:
    """The shape with how to compute it; every model of this benchmark is configured here."""
    return shape.replace(dtype="bfloat16", param_dtype=param_dtype, remat=remat, attention=models.kernel_of(jax.default_backend(), "bfloat16"))


def settings(config: ModelConfig, *, prune: PruneSection, length: int, rows: int, samples: int, sample_length: int, rank: int, rate: float = 1e-5) -> Config:
    """The experiment as qtjax.train would be given it; rank 0: full-parameter training."""
    overlay = OverlaySection("lora", r=rank, lora_alpha=2.0 * rank, target_modules="all-linear") if rank else OverlaySection()
    return Config(
        ModelSection(dtype=config.dtype, param_dtype=config.param_dtype, remat=config.remat),
        DataSection(max_length=sample_length),
        PruneSection(**{**vars(prune), "batch_size": samples}),
        overlay,
        TrainSection(row_length=length, rows=rows, shapes=1, learning_rate=rate, warmup_fraction=0.0, final_lr_fraction=1.0),
    )  # fmt: skip


def random_params(config: ModelConfig, mesh: Mesh) -> Tree:
    """Weights of the shape, born on the device as `models.init_params` draws them, but layer by layer: the random bits of all of a large
    model's layers at once would be the most memory that a row ever needs, and its peak would be theirs."""
    leaves = flatten(models.abstract_params(config))

    def drawn(path: str, leaf: Any, key: jax.Array) -> jax.Array:
        if path.endswith("norm/weight"):
            return jnp.ones(leaf.shape, leaf.dtype)
        if path.startswith("layers/"):
            return jax.lax.map(lambda key: normal(key, leaf.shape[1:], leaf.dtype), jax.random.split(key, leaf.shape[0]))
        return normal(key, leaf.shape, leaf.dtype)

    def normal(key: jax.Array, shape: tuple[int, ...], dtype: Any) -> jax.Array:
        return config.initializer_range * jax.random.normal(key, shape, dtype)

    def all_drawn(key: jax.Array) -> Tree:
        return unflatten({path: drawn(path, leaf, jax.random.fold_in(key, i)) for i, (path, leaf) in enumerate(leaves.items())})

    return jax.jit(all_drawn, out_shardings=param_shardings(config, mesh))(jax.random.key(0))


def random_samples(vocab: int, count: int, length: int, prompt: int) -> TokenizedDataset:
    """`count` samples of `length` random tokens; those after the first `prompt` are targets."""
    ids = np.random.default_rng(0).integers(0, vocab, (count, length), np.int32)
    slots = np.arange(length)
    return assemble([(row, slots >= prompt, slots == length - 1) for row in ids], np.arange(count), DataStats(rows=count))


def open_loop(config: Config, model_config: ModelConfig, mesh: Mesh, params: Tree, dataset: TokenizedDataset) -> Loop:
    """Everything that qtjax.train would have loaded and compiled, at step 0."""
    overlay = new_overlay(config, model_config, params, ADAPTER, STEPS)
    model = Model(Subject(model_config, overlay), params)
    state, frozen, optimizer = start(config, mesh, model, STEPS)
    sizes = {"shapes": (config.train.rows,), "row_length": config.train.row_length}
    subject = with_segments(model.subject, mesh, dataset.lengths, config.train.row_length, config.train.rows)
    programs = Programs(
        subject, mesh, config.prune, config.train.loss, optimizer, state, frozen,
        samples=config.prune.batch_size, max_length=config.data.max_length, **sizes,
    )  # fmt: skip
    plan = BatchPlan(len(dataset), config.prune.batch_size)
    schedule = learning_rate_schedule(config.train, STEPS)
    return Loop(config, mesh, dataset, plan, programs, state, frozen, schedule=schedule, last=STEPS, **sizes)


def job_loop(job: dict[str, Any], prune: PruneSection, parts: int) -> Loop:
    """The loop of a row: its step reads samples of which each row holds `parts`; half of a sample that shares its row is prompt."""
    size, length = SIZES[job["size"]], job["length"]
    trains_all = job["kind"] != "lora"
    config = computing(size.models[job["model"]], "float32" if trains_all else "bfloat16", job["memory"])
    sample_length, samples = length // parts, size.tokens // length * parts
    mesh = one_device()
    dataset = random_samples(config.vocab_size, BATCHES * samples, sample_length, 0 if parts == 1 else sample_length // 2)
    given = settings(
        config, prune=prune, length=length, rows=job["rows"], samples=samples, sample_length=sample_length, rank=0 if trains_all else size.rank
    )
    return open_loop(given, config, mesh, random_params(config, mesh), dataset)


def peak_memory() -> int | None:
    """Bytes in use at most since the process began; None where the backend does not count them (CPU)."""
    return (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use")


def train(job: dict[str, Any]) -> dict[str, Any]:
    """Optimizer steps of `size.tokens` random tokens, all of them targets but each row's first."""
    begin = time.perf_counter()
    loop = job_loop(job, FULL_DATA, 1)
    done = [loop.step(0, STEPS)[0]]
    ready = time.perf_counter() - begin
    seconds = timed(lambda: done.append(loop.step(len(done), STEPS)[0]), job["seconds"])
    assert all(each["trained_tokens"] == each["trained_slots"] == SIZES[job["size"]].tokens for each in done)
    return {
        "tokens": done[0]["trained_tokens"], "seconds": seconds, "first_loss": done[0]["loss"], "last_loss": done[-1]["loss"],
        "memory_bytes": peak_memory(), "seconds_to_first_step": ready,
    }  # fmt: skip


def q_tuning(job: dict[str, Any]) -> dict[str, Any]:
    """Whole bilevel steps at 25 % x 50 %, then full data on the same samples with the same programs.

    c: seconds of scoring, the decision included, over those of a full-data step; k: tokens trained on over tokens scored.
    """
    begin = time.perf_counter()
    loop = job_loop(job, Q_TUNING, PARTS)
    first = loop.step(0, STEPS)[0]
    ready = time.perf_counter() - begin
    done: list[dict[str, Any]] = []
    seconds = timed(lambda: done.append(loop.step(len(done), STEPS)[0]), job["seconds"] / 2, BATCHES)
    memory = peak_memory()
    time_full_data(loop, 1, 1)
    full = time_full_data(loop, len(done), len(done)).seconds / len(done)
    assert all(each["kept_samples"] == each["samples"] // 4 and each["scored_tokens"] == SIZES[job["size"]].tokens for each in done)
    return {
        "tokens": first["scored_tokens"], "seconds": seconds, "first_loss": first["loss"], "last_loss": done[-1]["loss"], "memory_bytes": memory,
        "seconds_to_first_step": ready, "full_seconds": full, "c": statistics.median(each["seconds_score"] for each in done) / full,
        "k": statistics.median(each["trained_tokens"] / each["scored_tokens"] for each in done),
    }  # fmt: skip


def scoring(config: ModelConfig, mesh: Mesh, rows: int, length: int, parts: int = 1) -> Any:
    """The run's compiled scoring pass over weights in the dtype that `config` stores, `parts` samples a row: (params, frozen, rows) -> (nll,
    entropy) [rows, length]."""
    subject = with_segments(Subject(config, None), mesh, np.full(parts, length // parts), length, rows)
    params = jax.tree.map(
        lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), models.abstract_params(config), param_shardings(config, mesh)
    )
    jobs = program_jobs(
        subject, mesh, Q_TUNING, "plain", optax.identity(), TrainState(params, (), {}), {}, shapes=(rows,), row_length=length, samples=rows, max_length=length
    )
    with jax.set_mesh(mesh):
        return jobs[f"score {rows}"]()


def whole_rows(mesh: Mesh, ids: np.ndarray, parts: int = 1) -> dict[str, jax.Array]:
    """Rows of `parts` samples each, every token a target but a sample's first."""
    segment, slots = (np.broadcast_to(x.astype(np.int32), ids.shape) for x in np.divmod(np.arange(ids.shape[1]), ids.shape[1] // parts))
    rows = {"input_ids": ids, "position_ids": slots, "segment_ids": segment + 1, "task_ids": np.zeros_like(slots)}
    return rows_on_device(mesh, rows | {"weights": (slots > 0).astype(np.float32)})


def score(job: dict[str, Any]) -> dict[str, Any]:
    """Scoring passes over `size.tokens` random tokens, weights in bfloat16."""
    begin = time.perf_counter()
    size, rows, mesh = SIZES[job["size"]], job["rows"], one_device()
    config = computing(size.models[job["model"]], "bfloat16", "none")
    program, params = scoring(config, mesh, rows, job["length"]), random_params(config, mesh)
    ids = np.random.default_rng(0).integers(0, config.vocab_size, (size.tokens // job["length"], job["length"]), np.int32)
    launches = [whole_rows(mesh, part) for part in np.split(ids, len(ids) // rows)]

    def once() -> list[tuple[jax.Array, jax.Array]]:
        return jax.block_until_ready([program(params, {}, each) for each in launches])

    targets, found = ids.size - len(ids), once()
    ready = time.perf_counter() - begin
    loss, entropy = (sum(float(each[i].sum()) for each in found) / targets for i in (0, 1))
    return {
        "tokens": ids.size, "seconds": timed(once, job["seconds"]), "first_loss": loss, "last_loss": loss, "entropy": entropy,
        "memory_bytes": peak_memory(), "seconds_to_first_step": ready,
    }  # fmt: skip


def matrix_rate(rows: int) -> float:
    """FLOP a second of a square bfloat16 product of random numbers, the best of several warm rounds."""
    a, b = (jax.random.normal(key, (rows, rows), jnp.bfloat16) for key in jax.random.split(jax.random.key(0)))
    product, best = jax.jit(jnp.matmul), float("inf")
    for _ in range(7):
        begin = time.perf_counter()
        jax.block_until_ready([product(a, b) for _ in range(10)])
        best = min(best, (time.perf_counter() - begin) / 10)
    return 2 * rows**3 / best


def listed(array: jax.Array) -> list[float]:
    """All values in a row, for JSON."""
    return np.asarray(array, np.float64).ravel().tolist()


def out_of_memory(error: BaseException) -> bool:
    """Whether the device had no room: while compiling (the tuning of kernels), loading or running."""
    return isinstance(error, jax.errors.JaxRuntimeError) and "RESOURCE_EXHAUSTED" in str(error)


def use_cache(job: dict[str, Any]) -> dict[str, Any]:
    """Compiled programs are kept in job["cache"], for the rows and calls that come after."""
    jax.config.update("jax_compilation_cache_dir", job["cache"])
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
    return job


def check(job: dict[str, Any]) -> dict[str, Any]:
    """The device and its matrix rate, and what every program gives on small models of the same families.

    Writes into job["folder"], by model: its weights, its tokens, a fresh adapter; the other framework computes the same from those.
    Returns: by model and kind the losses of three optimizer steps, or nll and entropy of each target, `packed` where rows hold PARTS
    samples; `plain` and `plain packed`: the latter in float32 from whole logits, without any of these programs.
    """
    size, mesh = SIZES[job["size"]], one_device()
    device = mesh.devices.flat[0]
    if device.platform == "cpu" and job["size"] == "full":
        raise Missing("no GPU was found, and these shapes need one; --shape tiny runs on a CPU")
    out: dict[str, Any] = {
        "device": device.device_kind, "backend": device.platform, "machine": machine(), "matrix_rate": matrix_rate(size.matrix),
        "versions": {"python": platform.python_version(), "jax": jax.__version__}, "xla_flags": os.environ.get("XLA_FLAGS", ""), "models": {},
    }  # fmt: skip
    for name in size.models:
        out["models"][name] = small_results(job, size, name, mesh)
    return out


def small_results(job: dict[str, Any], size: Size, name: str, mesh: Mesh) -> dict[str, Any]:
    """`check` of one model."""
    small, folder, rows, length = shrunk(size.models[name]), Path(job["folder"]) / name, 4, 256
    plain = small.replace(dtype="float32", param_dtype="float32")
    params = random_params(plain, mesh)
    save_pretrained(folder, plain, params)
    dataset = random_samples(small.vocab_size, rows, length, 0)
    ids = dataset.input_ids.reshape(rows, length)
    np.save(folder / "ids.npy", ids)
    halved = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)
    out = {}
    for parts, names in ((1, ("plain", "score")), (PARTS, ("plain packed", "packed"))):
        given = whole_rows(mesh, ids, parts)
        real = np.asarray(given["weights"])[:, 1:] > 0
        with jax.default_matmul_precision("highest"):
            logits = models.apply(plain, params, ids, position_ids=given["position_ids"], segment_ids=given["segment_ids"])[:, :-1]
        log_p = jax.nn.log_softmax(logits)
        nll = -jnp.take_along_axis(log_p, jnp.asarray(ids)[:, 1:, None], axis=-1)[..., 0]
        wanted = nll, -jnp.sum(jnp.exp(log_p) * log_p, axis=-1)
        found = scoring(computing(small, "bfloat16", "none"), mesh, rows, length, parts)(halved, {}, given)
        for kind, pair in zip(names, (wanted, (x[:, 1:] for x in found))):
            out[kind] = dict(zip(("nll", "entropy"), (listed(np.asarray(x)[real]) for x in pair)))
    common = {"prune": FULL_DATA, "length": length, "rows": rows, "samples": rows, "sample_length": length, "rate": job["rate"]}
    if "lora" in job["kinds"][name]:
        config = computing(small, "bfloat16", "dots")
        given = settings(config, rank=size.rank, **common)
        save_adapter(folder / "adapter", new_overlay(given, config, halved, ADAPTER, STEPS))
        loop = open_loop(given, config, mesh, halved, dataset)
        out["lora"] = [loop.step(i, STEPS)[0]["loss"] for i in range(3)]
    if "full" in job["kinds"][name]:
        config = computing(small, "float32", "dots")
        loop = open_loop(settings(config, rank=0, **common), config, mesh, params, dataset)
        out["full"] = [loop.step(i, STEPS)[0]["loss"] for i in range(3)]
    return out


if __name__ == "__main__":
    kinds = {"check": check, "full": train, "lora": train, "score": score, "q-tuning": q_tuning}
    serve({name: lambda job, run=run: run(use_cache(job)) for name, run in kinds.items()}, out_of_memory)
