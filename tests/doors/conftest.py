"""A tiny model folder, data, an experiment file over them, and run folders as training leaves them."""

import json

import jax
import jax.numpy as jnp
import pytest

from qtjax import models
from qtjax.checkpoints import load_pretrained, save_adapter, save_pretrained
from qtjax.checkpoints.run_state import RunState
from qtjax.config import Config, MeshSection, override, to_json, validate
from qtjax.overlays import init_overlay
from qtjax.parallel import make_mesh
from qtjax.training.experts import missing_experts
from qtjax.training.setup import checkpoint_tree, load_model, start


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory) -> str:
    """A random two-layer LLaMA folder with the embedded tokenizer and chat template."""
    folder = tmp_path_factory.mktemp("model") / "tiny"
    config = models.ModelConfig(
        vocab_size=2048, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=4, tie_word_embeddings=True, max_position_embeddings=128, initializer_range=0.3,
    )  # fmt: skip
    save_pretrained(folder, config, models.init_params(config, jax.random.key(7)), tokenizer_from="smol")
    return str(folder)


@pytest.fixture(scope="session")
def tiny_data(tmp_path_factory) -> str:
    """24 multiple-choice rows of two kinds that are questions with answers, too."""
    path = tmp_path_factory.mktemp("data") / "rows.jsonl"
    words = "red blue green one two three four cat dog bird sun moon".split()
    rows = [
        {
            "question": f"What is after {w}?", "choices": [words[i % 13 - 1], words[i % 13 - 2]], "answer": words[i % 13 - 1],
            "kind": i % 2,
        }  # fmt: skip
        for i, w in enumerate((words * 2)[:24])
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture(scope="session")
def values(tiny_model, tiny_data):
    """{"model.path": ..., ...} of the experiment."""
    return {
        "model.path": tiny_model, "data.path": tiny_data, "data.eval_path": tiny_data, "data.max_length": 48,
        "data.prompt_column": "question", "data.completion_column": "answer",
        "prune.batch_size": 16, "train.rows": 2, "train.row_length": 64, "eval.max_new_tokens": 4, "eval.batch_size": 8,
    }  # fmt: skip


@pytest.fixture(scope="session")
def experiment(values, tmp_path_factory) -> str:
    """A config file over the tiny model and data."""
    path = tmp_path_factory.mktemp("config") / "tiny.py"
    path.write_text(f"from qtjax.config import Config, override\n\n\ndef get_config():\n    return override(Config(), {values!r})\n")
    return str(path)


def noisy(tree, seed: int):
    """Every leaf with noise of its own."""
    leaves, structure = jax.tree.flatten(tree)
    keys = jax.random.split(jax.random.key(seed), len(leaves))
    return jax.tree.unflatten(structure, [x + 0.2 * jax.random.normal(k, x.shape, x.dtype) for x, k in zip(leaves, keys)])


@pytest.fixture(scope="session")
def make_run(values, tmp_path_factory):
    """make_run("none" | "lora", **{"overlay.r": 2}) -> run folder with one checkpoint, whose parameters were all moved by 0.05
    or whose overlay got noise, and trained experts where it is made of some."""

    def make(method: str, **changes) -> str:
        folder = tmp_path_factory.mktemp("runs") / method
        folder.mkdir()
        config = validate(override(Config(), values | {"overlay.method": method, "run.folder": str(folder)} | changes))
        mesh = make_mesh(MeshSection())
        for seed, expert in enumerate(missing_experts(config), start=1):
            shape, params = load_pretrained(config.model.path)
            fresh = init_overlay("lora", shape, params, jax.random.key(seed), r=2)
            save_adapter(expert, fresh.replace(params=noisy(fresh.params, seed)))
        state, _, _ = start(config, mesh, load_model(config, mesh), total_steps=1)
        tree = checkpoint_tree(state)
        if method == "none":
            tree["trainable"] = jax.tree.map(lambda x: x + jnp.asarray(0.05, x.dtype), tree["trainable"])
        else:
            tree["trainable"] = noisy(tree["trainable"], 0)
        checkpoints = RunState(folder / "checkpoints")
        checkpoints.save(1, tree, {})
        checkpoints.wait()
        checkpoints.close()
        (folder / "config.json").write_text(to_json(config))
        return str(folder)

    return make


@pytest.fixture(scope="session")
def full_run(make_run):
    return make_run("none")


@pytest.fixture(scope="session")
def lora_run(make_run):
    return make_run("lora")
