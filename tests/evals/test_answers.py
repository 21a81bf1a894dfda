"""Batched answers equal one-by-one answers, in few shapes."""

import jax
import numpy as np
import pytest

from qtjax import models
from qtjax.errors import QtjaxError
from qtjax.evals import answers
from qtjax.models.generate import _generate

CONFIG = models.ModelConfig(
    vocab_size=40, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, head_dim=4, initializer_range=0.5, max_position_embeddings=128,
)  # fmt: skip


@pytest.fixture(scope="module")
def params():
    return models.init_params(CONFIG, jax.random.key(0))


def test_batched_equals_one_by_one_with_two_compilations(params):
    """Prompts of very different lengths, in any order, get the answers each gets alone by full forward passes."""
    rng = np.random.default_rng(1)
    prompts = [rng.integers(0, 40, n).tolist() for n in (3, 60, 5, 8, 2, 57, 4)]
    before = _generate._cache_size()
    done = []
    got = answers.answer(CONFIG, params, prompts, max_new_tokens=6, batch_size=4, stop_ids=(7, 11), progress=done.append)
    assert _generate._cache_size() - before <= 2 and sum(done) == len(prompts)
    apply = jax.jit(models.apply, static_argnums=0)
    for prompt, new in zip(prompts, got, strict=True):
        ids, expected = list(prompt), []
        for _ in range(6):
            token = int(apply(CONFIG, params, np.array([ids + [0] * (66 - len(ids))]))[0, len(ids) - 1].argmax())
            if token in (7, 11):
                break
            expected.append(token)
            ids.append(token)
        assert new == expected


@pytest.mark.parametrize("seed", range(20))
def test_buckets_are_few_cover_everything_and_pad_at_most_half_when_they_can(seed):
    """At most three edges; one suffices where at most half of the slots would be padding; the longest prompt fits."""
    rng = np.random.default_rng(seed)
    lengths = rng.integers(1, rng.integers(2, 400), rng.integers(1, 200))
    edges = answers.bucket_lengths(lengths)
    assert 1 <= len(edges) <= 3 and edges == sorted(set(edges)) and edges[-1] >= lengths.max() and edges[-1] - lengths.max() < 8
    if -(-lengths.max() // 8) * 8 * len(lengths) <= 2 * lengths.sum():
        assert len(edges) == 1


def test_sampling_is_deterministic_by_seed_and_differs_between_seeds(params):
    """Temperature above 0 draws; the same seed draws the same."""
    knobs = dict(max_new_tokens=12, batch_size=2, stop_ids=(), temperature=1.5, top_p=0.9)
    first, again, other = (answers.answer(CONFIG, params, [[1, 2, 3]], seed=s, **knobs) for s in (0, 0, 1))
    assert first == again != other and len(first[0]) == 12


@pytest.mark.parametrize(("prompt", "said"), [([], "prompt 0: is empty"), ([1] * 125, "max_position_embeddings = 128")])
def test_impossible_prompts_are_one_line_errors(params, prompt, said):
    """Nothing is generated past the positions the model knows, nor from nothing."""
    with pytest.raises(QtjaxError, match=said):
        answers.answer(CONFIG, params, [prompt], max_new_tokens=8, batch_size=1, stop_ids=())
