"""Every kind of source yields the same rows, and every broken one is a one-line error that says where."""

import csv
import gzip
import json

import pytest

from qtjax.data.sources import load_rows
from qtjax.errors import QtjaxError

ROWS = [{"question": "1+1?", "answer": "2"}, {"question": 'a "b",\tc\nd', "answer": "é"}, {"question": "x", "answer": "y"}]


def _delimited(path, delimiter):
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, ["question", "answer"], delimiter=delimiter)
        writer.writeheader()
        writer.writerows(ROWS)


def _write(path):
    kind = path.suffix
    if kind == ".jsonl":
        path.write_text("".join(json.dumps(r) + "\n" for r in ROWS), encoding="utf-8")
    elif kind == ".json":
        path.write_text(json.dumps(ROWS, indent=1), encoding="utf-8")
    elif kind in (".csv", ".tsv"):
        _delimited(path, "," if kind == ".csv" else "\t")
    else:
        import pyarrow
        import pyarrow.parquet

        # Two row groups, so that reading crosses a border.
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), path, row_group_size=2)


@pytest.mark.parametrize("gz", [False, True])
@pytest.mark.parametrize("kind", ["jsonl", "json", "csv", "tsv", "parquet"])
def test_every_file_format_yields_the_same_rows(tmp_path, kind, gz):
    """JSONL, JSON, CSV, TSV and Parquet, plain and gzipped, hold the same rows."""
    path = tmp_path / f"data.{kind}"
    _write(path)
    if gz:
        packed = tmp_path / f"data.{kind}.gz"
        packed.write_bytes(gzip.compress(path.read_bytes()))
        path = packed
    rows = load_rows(str(path))
    assert [rows[i] for i in range(len(rows))] == ROWS
    assert rows[-1] == ROWS[-1] and list(rows[1:].index) == [1, 2]
    with pytest.raises(IndexError):
        rows[3]


@pytest.mark.parametrize("key", ["data", "train", "dev"])
def test_json_object_of_lists(tmp_path, key):
    """An object with the rows under the split's name, 'data' or 'train' is read like the list."""
    path = tmp_path / "d.json"
    path.write_text(json.dumps({"version": 1, key: ROWS}))
    assert list(load_rows(str(path), "dev")) == ROWS
    path.write_text(json.dumps({"version": 1, "rows": ROWS}))
    with pytest.raises(QtjaxError, match=r"list under 'dev', 'data' or 'train'; it has version, rows"):
        load_rows(str(path), "dev")


def test_json_file_of_lines_is_read_as_lines(tmp_path):
    """A .json file that holds one object per line is JSON lines."""
    path = tmp_path / "d.json"
    path.write_text("".join(json.dumps(r) + "\n" for r in ROWS))
    assert list(load_rows(str(path))) == ROWS


def test_where_points_at_the_line(tmp_path):
    """Places count lines of the file from 1, over blank lines, a byte-order mark, quoted line ends, and after a selection."""
    path = tmp_path / "d.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + b'{"a": 1}\r\n\r\n  \n{"a": 2}\n{"a": 3}')
    rows = load_rows(str(path))
    assert [r["a"] for r in rows] == [1, 2, 3]
    assert [rows.where(i) for i in range(3)] == [f"{path}:{line}" for line in (1, 4, 5)]
    some = rows.select([2, 1])
    assert [r["a"] for r in some] == [3, 2] and some.where(0) == f"{path}:5" and list(some[1:].index) == [1]
    table = tmp_path / "d.csv"
    table.write_text('a,b\n"x\ny",1\n\nz,2\n')
    rows = load_rows(str(table))
    assert [rows.where(i) for i in range(2)] == [f"{table}:2", f"{table}:5"]
    assert rows[0] == {"a": "x\ny", "b": "1"}


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b'{"a": 1}\n{"a": \n{"a": 3}\n', r"a\.jsonl:2: malformed JSON"),
        ("a.jsonl", b'{"a": 1}\n[1, 2]\n', r"a\.jsonl:2: must be a JSON object with named fields, is list"),
        ("a.jsonl", b'{"a": 1}\n{"a": "\xff"}\n', r"a\.jsonl:2: not UTF-8"),
        ("a.jsonl", b"\n \n", r"a\.jsonl: holds no rows"),
        ("a.jsonl", b"", r"a\.jsonl: the file is empty"),
        ("a.jsonl.gz", gzip.compress(b"", mtime=0), r"a\.jsonl\.gz: the file is empty"),
        ("a.jsonl.gz", b"no gzip", r"damaged or not gzip"),
        ("a.jsonl.gz", gzip.compress(b'{"a": 1}\n' * 99, mtime=0)[:-9], r"damaged or not gzip"),
        ("a.json", b'[{"a": 1},\n {"a" 2}]', r"a\.json:2: malformed JSON"),
        ("a.json", b"[]", r"holds no rows"),
        ("a.json", b"3", r"must be a list of objects, is int"),
        ("a.json", b'[{"a": 1}, 2]', r"row 1: must be an object with named fields, is int"),
        ("a.csv", b"a,b\n1,2\n3\n", r"a\.csv:3: has 1 fields, the first line has 2"),
        ("a.csv", b'a,b\n1,2\n"x"y,2\n', r"a\.csv:3: broken quoting"),
        ("a.csv", b"a,b\n", r"has a header but no rows"),
        ("a.csv", b"a,a\n1,2\n", r"a\.csv:1: the header names 'a' twice"),
        ("a.csv", b"a\n\xff\n", r"a\.csv:2: not UTF-8"),
        ("a.parquet", b"PAR1 nonsense PAR1", r"damaged or not Parquet"),
        ("a.xlsx", b"PK", r"cannot tell the format from its name; known endings are \.jsonl"),
    ],
)
def test_broken_files(tmp_path, name, content, message):
    """A broken file is an error of one line naming file, line and rule."""
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(QtjaxError, match=message) as caught:
        list(load_rows(str(path)))
    assert "\n" not in str(caught.value)


def test_missing_file_names_its_neighbours(tmp_path):
    """A missing file is an error with near names of its folder; a missing folder is said too."""
    (tmp_path / "train.jsonl").write_text("{}")
    with pytest.raises(QtjaxError, match=r"trian\.jsonl: no such file; did you mean 'train\.jsonl'\?"):
        load_rows(str(tmp_path / "trian.jsonl"))
    with pytest.raises(QtjaxError, match=r"no such file \(nor the folder"):
        load_rows(str(tmp_path / "no" / "x.jsonl"))
    with pytest.raises(QtjaxError, match=r"data\.path is empty"):
        load_rows("")


def test_table_without_header(tmp_path):
    """Columns asked for as c0, c1, ... read a table without a header; bare quotes in a TSV are characters."""
    path = tmp_path / "flan.tsv"
    path.write_text('"Larry" served tea.\tno\tbecause\nx\tyes\t"quoted"\n')
    assert list(load_rows(str(path), columns=["c0", "c2"])) == [
        {"c0": '"Larry" served tea.', "c1": "no", "c2": "because"},
        {"c0": "x", "c1": "yes", "c2": '"quoted"'},
    ]
    assert len(load_rows(str(path))) == 1


def test_saved_datasets(tmp_path):
    """Folders written by datasets.save_to_disk are read, a DatasetDict by split; an unknown split lists those there are."""
    import datasets

    one = datasets.Dataset.from_list(ROWS)
    one.save_to_disk(str(tmp_path / "one"))
    datasets.DatasetDict({"train": one, "test": one.select([2])}).save_to_disk(str(tmp_path / "two"))
    assert list(load_rows(str(tmp_path / "one"))) == ROWS
    assert list(load_rows(str(tmp_path / "two"), "test")) == ROWS[2:]
    with pytest.raises(QtjaxError, match=r"has no split 'tests'; did you mean 'test'\?; it has train, test"):
        load_rows(str(tmp_path / "two"), "tests")
    (tmp_path / "one" / "state.json").write_text("{")
    with pytest.raises(QtjaxError, match=r"the saved dataset is damaged"):
        load_rows(str(tmp_path / "one"))
    (tmp_path / "none").mkdir()
    with pytest.raises(QtjaxError, match=r"neither a folder written by datasets\.save_to_disk nor one with data files; it holds nothing"):
        load_rows(str(tmp_path / "none"))


def test_folder_of_data_files(tmp_path):
    """A folder of plain data files is read as a dataset, without a script."""
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "train.jsonl").write_text("".join(json.dumps(r) + "\n" for r in ROWS))
    assert list(load_rows(str(tmp_path / "set"))) == ROWS


def test_hub_out_of_reach_is_one_line(tmp_path, monkeypatch):
    """A hub name without network is an error of one line that tells the remedy."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(QtjaxError, match=r"nobody/nothing:main: no such file or folder here.*give that folder") as caught:
        load_rows("nobody/nothing:main")
    assert "\n" not in str(caught.value)


def test_embedded_generator():
    """'smol-instruct' comes from the package's own generator."""
    rows = load_rows("smol-instruct", "test")
    assert len(rows) and isinstance(rows[0], dict) and rows.where(0) == "smol-instruct[test] row 0"


@pytest.mark.shared
def test_real_files(shared):
    """Real files of six projects are read whole: counts as their sources state them."""
    sft = shared / "data" / "sft"
    counts = {
        "gsm8k_train.jsonl": 7473,
        "llmadapters_ARC-Easy_train.json": 2251,
        "llamafactory_v1_sft_demo.jsonl": 500,
        "rasbt_instruction_1100.json": 1100,
        "self_instruct_seed_tasks.jsonl": 175,
        "t0_p3_50k.jsonl.gz": 55185,
    }
    for name, count in counts.items():
        rows = load_rows(str(sft / name))
        assert len(rows) == count and isinstance(rows[count - 1], dict)
    for name, count in {"aqua": 2728, "creak": 6915, "ecqa": 7112, "qasc": 1084, "sensemaking": 6070, "strategyqa": 2061}.items():
        rows = load_rows(str(sft / f"flan_cot_{name}_train.tsv"), columns=["c0", "c2"])
        assert len(rows) == count and list(rows[0]) == ["c0", "c1", "c2"]
    # Claims in this file begin with a quote that closes before the field ends.
    assert load_rows(str(sft / "flan_cot_creak_train.tsv"), columns=["c0"])[1]["c0"].startswith('"Marlboro used')
