"""LoKr (Yeh et al. 2023, LyCORIS, arXiv 2309.14859): dW = alpha / r kron(w1, w2), each factor whole or of rank r.

in = i_m i_n and out = o_l o_k by `factorization`; in our layout w1 [i_m, o_l], w2 [i_n, o_k]. As in PEFT, w2 is low rank
when r < max(o_k, i_n) / 2, w1 when decompose_both and r < max(o_l, i_m) / 2, whole otherwise, and alpha / r applies even
when both are whole; so r may exceed any dimension. x dW is computed factor by factor on x as a grid [i_m, i_n]: dW is
never formed and no full weight gradient arises.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.tree_util import Partial

from qtjax.models import Edits, LinearEdit
from qtjax.overlays import lycoris
from qtjax.overlays.base import Base, Context, Method
from qtjax.overlays.fields import read_fields, require, setting, to_peft
from qtjax.overlays.leaves import Init, Leaf, kaiming, zeros
from qtjax.overlays.lycoris import LycorisFields, RankedSite, ranked_sites
from qtjax.overlays.sites import Spec, claims, linears_of, needs
from qtjax.tree import Tree, flatten, unflatten


@dataclass(frozen=True)
class LokrFields(LycorisFields):
    """Those of LycorisFields. decompose_factor: the first factor's size, or -1 for the divisor nearest the square root.
    init_weights: True starts with w1 zero, "lycoris" with w2 zero, False with neither. rank_dropout_scale: the outputs
    that rank_dropout keeps are rescaled to mean 1."""

    rank_dropout_scale: bool = setting(False, "bool")
    decompose_both: bool = setting(False, "bool")
    decompose_factor: int = setting(-1, "int")
    init_weights: bool | str = setting(True, "choice", (True, False, "lycoris"))


def factorization(dimension: int, factor: int) -> tuple[int, int]:
    """PEFT's (m, n), m n = dimension: m is `factor` where that divides, else the divisor, at most `factor` (-1: any),
    that the search for the smallest m + n from below ends at."""
    if factor > 0 and dimension % factor == 0:
        return factor, dimension // factor
    limit = dimension if factor == -1 else factor
    m, n = 1, dimension
    while m < n:
        larger = next(d for d in range(m + 1, dimension + 1) if dimension % d == 0)
        if larger + dimension // larger > dimension + 1 or larger > limit:
            break
        m, n = larger, dimension // larger
    return min(m, n), max(m, n)


def _read(base: Base, fields: Mapping[str, Any], strict: bool) -> Spec:
    if not strict:
        needs(fields, "r", "alpha", "target_modules", method="LoKr")
    settings = read_fields("lokr", LokrFields, fields, base.linears, inert=lycoris.INERT)
    factor = settings.decompose_factor
    require(factor == -1 or factor > 0, "decompose_factor", factor, "must be an integer above 0, or -1 for the square root")
    return Spec(settings, ranked_sites(base, settings, strict))


@dataclass(frozen=True)
class _Factor:
    """w1 or w2 of one site: its two sizes [inputs, outputs], and whether a layer of rank r has it in two parts."""

    name: str
    inputs: int
    outputs: int
    may_split: bool
    zero_whole: bool
    zero_part: str

    def splits(self, rank: int) -> bool:
        return self.may_split and rank < max(self.inputs, self.outputs) / 2

    def leaves(self, site: RankedSite) -> tuple[Leaf, ...]:
        """Whole, or down "_b" [inputs, R] and up "_a" [R, outputs]; both kinds where the layers' ranks say so."""
        i, o = self.inputs, self.outputs

        def init(part: str, otherwise: Init) -> Init:
            return zeros if self.zero_part == part else otherwise

        made = (
            site.factor(self.name, lambda r: None if self.splits(r) else (i, o), zeros if self.zero_whole else kaiming(i)),
            site.factor(f"{self.name}_a", lambda r: (r, o) if self.splits(r) else None, init("a", kaiming(*site.ranks))),
            site.factor(f"{self.name}_b", lambda r: (i, r) if self.splits(r) else None, init("b", kaiming(i))),
        )
        return tuple(leaf for leaf in made if any(leaf.shapes))

    def value(self, site: RankedSite, flat: Mapping[str, Array]) -> Array:
        """[N, inputs, outputs]: of each layer the whole factor or the product of its parts."""
        terms = {leaf.path.rsplit("/", 1)[-1]: leaf.unpadded(flat[leaf.path]) for leaf in self.leaves(site)}
        whole, a, b = (terms.get(name) for name in (self.name, f"{self.name}_a", f"{self.name}_b"))
        if a is None:
            return whole
        product = jnp.matmul(b, a, precision=jax.lax.Precision.HIGHEST)
        return product if whole is None else whole + product


def _factors(spec: Spec, site: RankedSite) -> tuple[_Factor, _Factor]:
    settings, linear = spec.fields, site.linear
    i_m, i_n = factorization(linear.inputs, settings.decompose_factor)
    o_l, o_k = factorization(linear.outputs, settings.decompose_factor)
    first, second = settings.init_weights is True, settings.init_weights == "lycoris"
    return (
        _Factor("lokr_w1", i_m, o_l, settings.decompose_both, first, "a" if first else ""),
        _Factor("lokr_w2", i_n, o_k, True, second, "b" if second else ""),
    )


def _leaves(spec: Spec) -> list[Leaf]:
    return [leaf for site in spec.sites for factor in _factors(spec, site) for leaf in factor.leaves(site)]


def _dropped(first: Array, second: Array, kept: Array, x: Array) -> Array:
    return LinearEdit(kron=(first, second)).side(x) * kept.astype(x.dtype)


def _expand(spec: Spec, params: Tree, frozen: Tree, context: Context) -> Edits:
    del frozen
    flat, edits = flatten(params), {}
    for site in spec.sites:
        first, second = (factor.value(site, flat) for factor in _factors(spec, site))
        kron = (site.scaled(first), second)
        rescale = spec.fields.rank_dropout > 0 and spec.fields.rank_dropout_scale
        kept = lycoris.kept_outputs(spec, site, context.rng, rescale)
        edit = LinearEdit(kron=kron) if kept is None else LinearEdit(path=Partial(_dropped, *kron, kept))
        edits[f"{site.linear.path}/edit"] = edit
    return Edits(unflatten(edits))


METHOD = Method(
    fields=LokrFields,
    read=_read,
    leaves=_leaves,
    expand=_expand,
    to_peft=lambda spec: {"peft_type": "LOKR", **to_peft(spec.fields), "modules_to_save": None, "layers_pattern": None},
    claims=claims("LOKR"),
    linears=linears_of,
    draws=lycoris.draws,
)
