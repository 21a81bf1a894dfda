"""Overlays: parameter-efficient fine-tuning as a tree laid over the model's parameter tree, which it never changes.

An overlay is (static spec, trainable tree, frozen tree). A method is one file with a `Method` record of functions and
one line of registration; nothing outside that file asks which method it is. The model sees only what `Overlay.expand`
returns: edits by module path, and virtual tokens.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from qtjax import models
from qtjax.errors import QtjaxError, near_names
from qtjax.models import Edits
from qtjax.overlays import leaves as table
from qtjax.overlays.leaves import Leaf
from qtjax.overlays.targets import End, Linear, end_modules, linear_modules, with_names_listed
from qtjax.tree import Tree, flatten


@dataclass(frozen=True)
class Base:
    """The model that an overlay is laid over: its config and {path: array or shape struct}."""

    config: models.ModelConfig
    leaves: Mapping[str, Any]

    @property
    def linears(self) -> tuple[Linear, ...]:
        return linear_modules(self.leaves)

    @property
    def ends(self) -> tuple[End, ...]:
        return end_modules(self.leaves)


@dataclass(frozen=True)
class Context:
    """What a forward pass knows: rng, a key or None (nothing is drawn); task_ids int [B] or [B, L] or None; hidden
    [B, L, D], the first pass's states, on the second pass of a method that needs two."""

    rng: Array | None = None
    task_ids: Array | None = None
    hidden: Array | None = None


@dataclass(frozen=True)
class Conversion:
    """What one overlay's derived form is: `settings`, by which `Method.read` takes the trainables as they are, and
    file(params, frozen) -> tensors of adapter_model.safetensors, which `Method.to_peft` describes."""

    settings: Mapping[str, Any]
    file: Callable[[Tree, Tree], dict[str, Any]]


@dataclass(frozen=True)
class Claims:
    """Which adapter_config.json is a method's: its peft_type is one of `types`, and fields have these values, of which True
    and False mean given or not."""

    types: tuple[str, ...] = ()
    fields: tuple[tuple[str, Any], ...] = ()

    def __call__(self, peft_config: Mapping[str, Any]) -> bool:
        def holds(name: str, value: Any) -> bool:
            found = peft_config.get(name)
            return (bool(found) if isinstance(value, bool) else found) == value

        return peft_config.get("peft_type") in self.types and all(holds(*field) for field in self.fields)


@dataclass(frozen=True)
class Method:
    """One method's functions. `spec` is its frozen, hashable settings, resolved for one base model.

    fields: the dataclass of its settings, by PEFT's names.
    read(base, fields, strict) -> spec: `fields` by PEFT's names, from a caller or adapter_config.json; strict: also refuse
      names that match nothing while others do.
    leaves(spec) -> every array, trained or frozen. start(spec, key, base, params, frozen) -> (params, frozen): initial values
      that several arrays have in common, put in place of the leaves' own; base is {path: array}. expand(spec, params, frozen, context) -> Edits, traceable.
    to_peft(spec) -> the method's own fields of adapter_config.json. claims(peft_config) -> whether this method reads it.
    linears(spec) -> the linear modules it edits, for checks against another base.
    unmergeable: why `merge` is impossible; empty when it is possible.
    draws(spec): training draws random numbers. two_passes(spec): `expand` needs a first pass's hidden states.
    tasks(spec): how many tasks task_ids choose among; 0 where they play no part.
    penalty(spec, params) -> scalar added to the mean loss (nats), or None without one.
    state(spec, params) -> arrays that `after_step` keeps; after_step(spec, params, state, gradients, step) -> (params, state)
      after step number `step` of the run (1, 2, ...), `gradients` those of the step, penalty included; None: it had no
      target, so that nothing was updated, and only what is planned by the number of steps goes on.
    rates(spec) -> {last part of a leaf's path: factor on the learning rate}.
    complete(spec, names) -> spec: with what an adapter file may carry and need not, known by its tensors' names.
    file(spec, params, frozen) -> tensors of adapter_model.safetensors where PEFT's file is a derived form; the trainables
      then stand in a file of their own. None: with this spec it holds the trainables themselves; {}: PEFT cannot read it.
    from_file(spec, tensors) -> (spec, params, frozen) of that file alone.
    saved_spec(spec, params) -> the spec that an adapter is saved by, where training itself decides some of it (pruned
      ranks); params on the host.
    conversion(spec) -> Conversion where only some settings have a derived form, which adapter_config.json then describes.
    in_peft: whether PEFT has the method; if not, only the file of trainables is written.
    given(spec, fields) -> {leaf path: first value} of the arrays that a caller hands over among the fields.
    parts(spec) -> {subfolder: its adapter_config.json} of adapters that this one is made of: tensors whose key begins
      with "<subfolder>/" stand in that folder's file, and `read` finds their configs under "parts"; in_parts: it has any.
    posterior: after training a posterior is fitted over it. alone: why it cannot be part of a stack; empty: it can.
    """

    fields: type
    read: Callable[[Base, Mapping[str, Any], bool], Any]
    leaves: Callable[[Any], Sequence[Leaf]]
    expand: Callable[[Any, Tree, Tree, Context], Edits]
    to_peft: Callable[[Any], dict[str, Any]]
    claims: Claims
    linears: Callable[[Any], Sequence[Linear]] = lambda spec: ()
    start: Callable[[Any, Array, Mapping[str, Any], Tree, Tree], tuple[Tree, Tree]] | None = None
    unmergeable: str = ""
    draws: Callable[[Any], bool] = lambda spec: False
    two_passes: Callable[[Any], bool] = lambda spec: False
    penalty: Callable[[Any, Tree], Array] | None = None
    state: Callable[[Any, Tree], Tree] = lambda spec, params: {}
    after_step: Callable[[Any, Tree, Tree, Tree | None, Array], tuple[Tree, Tree]] | None = None
    rates: Callable[[Any], Mapping[str, float]] = lambda spec: {}
    saved_spec: Callable[[Any, Tree], Any] = lambda spec, params: spec
    complete: Callable[[Any, Sequence[str]], Any] = lambda spec, names: spec
    file: Callable[[Any, Tree, Tree], dict[str, Any] | None] | None = None
    from_file: Callable[[Any, Mapping[str, Any]], tuple[Any, Tree, Tree]] | None = None
    conversion: Callable[[Any], Conversion | None] = lambda spec: None
    in_peft: bool = True
    tasks: Callable[[Any], int] = lambda spec: 0
    given: Callable[[Any, Mapping[str, Any]], Mapping[str, Array]] = lambda spec, fields: {}
    parts: Callable[[Any], Mapping[str, dict[str, Any]]] = lambda spec: {}
    in_parts: bool = False
    posterior: bool = False
    alone: str = ""


METHODS: dict[str, Method] = {}


def register(name: str, method: Method) -> None:
    """Makes a method known by its name in configs, `init_overlay` and adapter folders."""
    assert name not in METHODS, f"the overlay method {name!r} is registered twice"
    METHODS[name] = method


def method_named(name: str) -> Method:
    """The method, or the stack "a+b" of several. Raises QtjaxError, with near names, for one that is not known."""
    if name in METHODS:
        return METHODS[name]
    if isinstance(name, str) and "+" in name:
        from qtjax.overlays.stack import stack_of

        return stack_of(tuple(name.split("+")))
    raise QtjaxError(f"overlay method {name!r}: not known{near_names(str(name).lower(), METHODS)}; known: {', '.join(METHODS)}")


def field_names(method: str) -> list[str]:
    """The names of a method's settings; of a stack, those of all its parts."""
    parts = [method] if method in METHODS else method.split("+")
    return list(dict.fromkeys(f.name for part in parts for f in dataclasses.fields(method_named(part).fields)))


@dataclass(frozen=True, eq=False)
class Overlay:
    """A trained or trainable overlay; a pytree whose leaves are `params` and `frozen`, so jit, grad, optax and
    device_put take it as it is.

    method: the registered name; spec: the method's hashable settings (both static).
    params: the trainable tree, nested by module path with all layers stacked on axis 0. frozen: arrays that the method
    needs and does not train.
    """

    method: str
    spec: Any
    params: Tree
    frozen: Tree

    def expand(self, rng: Array | None = None, task_ids: Array | None = None, hidden: Array | None = None) -> Edits:
        """What the model applies. Frozen arrays get no gradient.

        Args: rng: a key for what the method draws in training (dropout); None draws nothing. task_ids: int [B] or
        [B, L]. hidden [B, L, D]: the first pass's states, where `two_passes`.
        """
        frozen = jax.lax.stop_gradient(self.frozen)
        return self._own.expand(self.spec, self.params, frozen, Context(rng, task_ids, hidden))

    def check_base(self, leaves: Mapping[str, Any], who: str = "overlay") -> None:
        """Raises QtjaxError when `leaves`, {path: array or shape} of a model, lack a linear module that the overlay edits, or
        have it in another shape."""
        for linear in self._own.linears(self.spec):
            path, expected = linear.leaf
            if path not in leaves or tuple(leaves[path].shape) != expected:
                found = f"is {tuple(leaves[path].shape)}" if path in leaves else "does not exist"
                raise QtjaxError(f"{who}: {self.method} needs {path} of shape {expected}, which {found}; it is for another base")

    def replace(self, **changes: Any) -> "Overlay":
        """A copy with other `params` (or another field): `overlay.replace(params=new)`."""
        return dataclasses.replace(self, **changes)

    def penalty(self) -> Array:
        """What the method adds to the mean loss of a step, float32 in nats; 0 for most."""
        own = self._own.penalty
        return jnp.float32(0) if own is None else own(self.spec, self.params)

    @property
    def _own(self) -> Method:
        return method_named(self.method)

    @property
    def draws(self) -> bool:
        """Whether a training step needs a key for `expand` (dropout)."""
        return self._own.draws(self.spec)

    @property
    def two_passes(self) -> bool:
        """Whether the model runs twice, the second time with the first pass's hidden states."""
        return self._own.two_passes(self.spec)

    @property
    def tasks(self) -> int:
        """Number of tasks that `task_ids` choose among; 0 where they play no part."""
        return self._own.tasks(self.spec)

    @property
    def trainable_count(self) -> int:
        """Number of trained values, as PEFT counts them: padding of unequal shapes and of unedited layers left out."""
        return sum(leaf.size for leaf in self._own.leaves(self.spec) if leaf.trained)


jax.tree_util.register_dataclass(Overlay, data_fields=["params", "frozen"], meta_fields=["method", "spec"])


def _base(config: models.ModelConfig, params: Tree | None) -> Base:
    return Base(config, flatten(models.abstract_params(config) if params is None else params))


def _read(own: Method, base: Base, fields: Mapping[str, Any]) -> Any:
    """The spec of a caller's fields."""
    return own.read(base, with_names_listed(fields, base.linears), True)


def init_overlay(
    method: str, config: models.ModelConfig, params: Tree | None, key: Array, **fields: Any
) -> Overlay:
    """A fresh overlay; of most methods one that leaves the model's function unchanged.

    Args:
      method: a name of METHODS, or several joined by "+" ("lora+ln_tuning"), each taking the fields that it knows; a
        mapping under a part's name holds fields for it alone (lora={"target_modules": "q_proj"}).
      config, params: the base model. Most methods use shapes only, so that `params` may be abstract or None; those that
        start from base weights (dora, ln_tuning, pissa, ...) say so.
      key: a jax.random key, typed or raw. Each array's draw depends on the key and its path, not on the other targets.
      fields: the method's settings by PEFT's names; see the dataclass in the method's file.
    Returns: an Overlay with float32 trainables. Traceable: under jit with out_shardings it is born sharded.
    Raises QtjaxError for an unknown method or field, an unsupported value, targets that match nothing.
    """
    own, base = method_named(method), _base(config, params)
    spec = _read(own, base, fields)
    leaves = own.leaves(spec)
    params, frozen = table.initial(leaves, key, base.leaves)
    if own.start is not None:
        params, frozen = own.start(spec, key, base.leaves, params, frozen)
    given = own.given(spec, fields)
    if given:
        params, frozen = table.split(leaves, flatten(params) | flatten(frozen) | dict(given))
    # Training donates its state: an array that starts as one of the base's, or stands in both trees, would be gone there.
    held = {id(leaf) for leaf in (*base.leaves.values(), *jax.tree.leaves(frozen))}
    params = jax.tree.map(lambda leaf: jnp.copy(leaf) if id(leaf) in held else leaf, params)
    return Overlay(method, spec, params, frozen)


def abstract_overlay(method: str, config: models.ModelConfig, **fields: Any) -> Overlay:
    """The overlay with jax.ShapeDtypeStruct leaves: shapes and counts at any size, nothing allocated."""
    own = method_named(method)
    spec = _read(own, _base(config, None), fields)
    return Overlay(method, spec, *table.abstract(own.leaves(spec)))


def overlay_axes(overlay: Overlay, config: models.ModelConfig) -> Overlay:
    """The logical axis names of every array in the overlay, derived from those of its base leaf.

    Returns: an Overlay whose leaves are tuples of axis names ("layers", "embed", None), one per dimension; map them to
      shardings with is_leaf=lambda x: isinstance(x, tuple) and the result fits jit and device_put for the overlay.
    """
    own = method_named(overlay.method)
    params, frozen = table.axes(own.leaves(overlay.spec), flatten(models.logical_axes(config)))
    return overlay.replace(params=params, frozen=frozen)


def base_array(base: Mapping[str, Any], path: str) -> Array:
    """A weight of the base model for an initial value. Raises QtjaxError where only shapes were given."""
    leaf = base.get(path)
    if leaf is None or isinstance(leaf, jax.ShapeDtypeStruct):
        raise QtjaxError(f"this initialisation starts from the base model's weights ({path}): give init_overlay its params")
    return leaf.dequantize(jnp.float32) if hasattr(leaf, "dequantize") else jnp.asarray(leaf, jnp.float32)
