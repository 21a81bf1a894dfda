"""Which linear modules a method edits: PEFT's target rules, resolved against a parameter tree.

Modules are known here by their tree path, "layers/self_attn/q_proj", which stands for one HF module a layer,
"model.layers.{n}.self_attn.q_proj". PEFT's rules speak about the latter, so they are tried on those names.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from qtjax.errors import QtjaxError, near_names
from qtjax.tree import flatten

ALL_LINEAR = "all-linear"

_ORDER = "q_proj k_proj v_proj o_proj gate_proj up_proj down_proj"

Names = str | tuple[str, ...]


@dataclass(frozen=True)
class Linear:
    """A stacked kernel [N, in, out]: its module's tree path and its three sizes."""

    path: str
    layers: int
    inputs: int
    outputs: int

    @property
    def name(self) -> str:
        return self.path.rsplit("/", 1)[-1]

    @property
    def leaf(self) -> tuple[str, tuple[int, ...]]:
        """Path and shape of the base leaf that it stands for."""
        return f"{self.path}/kernel", (self.layers, self.inputs, self.outputs)

    def module(self, layer: int) -> str:
        """HF's name of this module in one layer: "model.layers.3.self_attn.q_proj"."""
        return f"model.layers.{layer}." + self.path.removeprefix("layers/").replace("/", ".")


@dataclass(frozen=True)
class End(Linear):
    """The embedding ("embed_tokens", V to D) or the head ("lm_head", D to V, tied or not): there is one, layers = 1."""

    @property
    def leaf(self) -> tuple[str, tuple[int, ...]]:
        """The embedding's table [V, D], whose sizes are the head's too."""
        sizes = (self.outputs, self.inputs) if self.path == "lm_head" else (self.inputs, self.outputs)
        return "embed_tokens/embedding", sizes

    def module(self, layer: int = 0) -> str:
        del layer
        return "lm_head" if self.path == "lm_head" else f"model.{self.path}"


def linear_modules(params: Mapping[str, Any]) -> tuple[Linear, ...]:
    """The layers' linear modules of a parameter tree, in the model's order. Leaves need only a shape.

    Raises QtjaxError for a tree without stacked kernels.
    """
    found = [
        Linear(path.removesuffix("/kernel"), *leaf.shape)
        for path, leaf in flatten(params).items()
        if path.startswith("layers/") and path.endswith("/kernel") and len(leaf.shape) == 3
    ]
    if not found:
        raise QtjaxError("params: has no layers/.../kernel of shape [N, in, out]; give the tree of load_pretrained")
    return tuple(sorted(found, key=lambda linear: (_ORDER.find(linear.name), linear.path)))


def end_modules(params: Mapping[str, Any]) -> tuple[End, End]:
    """Embedding and head of a parameter tree."""
    vocab, width = flatten(params)["embed_tokens/embedding"].shape
    return End("embed_tokens", 1, vocab, width), End("lm_head", 1, width, vocab)


def as_names(value: Any, field: str) -> Names | None:
    """A field that PEFT allows to be a text or a list of texts: the text, a sorted tuple, or None when empty."""
    if value is None or isinstance(value, str):
        return value or None
    if isinstance(value, (list, tuple, set, frozenset)) and all(isinstance(v, str) for v in value):
        return tuple(sorted(set(value))) or None
    raise QtjaxError(f"{field} = {value!r}: must be a text or a list of texts")


def compiled(pattern: str, field: str) -> re.Pattern[str]:
    """The regex, or a QtjaxError that says what is wrong with it."""
    try:
        return re.compile(pattern)
    except re.error as error:
        raise QtjaxError(f"{field} = {pattern!r}: is not a valid regular expression ({error})") from None


def hits(rule: Names | None, module: str, field: str) -> bool:
    """PEFT's check: a text is a regex that matches the whole module name, a list holds names or dotted endings."""
    if rule is None:
        return False
    if isinstance(rule, str):
        return compiled(rule, field).fullmatch(module) is not None
    return any(module == name or module.endswith(f".{name}") for name in rule)


def other_modules(linears: Sequence[Linear]) -> list[str]:
    """HF modules that a rule can hit and that no method here edits as a linear module of the layers."""
    found = ["lm_head", "model", "model.embed_tokens", "model.layers", "model.norm"]
    for n in range(linears[0].layers):
        layer = f"model.layers.{n}"
        found += [layer, f"{layer}.self_attn", f"{layer}.mlp"]
        found += [f"{layer}.input_layernorm", f"{layer}.post_attention_layernorm"]
    return found


def normalize_targets(value: Any, linears: Sequence[Linear]) -> Names:
    """`target_modules` as the rule that PEFT understands: a regex, or a sorted tuple of names.

    "all-linear" (any case) becomes the names of the layers' linear modules; the head is never among them. A text is a
    regex if it matches a whole module name, as in PEFT; otherwise, when it holds only names, commas and blanks, it is a
    list ("q_proj,v_proj"), which PEFT would refuse. Raises QtjaxError for anything else.
    """
    rule = as_names(value, "target_modules")
    if rule is None:
        raise QtjaxError(f"target_modules = {value!r}: must name at least one module, or be {ALL_LINEAR!r}")
    if not isinstance(rule, str):
        return rule
    if rule.lower() == ALL_LINEAR:
        return tuple(sorted({linear.name for linear in linears}))
    return _listed(rule, "target_modules", [linear.module(n) for linear in linears for n in range(linear.layers)])


def _listed(rule: str, field: str, modules: Sequence[str]) -> Names:
    """A text of names, commas and blanks that is no module's name as a regex becomes a list; else the regex."""
    if re.fullmatch(r"[\w.]+(\s*,\s*[\w.]+)*\s*,?", rule.strip()):
        if not any(hits(rule, module, field) for module in modules):
            return tuple(sorted({name.strip() for name in rule.split(",") if name.strip()}))
    compiled(rule, field)
    return rule


def with_names_listed(fields: Mapping[str, Any], linears: Sequence[Linear]) -> dict[str, Any]:
    """A caller's fields, exclude_modules as text of names made a list as `normalize_targets` does, also in the fields of a
    stack's parts. In a file PEFT's meaning holds: there a text is a regex."""
    out = dict(fields)
    for name, value in fields.items():
        if name == "exclude_modules" and isinstance(value, str) and value:
            out[name] = _listed(value, name, _all_modules(linears))
        elif isinstance(value, Mapping) and "exclude_modules" in value:
            out[name] = with_names_listed(value, linears)
    return out


def _all_modules(linears: Sequence[Linear]) -> list[str]:
    return [linear.module(n) for linear in linears for n in range(linear.layers)] + other_modules(linears)


def check_excluded(rule: Names | None, linears: Sequence[Linear]) -> None:
    """Raises QtjaxError, with near names, for a name or regex of exclude_modules that no module of the model has."""
    modules = _all_modules(linears)
    for one in (rule,) if isinstance(rule, str) else rule or ():
        if not any(hits(one if isinstance(rule, str) else (one,), module, "exclude_modules") for module in modules):
            known = [*_known(linears), *dict.fromkeys(module.rsplit(".", 1)[-1] for module in other_modules(linears))]
            raise QtjaxError(f"exclude_modules: {one!r} matches no module{near_names(one, known)}; it would exclude nothing")


def resolve(
    target_modules: Names,
    linears: Sequence[Linear],
    *,
    exclude_modules: Names | None = None,
    layers_to_transform: tuple[int, ...] | None = None,
    strict: bool = True,
    ends: Sequence[End] = (),
    saved: Sequence[str] = (),
) -> dict[str, tuple[bool, ...]]:
    """{tree path: in which of the N layers it is edited} for every linear module that the rules hit somewhere.

    Args:
      target_modules, exclude_modules: normalized rules (`normalize_targets`, `as_names`).
      layers_to_transform: layer indices; only with a list of names, as in PEFT.
      strict: also refuse a name or an index that hits nothing while others do (PEFT takes it silently, and adapters
        in the wild list names of several architectures, so reading one is not strict).
      ends: embedding and head, where the method can edit them; else a rule that hits one is refused.
      saved: modules_to_save; what lies in one of them is no target.
    Raises QtjaxError, with near names, when nothing is hit, and for a rule that hits something other than a linear
    module of the layers.
    """
    if layers_to_transform is not None and isinstance(target_modules, str):
        raise QtjaxError(
            f"layers_to_transform = {list(layers_to_transform)}: needs target_modules as a list of names, got the regex"
            f" {target_modules!r}; say the layers in the regex instead"
        )
    count = linears[0].layers
    if strict:
        check_excluded(exclude_modules, linears)
    bad = [n for n in layers_to_transform or () if strict and not 0 <= n < count]
    if bad:
        raise QtjaxError(f"layers_to_transform = {bad[0]}: the model has layers 0 to {count - 1}")

    def hit(module: str) -> bool:
        excluded = hits(exclude_modules, module, "exclude_modules")
        excluded |= any(compiled(rf"(^|.*\.){name}($|\..*)", "modules_to_save").match(module) for name in saved)
        return not excluded and hits(target_modules, module, "target_modules")

    for module in other_modules(linears):
        if module not in [end.module() for end in ends] and hit(module):
            raise QtjaxError(
                f"target_modules = {_shown(target_modules)}: matches {module!r}, which is not a linear module of the"
                f" layers; name only {_names([*linears, *ends])}"
            )
    # As in PEFT, layers_to_transform leaves out what is in no layer, unless a name is the module's whole name.
    chosen = {
        end.path: (True,)
        for end in ends
        if hit(end.module()) and (layers_to_transform is None or end.module() in target_modules)
    }
    for linear in linears:
        where = tuple(
            (layers_to_transform is None or n in layers_to_transform) and hit(linear.module(n)) for n in range(count)
        )
        if any(where):
            chosen[linear.path] = where
    modules = [linear.module(n) for linear in linears for n in range(count)] + [end.module() for end in ends]
    for name in () if isinstance(target_modules, str) or not (strict or not chosen) else target_modules:
        if not any(hits((name,), module, "target_modules") for module in modules):
            raise QtjaxError(
                f"target_modules: {name!r} matches no linear module{near_names(name, _known(linears))};"
                f" the model has {_names(linears)}"
            )
    if not chosen and layers_to_transform is not None and not any(0 <= n < count for n in layers_to_transform):
        raise QtjaxError(f"layers_to_transform = {list(layers_to_transform)}: the model has layers 0 to {count - 1}")
    if not chosen:
        raise QtjaxError(
            f"target_modules = {_shown(target_modules)}: matches no linear module{_excluding(exclude_modules)}"
            f"{near_names(str(target_modules), modules) if isinstance(target_modules, str) else ''};"
            f" a text is a regex for a whole module name such as {modules[0]!r}, a list holds names: {_names(linears)}"
        )
    return chosen


def pattern_value(patterns: Sequence[tuple[str, Any]], module: str, default: Any, field: str) -> Any:
    """PEFT's rank_pattern and alpha_pattern: the value of the first key that is, as a regex, the module's name or its
    dotted ending; `default` if none is."""
    for key, value in patterns:
        if compiled(rf"(.*\.)?({key})$", field).match(module):
            return value
    return default


def check_patterns(patterns: Sequence[tuple[str, Any]], modules: Sequence[str], field: str) -> None:
    """Raises QtjaxError, with near names, for a pattern that matches none of the edited modules."""
    for key, _ in patterns:
        if not any(compiled(rf"(.*\.)?({key})$", field).match(module) for module in modules):
            names = sorted({module.rsplit(".", 1)[-1] for module in modules})
            raise QtjaxError(f"{field}: {key!r} matches no edited module{near_names(key, names)}")


def _known(linears: Sequence[Linear]) -> list[str]:
    return [linear.name for linear in linears] + [linear.path.removeprefix("layers/").replace("/", ".") for linear in linears]


def _names(linears: Sequence[Linear]) -> str:
    return ", ".join(linear.name for linear in linears)


def _shown(rule: Names) -> str:
    return repr(rule) if isinstance(rule, str) else ",".join(rule)


def _excluding(rule: Names | None) -> str:
    return "" if rule is None else f" that exclude_modules = {_shown(rule)} leaves"
