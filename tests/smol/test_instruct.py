"""smol-instruct: the same seed gives the same rows anywhere, provenance is true, train and test never share a question."""

import hashlib
import json
import os
import subprocess
import sys
from collections import Counter

import pytest

from qtjax.errors import QtjaxError
from qtjax.smol import check, load_rows, words
from qtjax.smol.instruct import FAMILIES, SHARES, TEST_ROWS, TRAIN_ROWS, final_answer, is_test_key


@pytest.fixture(scope="module")
def train():
    return load_rows("train")


@pytest.fixture(scope="module")
def test():
    return load_rows("test")


def prompt(row):
    return row["messages"][0]["content"]


def said(row):
    return row["messages"][1]["content"]


def test_same_seed_same_rows_in_another_process_with_another_hash_seed(train):
    """Rows depend on the seed alone: not on the process, its hash randomisation or what was drawn before."""
    code = "import json, sys; from qtjax.smol import load_rows; sys.stdout.write(json.dumps(load_rows('train', seed=0)))"
    out = subprocess.run(
        [sys.executable, "-c", code], env=os.environ | {"PYTHONHASHSEED": "77"}, capture_output=True, text=True, check=True
    )
    assert json.loads(out.stdout) == train == load_rows("train", seed=0)


def test_rows_are_pinned(train, test):
    """The rows of seed 0 are part of the shipped data: a change of this digest changes every number in the README."""
    digest = hashlib.sha256(json.dumps([train, test]).encode()).hexdigest()
    assert digest[:16] == "dd7a120738b22594"


def test_another_seed_other_rows(train):
    """Seeds differ in what they draw."""
    other = load_rows("train", seed=1)
    assert len({prompt(r) for r in other} - {prompt(r) for r in train}) > 500


def test_sizes_and_provenance_shares(train, test):
    """Counts are exact: SHARES percent of the train rows, and a test split that is all clean."""
    assert len(train) == TRAIN_ROWS and len(test) == TEST_ROWS and sum(SHARES.values()) == 100
    counts = Counter(r["provenance"] for r in train)
    for kind in ("mislabelled", "redundant", "padded"):
        assert counts[kind] == TRAIN_ROWS * SHARES[kind] // 100
    assert {r["provenance"] for r in test} == {"clean"}


def test_every_family_has_its_share(train, test):
    """The test split holds each family equally often, up to one; training at least 7 % of each."""
    counts = Counter(r["task"] for r in test)
    assert set(counts) == set(FAMILIES) and max(counts.values()) - min(counts.values()) <= 1
    assert min(Counter(r["task"] for r in train).values()) >= 0.07 * TRAIN_ROWS


def test_answers_are_checkable_and_mislabelled_ones_are_wrong(train, test):
    """check(right answer, what the row says) is True, except for mislabelled rows."""
    for row in [*train, *test]:
        assert check(row["answer"], said(row)) == (row["provenance"] != "mislabelled"), row


def test_mislabelled_answers_are_of_the_right_kind(train):
    """A wrong colour is a colour, a wrong sum a number, a wrong word a word of the same vocabulary."""
    colours = set(words.COLOURS)
    rows = [r for r in train if r["provenance"] == "mislabelled"]
    assert {final_answer(said(r)) for r in rows if r["task"] == "colour"} <= colours
    assert all(final_answer(said(r)).isdigit() for r in rows if r["task"] in ("add", "compare"))
    assert {final_answer(said(r)) for r in rows if r["task"] == "yesno"} <= {"yes", "no"}
    assert all(set(final_answer(said(r)).split()) <= set(words.WORDS) for r in rows if r["task"] in ("repeat", "position"))


def test_redundant_rows_repeat_few_questions(train):
    """Redundant rows are a handful of patterns: fewer than 60 different prompts among hundreds of rows."""
    rows = [r for r in train if r["provenance"] == "redundant"]
    assert len({prompt(r) for r in rows}) < 60 < len(rows) / 3 and len({said(r) for r in rows}) == 6


def test_padded_rows_are_longer_than_the_same_answer_clean(train):
    """A padded answer holds at least one filler sentence, a clean one none."""
    for row in train:
        assert any(filler in said(row) for filler in words.FILLERS) == (row["provenance"] == "padded")


def test_no_question_is_in_both_splits(train, test):
    """Neither a prompt of the test split nor its fact, pair of numbers or context is asked in training."""
    assert not {prompt(r) for r in test} & {prompt(r) for r in train}
    knowledge = ("opposite", "category", "colour", "next", "compare", "add")  # the others answer from their context
    assert not {said(r) for r in test if r["task"] in knowledge} & {said(r) for r in train}
    assert len({prompt(r) for r in test}) == len(test)
    fresh = [r for r in train if r["provenance"] != "redundant"]
    assert len({prompt(r) for r in fresh}) == len(fresh)
    other = load_rows("test", seed=5)
    assert not {prompt(r) for r in other} & {prompt(r) for r in train}


def test_held_out_facts_exist_in_each_family_of_knowledge():
    """Between 8 % and 35 % of the facts of each family are kept for the test."""
    facts = {
        "opposite": words.opposite_facts(),
        "category": words.category_facts(),
        "colour": words.colour_facts(),
        "next": words.order_facts(),
    }
    for task, known in facts.items():
        keys = [fact[0] for fact in known]
        assert len(set(keys)) == len(keys), task  # one right answer each
        assert 0.08 < sum(is_test_key(task, k) for k in keys) / len(keys) < 0.35, task


def test_row_shape(train):
    """A row is a user turn and an assistant turn with answer, task, provenance and an id of its own."""
    assert [m["role"] for m in train[0]["messages"]] == ["user", "assistant"]
    assert set(train[0]) == {"messages", "answer", "task", "provenance", "id"}
    assert len({r["id"] for r in train}) == len(train)


@pytest.mark.parametrize(
    ("answer", "text", "right"),
    [
        ("5 plums", "Tom has 5 plums. The answer is 5 plums.", True),
        ("5 plums", "Tom has 5 plums. The answer is 5 pears.", False),
        ("5 plums", "The answer is 5 plums. The answer is 4 plums.", False),
        ("animal", "A dog is an animal. The answer is an animal. Have a lovely day.", True),
        ("cold", "Cold.", True),
        ("cold", "  the answer IS   Cold !", True),
        ("Tuesday", "After Monday comes Tuesday. The answer is Tuesday", True),
        ("b", "After a comes b. The answer is b.", True),
        ("a", "The answer is a.", True),
        ("yes", "The answer is yes and no.", False),
        ("7", "The answer is 17.", False),
        ("cold", "It is cold. The answer is", False),
        ("cold", "", False),
        ("", "", False),
    ],
)
def test_check_rule(answer, text, right):
    """The final answer counts, whole, after normalisation; nothing else does."""
    assert check(answer, text) is right


def test_count_and_bad_arguments():
    """count rows come back; an unknown split or a negative count is one line."""
    assert len(load_rows("train", 100)) == 100 and len(load_rows("test", 7, seed=3)) == 7 and load_rows("train", 0) == []
    assert len(load_rows("train", 6000)) == 6000  # more than there are distinct prompts of some families
    with pytest.raises(QtjaxError, match="train or test"):
        load_rows("validation")
    with pytest.raises(QtjaxError, match="0 or more"):
        load_rows("train", -1)
