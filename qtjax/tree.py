"""Parameter trees are plain nested dicts; a leaf is addressed by its path, "layers/self_attn/q_proj/kernel"."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from qtjax.errors import QtjaxError, near_names

Tree = dict[str, Any]


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"a": {"b": x}} -> {"a/b": x}. Anything that is not a mapping is a leaf."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        path = f"{prefix}{key}"
        if isinstance(value, Mapping):
            flat.update(flatten(value, path + "/"))
        else:
            flat[path] = value
    return flat


def unflatten(flat: Mapping[str, Any]) -> Tree:
    """{"a/b": x} -> {"a": {"b": x}}; the inverse of `flatten`."""
    tree: Tree = {}
    for path, value in flat.items():
        *parents, name = path.split("/")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[name] = value
    return tree


def match_rules(paths: Sequence[str], rules: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    """The value of the first rule whose regex matches each whole path.

    Raises QtjaxError for a path without a rule and for a rule that matches no path (near paths are listed).
    """
    used = [False] * len(rules)
    out: dict[str, Any] = {}
    for path in paths:
        for i, (pattern, value) in enumerate(rules):
            if re.fullmatch(pattern, path):
                used[i] = True
                out.setdefault(path, value)
        if path not in out:
            raise QtjaxError(f"no rule matches the leaf {path!r}: add one")
    for (pattern, _), hit in zip(rules, used):
        if not hit:
            raise QtjaxError(f"the rule {pattern!r} matches no leaf{near_names(pattern, paths)}")
    return out


def describe_difference(expected: Mapping[str, Any], found: Mapping[str, Any], limit: int = 8) -> str:
    """One line naming missing, unknown and mis-shaped leaves of two flat {path: array-like} mappings; "" if none."""

    def some(names: Sequence[str]) -> str:
        return ", ".join(names[:limit]) + (f" and {len(names) - limit} more" if len(names) > limit else "")

    missing = sorted(set(expected) - set(found))
    unknown = sorted(set(found) - set(expected))
    shaped = [
        f"{p} is {tuple(found[p].shape)}, expected {tuple(expected[p].shape)}"
        for p in sorted(set(expected) & set(found))
        if tuple(expected[p].shape) != tuple(found[p].shape)
    ]
    parts = []
    if missing:
        parts.append(f"{len(missing)} missing: {some(missing)}")
    if unknown:
        parts.append(f"{len(unknown)} unknown: {some(unknown)}")
    if shaped:
        parts.append(f"{len(shaped)} of another shape: {some(shaped)}")
    return "; ".join(parts)
