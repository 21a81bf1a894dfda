"""The corpus: same inputs same bytes, shares as asked, documents short enough, books by year, no chat turns in it."""

import gzip
import json

import pytest
from transformers import AutoTokenizer

from qtjax.errors import QtjaxError
from qtjax.smol import model_folder
from qtjax.smol.corpus import build, documents, main, read_books, year_of
from qtjax.smol.draw import Draw
from qtjax.smol.lessons import TALKS, lesson

SENTENCE = "The old man walked slowly over the wide bridge and looked at the river. "


@pytest.fixture
def books(tmp_path):
    path = tmp_path / "books.jsonl.gz"
    rows = [
        {"title": "Somebody_Old_1850.txt", "text": "CHAPTER I\n\n" + "\n\n".join([SENTENCE * 12] * 40)},
        {"title": "Somebody_New_1950.txt", "text": "Modern words here. " * 500},
        {"title": "no year", "text": "Undated words here. " * 500},
        {"title": "x.md", "text": "# Title: X\n\n## Year: 1731\n\n-------\n\n" + SENTENCE * 9},
    ]
    with gzip.open(path, "wt", encoding="utf-8") as file:
        file.writelines(json.dumps(r) + "\n" for r in rows)
    return str(path)


def test_only_books_up_to_the_year(books):
    """Books after last_year and undated ones are left out."""
    texts = list(read_books(books, 1900))
    assert len(texts) == 2 and not any("Modern" in t or "Undated" in t for t in texts)
    assert len(list(read_books(books, 1800))) == 1
    assert year_of("a/B_1864.txt", "") == 1864 and year_of("a", "## Year: 1731") == 1731 and year_of("a", "b") is None


def test_documents_are_whole_sentences_of_bounded_size(books):
    """A document is at most `size` characters, ends a sentence, and keeps the text's order; headings go."""
    book = next(iter(read_books(books)))
    pieces = documents(book, 300)
    assert all(75 <= len(p) <= 300 and p.endswith(".") and "CHAPTER" not in p for p in pieces)
    assert sum(map(len, pieces)) > 0.9 * len(SENTENCE * 12 * 40)
    assert documents("“It’s a fine day,” he said to the _old_ man. " * 6, 300)[0].startswith('"It\'s a fine day," he said to the old man.')


def test_command_is_deterministic_and_mixes_by_share(books, tmp_path):
    """Two runs write the same bytes; books hold about their share of the characters."""
    outs = [tmp_path / "a.jsonl", tmp_path / "b.jsonl"]
    for out in outs:
        main(["--books", books, "--out", str(out), "--tokens", "20000", "--seed", "4"])
    assert outs[0].read_bytes() == outs[1].read_bytes()
    texts = [json.loads(line)["text"] for line in outs[0].read_text().splitlines()]
    share = sum(len(t) for t in texts if "old man walked" in t) / sum(map(len, texts))
    assert 0.22 < share < 0.30
    assert build([books], 20000, 5) != texts


def test_lessons_fit_and_hold_no_chat(books):
    """A lesson is under 450 characters and 256 tokens, holds no special token and never says "the answer is"."""
    draw = Draw(1)
    texts = [lesson(draw) for _ in range(1500)]
    tokenizer = AutoTokenizer.from_pretrained(model_folder())
    assert max(map(len, texts)) < 450
    assert max(len(ids) for ids in tokenizer(texts)["input_ids"]) <= 254
    joined = "\n".join(texts).lower()
    assert "answer is" not in joined and "<|" not in joined


@pytest.mark.parametrize("talk", TALKS, ids=lambda t: t.__name__)
def test_every_kind_of_lesson_is_clean_text(talk):
    """Each kind ends its sentence, has single spaces and leaves no placeholder behind."""
    draw = Draw(2)
    for _ in range(200):
        text = talk(draw)
        assert text[-1] in '.?"' and "  " not in text and "{" not in text and text == text.strip()


def test_bad_input_is_one_line(books, tmp_path):
    """A missing file, a malformed line, too little text and impossible numbers are QtjaxErrors of one line."""
    broken = tmp_path / "broken.jsonl"
    broken.write_text('{"text": "a", "title": "1800"}\nnot json\n')
    for run, match in [
        (lambda: build(["nowhere.jsonl"], 1000, 0), "no such file"),
        (lambda: build([str(broken)], 1000, 0), "line 2"),
        (lambda: build([books], 10_000_000, 0), "too little text"),
        (lambda: build([], 0, 0), "above 0"),
        (lambda: build([books], 100, 0, books_percent=101), "0 to 100"),
    ]:
        with pytest.raises(QtjaxError, match=match) as error:
            run()
        assert "\n" not in str(error.value)
