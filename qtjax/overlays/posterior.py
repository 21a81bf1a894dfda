"""Laplace-LoRA after training: fit the posterior, predict with it, measure calibration. Functions of (overlay, data).

A row asks one question; its answer is one of `classes` (token ids) at the slot after the row's last real token. So a
multiple-choice prompt has the answer letters as classes, and next-token prediction any set of tokens.
B rows, L slots, C classes, N layers; a LoRA matrix is [in, out] with (in, out) = (D, R) for A and (R, D') for B.
"""

import dataclasses
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from qtjax import models
from qtjax.errors import QtjaxError
from qtjax.models import Edits
from qtjax.overlays.base import Overlay, method_named
from qtjax.overlays.laplace import LaplaceSpec, PriorFields, factor_leaves, plain
from qtjax.overlays.lora import METHOD as LORA
from qtjax.tree import Tree, flatten, unflatten

_MATRICES = ("lora_A", "lora_B")


class Prediction(NamedTuple):
    """probabilities [B, C], fraction; mean [B, C] and covariance [B, C, C] of the linearised class logits; all float32."""

    probabilities: Array
    mean: Array
    covariance: Array


def fit_laplace(
    config: models.ModelConfig,
    params: Tree,
    overlay: Overlay,
    input_ids: Any,
    attention_mask: Any,
    classes: Any,
    *,
    batch_size: int = 8,
    prior: str = "fixed",
) -> Overlay:
    """The overlay with its posterior fitted at the trained weights.

    Args:
      overlay: a trained "laplace" or "lora" overlay; dropout plays no part. The factors of a matrix with `in` inputs and
        `out` outputs take in^2 + out^2 float32 a layer: name few target_modules at large widths.
      input_ids, attention_mask: int [B, L], padded on either side. classes: int [C], the token ids that can be the answer.
        Labels are not needed: the curvature of softmax does not depend on them.
      batch_size: rows at a time. prior: "fixed" keeps prior_precision; "evidence" takes the one of greatest evidence
        (MacKay's fixed point, precision = effective parameters / |theta|^2).
    Raises QtjaxError for an overlay that is no LoRA, and rows without a real token.
    """
    spec = _laplace_spec(overlay)
    if prior not in ("fixed", "evidence"):
        raise QtjaxError(f"prior = {prior!r}: must be 'fixed' or 'evidence'")
    ids, mask, classes = _rows(input_ids, attention_mask, classes)
    leaves = factor_leaves(spec)
    totals = unflatten({leaf.path: jnp.zeros(leaf.shape, jnp.float32) for leaf in leaves})
    for first in range(0, len(ids), batch_size):
        part = slice(first, first + batch_size)
        more = _moments(config, params, overlay, totals, ids[part], mask[part], classes)
        totals = jax.tree.map(jnp.add, totals, more)
    factors, tokens = flatten(totals), float(mask.sum())
    scales = {site.linear.path: jnp.asarray(site.scales)[:, None, None] for site in spec.lora.sites}
    for path in factors:
        module, name = path.rsplit("/", 1)
        if name.endswith("_in"):  # seen once a class
            factors[path] = factors[path] / (tokens * len(classes))
        elif name == "lora_B_out":  # the model multiplies by scale B
            factors[path] = factors[path] * scales[module] ** 2
    fitted = Overlay(
        "laplace", LaplaceSpec(spec.lora, PriorFields(spec.prior.prior_precision, True)), overlay.params,
        unflatten({**flatten(overlay.frozen), **factors}),
    )  # fmt: skip
    return fitted if prior == "fixed" else with_prior(fitted, evidence_prior(fitted))


def _laplace_spec(overlay: Overlay) -> LaplaceSpec:
    if isinstance(overlay.spec, LaplaceSpec):
        return overlay.spec
    if method_named(overlay.method) is LORA:
        return LaplaceSpec(plain(overlay.spec, "fit_laplace"), PriorFields())
    raise QtjaxError(f"fit_laplace: the overlay is {overlay.method!r}; a posterior is fitted over 'laplace' or 'lora'")


def _rows(input_ids: Any, attention_mask: Any, classes: Any) -> tuple[np.ndarray, np.ndarray, Array]:
    ids, mask = np.asarray(input_ids, np.int32), np.asarray(attention_mask) != 0
    if ids.ndim != 2 or ids.shape != mask.shape or not len(ids):
        raise QtjaxError(f"input_ids {ids.shape}, attention_mask {mask.shape}: must both be [B, L] with at least one row")
    if not mask.any(axis=1).all():
        raise QtjaxError(f"attention_mask: row {int(np.argmin(mask.any(axis=1)))} has no real token; leave it out")
    classes = np.asarray(classes, np.int32)
    if classes.ndim != 1 or len(classes) < 2 or len(set(classes.tolist())) != len(classes):
        raise QtjaxError(f"classes = {classes.tolist()}: must be a list of at least two different token ids")
    return ids, mask, jnp.asarray(classes)


def class_logits(
    config: models.ModelConfig, params: Tree, overlay: Any, input_ids: Array, attention_mask: Array, classes: Array
) -> Array:
    """float32 [B, C]: the classes' logits at each row's last real slot, wherever padding stands."""
    hidden = models.hidden_states(config, params, input_ids, attention_mask, overlay=overlay)
    last = input_ids.shape[1] - 1 - jnp.argmax(attention_mask[:, ::-1] != 0, axis=1)
    hidden = jnp.take_along_axis(hidden, last[:, None, None], axis=1)[:, 0]
    return models.logits(config, params, hidden, overlay)[:, classes]


@dataclasses.dataclass(frozen=True)
class _Fixed:
    """Edits that are already expanded, as the model takes an overlay."""

    edits: Edits
    two_passes, tasks, method = False, 0, "laplace"

    def expand(self, *context: Any) -> Edits:
        return self.edits

    def check_base(self, leaves: Any) -> None:
        """They were expanded for this model."""


@jax.custom_vjp
def _observed(x: Array, weight: Array, probes: tuple[Array, Array], mask: Array) -> Array:
    """x W. The gradients of the two probes are the second moments of x and of the output's gradient over real tokens."""
    del probes, mask
    return x @ weight


def _forward(x: Array, weight: Array, probes: tuple[Array, Array], mask: Array) -> tuple[Array, Any]:
    return x @ weight, (x, weight, mask)


def _backward(saved: Any, g: Array) -> tuple[Any, ...]:
    x, weight, mask = saved
    moments = [jnp.einsum("bli,blj,bl->ij", y, y, mask, preferred_element_type=jnp.float32) for y in (x, g)]
    return g @ weight.T, jnp.zeros_like(weight), tuple(moments), jnp.zeros_like(mask)


_observed.defvjp(_forward, _backward)


def _side(down: Array, up: Array, probes: Any, mask: Array, x: Array) -> Array:
    """The LoRA's side path, observed."""
    first, second = probes
    mask = mask.astype(x.dtype)
    return _observed(_observed(x, down.astype(x.dtype), first, mask), up.astype(x.dtype), second, mask)


@partial(jax.jit, static_argnames="config")
def _moments(config: models.ModelConfig, params: Tree, overlay: Overlay, probes: Tree, ids: Array, mask: Array, classes: Array):
    """A tree like `probes`: sums over rows, tokens and classes of a a^T and of g g^T, g = d/dh of sqrt(p_c) (e_c - p) . logits."""

    def logits(probes: Tree) -> Array:
        edits, flat = overlay.expand(), flatten(probes)
        records = flatten(edits.tree)
        for module in {path.rsplit("/", 1)[0] for path in flat}:
            edit, own = records[f"{module}/edit"], [[flat[f"{module}/{m}_{end}"] for end in ("in", "out")] for m in _MATRICES]
            real = jnp.broadcast_to(mask, (len(edit.down), *mask.shape)).astype(jnp.float32)
            path = jax.tree_util.Partial(_side, edit.down, edit.up, tuple(map(tuple, own)), real)
            records[f"{module}/edit"] = dataclasses.replace(edit, down=None, up=None, path=path)
        return class_logits(config, params, _Fixed(dataclasses.replace(edits, tree=unflatten(records))), ids, mask, classes)

    values, pull = jax.vjp(logits, probes)
    p = jax.nn.softmax(values)

    def one(c: Array, total: Tree) -> Tree:
        slope = jnp.sqrt(p[:, c])[:, None] * (jax.nn.one_hot(c, p.shape[1]) - p)
        return jax.tree.map(jnp.add, total, pull(slope)[0])

    return jax.lax.fori_loop(0, p.shape[1], one, jax.tree.map(jnp.zeros_like, probes))


def _fitted(overlay: Overlay) -> PriorFields:
    if not isinstance(overlay.spec, LaplaceSpec) or not overlay.spec.prior.fitted:
        raise QtjaxError(f"the {overlay.method!r} overlay has no fitted posterior; call fit_laplace first")
    return overlay.spec.prior


def _spectra(overlay: Overlay) -> dict[str, tuple[Array, Array, Array, Array]]:
    """{"<module>/lora_A": (a [N, in], U [N, in, in], s [N, out], V [N, out, out])}: eigenvalues and -vectors of A and S."""
    factors, out = flatten(overlay.frozen), {}
    for path in flatten(overlay.params):
        if f"{path}_in" in factors:
            (a, u), (s, v) = (jnp.linalg.eigh(factors[f"{path}_{end}"]) for end in ("in", "out"))
            out[path] = jnp.maximum(a, 0), u, jnp.maximum(s, 0), v
    return out


def predictive(
    config: models.ModelConfig,
    params: Tree,
    overlay: Overlay,
    input_ids: Any,
    attention_mask: Any,
    classes: Any,
    *,
    method: str = "probit",
    samples: int = 1000,
    key: Array | None = None,
) -> Prediction:
    """Class probabilities under the posterior, by the linearised model: logits ~ N(f, J Lambda^-1 J^T) at each row.

    Args: rows and classes as in `fit_laplace`. method: "probit", softmax(f / sqrt(1 + pi/8 var)); "mc", the mean softmax of
      `samples` draws with `key` (default jax.random.key(0)).
    Raises QtjaxError when the posterior is not fitted.
    """
    precision = _fitted(overlay).prior_precision
    if method not in ("probit", "mc"):
        raise QtjaxError(f"method = {method!r}: must be 'probit' or 'mc'")
    ids, mask, classes = _rows(input_ids, attention_mask, classes)
    mean, covariance = _linearised(config, params, overlay, _spectra(overlay), jnp.float32(precision), ids, mask, classes)
    if method == "probit":
        variance = jnp.diagonal(covariance, axis1=1, axis2=2)
        return Prediction(jax.nn.softmax(mean / jnp.sqrt(1 + jnp.pi / 8 * variance)), mean, covariance)
    key = jax.random.key(0) if key is None else key
    values, vectors = jnp.linalg.eigh(covariance)  # a root that exists for singular covariances too
    root = vectors * jnp.sqrt(jnp.maximum(values, 0))[:, None]
    noise = jax.random.normal(key, (samples, *mean.shape), jnp.float32)
    draws = mean + jnp.einsum("bij,sbj->sbi", root, noise)
    return Prediction(jax.nn.softmax(draws).mean(axis=0), mean, covariance)


@partial(jax.jit, static_argnames="config")
def _linearised(config, params, overlay, spectra, precision, ids, mask, classes):
    def row(one: tuple[Array, Array]) -> tuple[Array, Array]:
        def logits(trained: Tree) -> Array:
            return class_logits(config, params, overlay.replace(params=trained), one[0][None], one[1][None], classes)[0]

        slopes = flatten(jax.jacrev(logits)(overlay.params))
        covariance = 0.0
        for path, (a, u, s, v) in spectra.items():
            turned = jnp.einsum("cnio,nip,noq->cnpq", slopes[path], u, v, precision="highest")
            covariance += jnp.einsum("cnpq,knpq,npq->ck", turned, turned, 1 / (a[:, :, None] * s[:, None] + precision), precision="highest")
        return logits(overlay.params), covariance

    return jax.lax.map(row, (ids, mask))


def with_prior(overlay: Overlay, precision: float) -> Overlay:
    """The fitted overlay with another prior precision; the factors stay."""
    _fitted(overlay)
    return overlay.replace(spec=LaplaceSpec(overlay.spec.lora, PriorFields(float(precision), True)))


def _curvature(overlay: Overlay) -> tuple[np.ndarray, float]:
    """(eigenvalues of A (x) S of all weights, float64, zero for padding; |theta|^2)."""
    products = [np.asarray(a)[:, :, None] * np.asarray(s)[:, None] for a, _, s, _ in _spectra(overlay).values()]
    squared = sum(float((np.asarray(x, np.float64) ** 2).sum()) for x in flatten(overlay.params).values())
    return np.concatenate([x.reshape(-1) for x in products]).astype(np.float64), squared


def evidence_prior(overlay: Overlay, steps: int = 500) -> float:
    """The prior precision at which the evidence is stationary: MacKay's precision = effective parameters / |theta|^2."""
    precision = _fitted(overlay).prior_precision
    curvature, squared = _curvature(overlay)
    for _ in range(steps):
        new = float((curvature / (curvature + precision)).sum() / max(squared, 1e-30))
        if not np.isfinite(new) or new < 1e-12:
            raise QtjaxError("prior = 'evidence': the data say nothing about the adapter (no curvature); use prior = 'fixed'")
        if abs(new - precision) <= 1e-9 * precision:
            break
        precision = new
    return precision


def log_evidence(overlay: Overlay, log_likelihood: float) -> float:
    """Laplace's log marginal likelihood in nats, given the data's log-likelihood at the trained weights (nats, summed).

    log p(D) = log p(D | theta) - (precision |theta|^2 + log det(Lambda / precision)) / 2.
    """
    precision = _fitted(overlay).prior_precision
    curvature, squared = _curvature(overlay)
    return float(log_likelihood - 0.5 * (precision * squared + np.log1p(curvature / precision).sum()))


def calibration_error(probabilities: Any, labels: Any, bins: int = 15) -> float:
    """Expected calibration error, fraction 0-1: over equal bins of the top probability, |accuracy - confidence| weighted by rows.

    Args: probabilities [B, C]; labels int [B], indices into the classes. A bin is (lower, upper]. NaN without rows.
    """
    probabilities, labels = np.asarray(probabilities, np.float64), np.asarray(labels)
    if not len(labels):
        return float("nan")
    confidence, right = probabilities.max(axis=1), probabilities.argmax(axis=1) == labels
    place = np.clip(np.ceil(confidence * bins).astype(int) - 1, 0, bins - 1)
    gaps = [abs((right[place == b] - confidence[place == b]).sum()) for b in range(bins)]
    return float(sum(gaps) / len(labels))
