"""X-LoRA (Buehler & Buehler 2024, arXiv 2402.07148): a mixture of LoRA experts, weighed token by token.

A first pass of the bare base gives hidden states h (after the final norm, without gradient); a small classifier turns
them into scalings g [B, L, modules, E]; the second pass computes y = x W + sum_e g_e s_e (x A_e) B_e times
global_scaling_weight. The experts lie side by side in one low-rank path of rank sum r_e, with the gates between its two
factors. As in PEFT 0.21, whose first pass leaves the adapters out whatever scaling_pass_value says; only 0 is taken.
What PEFT saves of it is incomplete (it drops classifier layers); qtjax writes classifier and experts in full.
"""

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from qtjax.errors import QtjaxError
from qtjax.models import Edits, LinearEdit
from qtjax.overlays.base import Base, Context, Method, Overlay, method_named
from qtjax.overlays.fields import read_fields, require, setting, to_peft
from qtjax.overlays.leaves import Leaf, transposed, uniform
from qtjax.overlays.laplace import plain
from qtjax.overlays.lora import METHOD as LORA
from qtjax.overlays.lora import LoraSpec, lora_edits, lora_leaves
from qtjax.overlays.sites import claims
from qtjax.overlays.targets import Linear
from qtjax.tree import Tree, flatten, unflatten


_OF_EXPERTS = ("r", "lora_alpha", "target_modules")  # settings of fresh experts, not of the mixture


@dataclass(frozen=True)
class XLoraFields:
    """PEFT's names. xlora_depth: layers of the classifier, xlora_size its width where depth > 1; xlora_dropout_p: fraction
    [0-1), in training and depth > 1 only; top_k_lora: experts kept at each token, None all."""

    hidden_size: int | None = setting(None, "int>0")
    enable_softmax: bool = setting(True, "bool")
    enable_softmax_topk: bool = setting(False, "bool")
    softmax_temperature: float = setting(1.0, "number>0")
    layerwise_scalings: bool = setting(False, "bool")
    top_k_lora: int | None = setting(None, "int>0")
    xlora_depth: int = setting(1, "int>0")
    xlora_size: int = setting(2048, "int>0")
    xlora_dropout_p: float = setting(0.2, "[0,1)")
    use_trainable_adapters: bool = setting(False, "bool")
    global_scaling_weight: float = setting(1.0, "number")


@dataclass(frozen=True)
class XLoraStart(XLoraFields):
    """What a caller may give as well: adapters, the experts (LoRA overlays, or how many fresh ones), and a fresh one's settings."""

    adapters: Any = setting(3, "text")
    r: int = setting(8, "int>0")
    lora_alpha: float = setting(16.0, "number")
    target_modules: Any = setting("all-linear", "text")


@dataclass(frozen=True)
class XLoraSpec:
    """Settings, and the spec of each expert."""

    fields: XLoraFields
    experts: tuple[LoraSpec, ...]

    @property
    def modules(self) -> dict[tuple[int, str], int]:
        """{(layer, module path): its number}, in the order in which PEFT counts modules that any expert edits."""
        linears = self.linears
        layers = max(linear.layers for linear in linears)
        edited = {(n, s.linear.path) for e in self.experts for s in e.sites for n, rank in enumerate(s.ranks) if rank}
        order = [(n, linear.path) for n in range(layers) for linear in linears if (n, linear.path) in edited]
        return {place: i for i, place in enumerate(order)}

    @property
    def linears(self) -> tuple[Linear, ...]:
        found = {s.linear.path: s.linear for e in self.experts for s in e.sites}
        order = "q_proj k_proj v_proj o_proj gate_proj up_proj down_proj".split()
        return tuple(sorted(found.values(), key=lambda linear: order.index(linear.name)))


def _read(base: Base, fields: Mapping[str, Any], strict: bool) -> XLoraSpec:
    inert = {"scaling_pass_value": (0.0, 0, None)}
    own = {k: v for k, v in fields.items() if k not in ("adapters", "parts", *_OF_EXPERTS)}
    settings = read_fields("xlora", XLoraFields, own, inert=inert, also=("adapters", *_OF_EXPERTS))
    if "parts" in fields:  # an adapter folder: the experts' own adapter_config.json
        experts = tuple(_expert(LORA.read(base, part, False), settings) for part in fields["parts"])
    else:
        experts = tuple(_expert(spec, settings) for spec in _experts(base, fields))
    count, width = len(experts), base.config.hidden_size
    require(settings.hidden_size in (None, width), "hidden_size", settings.hidden_size, f"the base model's is {width}")
    top = settings.top_k_lora
    require(top is None or top <= count, "top_k_lora", top, f"there are {count} experts")
    require(not settings.enable_softmax_topk or top is not None, "enable_softmax_topk", True, "needs top_k_lora")
    return XLoraSpec(dataclasses.replace(settings, hidden_size=width), experts)


def _expert(spec: LoraSpec, settings: XLoraFields) -> LoraSpec:
    """The spec, if the mixture computes all of it. Raises QtjaxError otherwise."""
    if settings.use_trainable_adapters and spec.fields.lora_dropout:
        raise QtjaxError(f"lora_dropout = {spec.fields.lora_dropout}: experts that are trained in the mixture have none; set it to 0")
    return plain(spec, "xlora")


def _experts(base: Base, fields: Mapping[str, Any]) -> tuple[LoraSpec, ...]:
    given = fields.get("adapters", 3)
    if isinstance(given, (list, tuple)) and given:
        wrong = [a for a in given if not (isinstance(a, Overlay) and method_named(a.method) is LORA)]
        beside = [name for name in _OF_EXPERTS if name in fields]
        if beside:
            raise QtjaxError(f"{beside[0]} = {fields[beside[0]]!r}: the experts that adapters lists have their own; leave it out")
        if not wrong:
            return tuple(a.spec for a in given)
    if isinstance(given, int) and not isinstance(given, bool) and given > 0:
        fresh = {k: fields[k] for k in _OF_EXPERTS if k in fields}
        return (LORA.read(base, fresh, True),) * given
    shown = [a.method if isinstance(a, Overlay) else a for a in given] if isinstance(given, (list, tuple)) else given
    raise QtjaxError(f"adapters = {shown!r}: must be a list of lora overlays (init_overlay, load_adapter), or how many fresh ones")


def _given(spec: XLoraSpec, fields: Mapping[str, Any]) -> dict[str, Array]:
    """The experts' trained values, where overlays were given."""
    given = fields.get("adapters", 3)
    if not isinstance(given, (list, tuple)):
        if not spec.fields.use_trainable_adapters:
            raise QtjaxError(
                f"adapters = {given!r}: fresh experts add nothing and stay frozen, so that nothing could be learned; give trained lora"
                " overlays (adapters=[...]), or set use_trainable_adapters"
            )
        return {}
    return {f"expert_{i}/{path}": value for i, a in enumerate(given) for path, value in flatten(a.params).items()}


def _classifier(spec: XLoraSpec) -> list[tuple[int, int, int]]:
    """(number in PEFT's Sequential, inputs, outputs) of every dense layer; ReLU and a dropout above 0 count there too."""
    f = spec.fields
    outputs = len(spec.experts) * (len(spec.modules) if f.layerwise_scalings else 1)
    sizes = [f.hidden_size, *[f.xlora_size] * (f.xlora_depth - 1), outputs]
    step = 3 if f.xlora_dropout_p > 0 else 2
    return [(i * step, a, b) for i, (a, b) in enumerate(zip(sizes, sizes[1:]))]


def _leaves(spec: XLoraSpec) -> list[Leaf]:
    leaves = []
    for number, inputs, outputs in _classifier(spec):
        key, init = f"base_model.internal_xlora_classifier.layers.{number}", uniform(1 / math.sqrt(inputs))
        for name, shape, more in (("kernel", (inputs, outputs), transposed()), ("bias", (outputs,), {})):
            keys = (f"{key}.{'weight' if name == 'kernel' else 'bias'}",)
            path = f"classifier/{number}/{name}"
            leaves.append(Leaf(path, (shape,), (None,) * len(shape), keys, init, stacked=False, **more))
    for i, expert in enumerate(spec.experts):
        for leaf in lora_leaves(expert):
            keys = tuple(None if key is None else f"expert_{i}/{key}" for key in leaf.keys)
            trained = spec.fields.use_trainable_adapters
            leaves.append(
                Leaf(f"expert_{i}/{leaf.path}", leaf.shapes, leaf.axes, keys, leaf.init, leaf.module, trained=trained, **transposed())
            )
    return leaves


def scalings(spec: XLoraSpec, params: Tree, hidden: Array, rng: Array | None = None) -> Array:
    """float32 [B, L, modules or 1, E]: how much of each expert every token takes, top-k applied."""
    f, h = spec.fields, hidden.astype(jnp.float32)
    layers = _classifier(spec)
    for i, (number, _, _) in enumerate(layers):
        own = params["classifier"][str(number)]
        h = h @ own["kernel"] + own["bias"]
        if i + 1 < len(layers):
            h = jax.nn.relu(h)
            if rng is not None and f.xlora_dropout_p > 0:
                keep = jax.random.bernoulli(jax.random.fold_in(rng, i), 1 - f.xlora_dropout_p, h.shape)
                h = jnp.where(keep, h / (1 - f.xlora_dropout_p), 0)
    g = h.reshape(*h.shape[:-1], -1, len(spec.experts))
    g = jax.nn.softmax(g / f.softmax_temperature, axis=-1) if f.enable_softmax else g
    if f.top_k_lora is not None:
        chosen = jax.lax.top_k(g, f.top_k_lora)[1]
        g = g * jax.nn.one_hot(chosen, g.shape[-1], dtype=g.dtype).sum(axis=-2)
    if f.enable_softmax_topk:
        kept = g != 0
        g = jnp.where(kept, jax.nn.softmax(jnp.where(kept, g, -jnp.inf), axis=-1), 0)
    return g


def _expand(spec: XLoraSpec, params: Tree, frozen: Tree, context: Context) -> Edits:
    if context.hidden is None:
        return Edits({})  # the first pass is the base alone
    g = scalings(spec, params, context.hidden, context.rng)
    numbers, edits, count = spec.modules, {}, len(spec.experts)
    side = [lora_edits(e, (params | frozen)[f"expert_{i}"], None) for i, e in enumerate(spec.experts)]
    for linear in spec.linears:
        own = [(i, edit[linear.path]) for i, edit in enumerate(side) if linear.path in edit]
        if spec.fields.layerwise_scalings:
            at = np.array([numbers.get((n, linear.path), 0) for n in range(linear.layers)])
            gates = jnp.moveaxis(jnp.take(g, at, axis=2), 2, 0)
        else:
            gates = jnp.broadcast_to(g[None, :, :, 0], (linear.layers, *g.shape[:2], count))
        which = np.concatenate([np.full(edit.down.shape[-1], i) for i, edit in own])
        edits[f"{linear.path}/edit"] = LinearEdit(
            down=jnp.concatenate([edit.down for _, edit in own], axis=-1),
            mid=jnp.take(gates, which, axis=-1),
            up=jnp.concatenate([edit.up for _, edit in own], axis=-2) * spec.fields.global_scaling_weight,
        )
    return Edits(unflatten(edits))


def _to_peft(spec: XLoraSpec) -> dict[str, Any]:
    adapters = {str(i): f"expert_{i}" for i in range(len(spec.experts))}
    return {"peft_type": "XLORA", "adapters": adapters, "scaling_pass_value": 0.0, **to_peft(spec.fields)}


METHOD = Method(
    fields=XLoraStart,
    read=_read,
    leaves=_leaves,
    expand=_expand,
    to_peft=_to_peft,
    claims=claims("XLORA"),
    linears=lambda spec: spec.linears,
    unmergeable="which expert acts, and how much, depends on the token",
    draws=lambda spec: spec.fields.xlora_depth > 1 and spec.fields.xlora_dropout_p > 0,
    two_passes=lambda spec: True,
    given=_given,
    in_parts=True,
    alone="it is made of other adapters, trained first",
    parts=lambda spec: {f"expert_{i}": LORA.to_peft(expert) for i, expert in enumerate(spec.experts)},
)
