"""metrics.jsonl is strict JSON whose whole lines, and only those, count."""

import json
import math
import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qtjax.records.metrics import MetricsLog, scan, to_line


def strict(text):
    def no(constant):
        raise AssertionError(f"{constant} is not JSON")

    return json.loads(text, parse_constant=no)


@given(
    st.dictionaries(
        st.text(min_size=1), st.floats() | st.integers(-(2**53), 2**53) | st.booleans() | st.text() | st.none()
    )
)
def test_a_line_is_strict_json_and_reads_back(values):
    """Every finite number is read back exactly, NaN as null, and infinity as infinity; there is one line feed, at the end."""
    line = to_line(values)
    assert line.count(b"\n") == 1 and line.endswith(b"\n")
    back = strict(line)
    assert set(back) == set(values)
    for name, value in values.items():
        assert back[name] is None if isinstance(value, float) and math.isnan(value) else back[name] == value


def test_numpy_values_become_numbers():
    """Arrays of one element and numpy scalars are written as plain numbers."""
    assert strict(to_line({"a": np.float32(0.5), "b": np.array(3), "c": np.bool_(True)})) == {
        "a": 0.5,
        "b": 3,
        "c": True,
    }


@given(st.integers(0, 200), st.binary(max_size=4))
def test_any_tear_keeps_the_whole_lines(cut, rubbish):
    """Cut the file anywhere and put rubbish behind: the lines before the tear are read and nothing else, then it goes on."""
    lines = [to_line({"step": i, "loss": 1 / i}) for i in range(1, 6)]
    whole = b"".join(lines)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "metrics.jsonl"
        torn = whole[:cut] + (rubbish if cut < len(whole) else b"")
        path.write_bytes(torn)
        expected = 0
        while expected < 5 and torn.startswith(b"".join(lines[: expected + 1])):
            expected += 1
        assert [v["step"] for _, v in scan(path)] == list(range(1, expected + 1))
        log = MetricsLog(path)
        assert log.last_step == expected
        log.append(expected + 1, {"loss": 0.0})
        log.close()
        assert path.read_bytes() == b"".join(lines[:expected]) + to_line({"step": expected + 1, "loss": 0.0})


def test_steps_follow_one_another(tmp_path):
    """A step that does not follow the last one is refused: none missing, none twice."""
    log = MetricsLog(tmp_path / "m")
    log.append(1, {})
    for step in (0, 1, 3):
        with pytest.raises(ValueError, match="does not follow"):
            log.append(step, {})
    log.close()
