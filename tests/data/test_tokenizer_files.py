"""A folder whose tokenizer is its tokenizer.json: read without AutoTokenizer, and as AutoTokenizer reads it."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from qtjax.data import tokenizer as tokenizers
from qtjax.data.tokenizer import load_tokenizer
from qtjax.errors import QtjaxError
from qtjax.smol import model_folder

TEXTS = ["What is 12 + 30?", "<|im_start|>user\nTwo  spaces<|im_end|>\n", "naïve 漢字 🙂", ""]
MODELS = ({"model_type": "llama"}, {"model_type": "mistral"}, None)


def written(folder, tokenizer_class, config, **more):
    """smol's tokenizer as if another program had saved it."""
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(Path(model_folder()) / file, folder / file)
    said = json.loads((folder / "tokenizer_config.json").read_text()) | {"tokenizer_class": tokenizer_class} | more
    (folder / "tokenizer_config.json").write_text(json.dumps(said))
    if config is not None:
        (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize("config", MODELS, ids=["llama", "mistral", "no config.json"])
@pytest.mark.parametrize("name", ["TokenizersBackend", "PreTrainedTokenizerFast"])
def test_it_is_what_auto_tokenizer_gives(tmp_path, name, config):
    """The same class, ids, offsets, special and added tokens, template and text for both names that ask for nothing but the file."""
    from transformers import AutoTokenizer

    folder = written(tmp_path, name, config, add_bos_token=True, model_max_length=77)
    assert tokenizers._as_written(folder)
    own, theirs = load_tokenizer(str(folder)), AutoTokenizer.from_pretrained(str(folder))
    assert type(own) is type(theirs) and own.get_vocab() == theirs.get_vocab()
    for text in TEXTS:
        a, b = (each(text, return_offsets_mapping=True) for each in (own, theirs))
        assert dict(a) == dict(b) and own.decode(a["input_ids"]) == theirs.decode(b["input_ids"])
    for field in ("special_tokens_map", "all_special_ids", "added_tokens_decoder", "chat_template", "model_max_length", "is_fast", "padding_side"):
        assert getattr(own, field) == getattr(theirs, field), field


@pytest.mark.parametrize("name, more", [("LlamaTokenizer", {}), ("GPT2Tokenizer", {}), (None, {}), ("TokenizersBackend", {"auto_map": {"AutoTokenizer": ["a.B", None]}})])
def test_any_other_goes_through_auto_tokenizers_rules(tmp_path, name, more):
    """Another class, none, or code of the folder's own."""
    assert not tokenizers._as_written(written(tmp_path, name, {"model_type": "llama"}, **more))


def test_files_that_decide(tmp_path):
    """Mistral's tekken.json, no tokenizer.json and a broken tokenizer_config.json are left to AutoTokenizer as well."""
    folder = written(tmp_path, "TokenizersBackend", None)
    (folder / "tekken.json").write_text("{}")
    assert not tokenizers._as_written(folder)
    (folder / "tekken.json").unlink()
    (folder / "tokenizer.json").rename(folder / "other.json")
    assert not tokenizers._as_written(folder)
    (folder / "other.json").rename(folder / "tokenizer.json")
    for text in ("{", "[1]", "3"):
        (folder / "tokenizer_config.json").write_text(text)
        assert not tokenizers._as_written(folder)


@pytest.mark.parametrize("text", ["{", "[]", '{"model": 3}'])
def test_a_damaged_file_is_one_line(tmp_path, text):
    """As through AutoTokenizer: the folder, and that its files are damaged."""
    folder = written(tmp_path, "TokenizersBackend", {"model_type": "llama"})
    (folder / "tokenizer.json").write_text(text)
    with pytest.raises(QtjaxError, match=r"the tokenizer's files are damaged or of an unknown kind") as caught:
        load_tokenizer(str(folder))
    assert str(caught.value).startswith(str(folder)) and "\n" not in str(caught.value)


def test_neither_torch_nor_the_rules_are_imported():
    """What makes it fast: in an interpreter of its own, no module of torch and none of transformers' models."""
    code = (
        "import sys; from qtjax.data.tokenizer import load_tokenizer; load_tokenizer('smol');"
        "print([n for n in sys.modules if n.split('.')[0] == 'torch' or n.startswith('transformers.models.auto')])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
