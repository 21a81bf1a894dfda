"""LoRA (Hu et al. 2021, arXiv 2106.09685): y = x W + s (dropout(x) A) B, with A [in, R] random and B [R, out] zero.

s = lora_alpha / r, or lora_alpha / sqrt(r) with use_rslora (Kalajdzievski 2023, arXiv 2312.03732). Fields, names and
defaults of meaning are those of PEFT. Ranks may differ by module and layer (rank_pattern, layers_to_transform): the
factors of all layers are stacked at the largest rank and padded with zeros. The padding stays zero without a mask: the
gradient of a column of A is proportional to the matching row of B and the other way round.

The embedding is edited as E + s A B with A [V, R] zero, B [R, D] ~ N(0, 1) and no dropout, the head as any product. Of
tied ones each keeps its own change, so that a merge unties them (PEFT adds both to the one tensor, which is another
function). An adapter file may carry copies of the embedding and the head that it edits; as in PEFT they stand in the
place of the base's own. Initial factors taken from the base: principal.py; modules_to_save: saved.py.
"""

import math
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from qtjax.errors import QtjaxError
from qtjax.models import Edits, EmbeddingEdit, LinearEdit
from qtjax.overlays import leaves as table
from qtjax.overlays import principal
from qtjax.overlays.base import Base, Context, Conversion, Method, base_array
from qtjax.overlays.fields import Names, Targeted, read_fields, require, setting, to_peft
from qtjax.overlays.leaves import Init, Leaf, normal, transposed, uniform, zeros
from qtjax.overlays.saved import Saved, check_apart, resolve_saved, saved_edits, saved_leaves
from qtjax.overlays.sites import claims, linears_of, needs, resolve_sites
from qtjax.overlays.targets import End, Linear, check_patterns, pattern_value
from qtjax.tree import Tree, flatten, unflatten

# Fields of LoraConfig (peft 0.21) whose only supported values are listed; they are checked, never ignored.
INERT: dict[str, tuple[Any, ...]] = {
    "lora_bias": (False, None),
    "use_dora": (False, None),
    "use_qalora": (False, None),
    "use_bdlora": (False, None),
    "ensure_weight_tying": (False, None),
    "layer_replication": (None, []),
    "trainable_token_indices": (None, [], {}),
    "target_parameters": (None, []),
    "alora_invocation_tokens": (None, []),
    "loftq_config": (None, {}),
    "megatron_config": (None, {}),
}  # fmt: skip

# Initialisations that leave the base weights alone, so that an adapter made with them means what its file says.
_SAFE_INITS = (True, False, "gaussian", "orthogonal")
_INITS = "True, 'gaussian', 'orthogonal', 'pissa', 'pissa_niter_N' or 'olora'"


@dataclass(frozen=True)
class LoraFields(Targeted):
    """r: rank; scale lora_alpha / r; lora_dropout: fraction [0, 1) of the side path's input dropped in training.

    target_modules: a regex or a sorted tuple of names; rank_pattern, alpha_pattern: (regex, value) pairs, first match
    wins; layers_to_transform: layer indices or None for all; modules_to_save: endings of names of modules that are
    trained whole.
    """

    r: int = setting(8, "int>0")
    lora_alpha: float = setting(16.0, "number")
    lora_dropout: float = setting(0.0, "[0,1)")
    use_rslora: bool = setting(False, "bool")
    rank_pattern: tuple[tuple[str, int], ...] = setting((), "pattern:int>0")
    alpha_pattern: tuple[tuple[str, float], ...] = setting((), "pattern:number")
    init_lora_weights: bool | str = setting(True, "bool or text")
    modules_to_save: Names | None = setting(None, "names")


@dataclass(frozen=True)
class LoraSite:
    """One module: its sizes, and rank and scale of each of the N layers (rank 0: the layer is not edited)."""

    linear: Linear
    ranks: tuple[int, ...]
    scales: tuple[float, ...]

    @property
    def rank(self) -> int:
        return max(self.ranks)

    @property
    def is_end(self) -> bool:
        """Whether it is the embedding or the head, which have no layer axis."""
        return isinstance(self.linear, End)

    @property
    def is_embedding(self) -> bool:
        return self.linear.path == "embed_tokens"

    def leaf(self, name: str, shape: Any, axes: Any, init: Init, file_name: str, **more: Any) -> Leaf:
        """A leaf whose shape in a layer of rank r is shape(r)."""
        prefix, path = "base_model.model.", self.linear.path
        keys = tuple(f"{prefix}{self.linear.module(n)}.{file_name}" if r else None for n, r in enumerate(self.ranks))
        names = {"embed_tokens": ("vocab", "embed"), "lm_head": ("embed", "vocab")}.get(path, ("in", "out"))
        axes, module = tuple(dict(zip(("in", "out"), names)).get(axis) for axis in axes), "" if self.is_end else path
        shapes = tuple(shape(r) if r else None for r in self.ranks)
        return Leaf(f"{path}/{name}", shapes, axes, keys, init, module, stacked=not self.is_end, **more)


@dataclass(frozen=True)
class LoraSpec:
    """LoRA's settings by PEFT's names, and what they mean for one base model.

    saved: the modules copied whole. copies: which of the edited embedding and head the adapter's file carried.
    """

    fields: LoraFields
    sites: tuple[LoraSite, ...]
    saved: tuple[Saved, ...] = ()
    copies: tuple[str, ...] = ()

    @property
    def linears(self) -> tuple[Linear, ...]:
        return tuple(site.linear for site in self.sites)

    @property
    def subtracts(self) -> bool:
        """Whether initial factors stand among the frozen arrays."""
        return principal.subtracts(self.fields.init_lora_weights)


def lora_sites(base: Base, settings: LoraFields, strict: bool, ends: bool = False) -> tuple[LoraSite, ...]:
    """Targets with ranks and scales. Raises QtjaxError for a rank above a matrix's own and patterns that match nothing."""
    sites = []
    for linear, hits in (
        (site.linear, site.hits) for site in resolve_sites(base, settings, strict, ends, settings.modules_to_save or ())
    ):
        ranks, scales = [], []
        for n, hit in enumerate(hits):
            rank = pattern_value(settings.rank_pattern, linear.module(n), settings.r, "rank_pattern") if hit else 0
            alpha = pattern_value(settings.alpha_pattern, linear.module(n), settings.lora_alpha, "alpha_pattern")
            limit = min(linear.inputs, linear.outputs)
            if rank > (limit if strict else 2 * limit):  # files converted from PiSSA and OLoRA have twice the rank
                raise QtjaxError(
                    f"r = {rank}: {linear.module(n)} is {linear.inputs} x {linear.outputs}, so its rank is at most"
                    f" {limit}; lower r, or set rank_pattern for {linear.name!r}"
                )
            ranks.append(rank)
            scales.append(float(alpha) / (math.sqrt(rank) if settings.use_rslora else rank) if hit else 0.0)
        sites.append(LoraSite(linear, tuple(ranks), tuple(scales)))
    if strict:
        modules = [site.linear.module(n) for site in sites for n, rank in enumerate(site.ranks) if rank]
        check_patterns(settings.rank_pattern, modules, "rank_pattern")
        check_patterns(settings.alpha_pattern, modules, "alpha_pattern")
    return tuple(sites)


def read_lora(
    base: Base, fields: Mapping[str, Any], strict: bool, *, method: str = "lora", ends: bool = True, use_dora: bool = False,
    also: Sequence[str] = (),
) -> LoraSpec:  # fmt: skip
    """`Method.read` of LoRA and of what is built on it; also: fields that the latter reads itself."""
    raw = not strict and fields.get("initial_factors") == "frozen"  # our own file of trainables
    if not strict:
        needs(fields, "r", "lora_alpha", "target_modules", method="LoRA")
        fields = {name: value for name, value in fields.items() if name != "initial_factors"}
    inert = INERT | {"use_dora": (use_dora, None)}
    descriptive = ("megatron_core", "qalora_group_size")
    settings = read_fields(method, LoraFields, fields, base.linears, inert=inert, descriptive=descriptive, also=also)
    if isinstance(settings.modules_to_save, str):
        settings = replace(settings, modules_to_save=(settings.modules_to_save,))
    _check_init(settings.init_lora_weights, strict, raw)
    spec = LoraSpec(
        settings, lora_sites(base, settings, strict, ends), resolve_saved(base, settings.modules_to_save or (), strict)
    )
    check_apart(spec.saved, {s.linear.module(n) for s in spec.sites for n, rank in enumerate(s.ranks) if rank})
    if strict:
        edited = [(r, s) for site in spec.sites for r, s in zip(site.ranks, site.scales) if r and not site.is_embedding]
        if edited:
            principal.check_init(settings.init_lora_weights, *map(list, zip(*edited)))
    return spec


def _check_init(init: bool | str, strict: bool, raw: bool) -> None:
    if init not in _SAFE_INITS and not principal.subtracts(init):
        raise QtjaxError(f"init_lora_weights = {init!r}: is not supported; must be {_INITS}")
    require(not (strict and init is False), "init_lora_weights", init, f"must be {_INITS}")
    if not strict and not raw and principal.subtracts(init):
        raise QtjaxError(
            f"init_lora_weights = {init!r}: is not supported in a file, since peft then changed the base weights too; save"
            " it there with path_initial_model_for_weight_conversion, which writes an adapter for the untouched base"
        )


def _down_init(site: LoraSite, kind: bool | str) -> Init:
    """A ~ U(+-1/sqrt(in)), which is torch's kaiming_uniform(a=sqrt(5)), or N(0, 1/r) ("gaussian")."""
    if kind != "gaussian":
        return uniform(1 / math.sqrt(site.linear.inputs))
    std = 1 / np.maximum(np.asarray(site.ranks, np.float32), 1)
    std = std[0] if site.is_end else std[:, None, None]
    return lambda key, shape, base: jax.random.normal(key, shape, jnp.float32) * std


def lora_leaves(spec: LoraSpec) -> list[Leaf]:
    """lora_A [in, r] and lora_B [r, out]; PEFT stores torch's layouts, [r, in] and [out, r]. Then the frozen and the copied."""
    leaves = []
    for site in spec.sites:
        size, kind = site.linear, spec.fields.init_lora_weights
        one, two = (lambda r, i=size.inputs: (i, r)), (lambda r, o=size.outputs: (r, o))
        down, up = (zeros, normal(1.0)) if site.is_embedding else (_down_init(site, kind), zeros)
        names = ("lora_embedding_A", "lora_embedding_B") if site.is_embedding else ("lora_A.weight", "lora_B.weight")
        leaves.append(site.leaf("lora_A", one, ("in", None), down, names[0], **transposed()))
        leaves.append(site.leaf("lora_B", two, (None, "out"), up, names[1], **transposed()))
        if spec.subtracts and not site.is_embedding:
            frozen = transposed(trained=False)
            leaves.append(site.leaf("initial_A", one, ("in", None), zeros, "initial_A.weight", **frozen))
            leaves.append(site.leaf("initial_B", two, (None, "out"), zeros, "initial_B.weight", **frozen))
        if size.path in spec.copies:
            turn = {} if site.is_embedding else transposed()
            shape = (lambda r, s=(size.inputs, size.outputs): s)
            leaves.append(site.leaf("base", shape, ("in", "out"), zeros, "base_layer.weight", trained=False, **turn))
    return leaves + saved_leaves(spec.saved)


def lora_edits(spec: LoraSpec, params: Tree, rng: Array | None, frozen: Tree | None = None) -> dict[str, Any]:
    """{module path: the side path} with the scale in `up`, which costs least."""
    flat, edits = flatten(params) | flatten(frozen or {}), {}
    rate = spec.fields.lora_dropout
    for site in spec.sites:
        path = site.linear.path
        down, up, base = flat[f"{path}/lora_A"], flat[f"{path}/lora_B"], flat.get(f"{path}/base")
        initial = f"{path}/initial_A" in flat
        if initial:
            down, up = principal.joined(down, up, flat[f"{path}/initial_A"], flat[f"{path}/initial_B"])
        scale = jnp.asarray(site.scales, up.dtype)
        up = up * (scale[0] if site.is_end else scale[:, None, None])
        if site.is_embedding:
            edits[path] = EmbeddingEdit(table=base, down=down, up=up)
            continue
        keys = None
        if rng is not None and rate > 0:
            keys = jax.random.fold_in(rng, zlib.crc32(path.encode()))
            keys = keys if site.is_end else jax.random.split(keys, site.linear.layers)
        edits[path] = LinearEdit(
            down=down, up=up, kernel=base, dropout_key=keys, dropout_rate=rate, undropped=site.rank if initial else 0
        )
    return edits


def _expand(spec: LoraSpec, params: Tree, frozen: Tree, context: Context) -> Edits:
    edits = lora_edits(spec, params, context.rng, frozen)
    return Edits(unflatten({f"{path}/edit": edit for path, edit in edits.items()} | saved_edits(spec.saved, params)))


def start(spec: LoraSpec, key: Array, base: Mapping[str, Any], params: Tree, frozen: Tree) -> tuple[Tree, Tree]:
    """`Method.start`: the factors that come as pairs, from the base weights (pissa, olora) or not (orthogonal)."""
    init = spec.fields.init_lora_weights
    if not spec.subtracts and init != "orthogonal":
        return params, frozen
    trees = dict(flatten(params)), dict(flatten(frozen))
    for site in spec.sites:
        if site.is_embedding:
            continue
        linear, own = site.linear, jax.random.fold_in(key, zlib.crc32(f"{site.linear.path}/start".encode()))
        if not spec.subtracts:
            pair = principal.orthogonal(own, linear.layers, linear.inputs, linear.outputs, site.rank)
        else:
            pair = principal.factors(init, _kernel(site, base), site.rank, jnp.asarray(site.scales), own)
        for leaf in lora_leaves(replace(spec, sites=(site,), saved=(), copies=())):
            value, real = pair[leaf.path.endswith("B")], leaf.mask()
            value = value[0] if site.is_end else value
            trees[not leaf.trained][leaf.path] = value if real is None else jnp.where(real, value, 0)
    return unflatten(trees[0]), unflatten(trees[1])


def _kernel(site: LoraSite, base: Mapping[str, Any]) -> Array:
    if not site.is_end:
        return base_array(base, f"{site.linear.path}/kernel")
    tied = "lm_head/kernel" not in base
    return (base_array(base, "embed_tokens/embedding").T if tied else base_array(base, "lm_head/kernel"))[None]


def complete(spec: LoraSpec, names: Sequence[str]) -> LoraSpec:
    """`Method.complete`: the copies of edited embeddings that peft writes beside their factors, if they are there."""
    ends = [site.linear for site in spec.sites if site.is_end]
    found = tuple(end.path for end in ends if f"base_model.model.{end.module(0)}.base_layer.weight" in names)
    return replace(spec, copies=found)


def lora_to_peft(spec: LoraSpec, use_dora: bool = False) -> dict[str, Any]:
    """`Method.to_peft`; with initial factors the settings of the converted file."""
    fields = principal.converted_fields(spec.fields) if spec.subtracts else spec.fields
    off = {"bias": "none", "fan_in_fan_out": False, "lora_bias": False, "layers_pattern": None}
    return {"peft_type": "LORA", **to_peft(fields), **off, "use_dora": use_dora}


def converts(leaves_of: Callable[[LoraSpec], list[Leaf]]) -> Callable[[LoraSpec], Conversion | None]:
    """`Method.conversion`: with initial factors, PEFT's file is a derived form."""

    def conversion(spec: LoraSpec) -> Conversion | None:
        if not spec.subtracts:
            return None
        settings = {**to_peft(spec.fields), "initial_factors": "frozen"}
        return Conversion(settings, lambda *trees: principal.converted_file(table.tensors(leaves_of(spec), *trees)))

    return conversion


METHOD = Method(
    fields=LoraFields,
    read=read_lora,
    leaves=lora_leaves,
    start=start,
    expand=_expand,
    to_peft=lora_to_peft,
    claims=claims("LORA", use_dora=False, qtjax_method=False),
    linears=linears_of,
    draws=lambda spec: spec.fields.lora_dropout > 0,
    complete=complete,
    conversion=converts(lora_leaves),
)
