"""LayerNorm tuning (Zhao et al. 2023, arXiv 2312.11420): the RMS norms' scales are trained, as copies beside the base.

As in PEFT all norms are meant unless target_modules says otherwise: input_layernorm, post_attention_layernorm and the
final norm. The copies start from the base's weights, so init_overlay needs its params. PEFT would also copy a linear
module that a rule happens to hit; here a rule that hits anything but norms is refused.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import Array

from qtjax.errors import QtjaxError, near_names
from qtjax.models import Edits, NormEdit
from qtjax.overlays.base import Base, Context, Method, base_array
from qtjax.overlays.fields import Named, read_fields, require, setting, to_peft
from qtjax.overlays.leaves import Leaf
from qtjax.overlays.sites import claims, needs
from qtjax.overlays.targets import ALL_LINEAR, Names, check_excluded, hits, other_modules
from qtjax.tree import Tree, flatten, unflatten

_NORMS = ("input_layernorm", "norm", "post_attention_layernorm")


@dataclass(frozen=True)
class LnTuningFields(Named):
    """target_modules: names of norms, or a regex for whole module names."""

    target_modules: Names = setting(_NORMS, "targets")


@dataclass(frozen=True)
class NormSite:
    """One norm, stacked over the layers or the final one, its size, and in which layers it is trained."""

    path: str
    size: int
    hits: tuple[bool, ...]

    @property
    def stacked(self) -> bool:
        return self.path.startswith("layers/")

    def module(self, layer: int) -> str:
        """HF's name: "model.layers.3.input_layernorm", "model.norm"."""
        return f"model.layers.{layer}.{self.path.removeprefix('layers/')}" if self.stacked else f"model.{self.path}"


@dataclass(frozen=True)
class NormSpec:
    """Settings by PEFT's names, and the norms that they mean for one base model."""

    fields: LnTuningFields
    sites: tuple[NormSite, ...]


def _norms(base: Base) -> list[NormSite]:
    """Every norm of the model, as if all were trained."""
    found = []
    for path in ("layers/input_layernorm", "layers/post_attention_layernorm", "norm"):
        shape = base.leaves[f"{path}/weight"].shape
        found.append(NormSite(path, shape[-1], (True,) * (shape[0] if len(shape) > 1 else 1)))
    return found


def _read(base: Base, fields: Mapping[str, Any], strict: bool) -> NormSpec:
    if not strict:
        needs(fields, "target_modules", method="LN_TUNING")
    given = fields.get("target_modules")
    require(
        not (isinstance(given, str) and given.lower() == ALL_LINEAR), "target_modules", given,
        f"norms are tuned, not linear modules; name some of {', '.join(_NORMS)} or leave it out",
    )  # fmt: skip
    settings = read_fields("ln_tuning", LnTuningFields, fields, base.linears)
    rule, norms = settings.target_modules, _norms(base)
    own = [norm.module(n) for norm in norms for n in range(len(norm.hits))]
    if strict:
        check_excluded(settings.exclude_modules, base.linears)
    for name in rule if strict and isinstance(rule, tuple) else ():
        if not any(hits((name,), module, "target_modules") for module in own):
            raise QtjaxError(
                f"target_modules: {name!r} matches no norm{near_names(name, _NORMS)}; the model has {', '.join(_NORMS)}"
            )
    linears = [linear.module(n) for linear in base.linears for n in range(linear.layers)]
    for module in [*linears, *other_modules(base.linears)]:
        wrong = module not in own and hits(rule, module, "target_modules")
        if wrong and not hits(settings.exclude_modules, module, "exclude_modules"):
            shown = repr(rule) if isinstance(rule, str) else ",".join(rule)
            raise QtjaxError(
                f"target_modules = {shown}: matches {module!r}, which is no norm; name only {', '.join(_NORMS)}"
            )
    sites = []
    for norm in norms:
        where = tuple(
            hits(rule, norm.module(n), "target_modules")
            and not hits(settings.exclude_modules, norm.module(n), "exclude_modules")
            for n in range(len(norm.hits))
        )
        if any(where):
            sites.append(NormSite(norm.path, norm.size, where))
    require(
        bool(sites), "target_modules", rule,
        f"matches no norm; a text is a regex for a whole module name such as {norms[0].module(0)!r}, a list holds names",
    )  # fmt: skip
    return NormSpec(settings, tuple(sites))


def _copy(path: str, key: Array, shape: tuple[int, ...], base: Mapping[str, Any]) -> Array:
    del key, shape
    return base_array(base, path)


def _leaves(spec: NormSpec) -> list[Leaf]:
    leaves = []
    for site in spec.sites:
        keys = tuple(
            f"base_model.model.{site.module(n)}.ln_tuning_layers.weight" if hit else None for n, hit in enumerate(site.hits)
        )
        shapes = tuple((site.size,) if hit else None for hit in site.hits)
        init = partial(_copy, f"{site.path}/weight")
        leaves.append(Leaf(f"{site.path}/weight", shapes, (None,), keys, init, stacked=site.stacked))
    return leaves


def _expand(spec: NormSpec, params: Tree, frozen: Tree, context: Context) -> Edits:
    del frozen, context
    flat, edits = flatten(params), {}
    for site in spec.sites:
        edited = None if all(site.hits) else jnp.asarray(np.asarray(site.hits))
        edits[f"{site.path}/edit"] = NormEdit(flat[f"{site.path}/weight"], edited)
    return Edits(unflatten(edits))


METHOD = Method(
    fields=LnTuningFields,
    read=_read,
    leaves=_leaves,
    expand=_expand,
    to_peft=lambda spec: {"peft_type": "LN_TUNING", **to_peft(spec.fields), "modules_to_save": None},
    claims=claims("LN_TUNING"),
)
