"""A tiny model folder and data file, and configs over them: what every test of the loop starts from."""

import json

import jax
import numpy as np
import pytest
from rich.console import Console

from qtjax import models
from qtjax.checkpoints import save_pretrained
from qtjax.config import Config, override, validate
from qtjax.training import story
from qtjax.training.restore import load_run
from qtjax.training.run import open_session
from qtjax.training.run_folder import RunFolder
from qtjax.tree import flatten

WORDS = "red blue green one two three four cat dog bird sun moon tree house river stone".split()


@pytest.fixture(autouse=True)
def layers_in_a_loop(monkeypatch):
    """As in every model of a useful size; test_programs compares that with what a model as small as the tests' gets."""
    monkeypatch.setattr("qtjax.models.config.UNROLLED_WIDTH", 0)


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory) -> str:
    """A random two-layer LLaMA folder with the embedded tokenizer."""
    folder = tmp_path_factory.mktemp("model") / "tiny"
    config = models.ModelConfig(
        vocab_size=2048, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, tie_word_embeddings=True, max_position_embeddings=128, initializer_range=0.1,
    )  # fmt: skip
    save_pretrained(folder, config, models.init_params(config, jax.random.key(7)), tokenizer_from="smol")
    return str(folder)


@pytest.fixture(scope="session")
def tiny_data(tmp_path_factory) -> str:
    """60 question-answer rows of unequal lengths."""
    path = tmp_path_factory.mktemp("data") / "rows.jsonl"
    rng = np.random.default_rng(3)
    with open(path, "w") as f:
        for i in range(60):
            said = " ".join(rng.choice(WORDS, rng.integers(1, 9)))
            answer = " ".join(rng.choice(WORDS, rng.integers(1, 12)))
            f.write(json.dumps({"prompt": f"{i}: say {said}", "completion": answer}) + "\n")
    return str(path)


@pytest.fixture
def tiny_config(tiny_model, tiny_data, tmp_path):
    """config(**{"train.epochs": 1.0, ...}) -> validated Config writing under tmp_path."""

    def make(**changes) -> Config:
        base = {
            "model.path": tiny_model, "data.path": tiny_data, "data.max_length": 48, "data.eval_fraction": 0.2,
            "prune.batch_size": 16, "prune.sample_keep": 0.5, "train.epochs": 2.0, "train.learning_rate": 1e-2,
            "train.row_length": 64, "train.rows": 4, "train.checkpoint_every": 3, "train.shapes": 2,
            "eval.max_new_tokens": 8, "run.folder": str(tmp_path / "run"), "run.export": False,
            "run.compile_cache": str(tmp_path.parent / "compile_cache"),
        }  # fmt: skip
        return validate(override(Config(), base | changes))

    return make


@pytest.fixture
def differ_after_a_cut(tiny_config, tmp_path, power_cut):
    """differ_after_a_cut(at, **changes) -> paths of trained values in which a run cut at step `at` (from 0) and taken up again
    differs from one that never stopped; bitwise."""

    def run(at: int, **changes) -> list[str]:
        quiet = Console(quiet=True)
        whole, broken = (override(tiny_config(**changes), {"run.folder": f"{tmp_path}/{name}"}) for name in ("whole", "broken"))
        story.run(whole, quiet, quiet=True)
        power_cut(lambda: story.run(broken, quiet, quiet=True), lambda loop, number: number == at)
        story.run(broken, quiet, quiet=True)
        one, other = (flatten(load_run(config.run.folder)[2]) for config in (whole, broken))
        return [path for path in one if not np.array_equal(one[path], other[path])]

    return run


@pytest.fixture
def opened(tiny_config, tmp_path):
    """open(**changes) -> Session; run folders are closed at the end."""
    folders = []

    def make(**changes):
        config = tiny_config(**changes)
        folder = RunFolder.open(config)
        folders.append(folder)
        return open_session(config, folder, Console(quiet=True))

    make.root = tmp_path
    yield make
    for folder in folders:
        folder.close()
