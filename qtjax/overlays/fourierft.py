"""FourierFT (Gao et al. 2024, arXiv 2405.03003): dW = scaling Re(ifft2(S)), S zero but for n trained values.

S [in, out] holds the spectrum c at n places that all layers of a module share: in torch's layout [out, in] the flat
indices randperm(out in, seed)[:n]. PEFT saves only c and draws the places again from `random_loc_seed`; so do we, in numpy
(torch_random), and keep them as frozen int32 arrays. By default c starts as N(0, 1), so that, as in PEFT, a fresh overlay
is not quite the base; init_weights=True starts from zero.
Since c is real, Re(ifft2(S)) is the inverse transform of (S[p, q] + S[-p, -q]) / 2, which is Hermitian: half of the
spectrum is enough (irfft2).
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.tree_util import Partial

from qtjax.errors import QtjaxError, near_names
from qtjax.models import Edits, LinearEdit
from qtjax.overlays.base import Base, Context, Method
from qtjax.overlays.fields import OFF, Targeted, read_fields, setting, to_peft
from qtjax.overlays.leaves import Leaf, normal, zeros
from qtjax.overlays.sites import Site, Spec, claims, linears_of, needs, resolve_sites
from qtjax.overlays.targets import Linear
from qtjax.overlays.torch_random import permutation
from qtjax.tree import Tree, flatten, unflatten


@dataclass(frozen=True)
class FourierFields(Targeted):
    """n_frequency: trained values of a matrix; n_frequency_pattern: of some, by name or regex; scaling: of dW;
    random_loc_seed: of the places; init_weights: True starts from zero, False from N(0, 1)."""

    n_frequency: int = setting(1000, "int>0")
    scaling: float = setting(150.0, "number")
    random_loc_seed: int = setting(777, "int")
    n_frequency_pattern: tuple[tuple[str, int], ...] = setting((), "pattern:int>0")
    init_weights: bool = setting(False, "bool")


@dataclass(frozen=True)
class FourierSite(Site):
    """A site and each layer's number of frequencies, 0 where it is not edited."""

    counts: tuple[int, ...]


def _matches(key: str, module: str) -> bool:
    """PEFT's test here is stricter than that of rank_pattern: a regex for what follows a dot, or the whole name itself."""
    return key == module or re.match(rf".*\.{key}$", module) is not None


def _read(base: Base, fields: Mapping[str, Any], strict: bool) -> Spec:
    if not strict:
        needs(fields, "n_frequency", "scaling", "random_loc_seed", "target_modules", method="FourierFT")
    settings = read_fields("fourierft", FourierFields, fields, base.linears)
    patterns, sites = settings.n_frequency_pattern, []
    for site in resolve_sites(base, settings, strict):
        modules = [site.linear.module(n) for n in range(site.linear.layers)]
        counts = tuple(
            next((count for key, count in patterns if _matches(key, module)), settings.n_frequency) if hit else 0
            for module, hit in zip(modules, site.hits)
        )
        size = site.linear.inputs * site.linear.outputs
        if max(counts) > size:
            raise QtjaxError(
                f"n_frequency = {max(counts)}: {modules[counts.index(max(counts))]} has {size} values in all; lower"
                f" n_frequency, or set n_frequency_pattern for {site.linear.name!r}"
            )
        sites.append(FourierSite(site.linear, site.hits, counts))
    edited = [site.linear.module(n) for site in sites for n, hit in enumerate(site.hits) if hit]
    for key, _ in patterns if strict else ():
        if not any(_matches(key, module) for module in edited):
            names = sorted({module.rsplit(".", 1)[-1] for module in edited})
            raise QtjaxError(f"n_frequency_pattern: {key!r} matches no edited module{near_names(key, names)}")
    return Spec(settings, tuple(sites))


def places(linear: Linear, count: int, seed: int) -> np.ndarray:
    """int32 [2, count]: the rows (of `in`) and columns (of `out`) of the trained values."""
    flat = permutation(linear.inputs * linear.outputs, count, seed)
    return np.stack([flat % linear.inputs, flat // linear.inputs]).astype(np.int32)


def _site_leaves(spec: Spec, site: FourierSite) -> tuple[Leaf, Leaf]:
    linear, counts, seed = site.linear, site.counts, spec.fields.random_loc_seed

    def drawn(key: Array, shape: tuple[int, ...], base: Mapping[str, Any]) -> Array:
        del key, base
        return jnp.broadcast_to(jnp.asarray(places(linear, shape[-1], seed)), shape)

    start = zeros if spec.fields.init_weights else normal(1.0)
    keys = site.keys("fourierft_spectrum")
    return (
        Leaf(f"{linear.path}/spectrum", tuple((n,) if n else None for n in counts), (None,), keys, start, linear.path),
        Leaf(
            f"{linear.path}/places", tuple((2, n) if n else None for n in counts), (None, None), (None,) * len(counts),
            drawn, linear.path, trained=False, dtype=jnp.int32,
        ),
    )  # fmt: skip


def _leaves(spec: Spec) -> list[Leaf]:
    return [leaf for site in spec.sites for leaf in _site_leaves(spec, site)]


@dataclass(frozen=True)
class _Inverse:
    """Re(ifft2) of a spectrum [n] at places [2, n], as a function that equals another of the same sizes (for jit's cache).

    Places of padding are (0, 0) and their values zero, so values are added, not set.
    """

    inputs: int
    outputs: int

    def __call__(self, spectrum: Array, where: Array) -> Array:
        half = self.outputs // 2 + 1
        dense = jnp.zeros((self.inputs, half), jnp.float32)
        for row, column in (where, (-where[0] % self.inputs, -where[1] % self.outputs)):
            dense = dense.at[row, column].add(spectrum / 2, mode="drop")  # the other half's columns fall outside
        return jnp.fft.irfft2(dense.astype(jnp.complex64), s=(self.inputs, self.outputs))


def _expand(spec: Spec, params: Tree, frozen: Tree, context: Context) -> Edits:
    del context
    flat, fixed, edits = flatten(params), flatten(frozen), {}
    for site in spec.sites:
        spectrum, where = _site_leaves(spec, site)
        values = spectrum.unpadded(flat[spectrum.path]) * spec.fields.scaling
        inverse = _Inverse(site.linear.inputs, site.linear.outputs)
        edits[f"{site.linear.path}/edit"] = LinearEdit(delta=Partial(inverse, values, fixed[where.path]))
    return Edits(unflatten(edits))


def _to_peft(spec: Spec) -> dict[str, Any]:
    return {"peft_type": "FOURIERFT", **to_peft(spec.fields), **OFF}


METHOD = Method(
    fields=FourierFields,
    read=_read,
    leaves=_leaves,
    expand=_expand,
    to_peft=_to_peft,
    claims=claims("FOURIERFT"),
    linears=linears_of,
)
