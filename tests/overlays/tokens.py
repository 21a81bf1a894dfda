"""The overlays that put something before the row or beside attention, small and with random trainables."""

import jax
import jax.numpy as jnp
import numpy as np

from qtjax import models
from qtjax.models import ModelConfig
from qtjax.overlays import init_overlay, method_named
from qtjax.tree import flatten, unflatten

# head_dim is not hidden_size / heads, on purpose.
TINY = ModelConfig(
    vocab_size=48, hidden_size=32, intermediate_size=40, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, head_dim=12, rope_theta=1000.0,
)  # fmt: skip
CONFIGS = {
    "full": TINY,
    "window": TINY.replace(model_type="mistral", sliding_window=5),
    "window-below-prefix": TINY.replace(model_type="mistral", sliding_window=3),
}
FIELDS = {
    "prompt": dict(num_virtual_tokens=4),
    "mpt": dict(num_virtual_tokens=4, num_tasks=3, num_ranks=2),
    "ptuning": dict(num_virtual_tokens=4, encoder_hidden_size=6),
    "prefix": dict(num_virtual_tokens=4),
    "llama_adapter": dict(adapter_len=3, adapter_layers=1),
}


def params_of(config: ModelConfig) -> dict:
    """Random weights from numpy, norms around one."""
    rng = np.random.default_rng(0)
    flat = flatten(models.abstract_params(config))
    return unflatten({p: jnp.asarray(rng.normal("norm" in p, 0.3, s.shape), s.dtype) for p, s in flat.items()})


def trained(overlay, seed: int = 1, scale: float = 0.7):
    """The overlay with every trained value random (gates too), the padding of layers without one left at zero."""
    rng, params = np.random.default_rng(seed), {}
    for leaf in method_named(overlay.method).leaves(overlay.spec):
        mask = leaf.mask()
        value = rng.normal(0, scale, leaf.shape).astype(np.float32)
        params[leaf.path] = jnp.asarray(value if mask is None else value * mask)
    return overlay.replace(params=unflatten(params))


def made(method: str, config: ModelConfig = TINY, **more):
    """A trained overlay of TINY's kind."""
    return trained(init_overlay(method, config, None, jax.random.key(0), **(FIELDS[method] | more)))
