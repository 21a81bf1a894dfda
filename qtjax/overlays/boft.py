"""Butterfly orthogonal fine-tuning (Liu et al. 2024, arXiv 2311.06243): y = s * ((x R) W) + b, R = B_m ... B_2 B_1.

B_i = P_i blockdiag(Cayley((A - A^T) / 2)) P_i^T, full squares A [b, b] trained from zero, s [out] from one. P_i brings
inputs that lie 2^(i-1) half blocks apart into one block, which is a transpose of axes; P_1 = I, so that m = 1 is OFT with
the exact Cayley map. x meets B_m first. As in PEFT the base's bias is not scaled.
PEFT falls back to m = 1 without a word when its CUDA extension does not build (as on every CPU), while the config that it
writes still says m; such a file has one factor per module and loads with boft_n_butterfly_factor set to 1.
Dropout: in one factor, drawn anew each step, blocks are the identity with probability boft_dropout (PEFT takes exactly
int(boft_dropout * blocks) of them, which is none for few blocks).
"""

import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from qtjax.models import Edits, LinearEdit
from qtjax.overlays.base import Base, Context, Method
from qtjax.overlays.fields import OFF, Targeted, read_fields, require, setting, to_peft
from qtjax.overlays.leaves import Leaf, column, filled, normal, zeros
from qtjax.overlays.rotations import cayley, dropped, rotate_blocks
from qtjax.overlays.sites import Site, Spec, claims, linears_of, needs, resolve_sites
from qtjax.tree import Tree, flatten, unflatten


@dataclass(frozen=True)
class BoftFields(Targeted):
    """boft_block_size: inputs per block, or boft_block_num: blocks per module, the other 0 (the number alone is enough).

    boft_n_butterfly_factor: m; each doubles how many inputs mix. boft_dropout: fraction [0, 1) of one factor's blocks that
    rest in a training step. init_weights: False starts A from N(0, 0.1^2) and s from N(1, 0.1^2).
    """

    boft_block_size: int = setting(4, "int>=0")
    boft_block_num: int = setting(0, "int>=0")
    boft_n_butterfly_factor: int = setting(1, "int>0")
    boft_dropout: float = setting(0.0, "[0,1)")
    init_weights: bool = setting(True, "bool")


def _read(base: Base, fields: Mapping[str, Any], strict: bool) -> Spec:
    if not strict:
        needs(fields, "boft_block_size", "boft_block_num", "boft_n_butterfly_factor", "target_modules", method="BOFT")
    elif fields.get("boft_block_num") and fields.get("boft_block_size") is None:
        fields = {**fields, "boft_block_size": 0}
    settings = read_fields("boft", BoftFields, fields, base.linears)
    require(
        (settings.boft_block_size == 0) != (settings.boft_block_num == 0), "boft_block_size", settings.boft_block_size,
        f"exactly one of boft_block_num (= {settings.boft_block_num}) and boft_block_size must be above 0",
    )  # fmt: skip
    sites = resolve_sites(base, settings, strict)
    for site in sites:
        _check_size(site, settings)
    return Spec(settings, sites)


def _check_size(site: Site, settings: BoftFields) -> None:
    name, given = ("boft_block_size", settings.boft_block_size)
    if not given:
        name, given = "boft_block_num", settings.boft_block_num
    inputs, factors = site.linear.inputs, settings.boft_n_butterfly_factor
    require(inputs % given == 0, name, given, f"does not divide the {inputs} inputs of {site.linear.name}; choose a divisor")
    size = _block_size(site, settings)
    require(size > 1, name, given, f"makes blocks of one input at {site.linear.name}, which cannot turn; use larger blocks")
    if factors > 1:
        even = f"makes blocks of {size} inputs at {site.linear.name}; butterflies need even ones"
        require(size % 2 == 0, name, given, even)
        require(
            inputs // size % 2 ** (factors - 1) == 0, "boft_n_butterfly_factor", factors,
            f"needs blocks in a multiple of {2 ** (factors - 1)}, and {site.linear.name} has {inputs // size}; use fewer"
            " factors or smaller blocks",
        )  # fmt: skip


def _block_size(site: Site, settings: BoftFields) -> int:
    return settings.boft_block_size or site.linear.inputs // settings.boft_block_num


def _about_one(key: Array, shape: tuple[int, ...], base: Mapping[str, Any]) -> Array:
    return 1 + normal(0.1)(key, shape, base)


def _leaves(spec: Spec) -> list[Leaf]:
    """boft_R [m, blocks, b, b], not sharded (the number of blocks need not divide), and boft_s [out]."""
    own, leaves = spec.fields, []
    for site in spec.sites:
        size = _block_size(site, own)
        shape = (own.boft_n_butterfly_factor, site.linear.inputs // size, size, size)
        first, scale = (zeros, filled(1.0)) if own.init_weights else (normal(0.1), _about_one)
        leaves.append(site.leaf("boft_R", shape, (None,) * 4, "boft_R", init=first))
        leaves.append(site.leaf("boft_s", (site.linear.outputs,), ("out",), "boft_s", init=scale, **column()))
    return leaves


def butterfly(blocks: Array, x: Array) -> Array:
    """x B_m ... B_1: x [..., in], blocks [m, J, b, b] orthogonal."""
    factors, half = blocks.shape[0], blocks.shape[-1] // 2
    for n in reversed(range(factors)):
        if n == 0:
            x = rotate_blocks(blocks[0], x)
            continue
        # Half blocks (side, place) in every group of 2^n blocks: P_i exchanges the two axes, P_i^T exchanges them back.
        apart = x.reshape(*x.shape[:-1], -1, 2, 2**n, half)
        together = jnp.swapaxes(apart, -3, -2)
        turned = rotate_blocks(blocks[n], together.reshape(x.shape)).reshape(together.shape)
        x = jnp.swapaxes(turned, -3, -2).reshape(x.shape)
    return x


def _expand(spec: Spec, params: Tree, frozen: Tree, context: Context) -> Edits:
    del frozen
    flat, edits, rate = flatten(params), {}, spec.fields.boft_dropout
    for site in spec.sites:
        path = site.linear.path
        squares = flat[f"{path}/boft_R"]
        blocks = cayley((squares - jnp.swapaxes(squares, -1, -2)) / 2)
        if context.rng is not None and rate > 0:
            which, gone = jax.random.split(jax.random.fold_in(context.rng, zlib.crc32(path.encode())))
            resting = jax.random.randint(which, blocks.shape[:1], 0, blocks.shape[1])[:, None] == jnp.arange(blocks.shape[1])
            blocks = jnp.where(resting[..., None, None, None], dropped(gone, blocks, rate), blocks)
        edits[f"{path}/edit"] = LinearEdit(
            rotation=jax.tree_util.Partial(butterfly, blocks), post=site.elsewhere(flat[f"{path}/boft_s"], 1)
        )
    return Edits(unflatten(edits))


def _to_peft(spec: Spec) -> dict[str, Any]:
    return {"peft_type": "BOFT", **to_peft(spec.fields), **OFF}


METHOD = Method(
    fields=BoftFields,
    read=_read,
    leaves=_leaves,
    expand=_expand,
    to_peft=_to_peft,
    claims=claims("BOFT"),
    linears=linears_of,
    draws=lambda spec: spec.fields.boft_dropout > 0,
)
