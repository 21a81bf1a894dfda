"""A model's shape without its weights, and what a plan does with a hub name that is out of reach."""

import pytest

from qtjax.errors import QtjaxError
from qtjax.models import abstract_params
from qtjax.planning import PUBLISHED, model_shape
from qtjax.tree import flatten


@pytest.fixture(autouse=True)
def offline(monkeypatch, tmp_path):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))


@pytest.mark.parametrize(("name", "parameters"), [
    ("meta-llama/Llama-2-7b-hf", 6_738_415_616), ("meta-llama/Meta-Llama-3-8B", 8_030_261_248),
    ("mistralai/Mistral-7B-v0.1", 7_241_732_096), ("HuggingFaceTB/SmolLM2-1.7B", 1_711_376_384),
])  # fmt: skip
def test_published_shapes_have_the_published_size(name, parameters):
    """The configs of this project name these models; their parameters as their cards count them."""
    shape, found = model_shape(name)
    assert sum(leaf.size for leaf in flatten(abstract_params(shape)).values()) == parameters
    assert "as published" in found


def test_every_hub_name_of_the_configs_is_known():
    """`python -m qtjax.plan --config configs/llama3_8b.py` answers without a network and without an account."""
    from pathlib import Path

    from qtjax.config import read_config

    names = {read_config(str(path)).model.path for path in Path("configs").glob("*.py")}
    assert {name for name in names if name[0].isupper() or name.startswith(("meta-", "mistral"))} == set(PUBLISHED)


def test_an_unknown_hub_name_out_of_reach_says_what_to_do():
    """One line: the name, the reason, and that config.json is all that is needed."""
    with pytest.raises(QtjaxError) as error:
        model_shape("someone/some-model")
    text = str(error.value)
    assert "someone/some-model" in text and "config.json" in text and "give --model.path FOLDER" in text and "\n" not in text and len(text) < 400


@pytest.mark.parametrize("path", ["no-such-folder", "./no/such", "../no/such", "/no/such"])
def test_a_folder_that_is_not_there_is_no_hub_name(path):
    """What looks like a folder is called one."""
    with pytest.raises(QtjaxError, match="no such folder"):
        model_shape(path)
