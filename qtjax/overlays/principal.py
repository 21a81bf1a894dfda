"""Initial factors A0, B0 taken from the base weight itself, with the base left as it is.

PiSSA (Meng et al. 2024, arXiv 2404.02948): W = U S V^T, A0 = U_r sqrt(S_r / s), B0 = sqrt(S_r / s) V_r^T, so that s A0 B0 is
the best rank-r part of W; "pissa_niter_N" finds it by N rounds of subspace iteration. OLoRA (Buyukakyuz 2024, arXiv
2406.01775): W^T = Q R, A0 = (first r rows of R)^T, B0 = (first r columns of Q)^T. Orthogonal: A = G Q_odd / 10 and
B = Q_even^T H / 10 with Gaussian G, H and the odd and even rows of one orthogonal Q, whose product is zero.

PEFT subtracts s A0 B0 from the base weights. Here A0 and B0 are frozen arrays of the overlay, W_eff = W + s (A B - A0 B0),
which is the same function; dropout acts on x A B alone, as there. For PEFT the adapter is saved as what it is on an
untouched base: [A, A0] and [B; -B0] of rank 2r at the same scale, the form of PEFT's own conversion.
"""

import math
import re
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from qtjax.errors import QtjaxError

_SUBSPACE = re.compile(r"pissa_niter_([1-9][0-9]*)")


def subtracts(init: bool | str) -> bool:
    """Whether this init_lora_weights starts from factors of the base weight."""
    return isinstance(init, str) and (init in ("pissa", "olora") or _SUBSPACE.fullmatch(init) is not None)


def factors(init: str, kernel: Array, rank: int, scales: Array, key: Array) -> tuple[Array, Array]:
    """A [N, in, rank] and B [N, rank, out] of stacked kernels [N, in, out], one layer at a time, float32.

    Args: scales [N]: s of each layer; 0 in layers that are not edited, whose factors mean nothing.
    """
    scales = jnp.where(scales == 0, 1, scales)
    if init == "olora":
        own = partial(_qr, rank=rank)
    else:
        rounds = _SUBSPACE.fullmatch(init)
        own = partial(_svd, rank=rank, rounds=None if rounds is None else int(rounds[1]))
    return jax.lax.map(lambda one: own(*one), (kernel, scales, jax.random.split(key, kernel.shape[0])))


def _svd(w: Array, scale: Array, key: Array, *, rank: int, rounds: int | None) -> tuple[Array, Array]:
    exact = partial(jnp.matmul, precision=jax.lax.Precision.HIGHEST)
    if rounds is None:
        left, values, right = jnp.linalg.svd(w, full_matrices=False)
    else:  # Halko, Martinsson, Tropp 2009, algorithm 4.4
        basis = jnp.linalg.qr(exact(w, jax.random.normal(key, (w.shape[1], rank))))[0]
        for _ in range(rounds):
            basis = jnp.linalg.qr(exact(w, jnp.linalg.qr(exact(w.T, basis))[0]))[0]
        left, values, right = jnp.linalg.svd(exact(basis.T, w), full_matrices=False)
        left = exact(basis, left)
    root = jnp.sqrt(values[:rank] / scale)
    return left[:, :rank] * root, root[:, None] * right[:rank]


def _qr(w: Array, scale: Array, key: Array, *, rank: int) -> tuple[Array, Array]:
    del scale, key
    q, r = jnp.linalg.qr(w.T)
    return r[:rank].T, q[:, :rank].T


def orthogonal(key: Array, layers: int, inputs: int, outputs: int, rank: int) -> tuple[Array, Array]:
    """A [layers, inputs, rank] and B [layers, rank, outputs] whose product is zero up to rounding, float32."""
    exact = partial(jnp.matmul, precision=jax.lax.Precision.HIGHEST)

    def own(key: Array) -> tuple[Array, Array]:
        turn, first, second = jax.random.split(key, 3)
        q = jnp.linalg.qr(jax.random.normal(turn, (rank, rank)))[0]
        a = exact(jax.random.normal(first, (inputs, rank // 2)), q[0::2]) / 10
        return a, exact(q[1::2].T, jax.random.normal(second, (rank // 2, outputs))) / 10

    return jax.lax.map(own, jax.random.split(key, layers))


def check_init(init: bool | str, ranks: list[int], scales: list[float]) -> None:
    """Raises QtjaxError where these ranks and scales do not go with the initialisation."""
    if init == "orthogonal":
        odd = [rank for rank in ranks if rank % 2]
        if odd or len(set(ranks)) > 1:
            what = f"r = {odd[0]}: must be even" if odd else "rank_pattern: must be empty"
            raise QtjaxError(f"{what} with init_lora_weights = 'orthogonal'")
    if subtracts(init) and init != "olora" and min(scales) <= 0:
        raise QtjaxError(f"lora_alpha: must be above 0 with init_lora_weights = {init!r}")


def joined(a: Any, b: Any, a0: Any, b0: Any) -> tuple[Any, Any]:
    """[A, A0] [..., in, 2r] and [B; -B0] [..., 2r, out]."""
    return jnp.concatenate([a, a0], axis=-1), jnp.concatenate([b, -b0], axis=-2)


def converted_file(tensors: Mapping[str, Any]) -> dict[str, Any]:
    """PEFT's tensors of rank 2r from those that stand apart, in torch's layouts A [r, in], B [out, r].

    The embedding, which has no initial factors, is filled up with zeros, since one r holds for the whole file.
    """
    out = {key: value for key, value in tensors.items() if not key.endswith(("initial_A.weight", "initial_B.weight"))}
    for a in [key for key in out if key.endswith(("lora_A.weight", "lora_embedding_A"))]:
        b = f"{a.removesuffix('_A')}_B" if a.endswith("_A") else f"{a.removesuffix('lora_A.weight')}lora_B.weight"
        a0, b0 = (
            tensors[key.replace("lora_", "initial_")] if key.endswith(".weight") else np.zeros_like(out[key])
            for key in (a, b)
        )
        out[a], out[b] = np.concatenate([out[a], a0], axis=0), np.concatenate([out[b], -b0], axis=1)
    return out


def converted_fields(fields: Any) -> Any:
    """LoRA's settings for the joined factors: twice the rank, alpha so that every scale stays, the usual start."""
    factor = math.sqrt(2) if fields.use_rslora else 2
    return replace(
        fields, r=2 * fields.r, lora_alpha=factor * fields.lora_alpha, init_lora_weights=True,
        rank_pattern=tuple((key, 2 * rank) for key, rank in fields.rank_pattern),
        alpha_pattern=tuple((key, factor * alpha) for key, alpha in fields.alpha_pattern),
    )  # fmt: skip
