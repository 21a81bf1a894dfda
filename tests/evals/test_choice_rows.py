"""Every documented shape of a multiple-choice row becomes the prompt, choices and answer written here by hand."""

import json

import pytest

from qtjax.errors import QtjaxError
from qtjax.evals.choice_rows import Question, read_question

ADAPTERS = {
    "instruction": "Please choose the correct answer to the question: Which is used?\n\nAnswer1: safety goggles Answer2: breathing"
    " mask Answer3: lead apron\n\nAnswer format: answer1/answer2/answer3",
    "input": "",
    "output": "the correct answer is answer2",
    "answer": "answer2",
}


@pytest.mark.parametrize(
    "row",
    [
        {"question": "Why?", "choices": ["x y", "z"], "answer": 1},
        {"question": "Why?", "choices": ["x y", "z"], "answer": "B"},
        {"question": "Why?", "choices": ["x y", "z"], "answer": "z"},
        {"question": "Why?", "choices": {"text": ["x y", "z"], "label": ["1", "2"]}, "answerKey": "2"},
        {"question": {"stem": "Why?", "choices": [{"label": "A", "text": "x y"}, {"label": "B", "text": "z"}]}, "answerKey": "B"},
    ],
)
def test_generic_shapes_become_the_same_question(row):
    """Index, letter, text, Hugging Face's and CommonsenseQA's shapes all mean the same."""
    assert read_question(row) == Question("Question: Why?\nAnswer:", ("x y", "z"), 1)


def test_a_prompt_is_asked_as_it_stands():
    """`prompt` gets no "Question:" and no "Answer:"."""
    assert read_question({"prompt": "2 + 2 =", "choices": ["3", "4"], "answer": 1}).prompt == "2 + 2 ="


def test_adapters_rows_in_both_forms():
    """label asks the trained sentence with each label in turn; cloze and chat ask the choice texts after the bare question."""
    sentences = tuple(f"the correct answer is answer{i}" for i in (1, 2, 3))
    assert read_question(ADAPTERS) == Question(ADAPTERS["instruction"], sentences, 1, trained=True)
    cloze = read_question(ADAPTERS, "cloze")
    assert cloze == Question("Question: Which is used?\nAnswer:", ("safety goggles", "breathing mask", "lead apron"), 1)
    assert read_question(ADAPTERS, "chat") == Question("Which is used?", cloze.choices, 1, trained=True)


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"question": "q", "choices": ["a", "b"], "answer": "c"}, "data:7.*answer 'c'.*0 to 1"),
        ({"question": "q", "choices": ["a", "b"], "answer": 2}, "answer 2"),
        ({"question": "q", "choices": ["a"], "answer": 0}, "two or more"),
        ({"question": "q", "answer": 0}, "'choices'"),
        ({"choices": ["a", "b"], "answer": 0}, "'question' or 'prompt'"),
        (ADAPTERS | {"answer": "answer9"}, "answer9"),
    ],
)
def test_unreadable_rows_are_one_line_errors(row, said):
    """The message says where, what and the rule."""
    with pytest.raises(QtjaxError, match=said):
        read_question(row, where="data:7")


@pytest.mark.shared
@pytest.mark.parametrize("name", ["ARC-Easy_test", "openbookqa_test", "ARC-Challenge_test"])
def test_every_row_of_the_reference_files_is_read(shared, name):
    """Choices found in the instruction number as many as its "Answer format" names, in both forms."""
    rows = json.loads((shared / f"data/sft/llmadapters_{name}.json").read_text())
    for row in rows:
        named = row["instruction"].split("Answer format:")[1].count("/") + 1
        for form in ("label", "cloze"):
            question = read_question(row, form)
            assert len(question.choices) == named and all(question.choices)
        assert read_question(row).choices[question.answer] == row["output"]


@pytest.mark.shared
def test_commonsenseqa_is_read(shared):
    """Five choices, the key is their letter."""
    with open(shared / "data/eval/commonsenseqa_dev.jsonl") as lines:
        questions = [read_question(row := json.loads(line)) for line in lines]
    assert {len(q.choices) for q in questions} == {5}
    assert questions[0].choices[questions[0].answer] == "bank" and row["answerKey"] in "ABCDE"
