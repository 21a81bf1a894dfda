"""How token pruners rate targets: functions of `Targets`, the lowest rate stays.

Sources stand in the registry. Where they are silent, our decisions:
- random: the n-th target's draw depends on its sample's key and n alone, not on length, padding or the prompt before it.
- fastv, sparsevlm: made for vision-language models. In text-only fine-tuning the prompt's rows cannot attend to the
  answer, so a target is rated by the attention that LATER answer positions pay it. The raters compute it; the two
  pruners differ in nothing else.
- rho-1, token-cleaning: excess loss = nll - reference nll, the highest stay, over the sample's own targets or the batch's.
"""

import jax
import jax.numpy as jnp

from qtjax.errors import QtjaxError
from qtjax.pruning.base import Targets, checked_keys
from qtjax.pruning.tokens import token_criterion

_REMEDIES = {
    "token_nll": "score the batch first",
    "reference_nll": "score the same targets with a reference model",
    "attention": "compute it with the rater that the pruner names",
}


def _given(targets: Targets, field: str) -> jax.Array:
    """float32 [B, L], a field that the rate cannot do without."""
    value, shape = getattr(targets, field), jnp.shape(targets.mask)
    if value is None:
        raise QtjaxError(f"{field} is missing: the token pruner rates by it; {_REMEDIES[field]}")
    if jnp.shape(value) != shape:
        raise QtjaxError(f"{field} has shape {jnp.shape(value)}: must be {shape}, as mask")
    return jnp.asarray(value, jnp.float32)


def _at_targets(rate: jax.Array, targets: Targets) -> jax.Array:
    return jnp.where(jnp.asarray(targets.mask) != 0, rate, 0.0)


def rate_equal(targets: Targets) -> jax.Array:
    """0 everywhere: no target is worth less than another."""
    return jnp.zeros(jnp.shape(targets.mask), jnp.float32)


@jax.jit
def _draws(keys_B: jax.Array, mask: jax.Array) -> jax.Array:
    def draw(key, n):
        return jax.random.uniform(jax.random.fold_in(key, n))

    return jax.vmap(jax.vmap(draw, in_axes=(None, 0)))(keys_B, jnp.cumsum(mask, axis=1, dtype=jnp.int32))


def rate_random(targets: Targets) -> jax.Array:
    """One draw in [0, 1) per target."""
    mask = jnp.asarray(targets.mask) != 0
    return _at_targets(_draws(checked_keys(targets.keys, len(mask)), mask), targets)


def rate_perplexity(targets: Targets) -> jax.Array:
    """The target's own PPL = exp(nll), nll clamped to 50: eq. 7 of Q-Tuning with lambda = 0."""
    return token_criterion(_given(targets, "token_nll"), targets.mask, 0.0)


def rate_attention(targets: Targets) -> jax.Array:
    """Minus the attention received."""
    return _at_targets(-_given(targets, "attention"), targets)


def rate_excess_loss(targets: Targets) -> jax.Array:
    """Reference nll - nll. Not finite if either is not; such a target goes first."""
    return _at_targets(_given(targets, "reference_nll") - _given(targets, "token_nll"), targets)


def rate_neighborhood(targets: Targets, *, neighbor_weight: float = 0.5, neighbors: str = "sum") -> jax.Array:
    """eq. 7 of Q-Tuning: `token_criterion`."""
    return token_criterion(_given(targets, "token_nll"), targets.mask, neighbor_weight, neighbors)
