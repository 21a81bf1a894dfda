"""Data in files: the same samples as in memory, the memory of a few rows, kept for a restart and made again when they must be."""

import csv
import dataclasses
import gzip
import io
import json
import os
import shutil
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qtjax.config import DataSection
from qtjax.data import growing, prepare, rows, stored
from qtjax.data import tokenize as tokenize_module
from qtjax.data.dataset import ARRAYS, TokenizedDataset
from qtjax.data.delimited import read_delimited
from qtjax.data.prepare import keep_training_data, training_data
from qtjax.data.sources import load_rows
from qtjax.data.stored import Stored, open_stored
from qtjax.errors import QtjaxError


def write_rows(path: Path, count: int) -> Path:
    """Prompts and answers of unequal lengths, some without an answer, one too long."""
    with path.open("w") as file:
        for i in range(count):
            row = {"prompt": f"{i}: " + "hello there " * (i % 5), "completion": "" if i % 11 == 3 else "fine thanks " * (1 + i % 4)}
            file.write(json.dumps(row) + "\n")
    return path


def same(one: TokenizedDataset, other: TokenizedDataset) -> None:
    assert one.stats == other.stats and one.fingerprint == other.fingerprint
    for name in ARRAYS:
        a, b = getattr(one, name), getattr(other, name)
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(a, b, err_msg=name)


def test_in_files_is_as_in_memory(tokenizer, tmp_path, monkeypatch):
    """Past IN_MEMORY tokens, and from the first sample on in a folder: bit by bit the dataset that memory holds. The files of
    the first kind are gone while they are read, those of the second stay."""
    data = DataSection(path=str(write_rows(tmp_path / "d.jsonl", 60)), eval_fraction=0.0, max_length=30)
    memory = training_data(data, tokenizer)
    assert memory.stats.skipped and not isinstance(memory.input_ids.base, np.memmap)
    monkeypatch.setattr(tokenize_module, "CHUNK_ROWS", 7)
    same(training_data(data, tokenizer), memory)
    monkeypatch.setattr(growing, "IN_MEMORY", 200)
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    spilled = tokenize_module.tokenize(tokenizer, prepare.training_rows(data), data, scratch=scratch)
    assert isinstance(spilled.input_ids.base, np.memmap) and not list(scratch.iterdir())
    same(spilled, memory)
    kept = keep_training_data(data, tokenizer, tmp_path / "kept")
    same(TokenizedDataset.load(kept), memory)
    for i in range(len(memory)):
        for a, b in zip(spilled.sample(i), memory.sample(i)):
            np.testing.assert_array_equal(a, b)
    some = [5, 0, 17]
    same(spilled.subset(some), memory.subset(some))


def _peak(work) -> int:
    """Bytes that Python and numpy held at most while `work` ran."""
    work()  # what is imported and cached at first does not count
    tracemalloc.start()
    try:
        work()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("kind", ["jsonl", "jsonl.gz", "csv", "parquet"])
def test_memory_does_not_grow_with_the_rows(tokenizer, tmp_path, monkeypatch, kind):
    """Four times the rows: at most 60 bytes more for each further row (its place in the file, its number, the sort that
    holds some out), where the row itself has 300 characters and its samples 300 bytes of tokens."""
    import pyarrow
    import pyarrow.parquet

    for module, name, value in (
        (tokenize_module, "CHUNK_ROWS", 50), (rows, "ROWS", 50), (stored, "BLOCK", 1 << 14), (growing, "IN_MEMORY", 1000),
    ):  # fmt: skip
        monkeypatch.setattr(module, name, value)

    def made(count: int) -> DataSection:
        path = tmp_path / f"{count}.{kind}"
        items = [{"prompt": f"{i}: " + "hello there " * 12, "completion": "fine thanks " * 12} for i in range(count)]
        if kind == "csv":
            with path.open("w", newline="") as file:
                writer = csv.DictWriter(file, ["prompt", "completion"])
                writer.writeheader()
                writer.writerows(items)
        elif kind == "parquet":
            pyarrow.parquet.write_table(pyarrow.Table.from_pylist(items), path)
        else:
            text = "".join(json.dumps(item) + "\n" for item in items).encode()
            path.write_bytes(gzip.compress(text) if kind.endswith("gz") else text)
        return DataSection(path=str(path), eval_fraction=0.1)

    few, many = made(400), made(1600)
    growth = _peak(lambda: training_data(many, tokenizer)) - _peak(lambda: training_data(few, tokenizer))
    assert growth < 60 * 1200, growth / 1200


def test_kept_data_are_read_again_and_made_again_when_anything_differs(tokenizer, tmp_path, monkeypatch):
    """The same rows, tokenizer and settings: nothing is tokenized, wherever the file lies. Another row, tokenizer, template,
    length, selection or rule, and a damaged file: made again, and the old one is gone."""
    made = []
    true = prepare.tokenize
    monkeypatch.setattr(prepare, "tokenize", lambda *a, **k: made.append(1) or true(*a, **k))
    path, folder = write_rows(tmp_path / "d.jsonl", 30), tmp_path / "tokens"
    data = DataSection(path=str(path), eval_fraction=0.2)
    kept = keep_training_data(data, tokenizer, folder)
    assert keep_training_data(data, tokenizer, folder) == kept and len(made) == 1
    moved = shutil.copy(path, tmp_path / "moved.jsonl")
    assert keep_training_data(dataclasses.replace(data, path=str(moved), eval_fraction=0.2), tokenizer, folder) == kept
    template = tmp_path / "t.jinja"
    template.write_text("{% for m in messages %}{{ m['content'] }}{% endfor %}")
    other = type(tokenizer)(tokenizer_object=tokenizer.backend_tokenizer, bos_token="<s>", eos_token="<|eot_id|>", unk_token="<unk>")
    changes = [
        lambda: (dataclasses.replace(data, max_length=20), tokenizer), lambda: (dataclasses.replace(data, eval_fraction=0.3), tokenizer),
        lambda: (dataclasses.replace(data, max_samples=5), tokenizer), lambda: (dataclasses.replace(data, part="1/2"), tokenizer),
        lambda: (data, other), lambda: (dataclasses.replace(data, chat_template=str(template)), tokenizer),
    ]  # fmt: skip
    for number, change in enumerate(changes):
        now = keep_training_data(*change(), folder)
        assert now != kept and len(made) == 2 + number and [p.name for p in folder.iterdir()] == [now.name], number
        kept = now
    template.write_text("{% for m in messages %}{{ m['content'] }} {% endfor %}")
    assert keep_training_data(*changes[-1](), folder) != kept
    kept = keep_training_data(data, tokenizer, folder)
    text, times = path.read_text(), path.stat()
    path.write_text(text.replace("hello", "Hello", 1))  # of the same length
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))  # and of the same time
    changed = keep_training_data(data, tokenizer, folder)
    assert changed != kept
    monkeypatch.setattr(prepare, "_RULES", 2)
    ruled = keep_training_data(data, tokenizer, folder)
    assert ruled != changed
    begun = len(made)
    (ruled / "input_ids.npy").write_bytes((ruled / "input_ids.npy").read_bytes()[:-4])
    assert keep_training_data(data, tokenizer, folder) == ruled and len(made) == begun + 1
    same(TokenizedDataset.load(ruled), training_data(data, tokenizer))


def test_a_failure_half_way_leaves_nothing(tokenizer, tmp_path, monkeypatch):
    """A bad row after the first chunks: its error, no half dataset, and what a killed process left is cleared away."""
    path, folder = write_rows(tmp_path / "d.jsonl", 30), tmp_path / "tokens"
    monkeypatch.setattr(tokenize_module, "CHUNK_ROWS", 5)
    with path.open("a") as file:
        file.write("{nonsense\n")
    (folder / ".training-0123456789abcdef.1.tmp").mkdir(parents=True)
    (folder / "notes").mkdir()
    with pytest.raises(QtjaxError, match=r"d\.jsonl:31: malformed JSON"):
        keep_training_data(DataSection(path=str(path), eval_fraction=0.0), tokenizer, folder)
    assert [p.name for p in folder.iterdir()] == ["notes"]


def test_a_full_disk_is_one_line(tokenizer, tmp_path, monkeypatch, small_disk):
    """No room for the tokens, kept or spilled: one line, nothing left behind."""
    disk = small_disk("64k")
    path = write_rows(tmp_path / "d.jsonl", 2000)
    data = DataSection(path=str(path), eval_fraction=0.0)
    with pytest.raises(QtjaxError, match="disk is full") as caught:
        keep_training_data(data, tokenizer, disk / "tokens")
    assert "\n" not in str(caught.value) and not list((disk / "tokens").iterdir())
    monkeypatch.setattr(growing, "IN_MEMORY", 1000)
    with pytest.raises(QtjaxError, match="disk is full"):
        tokenize_module.tokenize(tokenizer, prepare.training_rows(data), data, scratch=disk)
    assert [p.name for p in disk.iterdir() if p.name.startswith(".tokens")] == []


_CELLS = st.text(st.sampled_from(["a", "é", "𝄞", '"', ",", "\t", "\n", "\r", " ", "\u2028", "\x0b"]), max_size=6)


@settings(max_examples=150, deadline=None)
@given(
    table=st.integers(1, 3).flatmap(lambda width: st.lists(st.lists(_CELLS, min_size=width, max_size=width), min_size=1, max_size=7)),
    ending=st.sampled_from(["\n", "\r\n", "\r"]), mark=st.booleans(), blank=st.booleans(), block=st.sampled_from([1, 7, 1 << 20]), together=st.sampled_from([1, 2, 1000]),
)  # fmt: skip
def test_a_table_read_by_pieces_is_the_table_read_at_once(tmp_path_factory, table, ending, mark, blank, block, together):
    """Whatever stands in the cells, however lines end and blocks fall: the rows and their lines as the csv module reads them from
    the whole text."""
    text = io.StringIO(newline="")
    csv.writer(text, lineterminator=ending * (1 + blank), quoting=csv.QUOTE_ALL).writerows([[f"h{i}" for i in range(len(table[0]))], *table])
    content = ("\ufeff" if mark else "") + text.getvalue()
    path = tmp_path_factory.getbasetemp() / "table.csv"
    path.write_bytes(content.encode())
    reader, expected, begin = csv.reader(io.StringIO(text.getvalue(), newline=""), strict=True), [], 1
    for record in reader:
        if record:
            expected.append((record, begin))
        begin = reader.line_num + 1
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stored, "BLOCK", block)
        patch.setattr(rows, "ROWS", together)
        with path.open("rb") as file:
            found = read_delimited("t", Stored(file), ",")
            names = expected[0][0]
            for i in [*range(len(found)), 0]:
                assert found[i] == dict(zip(names, expected[1 + i][0])) and found.where(i) == f"t:{expected[1 + i][1]}"
            assert len(found) == len(expected) - 1


@settings(max_examples=60, deadline=None)
@given(
    sizes=st.lists(st.integers(0, 9), min_size=1, max_size=5), together=st.integers(1, 7), seed=st.integers(0, 99), order=st.booleans()
)
def test_parquet_rows_are_found_in_any_order(tmp_path_factory, sizes, together, seed, order):
    """Row groups of any size, empty ones too, blocks across their borders; forward, some left out, and in any order."""
    import pyarrow
    import pyarrow.parquet

    path, total = tmp_path_factory.getbasetemp() / "t.parquet", sum(sizes)
    schema = pyarrow.schema([("n", pyarrow.int64())])
    with pyarrow.parquet.ParquetWriter(path, schema) as writer:
        for i, size in enumerate(sizes):
            writer.write_table(pyarrow.table({"n": list(range(sum(sizes[:i]), sum(sizes[: i + 1])))}, schema))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rows, "ROWS", together)
        if not total:
            with pytest.raises(QtjaxError, match="holds no rows"):
                load_rows(str(path))
            return
        found = load_rows(str(path))
        asked = np.random.default_rng(seed).permutation(total)[: 1 + seed % total]
        for i in asked if order else np.sort(asked):
            assert found[int(i)] == {"n": int(i)}


def test_a_gzipped_file_is_unpacked_where_it_is_told_and_leaves_no_name(tmp_path):
    """Its content is read piece by piece from a file in `scratch` that no listing shows."""
    packed, scratch = tmp_path / "d.jsonl.gz", tmp_path / "scratch"
    scratch.mkdir()
    packed.write_bytes(gzip.compress(b'{"a": 1}\n' * 5000))
    data = open_stored("d", packed, scratch)
    assert data.size == 45000 and data.line(9) == b'{"a": 1}' and data.read(44999, 10) == b"\n" and not list(scratch.iterdir())
    assert len(load_rows(str(packed), scratch=scratch)) == 5000
