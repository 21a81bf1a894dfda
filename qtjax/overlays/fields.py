"""A method's settings by PEFT's names: declared once in a frozen dataclass, read, checked and written back from there.

What PEFT knows and a method here does not support is refused by name, never ignored.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, dataclass, field, fields
from typing import Any

from qtjax.errors import QtjaxError, near_names
from qtjax.overlays.targets import Linear, Names, as_names, compiled, normalize_targets

# Fields that say who and how, not what is computed.
DESCRIPTIVE = frozenset(
    "peft_type peft_version auto_mapping base_model_name_or_path revision inference_mode runtime_config".split()
)
# Fields of many PEFT configs, and the values that mean nothing.
INERT: dict[str, tuple[Any, ...]] = {
    "task_type": (None, "CAUSAL_LM"),
    "bias": ("none", None),
    "fan_in_fan_out": (False, None),
    "modules_to_save": (None, []),
    "layers_pattern": (None, "", [], "layers", ["layers"]),
}

# What a config of PEFT's says of the fields that are off here, in the configs that have all four.
OFF: dict[str, Any] = {"bias": "none", "fan_in_fan_out": False, "modules_to_save": None, "layers_pattern": None}


def _integer(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _number(value: Any) -> bool:
    return (_integer(value) or isinstance(value, float)) and math.isfinite(value)


# rule name: (test, what the value must be)
_RULES: dict[str, tuple[Callable[[Any], bool], str]] = {
    "int>0": (lambda v: _integer(v) and v > 0, "must be an integer above 0"),
    "int>=0": (lambda v: _integer(v) and v >= 0, "must be an integer of 0 or more"),
    "int": (_integer, "must be an integer"),
    "number": (_number, "must be a number"),
    "number>0": (lambda v: _number(v) and v > 0, "must be a number above 0"),
    "number>=0": (lambda v: _number(v) and v >= 0, "must be a number of 0 or more"),
    "[0,1)": (lambda v: _number(v) and 0 <= v < 1, "is a fraction from 0 to below 1"),
    "(0,1]": (lambda v: _number(v) and 0 < v <= 1, "is a fraction above 0 and at most 1"),
    "bool": (lambda v: isinstance(v, bool), "must be true or false"),
    "bool or text": (lambda v: isinstance(v, (bool, str)), "must be true, false or a name"),
    "text": (lambda v: isinstance(v, str), "must be a text"),
}


def setting(default: Any, rule: str, choices: Sequence[Any] = ()) -> Any:
    """A field of a method's dataclass. Rules: of this file, "targets", "names", "layers", "ids", "pattern:RULE", "choice"."""
    return field(default=default, metadata={"rule": rule, "choices": tuple(choices)})


@dataclass(frozen=True)
class Named:
    """The fields of every method that edits linear modules of the layers."""

    target_modules: Names = setting("all-linear", "targets")
    exclude_modules: Names | None = setting(None, "names")


@dataclass(frozen=True)
class Targeted(Named):
    """Those of the methods that also choose layers by index."""

    layers_to_transform: tuple[int, ...] | None = setting(None, "layers")


def require(holds: bool, name: str, value: Any, rule: str) -> None:
    """Raises the one-line QtjaxError of an impossible value."""
    if not holds:
        raise QtjaxError(f"{name} = {value!r}: {rule}")


def read_fields(
    method: str,
    cls: type,
    given: Mapping[str, Any],
    linears: Sequence[Linear] = (),
    *,
    inert: Mapping[str, tuple[Any, ...]] | None = None,
    descriptive: Sequence[str] = (),
    also: Sequence[str] = (),
) -> Any:
    """Settings given by name, from a caller or from adapter_config.json, as the method's dataclass.

    Args: inert: {field of PEFT: values that mean nothing here}, beside the usual ones; anything else of it is refused.
      also: fields that the caller reads itself, for near names.
    Raises QtjaxError naming the field, its value and the rule: unknown fields, values of the wrong kind, and PEFT
    fields whose effect is not supported. A field unknown here passes only when it is off (None, False or empty), so
    that files of newer PEFT versions are read exactly when they mean the same.
    """
    known = {f.name: f for f in fields(cls)}
    inert = INERT | dict(inert or {})
    for name, value in given.items():
        if name in known or name in DESCRIPTIVE or name in descriptive:
            continue
        value = list(value) if isinstance(value, (tuple, set)) else value
        if name in inert:
            allowed = " or ".join(repr(v) for v in inert[name][:2])
            require(value in inert[name], name, value, f"is not supported for {method}; only {allowed} is")
        elif not (value is None or value is False or value in ("", [], {})):
            raise QtjaxError(
                f"{name} = {value!r}: is not a field that {method} supports{near_names(name, [*known, *also, *inert])}"
            )
    return cls(**{name: _checked(f, given.get(name), linears) for name, f in known.items()})


def _checked(f: Any, value: Any, linears: Sequence[Linear]) -> Any:
    rule, choices, name = f.metadata["rule"], f.metadata["choices"], f.name
    value = f.default if value is None and f.default is not MISSING else value
    if rule == "targets":
        return normalize_targets(value, linears)
    if rule == "names":
        return as_names(value, name)
    if rule == "layers":
        return _layers(value, name)
    if rule == "ids":
        return _ids(value, name)
    if rule.startswith("pattern:"):
        return _pattern(value, name, rule.removeprefix("pattern:"))
    if rule == "choice":
        fits = any(value is c or (type(value) is type(c) and value == c) for c in choices)
        require(fits, name, value, f"must be one of {', '.join(map(repr, choices))}")
        return value
    if value is None and f.default is None:
        return None
    test, text = _RULES[rule]
    require(test(value), name, value, text)
    return float(value) if f.type in (float, "float") else value


def _pattern(value: Any, name: str, rule: str) -> tuple[tuple[str, Any], ...]:
    value = dict(value) if isinstance(value, tuple) else value or {}
    require(isinstance(value, Mapping), name, value, "must map module names or regexes to numbers")
    test, text = _RULES[rule]
    for key, one in value.items():
        require(test(one), f"{name}[{key!r}]", one, text)
        compiled(rf"(.*\.)?({key})$", name)
    number = float if rule.startswith("number") else int
    return tuple((key, number(one)) for key, one in value.items())


def _layers(value: Any, name: str) -> tuple[int, ...] | None:
    if value is None:
        return None
    listed = [value] if _integer(value) else value
    valid = isinstance(listed, (list, tuple, set, range)) and all(_integer(n) for n in listed)
    require(valid, name, value, "must be a layer index or a list of them")
    return tuple(sorted(set(listed))) or None


def _ids(value: Any, name: str) -> tuple[int, ...] | None:
    if value is None:
        return None
    valid = isinstance(value, (list, tuple)) and all(_integer(n) and n >= 0 for n in value)
    require(valid, name, value, "must be a list of token ids")
    return tuple(value)


def to_peft(settings: Any) -> dict[str, Any]:
    """The dataclass as adapter_config.json's fields. Integral numbers are written as integers, PEFT's type for them."""
    out = {}
    for f in fields(settings):
        value, rule = getattr(settings, f.name), f.metadata["rule"]
        if rule.startswith("pattern:"):
            out[f.name] = {key: _integral(one) for key, one in value}
        elif isinstance(value, tuple):
            out[f.name] = list(value)
        else:
            out[f.name] = _integral(value) if rule.startswith("number") else value
    return out


def _integral(value: Any) -> Any:
    return int(value) if isinstance(value, float) and value.is_integer() else value
