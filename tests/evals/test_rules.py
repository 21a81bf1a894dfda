"""Each rule accepts what its source accepts and rejects near misses; rule_for reads the rule off the row."""

import pytest

from qtjax.errors import QtjaxError
from qtjax.evals.rules import RULES, final_number, normalise, reference_of, rule_for, rule_named
from qtjax.smol import instruct


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("#### 72", 72), ("so 3 + 4 = 7\n#### 1,200", 1200), ("it costs $18.50", 18.5), ("16-3 leaves 13", 13), ("a 16-3", 3),
        ("it is -4", -4), ("= -4 today", -4), ("#### -5 and 9 more", -5), ("half is .5.", 0.5), ("one, 2,", 2), ("#### none, 8 before", 8),
        ("nothing", None), ("", None),
    ],
)  # fmt: skip
def test_final_number(text, number):
    """The number after the last "####" counts, else the last one; separators, currency and minus in sums are no trap."""
    assert final_number(text) == number


@pytest.mark.parametrize(
    ("rule", "reference", "right", "wrong"),
    [
        ("number", "6*12 = 72\n#### 72", "I think 70 + 2 = 72.", "72 eggs, no: 27"),
        ("number", "4.0", "The answer is 4.", "4.1"),
        ("label", "answer2", "the correct answer is Answer2", "answer1, not answer2"),
        ("label", "true", "the correct answer is true", "untrue"),
        ("equal", "The Red  Fox.", "red fox", "red fox runs"),
        ("contains", "New York", "It is in new york, I say", "it is in new yorkshire"),
        ("smol-instruct", "cold", "The opposite of hot is cold. The answer is cold.", "The answer is hot. It is cold."),
    ],
)
def test_each_rule_accepts_the_right_and_rejects_the_near_miss(rule, reference, right, wrong):
    """One right and one nearly right generation per rule; an empty generation is never right."""
    assert RULES[rule](reference, right)
    assert not RULES[rule](reference, wrong)
    assert not RULES[rule](reference, "")


def test_an_empty_reference_is_never_matched():
    """A row without an answer cannot be scored as right by saying nothing."""
    assert not any(rule("", "") for rule in RULES.values())
    assert normalise("The, a!") == ""


def test_rule_for_reads_the_rule_off_the_row():
    """The registry's choice for the row shapes that the package ships or documents."""
    smol = instruct.load_rows("test", 3)[0]
    assert rule_for(smol, smol["messages"][-1]["content"]) == "smol-instruct"
    assert reference_of(smol, "x") == smol["answer"]
    gsm8k = {"question": "q", "answer": "6*12\n#### 72"}
    assert rule_for(gsm8k, gsm8k["answer"]) == "number"
    assert rule_for({"instruction": "", "output": "so it is 4.", "answer": "4.0"}, "so it is 4.") == "number"
    assert rule_for({"output": "the correct answer is answer2", "answer": "answer2"}, "the correct answer is answer2") == "label"
    assert rule_for({"prompt": "p", "completion": "blue"}, "blue") == "equal"
    assert rule_for({"output": "I would say blue.", "answer": "blue"}, "I would say blue.") == "contains"


def test_smol_rows_answered_as_written_are_right():
    """The generator's own clean completions pass its rule, its mislabelled ones do not."""
    for row in instruct.load_rows("train", 200):
        right = RULES["smol-instruct"](row["answer"], row["messages"][-1]["content"])
        assert right == (row["provenance"] != "mislabelled") or row["provenance"] == "padded"


def test_unknown_rule_is_one_line():
    """A mistyped rule names the known ones."""
    with pytest.raises(QtjaxError, match="'numbr'.*number"):
        rule_named("numbr")
