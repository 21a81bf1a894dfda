"""Chat templates: token for token what transformers makes of them, and the trained span of each answer as read off by hand."""

import numpy as np
import pytest

from qtjax.config import DataSection
from qtjax.data.examples import Example
from qtjax.data.rows import from_objects
from qtjax.data.templates import render_turns, resolve_template
from qtjax.data.tokenize import prompt_and_answer, tokenize
from qtjax.errors import QtjaxError

CHAT = [
    {"role": "user", "content": "how are you?"},
    {"role": "assistant", "content": "fine, thanks"},
    {"role": "user", "content": "2+2?"},
    {"role": "assistant", "content": "the answer is 4"},
]

# What the model must learn to write in each turn, and where the rest of the rendering begins again.
BY_HAND = {
    "chatml": ("fine, thanks<|im_end|>", "the answer is 4<|im_end|>", "<|im_end|>"),
    "llama-3": ("fine, thanks<|eot_id|>", "the answer is 4<|eot_id|>", "<|eot_id|>"),
    "zephyr": ("fine, thanks</s>", "the answer is 4</s>", "</s>"),
    "llama-2-chat": (" fine, thanks </s>", " the answer is 4 </s>", "</s>"),
    "mistral": (" fine, thanks</s>", " the answer is 4</s>", "</s>"),
}


def one(tokenizer, messages, path, **fields):
    data = DataSection(chat_template=path, **fields)
    return tokenize(tokenizer, from_objects("f", [{"messages": messages}]), data, progress=False)


def runs(ids, mask):
    """The maximal runs of trained ids."""
    edges = np.flatnonzero(np.diff(np.concatenate([[0], mask.astype(int), [0]])))
    return [ids[a:b].tolist() for a, b in edges.reshape(-1, 2)]


def reference(tokenizer, messages, template, **more):
    return list(tokenizer.apply_chat_template(messages, chat_template=template, tokenize=True, **more)["input_ids"])


@pytest.mark.parametrize("name", BY_HAND)
def test_spans_by_hand(tokenizer, templates, template_file, name):
    """Each answer is trained from the end of its generation prompt through the token that closes it, and nothing else is."""
    first, second, closer = BY_HAND[name]
    data = one(tokenizer, CHAT, template_file(templates[name]))
    ids, mask, closing = data.sample(0)
    assert [tokenizer.decode(run) for run in runs(ids, mask)] == [first, second]
    assert tokenizer.convert_ids_to_tokens(ids[closing].tolist()) == [closer, closer]
    assert all(run[-1] == tokenizer.convert_tokens_to_ids(closer) for run in runs(ids, mask))
    assert data.stats.trained_tokens == mask.sum() and not data.stats.noted and not data.stats.cut


@pytest.mark.parametrize("name", BY_HAND)
def test_ids_are_those_of_transformers(tokenizer, templates, template_file, name):
    """input_ids equal apply_chat_template(tokenize=True); the first trained token follows exactly the generation prompt."""
    data = one(tokenizer, CHAT[:2], template_file(templates[name]))
    ids, mask, _ = data.sample(0)
    assert ids.tolist() == reference(tokenizer, CHAT[:2], templates[name])
    prompt = reference(tokenizer, CHAT[:1], templates[name], add_generation_prompt=True)
    assert ids[: mask.argmax()].tolist() == prompt
    assert ids.tolist().count(tokenizer.bos_token_id) == (0 if name == "zephyr" else 1)


def test_repeated_and_tricky_answers(tokenizer, templates, template_file):
    """The answer's own turn is trained also where its text stands in a question, is one letter, or holds a marker."""
    chat = [
        {"role": "user", "content": "a a </s> a"},
        {"role": "assistant", "content": " a\n"},
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "say </s> now"},
    ]
    ids, mask, closing = one(tokenizer, chat, template_file(templates["chatml"])).sample(0)
    assert [tokenizer.decode(run) for run in runs(ids, mask)] == ["a<|im_end|>", "say </s> now<|im_end|>"]
    assert closing.sum() == 2


def test_weight_zero_and_empty_turns_stay_context(tokenizer, templates, template_file):
    """A turn of weight 0 and an empty turn are rendered but not trained; the empty one is noted."""
    chat = [
        {"role": "user", "content": "u"}, {"role": "assistant", "content": "no", "weight": 0},
        {"role": "user", "content": "v"}, {"role": "assistant", "content": ""},
        {"role": "user", "content": "w"}, {"role": "assistant", "content": "yes"},
    ]  # fmt: skip
    data = one(tokenizer, chat, template_file(templates["llama-3"]))
    ids, mask, _ = data.sample(0)
    assert [tokenizer.decode(run) for run in runs(ids, mask)] == ["yes<|eot_id|>"]
    assert data.stats.noted == {"empty assistant turns left untrained": 1}


def test_template_without_closing_token_is_noted(tokenizer, template_file):
    """Where a template ends turns by text alone, the turn's text is trained up to its trailing whitespace, and that is noted."""
    text = (
        "{% for m in messages %}{{ '### ' + m.role + ':\n' + m.content + '\n\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '### assistant:\n' }}{% endif %}"
    )
    data = one(tokenizer, CHAT, template_file(text))
    ids, mask, closing = data.sample(0)
    assert [tokenizer.decode(run) for run in runs(ids, mask)] == ["fine, thanks", "the answer is 4"]
    assert not closing.any() and data.stats.noted == {"answers without an end-of-turn token": 2}


def test_markers_that_are_no_tokens_are_trained_as_text(tokenizer, template_file):
    """A text marker after the answer that the tokenizer does not know as one token is still trained: it is how the model will stop."""
    text = (
        "{% for m in messages %}{{ '[' + m.role + ']' + m.content + '[/end]\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '[assistant]' }}{% endif %}"
    )
    ids, mask, _ = one(tokenizer, CHAT, template_file(text)).sample(0)
    assert [tokenizer.decode(run) for run in runs(ids, mask)] == ["fine, thanks[/end]", "the answer is 4[/end]"]


def test_turn_that_the_template_rewrites(tokenizer, template_file):
    """A turn whose text the template changes is bounded by its closing token, markers before the text notwithstanding."""
    text = (
        "{{ bos_token }}{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}"
        "{% if m.role == 'assistant' %}{{ '<|start_header_id|>' }}{% endif %}{{ m.content | upper + '<|im_end|>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    )
    ids, mask, closing = one(tokenizer, CHAT, template_file(text)).sample(0)
    assert [tokenizer.decode(run) for run in runs(ids, mask)] == [
        "<|start_header_id|>FINE, THANKS<|im_end|>",
        "<|start_header_id|>THE ANSWER IS 4<|im_end|>",
    ]
    assert closing.sum() == 2


def test_tool_calls(tokenizer, template_file, templates):
    """A rendered tool call is trained through its closing token; a template that leaves it out is an error."""
    text = (
        "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content }}{% for c in m.tool_calls or [] %}"
        "{{ '<call>' + c.function.name + ' ' + c.function.arguments | tojson }}{% endfor %}{{ '<|im_end|>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    )
    said = [("human", "u"), ("function_call", '{"name": "f", "arguments": {"x": 1}}'), ("observation", "o"), ("gpt", "done")]
    row = {"conversations": [{"from": who, "value": what} for who, what in said]}
    rows = from_objects("f", [row])
    ids, mask, _ = tokenize(tokenizer, rows, DataSection(chat_template=template_file(text))).sample(0)
    assert [tokenizer.decode(run) for run in runs(ids, mask)] == ['<call>f {"x": 1}<|im_end|>', "done<|im_end|>"]
    blind = template_file(templates["llama-2-chat"])
    with pytest.raises(QtjaxError, match=r"f row 0, message 1: the chat template leaves out the call of tool 'f'"):
        tokenize(tokenizer, rows, DataSection(chat_template=blind))


def test_refusals_are_one_line(tokenizer, templates, template_file):
    """A template that raises, and one whose generation prompt is no prefix, are errors naming row, roles and template."""
    path = template_file(templates["mistral"])
    with pytest.raises(QtjaxError, match=r"f row 0: the chat template .*template\.jinja refuses messages with roles system, user, assistant \(no system role\)") as caught:
        one(tokenizer, [{"role": "system", "content": "s"}, *CHAT[:2]], path)
    assert "\n" not in str(caught.value)
    bad = "{% for m in messages %}{{ m.role + ':' + m.content + eos_token }}{% endfor %}{% if add_generation_prompt %}{{ 'Assistant>' }}{% endif %}"
    with pytest.raises(QtjaxError, match=r"f row 0, message 1: the generation prompt of the chat template .* is not a prefix") as caught:
        one(tokenizer, CHAT, template_file(bad))
    assert "\n" not in str(caught.value)
    with pytest.raises(QtjaxError, match=r"data\.chat_template = 'no\.jinja': cannot be read"):
        resolve_template(tokenizer, "no.jinja")
    with pytest.raises(QtjaxError, match=r"f row 0: a conversation needs a chat template"):
        one(tokenizer, CHAT, "auto")
    with pytest.raises(QtjaxError, match=r"data\.system_prompt is set, but without a chat template"):
        one(tokenizer, CHAT, "none", system_prompt="s")


def test_pairs_and_system_prompt_through_a_template(tokenizer, templates, template_file):
    """With a template a prompt and its completion are a user and an assistant turn, opened by data.system_prompt."""
    data = DataSection(chat_template=template_file(templates["chatml"]), system_prompt="be brief")
    ids, mask, _ = tokenize(tokenizer, from_objects("f", [{"prompt": "p", "completion": "c"}]), data).sample(0)
    messages = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "p"}, {"role": "assistant", "content": "c"}]
    assert ids.tolist() == reference(tokenizer, messages, templates["chatml"])
    assert [tokenizer.decode(run) for run in runs(ids, mask)] == ["c<|im_end|>"]


def test_prompt_and_answer(tokenizer, templates):
    """The prompt to generate from ends in the generation prompt of the last trained turn."""
    example = Example(messages=tuple(CHAT), trained=(False, True, False, True))
    ids, answer = prompt_and_answer(tokenizer, example, templates["llama-3"], "f:1")
    assert ids.tolist() == reference(tokenizer, CHAT[:3], templates["llama-3"], add_generation_prompt=True)
    assert answer == "the answer is 4" and ids.dtype == np.int32
    with pytest.raises(QtjaxError, match=r"f:1: a conversation needs a chat template"):
        prompt_and_answer(tokenizer, example, None, "f:1")
    with pytest.raises(QtjaxError, match=r"f:1: a plain text has no prompt"):
        prompt_and_answer(tokenizer, Example(text="t"), None, "f:1")


def test_tokenizers_own_template(tokenizer, templates):
    """'auto' is the tokenizer's template if it has one, 'none' never is."""
    assert resolve_template(tokenizer, "auto") is None
    tokenizer.chat_template = templates["chatml"]
    try:
        assert resolve_template(tokenizer, "auto") == templates["chatml"] and resolve_template(tokenizer, "none") is None
        text, turns = render_turns(tokenizer, Example(messages=tuple(CHAT[:2]), trained=(False, True)), templates["chatml"], "f")
        assert text[turns[0].start : turns[0].text_end] == "fine, thanks"
    finally:
        tokenizer.chat_template = None


REAL = (
    "alpaca amberchat chatml chatqa falcon-instruct gemma-it granite-3.0-instruct llama-2-chat llama-3-instruct mistral-instruct"
    " openchat-3.5 phi-3-small phi-3 qwen2.5-instruct saiga solar-instruct vicuna zephyr"
).split()


@pytest.fixture(scope="session")
def real_tokenizers(tmp_path_factory, shared, tokenizer):
    """Tokenizers of four families: byte-level, byte-level of GPT-2, SentencePiece of stories260K and of Mistral v1 and v3."""
    import json
    import shutil

    from qtjax.data.tokenizer import load_tokenizer

    def folder(name, source, target, config):
        path = tmp_path_factory.mktemp(name)
        shutil.copy(shared / "data" / "tokenizers" / source, path / target)
        (path / "tokenizer_config.json").write_text(json.dumps(config))
        return load_tokenizer(str(path))

    llama = {"tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    gpt2 = {"tokenizer_class": "GPT2Tokenizer", "bos_token": "<|endoftext|>", "eos_token": "<|endoftext|>"}
    return [
        tokenizer,
        load_tokenizer(str(shared / "models" / "stories260K")),
        folder("gpt2", "gpt2_tokenizer.json", "tokenizer.json", gpt2),
        folder("v1", "tokenizer.model.v1", "tokenizer.model", llama),
        folder("v3", "mistral_instruct_tokenizer_240323.model.v3", "tokenizer.model", llama),
    ]


@pytest.mark.shared
@pytest.mark.parametrize("name", REAL)
def test_real_templates_on_real_tokenizers(shared, real_tokenizers, template_file, name):
    """18 published templates on five tokenizers: ids are those of transformers, and exactly the two answers are trained."""
    text = (shared / "data" / "tokenizers" / "chat_templates" / f"{name}.jinja").read_text()
    if "{%-" not in text:
        # Laid out for reading; their authors load them without line breaks and indentation.
        text = text.replace("    ", "").replace("\n", "")
    for tokenizer in real_tokenizers:
        ids, mask, closing = one(tokenizer, CHAT, template_file(text)).sample(0)
        assert ids.tolist() == reference(tokenizer, CHAT, text)
        said = [tokenizer.decode(run) for run in runs(ids, mask)]
        assert len(said) == 2
        for spoken, message in zip(said, CHAT[1::2]):
            assert spoken.strip().startswith(message["content"])
            # What follows the answer is what closes it, and never the next speaker.
            assert "2+2" not in spoken and "user" not in spoken.lower()
        assert not closing[~mask].any()


@pytest.mark.shared
def test_template_laid_out_for_reading_is_refused(shared, tokenizer):
    """Read as it stands, a template whose layout leaks into its output is refused rather than trained at a guess."""
    path = shared / "data" / "tokenizers" / "chat_templates" / "chatml.jinja"
    with pytest.raises(QtjaxError, match=r"is not a prefix.*line breaks and indentation are output too"):
        one(tokenizer, CHAT, str(path))
