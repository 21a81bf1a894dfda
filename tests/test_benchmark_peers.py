"""The table of peers: its arithmetic by hand, a row that trains something else has no numbers, bad input is one line."""

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from benchmarks import peers
from benchmarks.peers import __main__ as door
from benchmarks.peers import drive, environments, inputs, output, results, rows
from rich.console import Console

from qtjax.config import Config
from qtjax.errors import QtjaxError


def marks(cpu, wall, loss=(1.0, 0.9, 0.8, 0.7), tokens=500, samples=((0, 1),) * 4):
    return [{"cpu": c, "wall": w, "loss": x, "tokens": tokens, "samples": list(s)} for c, w, x, s in zip(cpu, wall, loss, samples)]


def test_a_round_by_hand():
    """Steps 3 and 4 of 500 tokens cost 12 - 6 CPU seconds and 9 - 5 of the clock: 6 per 1,000 tokens, 250 tokens a second."""
    found = results.round_of({"marks": marks((4, 6, 9, 12), (3, 5, 7, 9)), "peak_bytes": 7}, 2, 11.0)
    assert found == results.Round(6.0, 250.0, 7, 3, 11.0)
    others = [found._replace(cpu=1.0, cold=None), found._replace(cpu=100.0, peak=9)]
    assert results.median([found, *others]) == results.Round(6.0, 250.0, 7, 3, 11.0)


def test_bars_by_hand():
    """The best other by CPU and by wall clock are sought apart; a third of the memory is three times better."""
    medians = {
        "qtjax": results.Round(1.0, 1000, 100, 4.0), "torch": results.Round(1.4, 900, 400, 9.0), "torch-tuned": results.Round(1.2, 600, 400, 9.0),
        "trl": results.Round(3.0, 300, 900, 5.0), "qtjax-score": results.Round(1, 1, 100, 1), "torch-score": results.Round(3, 1, 290, 1),
    }  # fmt: skip
    found = {bar.says: results.judge(bar, medians) for bar in rows.bars_of("15m")}
    best = found["full fine-tuning / best torch"]
    assert (best.ratio, best.other, best.met) == (pytest.approx(1.2), "torch-tuned", False) and best.wall == pytest.approx(1000 / 900)
    assert found["full fine-tuning / TRL's defaults"].met is True and found["full fine-tuning / TRL's defaults"].ratio == 3.0
    assert found["first step, warm cache / TRL's"].ratio == 1.25 and found["first step, warm cache / TRL's"].wall is None
    assert found["scoring / the same, peak memory"].ratio == pytest.approx(2.9) and found["scoring / the same, peak memory"].met is False
    lora = found["LoRA / peft, torch loop"]
    assert (lora.ratio, lora.met) == (None, None) and "qtjax-lora" in lora.said
    asked = {bar.says: bar.least for bar in rows.bars_of("some/where/stories260K")}
    assert asked["full fine-tuning / best torch"] == 1.2 and asked["LoRA / peft, torch loop"] is None


def test_losses_are_compared_step_by_step_or_by_their_own_samples():
    """One loss off by more than a thousandth is said; other batches are held against their own samples' scores."""
    reference = {"losses": {"full": [2.0, 1.5]}, "initial_nll": {"0": 8.0, "1": 2.0}}
    check = lambda name, losses: results.check_training(  # noqa: E731
        rows.ROWS[name], marks((1, 2), (1, 2), losses, samples=((0, 1), (0, 1))), reference, {0: 4, 1: 1}
    )
    assert check("torch", (2.001, 1.5)).good
    said = check("torch", (2.0, 1.5031))
    assert not said.good and said.said == "loss 2: 1.50310, torch 1.50000"
    assert not check("torch", (2.0, float("nan"))).good
    assert check("trl-packing", (2.0, 99.0)).good and not check("trl-packing", (1.99, 1.5)).good  # (8 + 2) / (4 + 1)


def test_scores_are_compared_one_by_one():
    """A ten-thousandth of a nat on one target is the limit; a missing target is not overlooked."""
    theirs = {"nll": np.ones(3), "entropy": np.ones(3)}
    assert results.check_scores({"nll": np.asarray([1, 1, 1.00009]), "entropy": np.ones(3)}, theirs).good
    assert not results.check_scores({"nll": np.ones(3), "entropy": np.asarray([1, 1.0002, 1])}, theirs).good
    assert not results.check_scores({"nll": np.ones(3), "entropy": np.asarray([1, np.nan, 1])}, theirs).good
    assert not results.check_scores({"nll": np.ones(2), "entropy": np.ones(2)}, theirs).good


@pytest.fixture
def bench(tmp_path, monkeypatch):
    """A Bench whose processes are a function: script -> (losses, CPU seconds a step); a text is what the process dies with."""
    np.savez(tmp_path / "samples.npz", offsets=np.asarray([0, 4, 8]), targets=np.ones(8, bool))
    config = Config()
    work = inputs.Work("15m", str(tmp_path), str(tmp_path / "samples.npz"), config, 4000, 2000)
    given = {"batch": 2, "steps": 4, "warmup": 2, "max-length": 512, "learning-rate": 1e-4, "data": str(tmp_path / "rows.jsonl"), "rounds": 2}
    made = drive.Bench(work, given, {"qtjax": "python", "torch": "python"}, tmp_path)
    made.answers, made.launched = {}, []

    def launch(python, script, job, folder, variables):
        made.launched.append((folder.name, job.get("stop_after")))
        answer = made.answers[folder.parent.name if folder.name == "cold" else folder.name]
        if isinstance(answer, str):
            raise drive.Failed(answer)
        losses, cpu = answer
        return {"marks": marks([cpu * i for i in range(1, 5)], range(1, 5), losses), "peak_bytes": 2**20, "versions": {}}

    monkeypatch.setattr(drive, "launch", launch)
    made.reference = {"losses": {"full": [2.0, 1.5, 1.2]}, "initial_nll": {"0": 6.0, "1": 6.0}}
    return made


def shown(table) -> str:
    console = Console(width=140)
    with console.capture() as out:
        console.print(table)
    return out.get()


def test_a_row_that_disagrees_or_dies_is_marked_and_has_no_numbers(bench, tmp_path):
    """It leaves no number in table, bars, JSON and picture, and is not run again; the others are."""
    losses = [2.0, 1.5, 1.2, 1.0]
    bench.answers = {"qtjax": (losses, 0.5), "torch": (losses, 0.75), "trl": ([2.0, 1.4, 1.2, 1.0], 0.1), "trl-packing": "ValueError: [no] rows"}
    asked = rows.chosen("qtjax,torch,trl,trl-packing,tunix")
    drive.rounds([bench], asked, 2, lambda text: None, lambda: None)
    again = [("cold", 1), ("qtjax", None), ("torch", None)]
    assert bench.launched == again + [("trl", None), ("trl-packing", None)] + again
    text = shown(output.table(bench, asked, "heading", {"tunix": "--envs: tunix cannot be installed (no such thing)"}))
    lines = {line.split("│")[1].strip(): line for line in text.splitlines() if line.startswith("│")}
    assert max(map(len, text.splitlines())) <= 140
    assert "1.000" in lines["qtjax, full data"] and "1.50" in lines["torch loop"] and "3 losses" in lines["torch loop"]
    assert "differs: loss 2: 1.40000, torch 1.50000" in lines["TRL, defaults"] and "0.2" not in lines["TRL, defaults"]
    assert "failed: ValueError: [no] rows" in lines["TRL, packing"] and "not installed" in lines["Tunix"]
    bars = shown(output.bar_table(bench, asked))
    assert "1.50" in bars and "met" in bars and "no number of trl" in bars and "LoRA" not in bars
    found = output.report([bench], asked, bench.given, "a machine", {})["models"]["15m"]
    assert "median" not in found["rows"]["trl"] and found["rows"]["torch"]["median"]["cpu"] == pytest.approx(1.5)
    json.dumps(found)
    output.draw([bench], asked, "heading", tmp_path / "peers.png")
    assert (tmp_path / "peers.png").stat().st_size > 10_000


def test_bad_input_is_one_line(tmp_path, monkeypatch):
    """A typo in --rows or --set, a missing file, no model, no step to time, an environment that cannot be installed."""
    data, model = tmp_path / "rows.jsonl", tmp_path / "model"
    data.write_text('{"question": "1+1?", "answer": "2"}\n')
    with pytest.raises(QtjaxError, match="--rows: 'torch-tund' is no row; did you mean 'torch-tuned'"):
        door.main(["--data", str(data), "--rows", "torch-tund"])
    for flags, said in (
        (["--data", str(tmp_path / "none.jsonl")], "--data .*no such file"),
        (["--data", str(data), "--models", "14m"], "neither 15m nor an HF folder.*did you mean '15m'"),
        (["--data", str(data), "--models", "15m,15m"], "each once"),
        (["--data", str(data), "--warmup", "8"], "leaves none of 8 steps"),
        (["--data", str(data), "--batch", "0"], "must be 1 or more"),
        (["--data", str(data), "--set", "train.row=4"], "must be a config field.*did you mean 'train.rows'"),
        (["--data", str(data), "--set", "train.rows=few"], "must be an integer"),
        (["--data", str(data), "--tokenizer", str(model), "--out", str(tmp_path / "out")], "--tokenizer .*no such file"),
        (["--data", str(data), "--rowz", "qtjax"], "no such flag; did you mean '--rows'"),
    ):
        with pytest.raises(QtjaxError, match=said) as error:
            door.main(flags)
        assert "\n" not in str(error.value)
    fails = SimpleNamespace(returncode=1, stdout="", stderr="noise\nERROR: No matching distribution found for trl\nmore\n")
    monkeypatch.setattr(subprocess, "run", lambda *args, **kwargs: fails)
    with pytest.raises(QtjaxError, match=r"--envs: torch cannot be installed \(ERROR: No matching distribution found for trl\)"):
        environments.python_of("torch", str(tmp_path / "envs"), lambda text: None)


def test_an_environment_is_installed_once_and_again_for_other_requirements(tmp_path, monkeypatch):
    """What is there with the same requirements is used; without a folder this interpreter is."""
    commands = []

    def installs(command, **kwargs):
        commands.append(command)
        python = tmp_path / "tunix" / "bin" / "python"
        python.parent.mkdir(parents=True, exist_ok=True)
        python.touch()
        return SimpleNamespace(returncode=0, stdout="", stderr="")

    monkeypatch.setattr(subprocess, "run", installs)
    for _ in range(2):
        assert environments.python_of("tunix", str(tmp_path), lambda text: None) == str(tmp_path / "tunix" / "bin" / "python")
    assert len(commands) == 2 and commands[1][-1] == environments.REQUIREMENTS["tunix"][-1]
    monkeypatch.setitem(environments.REQUIREMENTS, "tunix", ("google-tunix==9",))
    environments.python_of("tunix", str(tmp_path), lambda text: None)
    assert len(commands) == 4
    here = [environments.python_of(name, envs, lambda text: None) for name, envs in (("torch", ""), ("qtjax", str(tmp_path)))]
    assert here == [sys.executable] * 2


def test_scripts_of_peers_know_no_qtjax():
    """They run in environments that lack it; every row's script is there."""
    folder = Path(peers.__file__).parent / "scripts"
    for file in folder.glob("*.py"):
        assert file.name.startswith("qtjax") or "import qtjax" not in file.read_text() and "from qtjax" not in file.read_text(), file
    for row in rows.ROWS.values():
        assert (folder / row.script).is_file() and row.script.startswith("qtjax") == (row.env == "qtjax")


@pytest.mark.parity
@pytest.mark.slow
def test_qtjax_and_torch_train_and_score_the_same(tmp_path):
    """On a small model, in this interpreter: every row's losses and scores agree, and every number is there."""
    from qtjax.smol import model_folder

    data = tmp_path / "rows.jsonl"
    asked = [{"question": f"What is {i} + {i}?", "answer": f"{i} + {i} is {2 * i}. " * (1 + i % 4)} for i in range(40)]
    data.write_text("".join(json.dumps(row) + "\n" for row in asked))
    given = door.settings([
        "--data", str(data), "--models", str(model_folder()), "--out", str(tmp_path / "out"), "--envs", "", "--batch", "4", "--steps", "4",
        "--rounds", "1", "--max-length", "128", "--json", str(tmp_path / "peers.json"), "--set", "train.rows=2", "--set", "train.shapes=1",
    ])  # fmt: skip
    names = ["qtjax", "torch", "torch-tuned", "torch-grouped", "qtjax-lora", "peft", "qtjax-score", "torch-score-tuned"]
    [made], found = door.run(given, rows.chosen(",".join(names)), Console(quiet=True))
    assert made.failed == {} and all(made.checked[name].good for name in names), (made.failed, made.checked)
    for name in names:
        [numbers] = made.rounds[name]
        assert numbers.cpu > 0 and numbers.speed > 0 and numbers.first > 0 and numbers.peak > 50e6
        assert (numbers.cold is not None) == name.startswith("qtjax")
    assert json.loads((tmp_path / "peers.json").read_text()) == json.loads(json.dumps(found))
    steps = {name: [mark["samples"] for mark in json.loads((made.folder / name / "result.json").read_text())["marks"]] for name in names[:2]}
    assert steps["qtjax"] == steps["torch"] and len(steps["torch"]) == 4
