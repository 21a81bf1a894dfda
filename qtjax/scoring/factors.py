"""What a training loss multiplies each token's nll by: 1, the label's probability (DFT) or an entropy (EAFT).

Factors are constants to differentiation (stop_gradient): a loss is sum(weights * factor * nll) and its slope
weights * factor * (softmax - onehot). Each is a function of one chunk, (logits_cV, nll_c) -> factor_c, all float32; of the logits only the
LARGEST may matter, since of a cut vocabulary no more are there.
Shape letters: V vocabulary, c chunk.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax

EAFT_TOP = 20
LARGEST = EAFT_TOP  # no factor reads more than so many of the largest logits
EAFT_SCALE = 3.0  # nats; the authors' stand-in for ln 20 = 2.9957


def label_probability(logits_cV: jax.Array, nll_c: jax.Array) -> jax.Array:
    """p = exp(-nll): Dynamic Fine-Tuning, arXiv 2508.05629, per token as in the authors' objective.

    It cancels the 1 / p that cross-entropy's gradient has beside a policy gradient with reward 1, so that an unlikely
    label no longer pulls hardest. Below the smallest float32 (nll above about 87) it is 0: such a token is not learnt.
    """
    return jnp.exp(-nll_c)


def top_entropy(logits_cV: jax.Array, nll_c: jax.Array) -> jax.Array:
    """H~ = (entropy of the softmax over the 20 largest logits alone, nats) / 3: Entropy-Adaptive Fine-Tuning.

    Source: arXiv 2601.02151 and its authors' code (LLaMA-Factory, use_eaft_loss; eaft_alpha, an exponent on H~, is 1 by
    default and here). What normalises there is 3.0, not ln 20: H~ runs from 0 to 0.9986, and the numbers here are those
    of that code. We differ in one case: a vocabulary of fewer than 20 tokens, where the authors' top-k fails, gives the
    entropy of all of them, divided by the same 3.
    """
    top_ck = lax.top_k(logits_cV, min(EAFT_TOP, logits_cV.shape[1]))[0]
    log_p_ck = jax.nn.log_softmax(top_ck, axis=1)
    return -jnp.sum(jnp.exp(log_p_ck) * log_p_ck, axis=1) / EAFT_SCALE


# None: a factor of 1 that costs no multiplication, and leaves the plain loss's program as it is.
FACTORS: dict[str, Callable[[jax.Array, jax.Array], jax.Array] | None] = {
    "plain": None,
    "dft": label_probability,
    "eaft": top_entropy,
}
LOSSES = tuple(FACTORS)
