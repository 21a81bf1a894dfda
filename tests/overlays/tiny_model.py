"""A tiny LLaMA with biases, and overlays on it with random trained values."""

import jax
import jax.numpy as jnp
import numpy as np

from qtjax import models
from qtjax.overlays import init_overlay, method_named
from qtjax.tree import flatten, unflatten

CONFIG = models.ModelConfig(
    vocab_size=61, hidden_size=32, intermediate_size=40, num_hidden_layers=3, num_attention_heads=4,
    num_key_value_heads=2, head_dim=12, attention_bias=True, mlp_bias=False, initializer_range=0.2,
)  # fmt: skip
IDS = np.random.default_rng(0).integers(0, CONFIG.vocab_size, (2, 11))


def base_params(config=CONFIG, seed=0):
    """Random parameters; norms and biases are random too."""
    flat = dict(flatten(models.init_params(config, jax.random.key(seed))))
    for n, path in enumerate(sorted(flat)):
        if "norm" in path or path.endswith("bias"):
            flat[path] += 0.3 * jax.random.normal(jax.random.key(n), flat[path].shape)
    return unflatten(flat)


def shaken(overlay, seed=1, scale=0.2):
    """The overlay with noise on every trained value; padding and layers that are not edited keep their zeros."""
    flat = dict(flatten(overlay.params))
    for n, leaf in enumerate(method_named(overlay.method).leaves(overlay.spec)):
        if leaf.trained:
            noise = scale * jax.random.normal(jax.random.fold_in(jax.random.key(seed), n), leaf.shape)
            flat[leaf.path] = flat[leaf.path] + (noise if leaf.mask() is None else jnp.where(leaf.mask(), noise, 0))
    return overlay.replace(params=unflatten(flat))


def trained(method, params, config=CONFIG, seed=1, **fields):
    return shaken(init_overlay(method, config, params, jax.random.key(7), **fields), seed)


def logits(params, overlay=None, config=CONFIG):
    return np.asarray(models.apply(config, params, IDS, overlay=overlay))


def record(overlay, path, layer=None):
    """The edit that a module gets, of one layer."""
    edit = flatten(overlay.expand().tree)[f"{path}/edit"]
    return edit if layer is None else jax.tree.map(lambda x: x[layer], edit)
