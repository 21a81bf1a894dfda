"""Orthogonal fine-tuning (Qiu et al. 2023, arXiv 2306.07280; input-centric form 2506.19847): y = (x R) W + b.

R is block-diagonal, each block the Cayley map of a skew-symmetric Q whose upper triangle is trained from zero. As in
PEFT the default is a truncated Cayley-Neumann series, about I + 2 Q, and use_cayley_neumann=False the exact map,
about I - 2 Q: the two turn in opposite directions, so an adapter means something only under the setting that it was
trained with. COFT (coft, eps) keeps each block's Q within a ball; PEFT writes the projection into the weights at every
forward pass, which is the forward pass below with a projection after each optimizer step.
PEFT 0.21 declares module_dropout for OFT and does not apply it; here a block is the identity with that probability.
"""

import math
import re
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from qtjax.errors import QtjaxError
from qtjax.models import Edits, LinearEdit
from qtjax.overlays.base import Base, Context, Method
from qtjax.overlays.fields import OFF, Targeted, read_fields, require, setting, to_peft
from qtjax.overlays.leaves import Leaf, normal, zeros
from qtjax.overlays.rotations import cayley, cayley_neumann, dropped, rotate_blocks, skew
from qtjax.overlays.sites import Site, Spec, claims, linears_of, needs, resolve_sites
from qtjax.tree import Tree, flatten, unflatten

# The version whose series is computed here: PEFT changed it in 0.18 and warns about a file that does not say.
_SERIES_OF = "0.21.2"


@dataclass(frozen=True)
class OftFields(Targeted):
    """oft_block_size: inputs per block, or r: blocks per module, the other 0 (r alone is enough when making one).

    block_share: one block for all of a module. coft, eps: Frobenius norm of a block's Q at most eps / sqrt(blocks).
    num_cayley_neumann_terms: 2 or more. module_dropout: fraction [0, 1) of blocks that rest in a training step; a shared
    block never does. init_weights: False starts from N(0, 0.1^2).
    """

    r: int = setting(0, "int>=0")
    oft_block_size: int = setting(32, "int>=0")
    use_cayley_neumann: bool = setting(True, "bool")
    num_cayley_neumann_terms: int = setting(5, "int>0")
    block_share: bool = setting(False, "bool")
    coft: bool = setting(False, "bool")
    eps: float = setting(6e-5, "number>0")
    module_dropout: float = setting(0.0, "[0,1)")
    init_weights: bool = setting(True, "bool")


@dataclass(frozen=True)
class OftSpec(Spec):
    """sizes: the block size of each site."""

    sizes: tuple[int, ...]


def _read(base: Base, fields: Mapping[str, Any], strict: bool) -> OftSpec:
    if not strict:
        needs(fields, "r", "oft_block_size", "use_cayley_neumann", "target_modules", method="OFT")
        _check_series(fields)
    elif fields.get("r") and fields.get("oft_block_size") is None:
        fields = {**fields, "oft_block_size": 0}
    settings = read_fields("oft", OftFields, fields, base.linears)
    require(
        (settings.r == 0) != (settings.oft_block_size == 0), "oft_block_size", settings.oft_block_size,
        f"exactly one of r (= {settings.r}) and oft_block_size must be above 0",
    )  # fmt: skip
    require(
        settings.num_cayley_neumann_terms >= 2, "num_cayley_neumann_terms", settings.num_cayley_neumann_terms,
        "one term is the identity and trains nothing; at least 2, better 5",
    )  # fmt: skip
    sites = resolve_sites(base, settings, strict)
    return OftSpec(settings, sites, tuple(_block_size(site, settings, strict, sites) for site in sites))


def _check_series(fields: Mapping[str, Any]) -> None:
    """Refuses a file of a PEFT whose Cayley-Neumann series was another one; PEFT reads it with a warning."""
    version = str(fields.get("peft_version") or "")
    numbers = re.match(r"(\d+)\.(\d+)", version)
    if fields["use_cayley_neumann"] and (numbers is None or tuple(map(int, numbers.groups())) < (0, 18)):
        raise QtjaxError(
            f"peft_version = {fields.get('peft_version')!r}: before 0.18 PEFT computed the Neumann series differently,"
            " so the adapter would mean something else here; train it again, or write the version that it was trained with"
        )


def _block_size(site: Site, settings: OftFields, strict: bool, sites: tuple[Site, ...]) -> int:
    """The site's block size. In a file a size that does not divide means the nearest one that does, as in PEFT."""
    name, given = ("r", settings.r) if settings.r else ("oft_block_size", settings.oft_block_size)
    inputs = site.linear.inputs
    divides = inputs % given == 0
    if strict and not divides:
        common = math.gcd(*(other.linear.inputs for other in sites))
        fitting = [n for n in range(2, common) if common % n == 0]
        require(
            False, name, given,
            f"does not divide the {inputs} inputs of {site.linear.name}; these divide all targets':"
            f" {', '.join(map(str, fitting))}",
        )  # fmt: skip
    count = given if divides else _nearest_divisor(inputs, given)
    size = inputs // count if settings.r else count
    require(size > 1, name, given, f"makes blocks of one input at {site.linear.name}, which cannot turn; use larger blocks")
    return size


def _nearest_divisor(number: int, wanted: int) -> int:
    """The divisor of `number` nearest to `wanted`, the smaller of two."""
    return min((n for n in range(1, number + 1) if number % n == 0), key=lambda n: (abs(n - wanted), n))


def _leaves(spec: OftSpec) -> list[Leaf]:
    """oft_R [blocks or 1, b (b - 1) / 2]. It is small, and the number of blocks need not divide, so it is not sharded."""
    init, leaves = zeros if spec.fields.init_weights else normal(0.1), []
    for site, size in zip(spec.sites, spec.sizes):
        shape = (1 if spec.fields.block_share else site.linear.inputs // size, size * (size - 1) // 2)
        leaves.append(site.leaf("oft_R", shape, (None, None), "oft_R.weight", init=init))
    return leaves


def _projected(upper: Array, eps: float) -> Array:
    """Every block's Q [N, J, b (b - 1) / 2] scaled back to Frobenius norm eps / sqrt(J) where it is longer."""
    square = 2 * jnp.sum(upper * upper, axis=-1, keepdims=True)  # each value stands twice in Q
    limit = eps / math.sqrt(upper.shape[-2])
    return jnp.where(square > limit**2, upper * (limit * jax.lax.rsqrt(jnp.maximum(square, limit**2))), upper)


def _expand(spec: OftSpec, params: Tree, frozen: Tree, context: Context) -> Edits:
    del frozen
    flat, edits, own = flatten(params), {}, spec.fields
    for site, size in zip(spec.sites, spec.sizes):
        path = site.linear.path
        upper = flat[f"{path}/oft_R"]
        if own.coft:  # the gradient is that at the projected point, straight through
            upper = jax.lax.stop_gradient(_projected(upper, own.eps)) + (upper - jax.lax.stop_gradient(upper))
        q = skew(upper, size)
        blocks = cayley_neumann(q, own.num_cayley_neumann_terms) if own.use_cayley_neumann else cayley(q)
        if context.rng is not None and own.module_dropout > 0 and not own.block_share:
            blocks = dropped(jax.random.fold_in(context.rng, zlib.crc32(path.encode())), blocks, own.module_dropout)
        edits[f"{path}/edit"] = LinearEdit(rotation=jax.tree_util.Partial(rotate_blocks, blocks))
    return Edits(unflatten(edits))


def _after_step(spec: OftSpec, params: Tree, state: Tree, gradients: Tree | None, step: Array) -> tuple[Tree, Tree]:
    """COFT's projection of the new values."""
    del gradients, step
    return (jax.tree.map(lambda x: _projected(x, spec.fields.eps), params) if spec.fields.coft else params), state


def _to_peft(spec: OftSpec) -> dict[str, Any]:
    return {"peft_type": "OFT", "peft_version": _SERIES_OF, **to_peft(spec.fields), **OFF}


METHOD = Method(
    fields=OftFields,
    read=_read,
    leaves=_leaves,
    expand=_expand,
    to_peft=_to_peft,
    claims=claims("OFT"),
    linears=linears_of,
    draws=lambda spec: spec.fields.module_dropout > 0 and not spec.fields.block_share,
    after_step=_after_step,
)
