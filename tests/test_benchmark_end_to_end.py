"""The end-to-end benchmark: its arithmetic from hand numbers, its checks, and a whole run on a tiny model."""

import json
import signal
from typing import ClassVar

import pytest

from benchmarks import end_to_end
from benchmarks.end_to_end import Spent, check, lines, main, settings
from qtjax.errors import QtjaxError


def spent(cpu, score, tokens, steps=2, kept=8, slots=None, of=64):
    return Spent([cpu] * steps, [2 * cpu] * steps, [score] * steps, tokens * steps, (slots or tokens) * steps, tokens * steps // 2, [2.0] * steps, [(kept, of)] * steps)


def test_the_model_and_the_speed_up_are_those_of_the_numbers():
    """c = 3/10 and k = 20/100 give 1 / 0.5 = 2; steps of 4 beside 10 CPU seconds are 2.5 times as fast; wall clock is its own."""
    chosen = settings("12.5x50", "mask")
    found = {"full data": spent(10, 0, 100), "Q-Tuning 12.5x50 mask": spent(4, 3, 20, slots=25)}
    reused = spent(2, 3, 20, steps=6)
    reused.score_cpu[2:] = [0.0] * 4
    found |= {"Q-Tuning 12.5x50, one forward mask": spent(3, 3, 20), "Q-Tuning 12.5x50, reused mask": reused}
    full, plain, kept, again = lines(chosen, found)
    assert kept["setting"] == "Q-Tuning 12.5x50, one forward" and kept["speedup"] == pytest.approx(10 / 3) and kept["bars"] == [("1.38x", True)]
    assert full["c"] == 0 and full["k"] == 1 and "model" not in full
    assert (plain["c"], plain["k"], plain["model"], plain["speedup"], plain["wall_speedup"]) == pytest.approx((0.3, 0.2, 2.0, 2.5, 2.5))
    assert plain["fill"] == pytest.approx(0.8) and plain["targets"] == pytest.approx(0.2) and plain["bars"] == [("0.9 of it", True), ("1.38x", True)]
    # three epochs of full data are 60 s, its own 12 s; one scoring pass of three: c = 0.1
    assert (again["c"], again["k"], again["speedup"]) == pytest.approx((0.1, 0.2, 5.0)) and again["bars"] == [("3x", True)]
    slow = lines(chosen[:2], {"full data": spent(10, 0, 100), "Q-Tuning 12.5x50 mask": spent(9, 3, 20)})[1]
    assert [met for _, met in slow["bars"]] == [False, False]


def test_budgets_alone_leave_out_the_lines_that_an_epoch_would_wait_for():
    """Full data and every budget in every mode; with the others, the first budget's two more."""
    alone = settings("12.5x50,25x50", "mask,drop", alone=True)
    assert [(each.name, each.mode) for each in alone] == [
        ("full data", ""), ("Q-Tuning 12.5x50", "mask"), ("Q-Tuning 12.5x50", "drop"), ("Q-Tuning 25x50", "mask"), ("Q-Tuning 25x50", "drop"),
    ]  # fmt: skip
    more = settings("12.5x50,25x50", "mask,drop")
    assert more[:5] == alone and [each.epochs for each in more[5:]] == [1, 3]


def test_numbers_of_a_wrong_run_are_refused():
    """A step that kept other samples than the budget says, or whose loss is not finite, ends the table."""
    chosen = settings("12.5x50", "mask")[:2]
    right = {"full data": spent(1, 0, 9, kept=64), "Q-Tuning 12.5x50 mask": spent(1, 1, 2)}
    check(chosen, right)
    check(chosen, right | {"Q-Tuning 12.5x50 mask": spent(1, 1, 2, kept=6, of=49)})  # the last batch of an epoch
    with pytest.raises(QtjaxError, match=r"kept 9 samples of 64, not 8"):
        check(chosen, right | {"Q-Tuning 12.5x50 mask": spent(1, 1, 2, kept=9)})
    right["full data"].losses[1] = float("nan")
    with pytest.raises(QtjaxError, match="full data.*not finite"):
        check(chosen, right)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "--data: is missing"), (["--data", "x", "--methods", "ful"], "--methods 'ful'"), (["--data", "x", "--budgets", "25"], "--budgets '25'"),
        (["--data", "x", "--budgets", "0x50"], "--budgets '0x50'"), (["--data", "x", "--modes", "cut"], "--modes 'cut'"),
        (["--data", "x", "--tokenizer", "nowhere"], "--tokenizer 'nowhere': no such file"),
    ],
)  # fmt: skip
def test_bad_flags_are_one_line(flags, message):
    """What cannot be measured is said before anything is compiled."""
    with pytest.raises(QtjaxError, match=message) as error:
        main(flags)
    assert "\n" not in str(error.value)


class Fake:
    """A session of four steps an epoch, the first not measured; opened: methods of all that were opened; stop: (method, step) in which
    somebody presses Ctrl-C, step -1: while it is compiled."""

    opened: ClassVar[list[str]] = []
    stop = ("", 0)

    def __init__(self, config, console):
        self.last, self.spent, self.epochs, self.method = 4 * int(config.train.epochs), spent(1.0, 0.25, 10, steps=0), config.train.epochs, config.overlay.method
        self.kept = 64 if config.prune.sample_pruner == "none" else 8
        self.opened.append(self.method)
        self.press(-1)

    def press(self, number):
        if (self.method, number) == self.stop and self.epochs == (3 if number >= 0 else 1):
            signal.raise_signal(signal.SIGINT)

    def step(self, number):
        self.press(number)
        if number % 4:
            own = self.spent
            own.cpu.append(1.0), own.wall.append(1.0), own.score_cpu.append(0.25), own.losses.append(1.0), own.kept.append((self.kept, 64))
            own.tokens, own.slots, own.targets = own.tokens + 10, own.slots + 10, own.targets + 5

    def close(self):
        self.opened.remove(self.method)


@pytest.mark.parametrize(
    ("stop", "full", "lora"),
    [
        (("none", 0), (1, False), None), (("none", 2), (2, False), None), (("none", 3), (3, False), None), (("none", 11), (3, True), None),
        (("lora", -1), (3, True), None), (("lora", 0), (3, True), (1, False)), (("lora", 11), (3, True), (3, True)), (("", 0), (3, True), (3, True)),
    ],
)  # fmt: skip
def test_what_was_measured_before_ctrl_c_is_shown(tmp_path, monkeypatch, capsys, stop, full, lora):
    """Asked to stop in a step, every setting takes it, and a measured one; scores that serve three epochs have no line unless they did; no
    other method is begun, and what one gave is shown as it was. full, lora: (steps, complete)."""
    monkeypatch.setattr(end_to_end, "Session", Fake)
    monkeypatch.setattr(Fake, "stop", stop)
    before = signal.getsignal(signal.SIGINT)
    main(["--data", "x", "--model", "smol", "--steps", "0", "--budgets", "12.5x50", "--modes", "mask", "--json", str(tmp_path / "e.json")])
    report, said = json.loads((tmp_path / "e.json").read_text()), capsys.readouterr()
    wanted = {"full": full} | ({"lora": lora} if lora else {})
    assert {method: (each["steps"], each["complete"]) for method, each in report["measured"].items()} == wanted
    for method, (steps, complete) in wanted.items():
        rows = report["results"][method]
        assert [row["setting"].endswith("reused") for row in rows] == [False] * 3 + [True] * complete
        assert {row["steps"] for row in rows[:3]} == {steps} and report["measured"][method]["samples"] == 64 * steps
        assert f"{method}: {64 * steps} samples, {steps} steps of 64{'' if complete else ', stopped before the end'};" in said.out
    assert ("lora: stopped before it was measured" in said.out) == (lora is None) and ("stopping after this step" in said.err) == (stop[0] != "")
    assert signal.getsignal(signal.SIGINT) is before and not Fake.opened


def test_ctrl_c_before_anything_is_measured_ends_it(monkeypatch):
    """There is nothing to show."""
    monkeypatch.setattr(end_to_end, "Session", Fake)
    monkeypatch.setattr(Fake, "stop", ("none", -1))
    with pytest.raises(KeyboardInterrupt):
        main(["--data", "x", "--model", "smol", "--steps", "0", "--budgets", "12.5x50", "--modes", "mask"])
    assert not Fake.opened


@pytest.mark.slow
def test_a_whole_table_on_a_tiny_model(tmp_path, capsys):
    """Full data, a budget in both modes and reuse, LoRA too, one epoch but for its first step: every line measured, checked, drawn and
    written; the last batch of the epoch is half a one."""
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"prompt": f"Say {i}", "completion": " ".join([str(i)] * (3 + i % 5))}) + "\n" for i in range(40)))
    flags = ["--data", str(rows), "--model", "smol", "--batch", "16", "--steps", "0", "--budgets", "25x50", "--max-length", "64"]
    main([*flags, "--json", str(tmp_path / "e.json"), "--picture", str(tmp_path / "e.png")])
    report = json.loads((tmp_path / "e.json").read_text())
    assert set(report["results"]) == {"full", "lora"} and {each["samples"] for each in report["measured"].values()} == {24}
    for found in report["results"].values():
        assert [(r["setting"], r["steps"]) for r in found] == [
            ("full data", 2), ("Q-Tuning 25x50", 2), ("Q-Tuning 25x50", 2), ("Q-Tuning 25x50, one forward", 2), ("Q-Tuning 25x50, reused", 6),
        ]  # fmt: skip
        assert all(0 < r["c"] < 3 and 0 < r["k"] < 1 and r["speedup"] > 0 for r in found[1:])
        assert found[4]["c"] < found[1]["c"]  # one scoring pass of three
    assert (tmp_path / "e.png").stat().st_size > 5000 and "Q-Tuning 25x50" in capsys.readouterr().out
    assert end_to_end.PAPER["25x50"] == 1.29
