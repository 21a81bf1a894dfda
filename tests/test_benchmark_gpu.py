"""The table of one GPU: its arithmetic, its order and limits, and at tiny shapes on a CPU the rows of both frameworks."""

import json
import math
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from benchmarks.gpu import __main__ as door
from benchmarks.gpu import check, ours, peer, plan, report, timing
from benchmarks.gpu.launch import Launcher
from benchmarks.gpu.shapes import LLAMA, SIZES, SMOL, expected_loss, layer_weights, lora_values, published_peak, shrunk, small_kinds, token_flops

from qtjax import models
from qtjax.errors import QtjaxError
from qtjax.overlays import abstract_overlay
from qtjax.tree import flatten

TINY, FULL = SIZES["tiny"], SIZES["full"]


def test_flops_of_a_token_by_hand():
    """Published sizes at 2,048 slots: 6, 4 and 2 for a weight, and attention over half the square three times or once."""
    n, head, attention = 24 * (4 * 2048**2 + 3 * 2048 * 8192), 2048 * 49152 * 2047 / 2048, 2 * 24 * 2048 * 2048
    assert n == layer_weights(SMOL) == 1_610_612_736
    assert token_flops("full", SMOL, 2048) == 6 * (n + head) + 3 * attention == pytest.approx(1.0871e10, rel=1e-3)
    assert token_flops("score", SMOL, 2048) == pytest.approx(token_flops("full", SMOL, 2048) / 3)
    n, head, attention = 32 * (4096 * (2 * 4096 + 2 * 1024) + 3 * 4096 * 14336), 4096 * 128256 * 4095 / 4096, 2 * 32 * 4096 * 4096
    assert n == layer_weights(LLAMA) == 6_979_321_856
    assert token_flops("lora", LLAMA, 4096, 16) == 4 * (n + head) + 6 * 41_943_040 + 3 * attention
    assert report.FORMULAS.keys() == {"full", "lora", "score"}


@pytest.mark.parametrize("config", [SMOL, LLAMA, *TINY.models.values()], ids=["1.7B", "8B", *TINY.models])
def test_weights_are_counted_as_the_model_has_them(config):
    """N is all kernels of the layers, R all values of a LoRA on them, and the shapes are the published ones."""
    leaves = flatten(models.abstract_params(config))
    assert layer_weights(config) == sum(leaf.size for path, leaf in leaves.items() if path.startswith("layers/") and path.endswith("kernel"))
    assert lora_values(config, 16) == abstract_overlay("lora", config, r=16, target_modules="all-linear").trainable_count
    whole = sum(leaf.size for leaf in leaves.values())
    assert {SMOL: 1_711_376_384, LLAMA: 8_030_261_248}.get(config, whole) == whole


def test_share_of_the_rate_by_hand():
    """Tokens of the median step over its seconds, times FLOPs, over each rate; a speed-up beside 1 / (c + k)."""
    row = plan.Row("full", FULL.full, 2048, "qtjax", ((4, "dots"),))
    flops = token_flops("full", SMOL, 2048)
    out = report.measured(row, FULL, {"tokens": 32768, "seconds": [0.9, 1.0, 7.0]}, 800e12, 989e12)
    assert out["tokens_per_second"] == 32768 and out["mfu"] == 32768 * flops / 800e12 and out["mfu_published"] == 32768 * flops / 989e12
    pruned = {"tokens": 32768, "seconds": [0.5], "full_seconds": 1.0, "c": 0.3, "k": 0.25}
    out = report.measured(plan.Row("q-tuning", FULL.full, 2048, "qtjax", ()), FULL, pruned, 800e12, None)
    assert out["speedup"] == 2 and out["model_speedup"] == 1 / 0.55 and "mfu" not in out
    assert published_peak("NVIDIA H100 80GB HBM3") == 989e12 and published_peak("NVIDIA H100 PCIe") == 756e12 and published_peak("cpu") is None


def finished(kind, framework, speed, weights="float32", mfu=0.55):
    return {"kind": kind, "model": "m", "length": 1, "framework": framework, "weights": weights, "status": "done", "tokens_per_second": speed, "mfu": mfu}


def test_bars_are_against_torch_that_trains_the_same():
    """55 % meets 50 and not 60; 1.25 of float32 master weights meets 1.2 whatever bfloat16 ones do; a row without a peer has no such bar."""
    rows = [finished("full", "qtjax", 125), finished("full", "torch", 100), finished("full", "torch", 140, "bfloat16"), finished("score", "qtjax", 1)]
    report.compared(rows, bars=True)
    assert rows[0]["met"] == {"mfu": True, "times_torch": True} and rows[0]["times_torch"] == 1.25 and rows[2]["times_torch"] == 125 / 140
    assert rows[3]["met"] == {"mfu": False}
    rows = [finished("full", "qtjax", 119), finished("full", "torch", 100)]
    report.compared(rows, bars=True)
    assert rows[0]["met"] == {"mfu": True, "times_torch": False}
    report.compared(rows := [finished("full", "qtjax", 125)], bars=False)
    assert "met" not in rows[0]


@pytest.mark.parametrize("size", [TINY, FULL], ids=["tiny", "full"])
def test_rows_fill_a_step_and_torch_stands_beside_ours(size):
    """Every setting's microbatches make up a step of whole rows; Q-Tuning's survivors, a quarter, fill one; the first rows are the first length's."""
    rows = plan.rows_of(size, plan.KINDS, size.lengths, True)
    assert all(size.tokens % (count * row.length) == 0 and count * row.length <= size.tokens // 4 for row in rows for count, _ in row.settings)
    assert [(r.kind, r.framework) for r in rows[:5]] == [("full", "qtjax"), ("full", "torch"), ("lora", "qtjax"), ("lora", "torch"), ("q-tuning", "qtjax")]
    assert [row.length for row in rows[:9]] == [size.lengths[0]] * 9 and [row.weights for row in rows[-2:]] == ["bfloat16"] * 2
    assert {row.framework for row in plan.rows_of(size, plan.KINDS, size.lengths, False)} == {"qtjax"}
    own = plan.rows_of(size, ["full"], size.lengths[:1], True, microbatch=2 * size.lengths[0], remat="none")
    assert own[0].settings == ((2, "none"),) and len(own[1].settings) == 4


class Clock:
    """Time that passes when it is told to."""

    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now


def run_with(rows, answers, seconds):
    """[(row, result)] of rows whose launches take answers' seconds: [(seconds, status)]; the limits that they were given."""
    clock, heard, limits, answers = Clock(), [], [], iter(answers)

    def launch(row, rows, memory, timing, limit):
        took, status = next(answers)
        limits.append((rows, memory, limit))
        clock.now += took
        return {"status": status, "said": status}

    plan.run_rows(rows, launch, plan.Budget(seconds, clock), lambda row: "broken" if row.model == "no" else "", lambda *each: heard.append(each))
    return heard, limits


def a_row(framework="qtjax", model="m", settings=((4, "dots"), (4, "full"), (2, "full"))):
    return plan.Row("full", model, 8, framework, settings)


def test_a_row_runs_only_while_there_is_time_for_it():
    """The first guess is replaced by what the framework's last row took; a shorter one may still run; limits are what is left."""
    rows = [a_row(), a_row("torch"), a_row(), a_row("torch"), a_row()]
    heard, limits = run_with(rows, [(100, "done"), (10, "done"), (10, "done")], 205 + plan.SAVING)
    assert [result["status"] for _, result in heard] == ["done", "done", "skipped", "done", "skipped"]
    assert heard[2][1]["said"] == "95 s left, a row of qtjax takes about 100" and [limit for *_, limit in limits] == [205, 105, 95]
    heard, _ = run_with(rows[:1], [], plan.GUESS["qtjax"] + plan.SAVING - 1)
    assert heard[0][1]["status"] == "skipped"


def test_a_full_memory_is_counted_and_less_is_asked_for():
    """The next setting while there is time, then the next row; a refused row is never launched."""
    heard, limits = run_with([a_row(), a_row(model="no"), a_row()], [(20, "no memory"), (30, "done"), (51, "no memory")], 125 + plan.SAVING)
    assert [(count, memory) for count, memory, _ in limits] == [(4, "dots"), (4, "full"), (4, "dots")]
    assert heard[0][1] | {"said": ""} == {"status": "done", "said": "", "rows": 4, "memory": "full", "out_of_memory": 1}
    assert heard[1][1] == {"status": "refused", "said": "broken"}
    assert heard[2][1]["status"] == "no memory" and heard[2][1]["out_of_memory"] == 1  # 24 s left, a try of the first row took 25
    heard, limits = run_with([a_row()], [(1, "no memory")] * 3, 1000)
    assert heard[0][1]["out_of_memory"] == 3 and len(limits) == 3


def test_as_many_steps_as_fit():
    """Three at least, however long; of short ones as many as fit, at most the limit."""
    clock = Clock()

    def step(took):
        clock.now += took

    assert timing.timed(lambda: step(10), 5, clock=clock) == [10, 10, 10]
    assert len(timing.timed(lambda: step(1), 5.5, clock=clock)) == 5
    assert len(timing.timed(lambda: step(0.01), 5, most=8, clock=clock)) == 8


SERVED = """
from benchmarks.gpu.timing import Missing, serve
def fails(error):
    def run(job):
        raise error
    return run
serve({"well": lambda job: {"x": job["length"]}, "full": fails(MemoryError("asked for 9 GB")), "bare": fails(Missing("no torch")), "bug": fails(KeyError("x"))},
      lambda error: isinstance(error, MemoryError))
"""


def test_a_process_answers_with_its_numbers_or_why_it_has_none(tmp_path):
    """Memory that ran out and a missing package are answers; a bug ends the process without one."""
    found = {}
    for kind in ("well", "full", "bare", "bug"):
        (tmp_path / kind).write_text(json.dumps({"kind": kind, "length": 8, "out": str(tmp_path / f"{kind}.json")}))
        done = subprocess.run([sys.executable, "-c", SERVED, str(tmp_path / kind)], cwd=Path(door.__file__).parents[2], capture_output=True, check=False)
        found[kind] = json.loads((tmp_path / f"{kind}.json").read_text()) if done.returncode == 0 else done.returncode
    assert found == {
        "well": {"status": "done", "x": 8}, "full": {"status": "no memory", "said": "asked for 9 GB"}, "bare": {"status": "missing", "said": "no torch"}, "bug": 1,
    }  # fmt: skip
    assert ours.out_of_memory(jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory")) and not ours.out_of_memory(ValueError("RESOURCE_EXHAUSTED"))
    assert not ours.out_of_memory(jax.errors.JaxRuntimeError("INTERNAL: no")) and not peer.out_of_memory(ValueError("out of memory"))


def test_a_process_that_dies_or_lasts_too_long_is_said_in_one_line(tmp_path):
    """Its last words, the limit it ran into, or that there is no such program."""

    def said(script, limit=60.0):
        (tmp_path / "python").write_text(f"#!/bin/sh\n{script}\n")
        (tmp_path / "python").chmod(0o755)
        answer = Launcher("tiny", tmp_path, tmp_path, {"torch": str(tmp_path / "python")}).job("torch", {"kind": "check"}, limit)
        return answer["status"], answer["said"]

    assert said("echo one; echo last words >&2; echo; exit 3") == ("failed", "exit status 3: last words")
    assert said("exit 0") == ("failed", "exit status 0: nothing was said")
    assert said("exec sleep 30", 0.2) == ("no time", "stopped after 0 s")
    assert Launcher("tiny", tmp_path, tmp_path, {"torch": "nowhere"}).job("torch", {"kind": "check"}, 9)["said"] == "nowhere: No such file or directory"


def answers(size):
    """What both frameworks say of the small models where all is well."""
    out = []
    for framework in ("qtjax", "torch"):
        found = {}
        for name in size.models:
            plain = {"nll": [6.0, 8.0], "entropy": [5.0, 5.0]}
            found[name] = {kind: dict(plain) if kind == "score" else [7.0, 6.8, 6.6] for kind in small_kinds(size, name)} | {"plain": plain}
            found[name] |= {"packed": dict(plain), "plain packed": plain}
        out.append({"status": "done", "models": found, "versions": {framework: "1"}})
    return out[0] | {"device": "NVIDIA H100", "backend": "gpu", "machine": "a card", "matrix_rate": 8e14, "xla_flags": ""}, out[1]


def test_what_does_not_agree_is_not_measured():
    """A shifted target, NaN, a model that learns otherwise: that kind on that model, in whom it is wrong; Q-Tuning with what it is made of."""
    assert check.problems(TINY, *answers(TINY)) == {}
    mine, other = answers(TINY)
    other["models"][TINY.lora]["score"]["nll"] = [8.0, 6.0]
    other["models"][TINY.lora]["lora"] = [7.0, 6.8, 6.68]
    found = check.problems(TINY, mine, other)
    assert found.keys() == {("torch", "score", TINY.lora), ("qtjax", "lora", TINY.lora), ("torch", "lora", TINY.lora)}
    mine, other = answers(TINY)
    mine["models"][TINY.full]["score"]["entropy"] = [math.nan, 5.0]
    assert check.problems(TINY, mine, other).keys() == {("qtjax", "score", TINY.full), ("qtjax", "q-tuning", TINY.full)}
    mine, other = answers(TINY)
    mine["models"][TINY.lora]["packed"]["nll"] = [8.0, 6.0]  # grouped heads, packed: Q-Tuning's rows alone are of that kind
    assert check.problems(TINY, mine, other).keys() == {("qtjax", "q-tuning", TINY.full)}
    for losses in ([7.02, 6.8, 6.6], [7.0, 7.0, 7.0]):  # begins elsewhere than plain float32; learns nothing
        mine, _ = answers(TINY)
        mine["models"][TINY.full]["full"] = losses
        assert {key[:2] for key in check.problems(TINY, mine, None)} == {("qtjax", "full"), ("torch", "full"), ("qtjax", "q-tuning")}


def test_a_row_with_another_loss_than_random_weights_have_is_refused():
    """ln V and half the logits' variance: 11.21 of the 1.7B shape; NaN at the end, or a low entropy, is no number either."""
    loss, entropy = expected_loss(SMOL)
    assert loss == pytest.approx(math.log(49152) + 0.4096) and entropy == pytest.approx(math.log(49152) - 0.4096)
    good = {"first_loss": loss, "last_loss": loss - 1, "entropy": entropy}
    row = plan.Row("full", FULL.full, 2048, "qtjax", ())
    assert check.row_problem(row, FULL, good) == ""
    for wrong in ({"first_loss": loss - 0.5}, {"first_loss": math.nan}, {"last_loss": math.nan}, {"entropy": loss}):
        assert check.row_problem(row, FULL, good | wrong)


class Launched:
    """In place of processes: the small models agree, rows take no time."""

    def __init__(self, *given):
        self.backend, self.rows = "", []

    def job(self, framework, job, limit):
        mine, other = answers(FULL)
        return mine if framework == "qtjax" else other

    def row(self, row, rows, memory, seconds, limit):
        self.rows.append(row)
        if len(self.rows) == 3:
            raise KeyboardInterrupt
        loss, _ = expected_loss(FULL.models[row.model])
        return {"status": "done", "tokens": 32768, "seconds": [1.0], "first_loss": loss + (len(self.rows) == 2), "last_loss": loss, "memory_bytes": 2**30}


def test_what_was_measured_before_a_kill_is_in_the_file(monkeypatch, tmp_path, capsys):
    """Two rows, of which one had another loss and has no number."""
    monkeypatch.setattr(door, "Launcher", Launched)
    with pytest.raises(KeyboardInterrupt):
        door.main(["--json", str(tmp_path / "gpu.json")])
    found = json.loads((tmp_path / "gpu.json").read_text())
    assert [row["status"] for row in found["rows"]] == ["done", "refused"] and "seconds" not in found["rows"][1]
    assert found["rows"][0]["mfu"] == pytest.approx(32768 * token_flops("full", SMOL, 2048) / 8e14) and found["published_rate"] == 989e12
    assert "small models agree: qtjax, torch and plain float32" in capsys.readouterr().out


@pytest.mark.parametrize(
    "flags, said",
    [
        (["--shape", "ful"], "--shape 'ful': must be one of full, tiny; did you mean 'full'"),
        (["--seconds", "0"], "--seconds 0: must be above 0"),
        (["--seconds", "long"], "--seconds 'long': must be a number"),
        (["--rows", "full,qtuning"], "--rows 'qtuning': must be of full, lora, q-tuning, score; did you mean 'q-tuning'"),
        (["--lengths", "1024"], "--lengths '1024': must be of 2048, 4096"),
        (["--microbatch", "5000"], "--microbatch 5000: must be a multiple of 4096 that divides the step's 32768 tokens"),
        (["--remat", "dot"], "--remat 'dot': must be one of none, dots, full; did you mean 'dots'"),
        (["--json", "nowhere/out.json"], "--json nowhere/out.json: must be a file in a folder that exists"),
        (["--compile-cache", __file__], "is a file; name a folder"),
        (["--torch-python", "nowhere/python"], "--torch-python nowhere/python: is no program"),
        (["--length", "64"], "--length: no such flag; did you mean '--lengths'"),
    ],
)  # fmt: skip
def test_bad_flags_are_one_line_before_anything_starts(flags, said, monkeypatch):
    """What, the rule, and near names."""
    monkeypatch.setattr(door, "Launcher", None)
    with pytest.raises(QtjaxError) as error:
        door.main(flags)
    assert said in str(error.value) and "\n" not in str(error.value)


@pytest.mark.slow
@pytest.mark.parametrize("size, name", [("tiny", TINY.full), ("tiny", TINY.lora), ("full", FULL.lora)])
def test_small_models_agree_with_plain_float32(size, name, tmp_path):
    """The scoring pass and three steps in bfloat16, by the check's own bounds, which a wrong order of the targets does not meet."""
    kinds = small_kinds(SIZES[size], name)
    found = ours.small_results({"folder": str(tmp_path), "rate": 1e-3, "kinds": {name: kinds}}, SIZES[size], name, ours.one_device())
    assert check.scores_differ(found["score"], found["plain"]) == "" and check.scores_differ(found["score"], {k: v[::-1] for k, v in found["plain"].items()})
    assert check.scores_differ(found["packed"], found["plain packed"]) == "" and len(found["packed"]["nll"]) == 4 * 252 < len(found["score"]["nll"])
    assert all(check.losses_differ(found[kind], None, float(np.mean(found["plain"]["nll"]))) == "" for kind in kinds[1:])


@pytest.mark.parametrize(
    "kind, model, run",
    [
        pytest.param("full", TINY.full, ours.train, marks=pytest.mark.slow), pytest.param("lora", TINY.lora, ours.train, marks=pytest.mark.slow), ("score", TINY.lora, ours.score),
        pytest.param("q-tuning", TINY.full, ours.q_tuning, marks=pytest.mark.slow),
    ],
)  # fmt: skip
def test_a_row_trains_prunes_and_scores_as_the_run_does(kind, model, run):
    """Losses of random weights, all tokens of a step counted; Q-Tuning keeps a quarter of the samples and is timed beside full data."""
    row = plan.Row(kind, model, 64, "qtjax", ())
    job = {"size": "tiny", "kind": kind, "model": model, "length": 64, "rows": 4, "memory": "dots", "seconds": 0.1, "weights": "float32"}
    result = run(job)
    assert check.row_problem(row, TINY, result) == "" and result["tokens"] == TINY.tokens and len(result["seconds"]) >= timing.LEAST
    if kind == "q-tuning":
        assert 0.15 < result["k"] <= 0.25 and result["c"] > 0 and result["full_seconds"] > 0


def test_weights_are_drawn_as_the_model_draws_them():
    """Normal of the initialiser's range, norms one, every layer and leaf its own, in the dtype asked for."""
    config = ours.computing(shrunk(SMOL), "bfloat16", "none")
    leaves = flatten(ours.random_params(config, ours.one_device()))
    expected = flatten(models.abstract_params(config))
    assert {path: (x.shape, x.dtype) for path, x in leaves.items()} == {path: (x.shape, x.dtype) for path, x in expected.items()}
    for path, leaf in leaves.items():
        values = np.asarray(leaf, np.float32)
        if path.endswith("norm/weight"):
            assert (values == 1).all()
        else:
            assert abs(values.std() / config.initializer_range - 1) < 0.02 and abs(values.mean()) < 0.02 * config.initializer_range, path
    assert not np.array_equal(leaves["layers/mlp/gate_proj/kernel"][0], leaves["layers/mlp/gate_proj/kernel"][1])
    assert not np.array_equal(leaves["layers/mlp/gate_proj/kernel"], leaves["layers/mlp/up_proj/kernel"])


@pytest.mark.slow
def test_the_whole_command_without_torch(monkeypatch, tmp_path, capsys):
    """Each row in a process of its own, the table at the end; a full-size model on a CPU is refused in one line."""
    monkeypatch.setattr(plan, "TIMED", 0.5)
    door.main(["--shape", "tiny", "--rows", "full,q-tuning", "--lengths", "64", "--without-torch", "--seconds", "3000", "--json", str(tmp_path / "out.json")])
    found = json.loads((tmp_path / "out.json").read_text())
    assert [(row["kind"], row["status"]) for row in found["rows"]] == [("full", "done"), ("q-tuning", "done")] and found["checked"] == {}
    out = capsys.readouterr().out
    assert "FLOPs a token" in out and "1 / (c + k)" in out and max(map(len, out.splitlines())) <= 140
    with pytest.raises(QtjaxError, match="no GPU was found"):
        door.main([])


@pytest.mark.slow
@pytest.mark.parity
def test_torch_beside_ours(monkeypatch, tmp_path):
    """Small models agree in both frameworks, and each row of torch has numbers, in both kinds of weights."""
    monkeypatch.setattr(plan, "TIMED", 0.5)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    door.main(["--shape", "tiny", "--rows", "full,lora,score", "--lengths", "64", "--seconds", "3000", "--json", str(tmp_path / "out.json")])
    found = json.loads((tmp_path / "out.json").read_text())
    assert found["checked"] == {} and found["without_torch"] == "" and {"torch", "transformers", "peft", "jax"} <= found["versions"].keys()
    assert [row["status"] for row in found["rows"]] == ["done"] * 9
    assert all("times_torch" in row for row in found["rows"])
    assert found["rows"][-1]["weights"] == "bfloat16"


@pytest.mark.slow
def test_an_interpreter_without_torch_says_so_and_ours_go_on(tmp_path, monkeypatch):
    """One line in each of torch's rows, none of them started."""
    bare = tmp_path / "python"
    bare.write_text(f"#!/bin/sh\nexec {sys.executable} -S -E \"$@\"\n")
    bare.chmod(0o755)
    monkeypatch.setattr(plan, "TIMED", 0.5)
    door.main(["--shape", "tiny", "--rows", "score", "--lengths", "64", "--torch-python", str(bare), "--seconds", "3000", "--json", str(tmp_path / "out.json")])
    found = json.loads((tmp_path / "out.json").read_text())
    assert [row["status"] for row in found["rows"]] == ["done", "refused", "done", "refused"]
    assert found["rows"][1]["said"] == "no package torch in this interpreter"
