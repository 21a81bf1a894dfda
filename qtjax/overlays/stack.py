"""Several overlays over one base, "lora+ln_tuning": each with its own trees under its own name, their edits combined.

The combined record of a place follows LinearEdit's formula, whatever the order of the names: of "ia3+bitfit" the vectors
scale the product and the base's bias, and bitfit's bias is added after that.
"""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import jax
from jax import Array
import jax.numpy as jnp

from qtjax.errors import QtjaxError, near_names
from qtjax.models import Edits, combine_trees
from qtjax.overlays.base import Base, Claims, Context, Method, method_named
from qtjax.overlays.leaves import Leaf, abstract
from qtjax.tree import Tree


@functools.cache
def stack_of(names: tuple[str, ...]) -> Method:
    """One Method made of several. Its spec is the tuple of theirs.

    A field goes to every part that knows it; a mapping under a part's own name goes to that part alone and comes first:
    init_overlay("lora+ln_tuning", ..., r=8, lora={"target_modules": "q_proj"}).
    Raises QtjaxError for an unknown part, the same part twice, and (from `read`) parts that set the same place.
    """
    parts = [method_named(name) for name in names]
    if len(set(names)) != len(names):
        raise QtjaxError(f"overlay method {'+'.join(names)!r}: names the same method twice; one of each is enough")

    for name, part in zip(names, parts):
        if part.alone:
            raise QtjaxError(f"overlay method {'+'.join(names)!r}: {name} cannot be stacked: {part.alone}")

    def read(base: Base, fields: Mapping[str, Any], strict: bool) -> tuple[Any, ...]:
        spec = tuple(
            part.read(base, own, strict) for part, own in zip(parts, _routed(dict(zip(names, parts)), fields))
        )
        _check_places(names, parts, spec)
        return spec

    def leaves(spec: tuple[Any, ...]) -> list[Leaf]:
        out = []
        for name, part, own in zip(names, parts, spec):
            out += [dataclasses.replace(leaf, path=f"{name}/{leaf.path}") for leaf in part.leaves(own)]
        return out

    def start(spec: tuple[Any, ...], key: Array, base: Mapping[str, Any], params: Tree, frozen: Tree) -> tuple[Tree, Tree]:
        for n, part, own in zip(names, parts, spec):
            if part.start is not None:
                trained, kept = part.start(own, key, base, params.get(n, {}), frozen.get(n, {}))
                params, frozen = params | {n: trained}, frozen | ({n: kept} if kept else {})
        return params, frozen

    def expand(spec: tuple[Any, ...], params: Tree, frozen: Tree, context: Context) -> Edits:
        return _combined([p.expand(s, params.get(n, {}), frozen.get(n, {}), context) for n, p, s in zip(names, parts, spec)])

    def penalty(spec: tuple[Any, ...], params: Tree) -> Any:
        return sum(part.penalty(own, params.get(n, {})) for n, part, own in zip(names, parts, spec) if part.penalty)

    def state(spec: tuple[Any, ...], params: Tree) -> Tree:
        return {n: part.state(own, params.get(n, {})) for n, part, own in zip(names, parts, spec)}

    def after_step(spec, params: Tree, state: Tree, gradients: Tree | None, step: Any) -> tuple[Tree, Tree]:
        for n, part, own in zip(names, parts, spec):
            if part.after_step is not None:
                slopes = None if gradients is None else gradients.get(n, {})
                new, kept = part.after_step(own, params.get(n, {}), state[n], slopes, step)
                params, state = params | {n: new}, state | {n: kept}
        return params, state

    return Method(
        fields=_united(parts), read=read, leaves=leaves, expand=expand, to_peft=lambda spec: {}, claims=Claims(),
        linears=lambda spec: [linear for part, own in zip(parts, spec) for linear in part.linears(own)],
        start=start if any(part.start for part in parts) else None,
        unmergeable="; ".join(f"{name}: {part.unmergeable}" for name, part in zip(names, parts) if part.unmergeable),
        draws=lambda spec: any(part.draws(own) for part, own in zip(parts, spec)),
        two_passes=lambda spec: any(part.two_passes(own) for part, own in zip(parts, spec)),
        tasks=lambda spec: max(part.tasks(own) for part, own in zip(parts, spec)),
        penalty=penalty if any(part.penalty for part in parts) else None,
        state=state, after_step=after_step if any(part.after_step for part in parts) else None,
        rates=lambda spec: {k: v for part, own in zip(parts, spec) for k, v in part.rates(own).items()},
    )  # fmt: skip


def _routed(parts: Mapping[str, Method], fields: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The fields of each part."""
    known = {name: {f.name for f in dataclasses.fields(part.fields)} for name, part in parts.items()}
    for name, value in fields.items():
        if name in parts and not isinstance(value, Mapping):
            raise QtjaxError(f"{name} = {value!r}: must map {name}'s fields to values, it names a part of the stack")
        if name not in parts and not any(name in own for own in known.values()):
            near = near_names(name, set().union(*known.values(), parts))
            raise QtjaxError(f"{name}: none of {', '.join(parts)} has such a field{near}")
    shared = {name: value for name, value in fields.items() if name not in parts}
    return [{k: v for k, v in shared.items() if k in known[part]} | dict(fields.get(part, {})) for part in parts]


def _united(parts: list[Method]) -> type:
    """A dataclass with every part's fields; of the same name, the first part's."""
    found = {}
    for f in (f for part in parts for f in dataclasses.fields(part.fields)):
        found.setdefault(f.name, (f.name, f.type, dataclasses.field(default=f.default, metadata=f.metadata)))
    return dataclasses.make_dataclass("StackFields", found.values(), frozen=True, kw_only=True)


def _check_places(names: tuple[str, ...], parts: list[Method], spec: tuple[Any, ...]) -> None:
    """Refuses a stack whose parts set the same thing at the same place, before anything is trained."""
    context = Context(task_ids=jnp.zeros(1, jnp.int32))

    def shapes(part: Method, own: Any) -> Edits:
        return jax.eval_shape(lambda trees: part.expand(own, *trees, context), abstract(part.leaves(own)))

    try:
        edits = _combined([shapes(part, own) for part, own in zip(parts, spec)])
        combine_trees(edits.tree, edits.shared)  # as the model will
    except QtjaxError as error:
        raise QtjaxError(f"overlay method {'+'.join(names)!r}: {error}") from None


def _combined(edits: list[Edits]) -> Edits:
    ahead = [e for e in edits if e.virtual is not None or e.prefix]
    if len(ahead) > 1:
        raise QtjaxError("two overlays both put tokens before the row; only one of them can")
    tree, shared = edits[0].tree, edits[0].shared
    for more in edits[1:]:
        tree, shared = combine_trees(tree, more.tree), combine_trees(shared, more.shared)
    return Edits(tree, shared, *((ahead[0].virtual, ahead[0].prefix) if ahead else ()))
