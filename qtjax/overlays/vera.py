"""VeRA (Kopiczko et al. 2023, arXiv 2310.11454): y = x W + lambda_b o ((lambda_d o (dropout(x) A)) B), lambdas trained.

A [max in, R] and B [R, max out] are random, frozen and shared by all layers and modules, each of which takes their first
rows or columns; one copy exists, whatever the number of layers. They are torch's draws of `projection_prng_key`, bit for
bit (torch_random). With save_projection (the default) they stand in the file and a file's own are used; without it they
are drawn again when an adapter is read. lambda_d starts at d_initial, lambda_b at zero.
"""

import functools
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import Array

from qtjax.models import Edits, LinearEdit
from qtjax.overlays.base import Base, Context, Method
from qtjax.overlays.fields import OFF, Targeted, read_fields, require, setting, to_peft
from qtjax.overlays.leaves import Init, Leaf, filled, normal, transposed, zeros
from qtjax.overlays.sites import Spec, claims, layer_keys, linears_of, needs, resolve_sites
from qtjax.overlays.torch_random import generator, uniform
from qtjax.tree import Tree, flatten, unflatten


@dataclass(frozen=True)
class VeraFields(Targeted):
    """r: rank of the shared projections, of any size; vera_dropout: fraction of the side path's input dropped in training;
    init_weights: False starts from lambda_d ~ N(0, 1) and lambda_b = 1."""

    r: int = setting(256, "int>0")
    projection_prng_key: int = setting(0, "int")
    save_projection: bool = setting(True, "bool")
    vera_dropout: float = setting(0.0, "[0,1)")
    d_initial: float = setting(0.1, "number")
    init_weights: bool = setting(True, "bool")


def _read(base: Base, fields: Mapping[str, Any], strict: bool) -> Spec:
    if not strict:
        needs(fields, "r", "projection_prng_key", "target_modules", method="VeRA")
    settings = read_fields("vera", VeraFields, fields, base.linears)
    rule = "PEFT's VeRA has no such field; name only the wanted target_modules"
    require(settings.exclude_modules is None, "exclude_modules", settings.exclude_modules, rule)
    return Spec(settings, resolve_sites(base, settings, strict))


@functools.lru_cache(maxsize=1)
def projections(seed: int, rank: int, inputs: int, outputs: int) -> tuple[np.ndarray, np.ndarray]:
    """A [inputs, rank] and B [rank, outputs], float32: U(+-sqrt(6 / fan_in)) in torch's layouts, A's draws first."""
    state = generator(seed)
    gain = math.sqrt(3.0) * math.sqrt(2)
    a = uniform(state, (rank, inputs), gain / math.sqrt(inputs))
    b = uniform(state, (outputs, rank), gain / math.sqrt(rank))
    return a.T, b.T


def _leaves(spec: Spec) -> list[Leaf]:
    settings, leaves = spec.fields, []
    inputs, outputs = (max(getattr(linear, size) for linear in spec.linears) for size in ("inputs", "outputs"))

    def drawn(which: int) -> Init:
        return lambda key, shape, base: jnp.asarray(
            projections(settings.projection_prng_key, settings.r, inputs, outputs)[which]
        )

    for which, (name, shape) in enumerate((("vera_A", (inputs, settings.r)), ("vera_B", (settings.r, outputs)))):
        key = f"base_model.{name}" if settings.save_projection else None
        more = transposed(trained=False, stacked=False)
        leaves.append(Leaf(name, (shape,), (None, None), (key,), drawn(which), **more))
    start = (filled(settings.d_initial), zeros) if settings.init_weights else (normal(1.0), filled(1.0))
    for site in spec.sites:
        leaves.append(site.leaf("lambda_d", (settings.r,), (None,), "vera_lambda_d", init=start[0]))
        leaves.append(site.leaf("lambda_b", (site.linear.outputs,), ("out",), "vera_lambda_b", init=start[1]))
    return leaves


def _expand(spec: Spec, params: Tree, frozen: Tree, context: Context) -> Edits:
    flat, rate = flatten(params), spec.fields.vera_dropout
    a, b = frozen["vera_A"], frozen["vera_B"]
    own: dict[str, LinearEdit] = {}
    shared: dict[str, LinearEdit] = {}
    for site in spec.sites:
        linear, place = site.linear, f"{site.linear.path}/edit"
        keys: Array | None = layer_keys(context.rng, linear) if context.rng is not None and rate > 0 else None
        lambdas = {"mid": flat[f"{linear.path}/lambda_d"], "out": flat[f"{linear.path}/lambda_b"]}
        own[place] = LinearEdit(**lambdas, dropout_key=keys, dropout_rate=rate)
        shared[place] = LinearEdit(down=a[: linear.inputs], up=b[:, : linear.outputs])
    return Edits(unflatten(own), unflatten(shared))


def _to_peft(spec: Spec) -> dict[str, Any]:
    fields = to_peft(spec.fields)
    del fields["exclude_modules"]
    return {"peft_type": "VERA", **fields, **OFF}


METHOD = Method(
    fields=VeraFields,
    read=_read,
    leaves=_leaves,
    expand=_expand,
    to_peft=_to_peft,
    claims=claims("VERA"),
    linears=linears_of,
    draws=lambda spec: spec.fields.vera_dropout > 0,
)
