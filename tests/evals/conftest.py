"""A random two-layer model over the embedded tokenizer's vocabulary, and plain references for likelihoods."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qtjax import models
from qtjax.data.tokenizer import load_tokenizer


@pytest.fixture(scope="session")
def tokenizer():
    return load_tokenizer("smol")


@pytest.fixture(scope="session")
def model(tokenizer):
    """(config, params)"""
    config = models.ModelConfig(
        vocab_size=len(tokenizer), hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=4, initializer_range=0.3, tie_word_embeddings=True, max_position_embeddings=256,
    )  # fmt: skip
    return config, models.init_params(config, jax.random.key(5))


@pytest.fixture(scope="session")
def token_nll(model):
    """token_nll(ids) -> float64 [l]: -log p(ids[t] | ids[:t]) of one sample by itself, from full logits; NaN at slot 0."""
    config, params = model
    logits_of = jax.jit(lambda ids: models.apply(config, params, ids))

    def one(ids):
        padded = np.zeros((1, 128), np.int32)
        padded[0, : len(ids)] = ids
        logp = np.asarray(jax.nn.log_softmax(logits_of(jnp.asarray(padded))[0]), np.float64)
        return np.array([np.nan] + [-logp[t - 1, ids[t]] for t in range(1, len(ids))])

    return one
