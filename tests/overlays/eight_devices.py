"""Run by test_every_method in a process of eight devices: loss and gradients of every method on a mesh and on one device."""

import json

import jax
import jax.numpy as jnp
import numpy as np
from tests.overlays import test_every_method as laws

from qtjax import models
from qtjax.config import MeshSection
from qtjax.overlays import overlay_axes
from qtjax.parallel import make_mesh, param_shardings, tree_shardings
from qtjax.tree import flatten

BASE = models.init_params(laws.CONFIG, jax.random.key(0))
IDS = jnp.asarray(np.random.default_rng(0).integers(0, laws.CONFIG.vocab_size, (8, 12)))


def measured(name, overlay, params):
    """(loss, gradients) of next-token prediction, in float32."""
    tasks = None if laws.tasks_of(name) is None else jnp.arange(8) % 3

    def loss(trained):
        out = models.apply(laws.CONFIG, params, IDS, overlay=overlay.replace(params=trained), task_ids=tasks)
        logp = jax.nn.log_softmax(out[:, :-1])
        return -jnp.take_along_axis(logp, IDS[:, 1:, None], -1).mean()

    return jax.jit(jax.value_and_grad(loss))(overlay.params)


def main() -> None:
    mesh = make_mesh(MeshSection(data=2, fsdp=2, tensor=2))
    sharded = jax.tree.map(jax.device_put, BASE, param_shardings(laws.CONFIG, mesh))
    out = {}
    for name in laws.NAMES:
        overlay = laws.trained(laws.made(name, BASE))
        one, slope = measured(name, overlay, BASE)
        axes = overlay_axes(overlay, laws.CONFIG)
        trees = (
            jax.tree.map(jax.device_put, tree, tree_shardings(mesh, names, tree)) if tree else tree
            for tree, names in ((overlay.params, axes.params), (overlay.frozen, axes.frozen))
        )
        placed = overlay.replace(**dict(zip(("params", "frozen"), trees)))
        with jax.set_mesh(mesh):
            many, slopes = measured(name, placed, sharded)
        worst = max(
            float(np.linalg.norm(np.asarray(a) - np.asarray(b)) / max(np.linalg.norm(np.asarray(b)), 1e-12))
            for a, b in zip(flatten(slopes).values(), flatten(slope).values())
        )
        spread = sum(not x.sharding.is_fully_replicated for x in jax.tree.leaves(placed.params))
        out[name] = {"loss": abs(float(many) - float(one)), "gradient": worst, "sharded": spread}
    print("RESULT" + json.dumps(out))


if __name__ == "__main__":
    main()
