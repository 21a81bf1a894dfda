"""Rows of every known shape become the same kind of example; what cannot be read names the row, what is empty is a counted skip."""

import pytest

from qtjax.config import DataSection
from qtjax.data.examples import Example, Skip, resolve_format, to_example
from qtjax.data.sources import load_rows
from qtjax.errors import QtjaxError

AUTO = DataSection()


def example(row, data=AUTO):
    return to_example(row, data, "f:7")


@pytest.mark.parametrize(
    ("row", "prompt", "answer"),
    [
        ({"prompt": "p", "completion": "c"}, "p", "c"),
        ({"question": "p", "answer": "c", "id": 3}, "p", "c"),
        ({"prompt": "p", "response": "c"}, "p", "c"),
        ({"prompt": "p", "completion": 42}, "p", "42"),
        ({"instruction": "p", "input": "", "output": "c", "answer": "x"}, "p", "c"),
        ({"instruction": "p", "input": "i", "output": "c"}, "p\ni", "c"),
        ({"instruction": "p", "context": "i", "response": "c"}, "p\ni", "c"),
        ({"instruction": "p", "instances": [{"input": "i", "output": "c"}]}, "p\ni", "c"),
    ],
)
def test_pairs_are_recognised(row, prompt, answer):
    """format auto reads prompt/completion, question/answer and instruction/input/output from the column names."""
    assert example(row) == Example(prompt=prompt, completion=answer)


def test_named_columns_and_text():
    """Columns named in the config win over known names; the format text reads one column."""
    row = {"prompt": "no", "completion": "no", "q": "p", "a": "c"}
    assert example(row, DataSection(prompt_column="q", completion_column="a")) == Example(prompt="p", completion="c")
    assert example({"text": "t"}) == Example(text="t")
    assert example({"body": "t"}, DataSection(format="text", completion_column="body")) == Example(text="t")


def test_openai_messages():
    """Roles, text parts, weights and tools of chat messages are kept; only non-empty assistant turns of weight 1 are trained."""
    row = {
        "tools": '[{"name": "f"}]',
        "messages": [
            {"role": "developer", "content": "s"},
            {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "value": "b"}], "loss_weight": 0.0},
            {"role": "assistant", "content": "x", "weight": 0},
            {"role": "tool", "content": "t", "tool_call_id": "1"},
            {"role": "assistant", "content": " "},
            {"role": "assistant", "content": "y", "loss_weight": 1.0},
        ],
    }
    got = example(row)
    assert [m["role"] for m in got.messages] == ["system", "user", "assistant", "tool", "assistant", "assistant"]
    assert [m["content"] for m in got.messages] == ["s", "ab", "x", "t", " ", "y"]
    assert got.trained == (False, False, False, False, False, True)
    assert got.empty_turns == 1 and got.tools == ({"name": "f"},) and got.messages[3]["tool_call_id"] == "1"
    assert all(set(m) <= {"role", "content", "tool_call_id"} for m in got.messages)


def test_sharegpt():
    """ShareGPT's speakers become roles, function_call a tool call of the assistant, observation a tool's answer."""
    said = [
        ("system", "s"), ("human", "u"), ("function_call", '{"name": "f", "arguments": {"x": 1}}'), ("observation", "o"), ("gpt", "a"),
    ]  # fmt: skip
    got = example({"conversations": [{"from": who, "value": what} for who, what in said]})
    assert [m["role"] for m in got.messages] == ["system", "user", "assistant", "tool", "assistant"]
    assert got.messages[2]["tool_calls"] == [{"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}]
    assert got.trained == (False, False, True, False, True)


def test_conversational_pair_trains_the_answer_only():
    """A prompt that is itself a conversation is context, its assistant turns included."""
    got = example(
        {
            "prompt": [{"role": "user", "content": "u"}, {"role": "assistant", "content": "a"}, {"role": "user", "content": "v"}],
            "completion": [{"role": "assistant", "content": "b"}],
        }
    )
    assert got.trained == (False, False, False, True)


def test_arrow_struct_of_lists():
    """A conversation stored as an object of lists (older Arrow columns) is read like a list of objects."""
    assert example({"messages": {"role": ["user", "assistant"], "content": ["u", "a"]}}).messages == (
        {"role": "user", "content": "u"},
        {"role": "assistant", "content": "a"},
    )


def test_system_prompt_opens_conversations_without_one():
    """as_messages puts the system prompt first, unless there is one."""
    pair = Example(prompt="p", completion="c").as_messages("be brief")
    assert [m["role"] for m in pair.messages] == ["system", "user", "assistant"] and pair.trained == (False, False, True)
    own = example({"messages": [{"role": "system", "content": "s"}, {"role": "assistant", "content": "a"}]})
    assert own.as_messages("be brief") == own


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"prompt": "p", "completion": " \n"}, "empty answer"),
        ({"prompt": "p", "completion": None}, "empty answer"),
        ({"instruction": "p", "output": ""}, "empty answer"),
        ({"text": " "}, "empty text"),
        ({"messages": [{"role": "user", "content": "u"}]}, "no answer"),
        ({"messages": [{"role": "user", "content": "u"}, {"role": "assistant", "content": None}]}, "empty answer"),
        ({"messages": [{"role": "assistant", "content": "u", "weight": 0}]}, "no answer"),
    ],
)
def test_rows_without_an_answer_are_skips(row, reason):
    """Nothing to train is a skip with a reason, never an error and never an example."""
    assert example(row) == Skip(reason)


@pytest.mark.parametrize(
    ("row", "data", "message"),
    [
        ({"a": 1, "b": 2}, AUTO, r"f:7: no known shape in columns 'a', 'b'; name them with data\.prompt_column"),
        ({"question": "q", "answer": "a"}, DataSection(prompt_column="questoin", completion_column="answer"),
         r"f:7: has no column 'questoin'; did you mean 'question'\?; it has 'question', 'answer'"),
        ({"prompt": "p"}, DataSection(format="prompt_completion"), r"f:7: has no column 'completion' or 'answer' or 'response'; it has 'prompt'"),
        ({"x": "p"}, DataSection(format="messages"), r"f:7: has no column 'messages' or"),
        ({"question": "q", "answer": ["a"]}, AUTO, r"f:7: column 'answer' must hold text, holds a list"),
        ({"messages": [{"role": "wizard", "content": "x"}]}, AUTO, r"f:7, column 'messages', message 0: unknown role 'wizard'.*known roles are system"),
        ({"conversations": [{"from": "humann", "value": "x"}]}, AUTO, r"message 0: unknown role 'humann'; did you mean 'human'\?"),
        ({"messages": [{"from": "human", "value": "x"}]}, DataSection(format="messages"), r"'role' and 'content'; if it has others, try data\.format = 'sharegpt'"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, AUTO, r"content part of type 'image_url' cannot be trained on"),
        ({"messages": [{"role": "assistant", "content": "x", "weight": 0.5}]}, AUTO, r"weight 0\.5 must be 0"),
        ({"messages": [{"role": "assistant", "content": "x"}], "tools": "{"}, AUTO, r"f:7: column 'tools' is not JSON"),
        ({"messages": 3}, DataSection(format="messages"), r"must be a list of messages, is a number"),
        ({"instruction": "p", "instances": []}, AUTO, r"'instances' must hold exactly one"),
    ],
)  # fmt: skip
def test_unreadable_rows(row, data, message):
    """What cannot be read is one line naming file, row, column and remedy."""
    with pytest.raises(QtjaxError, match=message) as caught:
        example(row, data)
    assert "\n" not in str(caught.value)


def test_format_is_settled_once():
    """With the format of the first row, a later row without its columns is an error, not another format."""
    fmt = resolve_format({"question": "q", "answer": "a"}, AUTO, "f:1")
    with pytest.raises(QtjaxError, match=r"f:2: has no column"):
        to_example({"text": "t"}, AUTO, "f:2", fmt)


@pytest.mark.shared
@pytest.mark.parametrize(
    ("name", "fmt"),
    [
        ("gsm8k_train.jsonl", "prompt_completion"),
        ("llmadapters_ARC-Easy_train.json", "instruction"),
        ("rasbt_instruction_1100.json", "instruction"),
        ("self_instruct_seed_tasks.jsonl", "instruction"),
        ("llamafactory_v1_sft_demo.jsonl", "messages"),
        ("llamafactory_glaive_toolcall_en_demo.json", "sharegpt"),
    ],
)
def test_real_rows(shared, name, fmt):
    """Every row of real files is an example; their format is recognised."""
    rows = load_rows(str(shared / "data" / "sft" / name))
    assert resolve_format(rows[0], AUTO, "") == fmt
    assert all(isinstance(to_example(rows[i], AUTO, rows.where(i), fmt), Example) for i in range(len(rows)))
