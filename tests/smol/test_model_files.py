"""The shipped model folder: tokenizer lossless, template as expected, sizes agreeing with config.json, all in the wheel."""

import json
from importlib import resources
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoConfig, AutoTokenizer

from qtjax.errors import QtjaxError
from qtjax.smol import load_rows, model_folder, words
from qtjax.smol.tokenizer import BOS, EOS, PAD, save, train, training_texts

FOLDER = Path(model_folder())
CONFIG = json.loads((FOLDER / "config.json").read_text())
TOKENIZER = AutoTokenizer.from_pretrained(model_folder())


@given(st.text(max_size=60))
@settings(max_examples=150, deadline=None)
def test_round_trip(text):
    """Any text without a special token comes back unchanged."""
    if not any(special in text for special in (BOS, EOS, PAD)):
        assert TOKENIZER.decode(TOKENIZER.encode(text)) == text


def test_template_renders_chatml():
    """The rendering is ChatML, and the generation prompt is a prefix of the full rendering."""
    turns = load_rows("train", 1)[0]["messages"]
    full = TOKENIZER.apply_chat_template(turns, tokenize=False)
    head = TOKENIZER.apply_chat_template(turns[:1], tokenize=False, add_generation_prompt=True)
    asked, said = (t["content"] for t in turns)
    assert full == f"<|im_start|>user\n{asked}<|im_end|>\n<|im_start|>assistant\n{said}<|im_end|>\n"
    assert full.startswith(head) and head.endswith("<|im_start|>assistant\n")
    system = TOKENIZER.apply_chat_template([{"role": "system", "content": "Be short."}, *turns[:1]], tokenize=False)
    assert system.startswith("<|im_start|>system\nBe short.<|im_end|>\n<|im_start|>user\n")


def test_ids_agree_with_config():
    """Vocabulary and special ids of the tokenizer are those of config.json and generation_config.json; one BOS."""
    generation = json.loads((FOLDER / "generation_config.json").read_text())
    assert len(TOKENIZER) == CONFIG["vocab_size"] == 2048
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        assert getattr(TOKENIZER, name) == CONFIG[name] == generation[name]
    ids = TOKENIZER.apply_chat_template(load_rows("train", 1)[0]["messages"], tokenize=True, return_dict=False)
    assert ids[:1] == [TOKENIZER.bos_token_id] and TOKENIZER.eos_token_id in ids and TOKENIZER.pad_token_id not in ids
    assert max(ids) < CONFIG["vocab_size"]


def test_digits_are_single_and_known_words_whole():
    """Every digit is a token of its own; every word of the closed vocabularies is one token inside a sentence."""
    assert TOKENIZER.tokenize("3456") == ["3", "4", "5", "6"]
    known = {a for facts in (words.opposite_facts(), words.category_facts(), words.colour_facts()) for fact in facts for a in fact[:2]}
    known |= {*words.WORDS, *words.GOODS, *words.OBJECTS, *words.PLACES, *words.NAMES}
    assert [w for w in sorted(known) if len(TOKENIZER.encode(f" {w}")) > 1] == []


def test_rows_fit_the_default_lengths():
    """A row is at most 96 tokens, under the 128 of configs/smol.py and the model's 512 positions."""
    lengths = [len(TOKENIZER.apply_chat_template(r["messages"], tokenize=True, return_dict=False)) for r in load_rows("train")]
    assert max(lengths) <= 96 and 30 < sum(lengths) / len(lengths) < 50


def test_config_is_a_small_grouped_tied_llama():
    """transformers reads config.json: GQA, tied, heads x head_dim = hidden size, below 3 million parameters."""
    config = AutoConfig.from_pretrained(model_folder())
    assert config.model_type == "llama" and config.tie_word_embeddings
    assert config.num_attention_heads % config.num_key_value_heads == 0 and config.num_key_value_heads < config.num_attention_heads
    assert config.num_attention_heads * config.head_dim == config.hidden_size
    d, f, kv = config.hidden_size, config.intermediate_size, config.num_key_value_heads * config.head_dim
    assert config.vocab_size * d + config.num_hidden_layers * (2 * d * d + 2 * d * kv + 3 * d * f + 2 * d) + d < 3e6


def test_package_data_is_there_and_small():
    """The model folder and the card are found through the package, hold no pickle, and stay within 8 MB."""
    room = resources.files("qtjax.smol")
    names = {p.name for p in room.joinpath("model").iterdir()}
    assert {"config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"} <= names
    assert not any(n.endswith((".bin", ".pt", ".pkl")) for n in names) and room.joinpath("MODEL_CARD.md").is_file()
    assert sum(p.stat().st_size for p in FOLDER.iterdir()) <= 8_000_000


def test_tokenizer_command_is_deterministic(tmp_path):
    """Training twice on the same corpus writes the same bytes, loadable by AutoTokenizer."""
    corpus = tmp_path / "corpus.jsonl"
    corpus.write_text("".join(json.dumps({"text": f"The cup number {i} is in the box."}) + "\n" for i in range(50)))
    for name in ("a", "b"):
        save(train(training_texts(str(corpus)), 400), str(tmp_path / name))
    assert (tmp_path / "a/tokenizer.json").read_bytes() == (tmp_path / "b/tokenizer.json").read_bytes()
    assert len(AutoTokenizer.from_pretrained(str(tmp_path / "a"))) == 400
    corpus.write_text('{"text": "fine"}\n[]\n')
    with pytest.raises(QtjaxError, match="line 2"):
        list(training_texts(str(corpus)))
    with pytest.raises(QtjaxError, match="259"):
        train(["a"], 100)
