"""Laplace-LoRA: Kronecker factors, the linearised predictive and calibration, against dense curvature and recorded numbers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qtjax import models
from qtjax.checkpoints import adapter_state_dict, load_adapter, load_pretrained, save_adapter
from qtjax.errors import QtjaxError
from qtjax.overlays import Overlay, init_overlay
from qtjax.overlays.laplace import LaplaceSpec, PriorFields, factor_leaves
from qtjax.overlays.posterior import (
    calibration_error, class_logits, evidence_prior, fit_laplace, log_evidence, predictive, with_prior,
)  # fmt: skip
from qtjax.tree import flatten, unflatten

pytestmark = pytest.mark.slow

TINY = models.ModelConfig(
    vocab_size=24, hidden_size=8, intermediate_size=12, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
    head_dim=4, max_position_embeddings=32, initializer_range=0.3,
)  # fmt: skip
CLASSES = [3, 7, 11]


@pytest.fixture(scope="module")
def tiny():
    params = models.init_params(TINY, jax.random.key(0))
    overlay = init_overlay("laplace", TINY, params, jax.random.key(1), r=2, lora_alpha=3, target_modules="q_proj,down_proj")
    trained = jax.tree.map(lambda x: x + 0.3 * jnp.sin(1 + jnp.arange(x.size).reshape(x.shape)), overlay.params)
    return params, overlay.replace(params=trained)


def rows(count, length, seed=0):
    ids = np.random.default_rng(seed).integers(0, 24, (count, length))
    return ids, np.ones_like(ids)


def jacobian(params, overlay, ids, mask):
    """{path: [B, C, N, in, out]}"""
    ids, mask = jnp.asarray(ids), jnp.asarray(mask)
    of = lambda trained: class_logits(TINY, params, overlay.replace(params=trained), ids, mask, jnp.asarray(CLASSES))  # noqa: E731
    return {k: np.asarray(v, np.float64) for k, v in flatten(jax.jacrev(of)(overlay.params)).items()}


def test_factors_of_one_token_are_the_dense_curvature(tiny):
    """With one row of one token K-FAC is exact: A (x) S is J^T (diag p - p p^T) J of every LoRA matrix and layer."""
    params, overlay = tiny
    ids, mask = rows(1, 1)
    fitted = fit_laplace(TINY, params, overlay, ids, mask, CLASSES)
    factors = flatten(fitted.frozen)
    p = np.asarray(jax.nn.softmax(class_logits(TINY, params, overlay, jnp.asarray(ids), jnp.asarray(mask), jnp.asarray(CLASSES))))[0]
    hessian = np.diag(p) - np.outer(p, p)
    for path, slope in jacobian(params, overlay, ids, mask).items():
        for n in range(2):
            flat = slope[0, :, n].reshape(3, -1)
            own = np.kron(factors[f"{path}_in"][n], factors[f"{path}_out"][n])
            np.testing.assert_allclose(own, flat.T @ hessian @ flat, atol=1e-5 * np.abs(own).max() + 1e-9, err_msg=path)


def test_factors_add_over_rows_and_batches(tiny):
    """S is the sum over rows and A the mean over tokens, whatever the batch size."""
    params, overlay = tiny
    ids, mask = rows(5, 4)
    whole = flatten(fit_laplace(TINY, params, overlay, ids, mask, CLASSES, batch_size=2).frozen)
    single = [flatten(fit_laplace(TINY, params, overlay, ids[i : i + 1], mask[:1], CLASSES).frozen) for i in range(5)]
    for path, value in whole.items():
        parts = np.stack([s[path] for s in single])
        np.testing.assert_allclose(value, parts.mean(0) if path.endswith("_in") else parts.sum(0), rtol=2e-4, atol=1e-6)


def test_predictive_covariance_is_the_dense_one(tiny):
    """Var = sum over matrices of J (A (x) S + precision I)^-1 J^T, written out dense; the probabilities are probit's and, in
    the limit of many draws, close to the sampled mean."""
    params, overlay = tiny
    fitted = with_prior(fit_laplace(TINY, params, overlay, *rows(6, 5), CLASSES), 0.7)
    ids, mask = rows(2, 5, seed=3)
    got = predictive(TINY, params, fitted, ids, mask, CLASSES)
    factors, expected = flatten(fitted.frozen), np.zeros((2, 3, 3))
    for path, slope in jacobian(params, overlay, ids, mask).items():
        for n in range(2):
            precision = np.kron(np.asarray(factors[f"{path}_in"][n], np.float64), factors[f"{path}_out"][n])
            flat = slope[:, :, n].reshape(2, 3, -1)
            inverse = np.linalg.inv(precision + 0.7 * np.eye(len(precision)))
            expected += np.einsum("bci,ij,bkj->bck", flat, inverse, flat)
    np.testing.assert_allclose(got.covariance, expected, rtol=1e-3, atol=1e-5 * expected.max())
    scaled = np.asarray(got.mean) / np.sqrt(1 + np.pi / 8 * np.einsum("bcc->bc", expected))
    np.testing.assert_allclose(got.probabilities, jax.nn.softmax(jnp.asarray(scaled)), atol=1e-4)
    drawn = predictive(TINY, params, fitted, ids, mask, CLASSES, method="mc", samples=20000)
    np.testing.assert_allclose(drawn.probabilities.sum(axis=1), 1, atol=1e-5)
    assert np.abs(np.asarray(drawn.probabilities - got.probabilities)).max() < 0.1


def test_the_padding_side_does_not_matter(tiny):
    """Rows padded on the right, on the left and not at all give the same factors and the same prediction."""
    params, overlay = tiny
    ids, _ = rows(3, 4)
    results = []
    for pad in ((0, 3), (3, 0), (0, 0)):
        own, mask = (np.pad(x, ((0, 0), pad)) for x in (ids, np.ones_like(ids)))
        fitted = fit_laplace(TINY, params, overlay, own, mask, CLASSES)
        results.append((fitted.frozen, predictive(TINY, params, fitted, own, mask, CLASSES)))
    for other in results[1:]:
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5), results[0], other)


@pytest.mark.shared
def test_recorded_predictive(shared):
    """With the recorded factors and prior, means and covariances are the recorded ones, from our own Jacobians."""
    folder = shared / "peft_refs" / "llama-laplace"
    recorded = np.load(folder / "laplace.npz")
    config, params = load_pretrained(folder)
    overlay = load_adapter(folder, config, params)
    spec, factors = LaplaceSpec(overlay.spec, PriorFields(1 / float(recorded["prior_var"]), True)), {}
    for leaf in factor_leaves(spec):
        name, end = leaf.path.rsplit("/", 1)[1].rsplit("_", 1)
        keys = [f"{'A' if end == 'in' else 'S'}/{k.replace('.laplace.', '.').removesuffix(f'_{end}')}.weight" for k in leaf.keys]
        factors[leaf.path] = jnp.asarray(np.stack([recorded[k] for k in keys]), jnp.float32)
    fitted = Overlay("laplace", spec, overlay.params, unflatten(factors))
    ids = recorded["test_ids"]
    got = predictive(config, params, fitted, ids, np.ones_like(ids), recorded["target_ids"])
    np.testing.assert_allclose(got.mean, recorded["logit_mean"], atol=2e-4)
    np.testing.assert_allclose(got.covariance, recorded["variance"], rtol=1e-3, atol=1e-3 * np.abs(recorded["variance"]).max())


def test_it_is_saved_as_lora_with_its_factors(tiny, tmp_path):
    """save -> load keeps mean, factors and prior bitwise; without the factors' file the mean loads, unfitted; lora is not confused."""
    params, overlay = tiny
    fitted = fit_laplace(TINY, params, overlay, *rows(4, 5), CLASSES, prior="evidence")
    save_adapter(tmp_path, fitted)
    again = load_adapter(tmp_path, TINY, params)
    assert (again.method, again.spec) == ("laplace", fitted.spec)
    jax.tree.map(np.testing.assert_array_equal, (again.params, again.frozen), (fitted.params, fitted.frozen))
    (tmp_path / "qtjax_trainable.safetensors").unlink()
    mean = load_adapter(tmp_path, TINY, params)
    assert not mean.spec.prior.fitted and not flatten(mean.frozen)
    jax.tree.map(np.testing.assert_array_equal, mean.params, fitted.params)
    plain = init_overlay("lora", TINY, params, jax.random.key(2), r=2)
    save_adapter(tmp_path / "lora", plain)
    assert load_adapter(tmp_path / "lora", TINY, params).method == "lora"
    assert set(adapter_state_dict(plain)) == set(adapter_state_dict(fit_laplace(TINY, params, plain, *rows(1, 2), CLASSES).replace(
        spec=LaplaceSpec(plain.spec, PriorFields()), frozen={})))


def test_evidence_is_greatest_at_its_own_prior(tiny):
    """The chosen precision beats its neighbours, and the evidence is the dense formula's."""
    params, overlay = tiny
    fitted = fit_laplace(TINY, params, overlay, *rows(8, 5), CLASSES)
    best = evidence_prior(fitted)
    value = log_evidence(with_prior(fitted, best), -3.0)
    assert all(value >= log_evidence(with_prior(fitted, best * factor), -3.0) for factor in (0.5, 0.9, 1.1, 2))
    dense, factors = 0.0, flatten(fitted.frozen)
    for path, theta in flatten(fitted.params).items():
        dense += best * float((theta**2).sum())
        for n in range(2):
            product = np.kron(np.asarray(factors[f"{path}_in"][n], np.float64), factors[f"{path}_out"][n])
            dense += np.linalg.slogdet(product / best + np.eye(len(product)))[1]
    np.testing.assert_allclose(value, -3.0 - dense / 2, rtol=1e-4)


def test_calibration_error_by_hand():
    """Two bins: (0.9, 0.9 of which one is right) and (0.6, right): (2 |0.5 - 0.9| + |1 - 0.6|) / 3; empty data is NaN."""
    probabilities = [[0.9, 0.1], [0.9, 0.1], [0.4, 0.6]]
    assert calibration_error(probabilities, [0, 1, 1], bins=10) == pytest.approx((2 * 0.4 + 0.4) / 3)
    assert calibration_error([[1.0, 0.0]], [0]) == 0
    assert np.isnan(calibration_error(np.zeros((0, 2)), []))


def test_bad_input_is_one_line(tiny):
    """Unfitted posteriors, empty rows, single classes and settings that the method sets itself are refused."""
    params, overlay = tiny
    ids, mask = rows(2, 3)
    with pytest.raises(QtjaxError, match="fit_laplace first"):
        predictive(TINY, params, overlay, ids, mask, CLASSES)
    with pytest.raises(QtjaxError, match="row 1 has no real token"):
        fit_laplace(TINY, params, overlay, ids, mask * [[1], [0]], CLASSES)
    with pytest.raises(QtjaxError, match="classes = \\[3\\]"):
        fit_laplace(TINY, params, overlay, ids, mask, [3])
    with pytest.raises(QtjaxError, match="prior_precision = 0"):
        init_overlay("laplace", TINY, params, jax.random.key(0), prior_precision=0)
    with pytest.raises(QtjaxError, match="fitted = True"):
        init_overlay("laplace", TINY, params, jax.random.key(0), fitted=True)
