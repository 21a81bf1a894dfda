"""How much attention an answer token gets from later ones: chosen rows of chosen layers, some rows at a time.

FastV (arXiv 2403.06764) and SparseVLM (arXiv 2410.04417) rate the image tokens of a prompt by the attention that text pays
them. Here answers are rated, and under a causal mask no prompt row sees an answer: what rates an answer token (a target)
is the attention of the LATER targets of its segment, averaged over heads.
B batch, L slots (virtual tokens in front included), S key slots (a prefix in front included), N layers, R rows at a time,
H query heads, K key/value heads, C head dim, D model.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from qtjax.errors import QtjaxError, near_names

ROWS_AT_A_TIME = 64  # the largest array is [B, H, 64, S], float32: 1/32 of a layer's own attention weights at L = 2048


class _Rater(NamedTuple):
    depths: Callable[[int], set[int]]  # of N layers those that rate, 0 to N - 1
    last_row_only: bool  # of a segment's targets only the last one pays attention
    by_similarity: bool  # attention counts as much as the two tokens' hidden states are alike


# SparseVLM prunes at layers 2, 6 and 15 of LLaVA's 32, counted from 0: the same depths of N layers, rounded half to even.
_RATERS = {
    "fastv": _Rater(lambda layers: {layers - 1}, last_row_only=True, by_similarity=False),
    "sparsevlm": _Rater(lambda layers: {round(layers * depth / 32) for depth in (2, 6, 15)}, False, True),
}
RATERS = tuple(_RATERS)


def check_rater(rater: str, targets: Array, shape: tuple[int, ...]) -> None:
    """Raises QtjaxError for a rater that is not known or targets that are not bool [B, L]."""
    if rater not in _RATERS:
        raise QtjaxError(f"rater {rater!r} is not known, known: {', '.join(RATERS)}{near_names(rater, RATERS)}")
    if targets.dtype != bool or targets.shape != shape:
        raise QtjaxError(f"targets: must be bool {list(shape)} like input_ids, got {targets.dtype} {list(targets.shape)}")


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["layers", "order", "count", "blocks", "last", "share"],
    meta_fields=["by_similarity"],
)
@dataclass(frozen=True)
class Plan:
    """Which layers and rows rate whom; the same for all layers of one forward pass.

    layers: bool [N], those that rate. order: int32 [B, L], slots, the `count` int32 [B] rows that pay attention first.
    blocks: int32 [], how often R of them hold all rows. last: bool [B, L], the last target of its segment. share: float32
    [B, L], what a unit of attention adds to a target's rating: 1 / (rows that pay it x layers that rate), 0 elsewhere.
    """

    layers: Array
    order: Array
    count: Array
    blocks: Array
    last: Array
    share: Array
    by_similarity: bool


def plan(rater: str, num_layers: int, targets: Array, segment: Array) -> Plan:
    """Args: targets bool [B, L], none where segment int [B, L] is 0."""
    spec = _RATERS[rater]
    depths = spec.depths(num_layers)
    later = jax.vmap(_later_targets)(targets, segment)
    last = targets & (later == 0)
    rows = last if spec.last_row_only else targets
    payers = 1 if spec.last_row_only else jnp.maximum(later, 1)  # the last one, whom no later row sees, pays itself
    count = rows.sum(axis=-1, dtype=jnp.int32)
    return Plan(
        layers=jnp.isin(jnp.arange(num_layers), jnp.array(sorted(depths))),
        order=jnp.argsort(~rows, axis=-1, stable=True).astype(jnp.int32),
        count=count,
        blocks=(count.max(initial=0) + ROWS_AT_A_TIME - 1) // ROWS_AT_A_TIME,
        last=last,
        share=jnp.where(targets, 1 / (len(depths) * payers), 0).astype(jnp.float32),
        by_similarity=spec.by_similarity,
    )


def _later_targets(targets_L: Array, segment_L: Array) -> Array:
    """int32 [L]: how many targets of a slot's own segment come after it, without comparing all slots with all."""
    by_segment = jnp.argsort(segment_L, stable=True)
    sorted_L, running_L = segment_L[by_segment], jnp.cumsum(targets_L[by_segment], dtype=jnp.int32)
    end_L = jnp.searchsorted(sorted_L, sorted_L, side="right") - 1
    return jnp.zeros_like(running_L).at[by_segment].set(running_L[end_L] - running_L)


def attention_paid(plan: Plan, rates: Array, x: Array, q: Array, k: Array, mask: Array) -> Array:
    """One layer's part of the rating: float32 [B, L], 0 where no target stands, and everywhere unless `rates` (bool []).

    Args: x [B, L, D]: the hidden states that enter the layer; q [B, L, H, C], k [B, S, K, C], mask bool [B, 1, L, S]:
    what attention itself reads. The last L of the key slots are the rows' own. No gradient passes.
    """
    x, q, k = (jax.lax.stop_gradient(array) for array in (x, q, k))
    return jax.lax.cond(rates, _paid, lambda plan, x, *_: jnp.zeros(x.shape[:2], jnp.float32), plan, x, q, k, mask)


def _paid(plan: Plan, x: Array, q: Array, k: Array, mask: Array) -> Array:
    (batch, length), heads, kv_heads = x.shape[:2], q.shape[2], k.shape[2]
    size = min(ROWS_AT_A_TIME, length)
    order = jnp.pad(plan.order, ((0, 0), (0, -length % size)))
    slots = jnp.arange(length, dtype=jnp.int32)
    exact = partial(jnp.einsum, precision=jax.lax.Precision.HIGHEST, preferred_element_type=jnp.float32)
    if plan.by_similarity:
        norms = jnp.maximum(jnp.sqrt(jnp.sum(jnp.square(x.astype(jnp.float32)), axis=-1)), 1e-30)

    def block(n: Array, total: Array) -> Array:
        row_BR = jax.lax.dynamic_slice_in_dim(order, n * size, size, axis=1)
        real_BR = n * size + jnp.arange(size) < plan.count[:, None]

        def of_rows(array: Array) -> Array:
            return jnp.take_along_axis(array, row_BR.reshape(batch, size, *[1] * (array.ndim - 2)), axis=1)

        q_BRKGC = of_rows(q).reshape(batch, size, kv_heads, heads // kv_heads, q.shape[-1])
        logits = exact("brkgc,bskc->bkgrs", q_BRKGC, k) * q.shape[-1] ** -0.5
        logits = jnp.where(of_rows(mask[:, 0])[:, None, None], logits, jnp.finfo(jnp.float32).min)
        paid_BRL = jax.nn.softmax(logits, axis=-1).mean(axis=(1, 2))[..., -length:]
        if plan.by_similarity:
            cosine = exact("brd,bld->brl", of_rows(x), x) / (of_rows(norms)[..., None] * norms[:, None, :])
            paid_BRL *= jnp.maximum(cosine, 0)
        pays = (slots < row_BR[..., None]) | ((slots == row_BR[..., None]) & of_rows(plan.last)[..., None])
        return total + jnp.where(pays & real_BR[..., None], paid_BRL, 0).sum(axis=1)

    total = jax.lax.fori_loop(0, plan.blocks, block, jnp.zeros((batch, length), jnp.float32))
    return jnp.where(plan.share > 0, total * plan.share, 0)
