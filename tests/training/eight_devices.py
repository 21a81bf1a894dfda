"""Run by test_score.py in a process of eight devices: rated rows on a mesh and on one device; prints JSON."""

import json
import re

import jax
import numpy as np

from qtjax import models
from qtjax.config import MeshSection
from qtjax.parallel import make_mesh, param_shardings
from qtjax.training.score import rated_rows

CONFIG = models.ModelConfig(
    vocab_size=64, hidden_size=16, intermediate_size=24, num_hidden_layers=3, num_attention_heads=4,
    num_key_value_heads=2, head_dim=4, initializer_range=0.4,
)  # fmt: skip


def main() -> None:
    assert jax.device_count() == 8
    params, rng = models.init_params(CONFIG, jax.random.key(5)), np.random.default_rng(0)
    mesh = make_mesh(MeshSection(data=2, fsdp=2, tensor=2))
    sharded = jax.tree.map(jax.device_put, params, param_shardings(CONFIG, mesh))
    batch = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(("data", "fsdp")))
    rows = {
        "input_ids": rng.integers(0, 64, (8, 96)).astype(np.int32),
        "loss_mask": rng.random((8, 96)) < 0.9,
        "segment_ids": np.repeat([1, 2, 3, 0], (60, 20, 10, 6))[None].repeat(8, axis=0).astype(np.int32),
    }
    out = {}
    for rater in models.RATERS:
        one = jax.jit(lambda p, r: rated_rows(CONFIG, p, None, r, rater))(params, rows)
        with jax.set_mesh(mesh):
            program = jax.jit(lambda p, r: rated_rows(CONFIG, p, None, r, rater, mesh))
            placed = jax.device_put(rows, batch)
            text = program.lower(sharded, placed).compile().as_text()
            many = program(sharded, placed)
        # What a device gathers may be weights; an array with all eight rows of 96 slots would be activations.
        gathered = re.findall(r"= \w+(\[8,[\d,]*96[\d,]*\])\S* all-gather", text)
        out[rater] = {"one": np.asarray(one).tolist(), "mesh": np.asarray(many).tolist(), "gathered": gathered}
    print(json.dumps(out))


if __name__ == "__main__":
    main()
