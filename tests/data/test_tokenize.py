"""Tokenization without a template, cutting, skipping, counting; vocabulary checks; saving and loading what came out."""

import io

import numpy as np
import pytest
from rich.console import Console

from qtjax.config import DataSection
from qtjax.data import tokenize as tokenize_module
from qtjax.data.dataset import DataStats, TokenizedDataset
from qtjax.data.prepare import held_out_rows, training_data, training_rows
from qtjax.data.progress import LateProgress
from qtjax.data.rows import from_objects
from qtjax.data.tokenize import tokenize
from qtjax.data.tokenizer import check_vocabulary, closing_ids, load_tokenizer
from qtjax.errors import QtjaxError


def pairs(*texts):
    return from_objects("f", [{"prompt": p, "completion": c} for p, c in texts])


def plain(tokenizer, text):
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def test_without_a_template(tokenizer):
    """BOS + tokens(prompt) + tokens(completion) + EOS; completion and EOS are trained, EOS closes."""
    data = tokenize(tokenizer, pairs(("hello", " four"), ("", "x")), DataSection())
    ids, mask, closing = data.sample(0)
    prompt, answer = plain(tokenizer, "hello"), plain(tokenizer, " four")
    assert ids.tolist() == [tokenizer.bos_token_id, *prompt, *answer, tokenizer.eos_token_id] and ids.dtype == np.int32
    assert mask.tolist() == [False] * (1 + len(prompt)) + [True] * (len(answer) + 1)
    assert closing.tolist() == [False] * (len(ids) - 1) + [True]
    assert data.sample(1)[1].tolist() == [False, True, True]
    assert data.stats == DataStats(rows=2, samples=2, tokens=len(ids) + 3, trained_tokens=int(mask.sum()) + 2)
    assert data.lengths.tolist() == [len(ids), 3] and data.trained.tolist() == [int(mask.sum()), 2]


def test_cut_and_skipped_are_counted(tokenizer):
    """A cut answer stays without EOS and is counted; a sample without an answer token left, or without an answer, is skipped and counted."""
    rows = pairs(("a", "b" * 20), ("a" * 30, "b"), ("a", " "), ("a", "b"))
    data = tokenize(tokenizer, rows, DataSection(max_length=10))
    assert data.lengths.tolist() == [10, 4] and data.row_index.tolist() == [0, 3]
    ids, mask, closing = data.sample(0)
    assert mask.tolist() == [False, False] + [True] * 8 and not closing.any() and tokenizer.eos_token_id not in ids
    assert data.stats.rows == 4 and data.stats.samples == 2 and data.stats.cut == 1
    assert data.stats.skipped == {"empty answer": 1, "no answer token within max_length": 1}
    assert data.stats.line() == (
        "4 rows -> 2 samples (1 cut; 2 skipped: empty answer 1, no answer token within max_length 1), 14 tokens, 10 trained"
    )


def test_cutting_untrained_tokens_is_no_cut(tokenizer, templates, template_file):
    """Only a lost target counts as cut: whitespace after the closing token may go."""
    row = {"messages": [{"role": "user", "content": "u"}, {"role": "assistant", "content": "a"}]}
    data = DataSection(chat_template=template_file(templates["chatml"]))
    whole = tokenize(tokenizer, from_objects("f", [row]), data)
    length = len(whole.input_ids)
    assert whole.loss_mask[-2] and not whole.loss_mask[-1]
    import dataclasses

    less = tokenize(tokenizer, from_objects("f", [row]), dataclasses.replace(data, max_length=length - 1))
    assert less.stats.cut == 0 and less.closing[-1]
    least = tokenize(tokenizer, from_objects("f", [row]), dataclasses.replace(data, max_length=length - 2))
    assert least.stats.cut == 1 and not least.closing.any()


def test_text_trains_every_token_once(tokenizer):
    """Format text: pieces of at most max_length overlap by one token; put together, every token but BOS is a target exactly once."""
    text = "hello there how are you today " * 3
    data = tokenize(tokenizer, from_objects("f", [{"text": text}, {"text": " "}]), DataSection(max_length=7))
    whole = [tokenizer.bos_token_id, *plain(tokenizer, text), tokenizer.eos_token_id]
    assert data.input_ids[data.loss_mask].tolist() == whole[1:]
    assert data.lengths.max() == 7 and data.lengths.min() >= 2 and set(data.row_index) == {0}
    assert data.closing.sum() == 1 and data.closing[-1]
    assert data.stats.skipped == {"empty text": 1} and data.stats.noted == {"texts split at max_length": 1}


def test_nothing_left_is_an_error(tokenizer):
    """A dataset without a single sample is one line with the reasons."""
    with pytest.raises(QtjaxError, match=r"f: no sample is left to train on, all 1 rows were skipped \(empty answer 1\)"):
        tokenize(tokenizer, pairs(("a", "")), DataSection())


def test_chunks_do_not_show(tokenizer, monkeypatch):
    """The result does not depend on how rows are batched."""
    rows = pairs(*((f"p{i}", "c" * (i % 7)) for i in range(23)))
    whole = tokenize(tokenizer, rows, DataSection(max_length=6))
    monkeypatch.setattr(tokenize_module, "CHUNK_ROWS", 5)
    by_rows = tokenize(tokenizer, rows, DataSection(max_length=6))
    monkeypatch.setattr(tokenize_module, "CHUNK_CHARACTERS", 8)
    by_size = tokenize(tokenizer, rows, DataSection(max_length=6))
    for other in (by_rows, by_size):
        assert other.stats == whole.stats
        for name in ("input_ids", "loss_mask", "closing", "offsets", "row_index"):
            np.testing.assert_array_equal(getattr(other, name), getattr(whole, name))
    assert whole.stats.rows == whole.stats.samples + sum(whole.stats.skipped.values())


def test_an_unreadable_row_is_named(tokenizer):
    """A bad row in the middle stops with its place."""
    rows = from_objects("f", [{"prompt": "a", "completion": "b"}, {"prompt": "a"}])
    with pytest.raises(QtjaxError, match=r"f row 1: has no column"):
        tokenize(tokenizer, rows, DataSection())


def test_half_a_character_is_named(tokenizer):
    """Text that is no Unicode (JSON can spell a lone surrogate) is an error naming its row, not the tokenizer's."""
    for row in ({"prompt": "a", "completion": "\ud800b"}, {"text": "\udc00"}):
        good = {key: "x" for key in row}
        with pytest.raises(QtjaxError, match=r"f row 1: holds '.ud\w00', half of a character"):
            tokenize(tokenizer, from_objects("f", [good, row]), DataSection())


def test_vocabulary_mismatch(tokenizer):
    """A token id at or above the model's vocab_size is an error; with ids given, only those that occur count."""
    size = len(tokenizer)
    check_vocabulary(tokenizer, size)
    with pytest.raises(QtjaxError, match=rf"has id {size - 1}, but the model's vocab_size is {size - 1}"):
        check_vocabulary(tokenizer, size - 1)
    check_vocabulary(tokenizer, 10, np.array([1, 9], np.int32))
    with pytest.raises(QtjaxError, match=r"has id 10, but the model's vocab_size is 10"):
        check_vocabulary(tokenizer, 10, np.array([1, 10], np.int32))


def test_closing_ids(tokenizer):
    """EOS and chat markers can close an answer; BOS and unknown cannot."""
    names = set(tokenizer.convert_ids_to_tokens(sorted(closing_ids(tokenizer))))
    assert {"</s>", "<|im_end|>", "<|eot_id|>"} <= names and not names & {"<s>", "<unk>"}


def test_load_tokenizer(tmp_path, tokenizer):
    """A folder's tokenizer is loaded; a missing folder, one without a tokenizer, a damaged one and an unknown hub name are one line each."""
    tokenizer.save_pretrained(tmp_path / "model")
    assert load_tokenizer(str(tmp_path / "model")).get_vocab() == tokenizer.get_vocab()
    (tmp_path / "empty").mkdir()
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "tokenizer.json").write_text("{")
    for path, message in (
        (tmp_path / "mode", r"no such folder; did you mean 'model'\?"),
        (tmp_path / "empty", r"the folder has no tokenizer \(tokenizer\.json or tokenizer\.model\); it holds nothing"),
        (tmp_path / "broken", r"the tokenizer's files are damaged"),
        ("nobody/nothing", r"no such folder here, and no such model on the Hugging Face hub"),
    ):
        with pytest.raises(QtjaxError, match=message) as caught:
            load_tokenizer(str(path))
        assert "\n" not in str(caught.value)


def test_embedded_tokenizer():
    """'smol' is the embedded model's tokenizer."""
    assert len(load_tokenizer("smol")) > 256


def test_save_and_load(tmp_path, tokenizer):
    """A saved dataset is loaded bitwise equal, memory-mapped or not; a damaged folder is an error."""
    data = tokenize(tokenizer, pairs(("a", "b"), ("c", "d" * 40), ("c", "")), DataSection(max_length=9))
    data.save(tmp_path / "d")
    for mmap in (True, False):
        again = TokenizedDataset.load(tmp_path / "d", mmap=mmap)
        assert again.stats == data.stats and len(again) == len(data) == 2
        for i in range(2):
            for a, b in zip(again.sample(i), data.sample(i)):
                np.testing.assert_array_equal(a, b)
                assert a.dtype == b.dtype
    np.save(tmp_path / "d" / "input_ids.npy", data.input_ids[:-1])
    with pytest.raises(QtjaxError, match=r"do not fit together"):
        TokenizedDataset.load(tmp_path / "d")
    (tmp_path / "d" / "offsets.npy").unlink()
    with pytest.raises(QtjaxError, match=r"not a complete tokenized dataset"):
        TokenizedDataset.load(tmp_path / "d")


def test_subset(tokenizer):
    """A subset holds the chosen samples in order and counts its own tokens."""
    data = tokenize(tokenizer, pairs(("a", "b"), ("c", "dd"), ("e", "f")), DataSection())
    some = data.subset([2, 0])
    assert some.row_index.tolist() == [2, 0] and some.sample(1)[0].tolist() == data.sample(0)[0].tolist()
    assert some.stats.samples == 2 and some.stats.tokens == 8 and some.stats.trained_tokens == 4


def test_stats_table_shows_every_count():
    """The table holds every number of the statistics."""
    console = Console(file=io.StringIO(), width=100)
    console.print(DataStats(1234, 5, 6, {"empty answer": 7}, {"odd": 8}, 9, 10).table())
    text = console.file.getvalue()
    for cell in ("1,234", "skipped: empty answer", "noted: odd", "6", "9", "10"):
        assert cell in text


def test_progress_appears_only_when_it_takes_long():
    """The bar shows itself after its delay, not before, and never when disabled."""
    console = Console(file=io.StringIO(), force_terminal=True)
    for delay, enabled, shown in ((0.0, True, True), (60.0, True, False), (0.0, False, False)):
        with LateProgress("work", 10, delay=delay, enabled=enabled, console=console) as bar:
            for _ in range(10):
                bar.advance(1)
            assert bar.shown is shown
    assert "work" in console.file.getvalue()


def test_training_and_held_out_rows_share_nothing(tmp_path):
    """eval_fraction divides the rows; together they are the file, and row numbers still point into it. max_samples cuts training only."""
    path = tmp_path / "d.jsonl"
    path.write_text("".join(f'{{"prompt": "{i}", "completion": "x"}}\n' for i in range(40)))
    data = DataSection(path=str(path), eval_fraction=0.25)
    train, held = training_rows(data), held_out_rows(data)
    assert (len(train), len(held)) == (30, 10)
    assert sorted([*train.index, *held.index]) == list(range(40))
    assert all(int(rows[i]["prompt"]) == rows.index[i] for rows in (train, held) for i in range(len(rows)))
    few = DataSection(path=str(path), eval_fraction=0.25, max_samples=3)
    assert training_rows(few).index.tolist() == train.index[:3].tolist() and len(held_out_rows(few)) == 10
    with pytest.raises(QtjaxError, match=r"nothing is held out"):
        held_out_rows(DataSection(path=str(path), eval_fraction=0.0))
    own = DataSection(path=str(path), eval_path=str(path))
    assert len(training_rows(own)) == len(held_out_rows(own)) == 40


@pytest.mark.shared
def test_gsm8k_on_stories(shared):
    """GSM8K with the real stories260K tokenizer: every row accounted for, and samples are BOS + question + answer + EOS."""
    tokenizer = load_tokenizer(str(shared / "models" / "stories260K"))
    data = DataSection(path=str(shared / "data" / "sft" / "gsm8k_train.jsonl"), eval_fraction=0.0)
    done = training_data(data, tokenizer)
    assert done.stats.rows == 7473 == done.stats.samples + sum(done.stats.skipped.values())
    check_vocabulary(tokenizer, 512, done.input_ids)
    row = training_rows(data)[int(done.row_index[100])]
    expected = [1, *plain(tokenizer, row["question"]), *plain(tokenizer, row["answer"]), 2]
    assert done.sample(100)[0].tolist() == expected
    assert (done.trained > 0).all() and done.lengths.max() <= 512
    assert done.closing.sum() == done.stats.samples - done.stats.cut
