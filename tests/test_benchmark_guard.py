"""The regression guard: this code is as committed, and a program that got worse, better or lost is told by name."""

import json

import pytest
from benchmarks import guard

from qtjax.errors import QtjaxError

VERSION = guard.this_version()
VALUES = {
    "15M full, 1 device: a run": {"programs": 14},
    "15M full, 1 device: update": {"flops": 1000, "arguments": 500, "outputs": 400, "donated": 400, "temporaries": 2000},
    "loop full mask, 1 device: later steps": {"compilations": 0},
}


def changed(program: str, **numbers: int) -> guard.Measured:
    return VALUES | {program: VALUES.get(program, {}) | numbers}


def ran(monkeypatch, capsys, file, now: guard.Measured, *flags: str) -> tuple[int, str]:
    """(status, output) of the guard where `now` is measured."""
    monkeypatch.setattr(guard, "measure", lambda only="": {name: numbers for name, numbers in now.items() if name.startswith(only)})
    try:
        guard.main(["--file", str(file), *flags])
        status = 0
    except SystemExit as end:
        status = end.code
    return status, capsys.readouterr().out


@pytest.fixture
def committed(tmp_path):
    """A file that holds VALUES for the version here."""
    file = tmp_path / "guard.json"
    file.write_text(json.dumps({VERSION: VALUES}))
    return file


@pytest.mark.slow
def test_the_steps_of_full_fine_tuning_are_as_committed(run_python, tmp_path):
    """The real guard over the 15M model's five programs on one device: status 0; its processes see nothing of the tests' XLA flags."""
    said = run_python("benchmarks.guard", "--only", "15M full, 1", "--json", str(tmp_path / "now.json"))
    assert "6 entries as committed" in said and max(map(len, said.splitlines())) <= 140
    [now] = json.loads((tmp_path / "now.json").read_text()).values()
    memory = now["15M full, 1 device: accumulate 8"]
    parameters = 4 * 15_191_712
    assert memory["outputs"] == pytest.approx(parameters, rel=0.01)  # a gradient for every parameter
    assert memory["donated"] == pytest.approx(parameters, rel=0.01)  # that takes the place of the sum so far
    assert now["15M full, 1 device: update"]["donated"] == pytest.approx(3 * parameters, rel=0.01)  # weights and two moments


@pytest.mark.slow
def test_everything_is_as_committed(run_python):
    """Both methods, one device and eight, and two Loops that compile nothing after their first step."""
    assert "entries as committed" in run_python("benchmarks.guard")


def test_a_step_back_is_told_by_name(committed, monkeypatch, capsys):
    """10 % more temporaries: status 1, and one line with the program, the number, both values and their ratio."""
    status, said = ran(monkeypatch, capsys, committed, changed("15M full, 1 device: update", temporaries=2200))
    [line] = [line for line in said.splitlines() if "committed 2,000" in line]
    assert status == 1 and line.startswith("15M full, 1 device: update: temporaries: committed 2,000, now 2,200, 1.10x, worse")
    assert "entries as committed" not in said


def test_what_counts_as_a_deviation(committed, monkeypatch, capsys):
    """2 % is room for harmless edits; better is told too; less donated is worse; a compilation where there was none; gone; new."""
    update, later = "15M full, 1 device: update", "loop full mask, 1 device: later steps"
    assert ran(monkeypatch, capsys, committed, changed(update, temporaries=2039, flops=981))[0] == 0
    for now, expected in [
        (changed(update, temporaries=1900), "temporaries: committed 2,000, now 1,900, 0.95x, better; run --update"),
        (changed(update, donated=200), "donated: committed 400, now 200, 0.50x, worse"),
        (changed(later, compilations=1), "later steps: compilations: committed 0, now 1, worse"),
        (changed("15M full, 1 device: a run", programs=15), "a run: programs: committed 14, now 15, 1.07x, worse"),
        (changed("small full, 1 device: a run", programs=3), "small full, 1 device: a run: programs: 3, not committed"),
        ({name: numbers for name, numbers in VALUES.items() if name != update}, f"{update}: flops: committed as 1,000, no longer there"),
    ]:
        status, said = ran(monkeypatch, capsys, committed, now)
        assert status == 1 and any(expected in line for line in said.splitlines()), said


def test_an_unknown_version_is_weighed_against_the_nearest(tmp_path, monkeypatch, capsys):
    """Side by side with it, and only 1.5 times worse fails: better, or 1.4 times worse, is another compiler's business."""
    file = tmp_path / "guard.json"
    file.write_text(json.dumps({"0.8.0 other": changed("15M full, 1 device: update", temporaries=1), "99.0.0 other": VALUES}))
    monkeypatch.setattr(guard, "this_version", lambda: "98.1.0 here")
    status, said = ran(monkeypatch, capsys, file, changed("15M full, 1 device: update", temporaries=2800, flops=10))
    assert status == 0 and "against 99.0.0 other" in said and "(2.0)" in said  # kB, beside the 2.8 that are measured
    status, said = ran(monkeypatch, capsys, file, changed("15M full, 1 device: update", temporaries=3100, donated=200))
    assert status == 1 and "temporaries: committed 2,000, now 3,100, 1.55x" in said and "donated: committed 400, now 200, 0.50x" in said
    assert ran(monkeypatch, capsys, file, changed("loop full mask, 1 device: later steps", compilations=1))[0] == 1
    known = ["0.9.1 a", "0.10.2 a", "0.10.2 b", "0.11.0 a"]
    assert [guard.nearest(v, known) for v in ("0.10.3 b", "0.10.2 c", "0.9.9 a", "2.0 a")] == ["0.10.2 b", "0.10.2 a", "0.9.1 a", "0.11.0 a"]


def test_update_writes_what_is_measured(committed, monkeypatch, capsys):
    """Sorted; a part leaves the rest; a version that is new stands beside the old, a change drops those that older code had."""
    better = changed("15M full, 1 device: update", temporaries=1000)
    assert ran(monkeypatch, capsys, committed, better, "--update", "--only", "15M")[0] == 0
    assert json.loads(committed.read_text()) == {VERSION: better}
    monkeypatch.setattr(guard, "this_version", lambda: "98.1.0 here")
    assert ran(monkeypatch, capsys, committed, VALUES, "--update")[0] == 0
    assert json.loads(committed.read_text()) == {VERSION: better, "98.1.0 here": VALUES}
    status, said = ran(monkeypatch, capsys, committed, better, "--update")
    assert json.loads(committed.read_text()) == {"98.1.0 here": better} and f"values of {VERSION} were of older code" in said


def test_the_committed_file_is_readable_and_sorted():
    """Numbers only, programs in order, each version's the same programs: what a reviewer sees change is what changed."""
    values = json.loads(guard.FILE.read_text())
    assert list(values) == sorted(values)
    for programs in values.values():
        assert list(programs) == sorted(programs)
        assert {case.name for case in guard.CASES} == {name.split(": ")[0] for name in programs}
        assert all(type(number) is int and number >= 0 for numbers in programs.values() for number in numbers.values())
        assert all(numbers["compilations"] == 0 for name, numbers in programs.items() if name.endswith("later steps"))


def test_bad_input_is_one_line(tmp_path):
    """A name that nothing begins with, a file without values, one that is no JSON."""
    with pytest.raises(QtjaxError, match="--only '15M ful!': no name begins so; did you mean '15M full"):
        guard.main(["--only", "15M ful!"])
    with pytest.raises(QtjaxError, match="holds no values; write it with --update"):
        guard.main(["--file", str(tmp_path / "none.json")])
    (tmp_path / "bad.json").write_text("{")
    with pytest.raises(QtjaxError, match="bad.json: cannot be read"):
        guard.main(["--file", str(tmp_path / "bad.json")])
