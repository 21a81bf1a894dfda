"""Run by test_mesh.py in a process with eight devices: the same evaluations without a mesh and on one; prints JSON."""

import json

import jax
import numpy as np

from qtjax import evals, models
from qtjax.config import DataSection, MeshSection
from qtjax.data.dataset import DataStats, assemble
from qtjax.data.tokenizer import load_tokenizer
from qtjax.parallel import make_mesh, param_shardings

CONFIG = models.ModelConfig(
    vocab_size=2048, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, head_dim=4, initializer_range=0.3, tie_word_embeddings=True, max_position_embeddings=128,
)  # fmt: skip


def main() -> None:
    assert jax.device_count() == 8
    params = models.init_params(CONFIG, jax.random.key(5))
    mesh = make_mesh(MeshSection(data=2, fsdp=2, tensor=2))
    sharded = jax.tree.map(jax.device_put, params, param_shardings(CONFIG, mesh))
    rng, tokenizer = np.random.default_rng(0), load_tokenizer("smol")
    samples = [(rng.integers(0, 2048, n), rng.random(n) < 0.6, np.zeros(n, bool)) for n in (30, 7, 12, 25, 40, 9, 31)]
    dataset = assemble(samples, range(7), DataStats())
    questions = [evals.Question("What is after one?", ("two", "ten", "red"), 0)] * 3
    prompts = [ids.tolist() for ids, _, _ in samples]
    out = {}
    for name, tree, where in (("one", params, None), ("mesh", sharded, mesh)):
        loss = evals.held_out_loss(CONFIG, tree, dataset, row_length=48, rows=3, mesh=where)
        choice = evals.multiple_choice(CONFIG, tree, tokenizer, questions, DataSection(), row_length=48, rows=2, mesh=where)
        answers = evals.answer(CONFIG, tree, prompts, max_new_tokens=5, batch_size=3, stop_ids=(), mesh=where)
        out[name] = {"loss": loss.loss, "tokens": loss.tokens, "nll": [n.tolist() for n in choice.nll], "answers": answers}
    print(json.dumps(out))


if __name__ == "__main__":
    main()
