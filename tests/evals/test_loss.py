"""Held-out loss is the token-weighted mean nll of the samples, however they are packed; one program serves every call."""

import math

import jax
import numpy as np
import pytest

from qtjax.data.dataset import DataStats, assemble
from qtjax.evals import held_out_loss, likelihood, rows
from qtjax.evals.loss import whole_sequences
from qtjax.evals.rows import _token_scores


@pytest.fixture(scope="module")
def dataset(model):
    """Eleven samples of 2 to 40 tokens; one without targets, one whose mask claims its first token."""
    rng = np.random.default_rng(2)
    samples = []
    for n in (40, 2, 17, 33, 9, 25, 25, 8, 40, 12, 5):
        mask = rng.random(n) < 0.5
        mask[-1] = True
        samples.append((rng.integers(0, model[0].vocab_size, n), mask, np.zeros(n, bool)))
    samples[4][1][:] = False
    samples[6][1][0] = True
    return assemble(samples, range(len(samples)), DataStats())


def test_packed_loss_equals_sample_by_sample(model, dataset, token_nll):
    """Sum over all targets divided by their number, in nats; three rows a launch, so that the last one is partly empty."""
    found = held_out_loss(*model, dataset, row_length=48, rows=3)
    expected, per_sample = [], []
    for i in range(len(dataset)):
        ids, mask, _ = dataset.sample(i)
        nll = token_nll(ids)[1:][mask[1:]]
        expected += nll.tolist()
        per_sample.append((nll.sum(), len(nll)))
    assert found.loss == pytest.approx(np.mean(expected), rel=1e-5)
    assert found.perplexity == pytest.approx(math.exp(np.mean(expected)), rel=1e-4)
    assert (found.tokens, found.samples) == (len(expected), 11)
    each = likelihood(*model, whole_sequences(dataset, range(11)), row_length=48, rows=3)
    np.testing.assert_allclose(each.nll, [s for s, _ in per_sample], rtol=1e-5, atol=1e-5)
    assert each.targets.tolist() == [n for _, n in per_sample]


def test_samples_are_packed_some_at_a_time(model, dataset, monkeypatch):
    """Four at a time, each made when it is asked for: every sample once, with the sums that all at once have."""
    whole, asked = likelihood(*model, whole_sequences(dataset), row_length=48, rows=3), []
    monkeypatch.setattr(rows, "TOGETHER", 4)
    monkeypatch.setattr(type(dataset), "sample", lambda self, i, true=type(dataset).sample: asked.append(i) or true(self, i))
    done = []
    some = likelihood(*model, whole_sequences(dataset), row_length=48, rows=3, progress=done.append)
    np.testing.assert_allclose(some.nll, whole.nll, rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(some.targets, whole.targets)
    assert sum(done) == 11 and asked[-3:] == [8, 9, 10] and len(asked) == 15  # the first four twice, to choose the shape


def test_other_parameters_and_other_samples_compile_nothing(model, dataset):
    """Before and after training, all samples or some: the same shape, the same program."""
    config, params = model
    held_out_loss(config, params, dataset, row_length=48, rows=3)
    before = _token_scores._cache_size()
    other = held_out_loss(config, jax.tree.map(lambda x: x * 0.5, params), dataset, row_length=48, rows=3)
    some = held_out_loss(config, params, dataset, row_length=48, rows=3, samples=[0, 3, 8, 5])
    assert _token_scores._cache_size() == before
    assert other.loss != some.loss and some.samples == 4


def test_nothing_to_predict_is_nan(model, dataset):
    """No target: NaN and a count of 0, not a loss of zero."""
    found = held_out_loss(*model, dataset, row_length=48, rows=3, samples=[4])
    assert math.isnan(found.loss) and math.isnan(found.perplexity) and found.tokens == 0
