"""What an overlay may change inside the model: today one record per dense product."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax import Array


@dataclass(frozen=True)
class LinearEdit:
    """y = x W + b + (dropout(x) down) up.

    down [N, in, R] and up [N, R, out] (the layer axis N is consumed by the scan); the method's scale is folded into
    `up`. A layer without the edit has zero factors, which is exact. dropout_key: one key per layer, or None (no dropout).
    """

    down: Array
    up: Array
    dropout_key: Array | None = None
    dropout_rate: float = 0.0

    def side(self, x: Array) -> Array:
        """The low-rank path's contribution to y, in x's dtype."""
        if self.dropout_key is not None and self.dropout_rate > 0:
            keep = jax.random.bernoulli(self.dropout_key, 1 - self.dropout_rate, x.shape)
            x = jnp.where(keep, x / (1 - self.dropout_rate), 0).astype(x.dtype)
        return (x @ self.down.astype(x.dtype)) @ self.up.astype(x.dtype)


jax.tree_util.register_dataclass(
    LinearEdit, data_fields=["down", "up", "dropout_key"], meta_fields=["dropout_rate"]
)
