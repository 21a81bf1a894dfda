"""(IA)^3 (Liu et al. 2022, arXiv 2205.05638): y = l * (x W + b), or (l * x) W + b at feed-forward modules; l starts at one.

As in PEFT the base's bias is scaled with the output, and layers are chosen through names or a regex only. PEFT takes a
name of feedforward_modules as the end of a module's name without a dot before it, and so do we.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from qtjax.errors import near_names
from qtjax.models import Edits, LinearEdit
from qtjax.overlays.base import Base, Context, Method
from qtjax.overlays.fields import Named, read_fields, require, setting, to_peft
from qtjax.overlays.leaves import Leaf, column, filled, normal, row
from qtjax.overlays.sites import Site, Spec, claims, linears_of, needs, resolve_sites
from qtjax.overlays.targets import Names, hits
from qtjax.tree import Tree, flatten, unflatten

_FEEDFORWARD = "down_proj"


@dataclass(frozen=True)
class Ia3Fields(Named):
    """feedforward_modules: which of target_modules scale their input; default those named down_proj.

    init_ia3_weights: False starts from N(0, 1), which is no identity.
    """

    target_modules: Names = setting(("down_proj", "k_proj", "v_proj"), "targets")
    feedforward_modules: Names | None = setting(None, "names")
    init_ia3_weights: bool = setting(True, "bool")


@dataclass(frozen=True)
class Ia3Spec(Spec):
    """ahead: per site, in which of its layers the vector stands before the product."""

    ahead: tuple[bool, ...]


def _read(base: Base, fields: Mapping[str, Any], strict: bool) -> Ia3Spec:
    if not strict:
        needs(fields, "target_modules", method="IA3")
    settings = read_fields("ia3", Ia3Fields, fields, base.linears)
    targets = settings.target_modules
    if fields.get("feedforward_modules") is None:
        named = targets if isinstance(targets, tuple) else (_FEEDFORWARD,)
        ahead = tuple(name for name in named if name.rsplit(".", 1)[-1] == _FEEDFORWARD)
        settings = replace(settings, feedforward_modules=ahead or None)
    elif isinstance(settings.feedforward_modules, tuple) and isinstance(targets, tuple):
        for name in settings.feedforward_modules:
            require(
                name in targets, "feedforward_modules", name,
                f"must be one of target_modules, {', '.join(targets)}{near_names(name, targets)}",
            )  # fmt: skip
    sites = resolve_sites(base, settings, strict)
    return Ia3Spec(settings, sites, tuple(_ahead(site, settings.feedforward_modules) for site in sites))


def _ahead(site: Site, feedforward: Names | None) -> bool:
    """Whether the vector of this module scales its input."""
    modules = [site.linear.module(n) for n, hit in enumerate(site.hits) if hit]
    if isinstance(feedforward, str):
        found = {hits(feedforward, module, "feedforward_modules") for module in modules}
    else:
        found = {any(module.endswith(name) for name in feedforward or ()) for module in modules}
    require(
        len(found) == 1, "feedforward_modules", feedforward,
        f"scales the input of {site.linear.name} in some layers and its output in others; one overlay does one of them",
    )  # fmt: skip
    return found.pop()


def _leaves(spec: Ia3Spec) -> list[Leaf]:
    init, leaves = filled(1.0) if spec.fields.init_ia3_weights else normal(1.0), []
    for site, ahead in zip(spec.sites, spec.ahead):
        size, axis = (site.linear.inputs, "in") if ahead else (site.linear.outputs, "out")
        leaves.append(site.leaf("ia3_l", (size,), (axis,), "ia3_l", init=init, **(row() if ahead else column())))
    return leaves


def _expand(spec: Ia3Spec, params: Tree, frozen: Tree, context: Context) -> Edits:
    del frozen, context
    flat, edits = flatten(params), {}
    for site, ahead in zip(spec.sites, spec.ahead):
        vector = site.elsewhere(flat[f"{site.linear.path}/ia3_l"], 1)
        edits[f"{site.linear.path}/edit"] = LinearEdit(pre=vector) if ahead else LinearEdit(post=vector, scales_bias=True)
    return Edits(unflatten(edits))


def _to_peft(spec: Ia3Spec) -> dict[str, Any]:
    out = {"peft_type": "IA3", **to_peft(spec.fields), "fan_in_fan_out": False, "modules_to_save": None}
    return out | {"feedforward_modules": out["feedforward_modules"] or []}  # PEFT takes null for its default


METHOD = Method(
    fields=Ia3Fields,
    read=_read,
    leaves=_leaves,
    expand=_expand,
    to_peft=_to_peft,
    claims=claims("IA3"),
    linears=linears_of,
)
