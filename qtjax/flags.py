"""Command lines of the doors: flags typed by their defaults, mistakes in one line."""

import argparse
import re
import typing
from collections.abc import Mapping, Sequence
from typing import Any

from qtjax.errors import QtjaxError, near_names

Flags = Mapping[str, tuple[Any, str]]

KINDS = {int: "an integer", float: "a number", bool: "true or false", str: "a text"}


def parse_flags(prog: str, description: str, argv: Sequence[str] | None, flags: Flags) -> dict[str, Any]:
    """Parses `--name value` flags.

    Args: flags: {"max-new-tokens": (default, doc)}. The default's type is the flag's: a bool is a switch, a list may be
    given several times.
    Returns: {"max-new-tokens": value}. Raises QtjaxError for unknown flags (near ones named) and values of another type.
    """
    parser = flag_parser(prog, description, flags)
    given, unknown = parser.parse_known_args(argv)
    refuse_unknown(parser, unknown)
    return typed_flags(given, flags)


def flag_parser(prog: str, description: str, flags: Flags, *, add_help: bool = True) -> argparse.ArgumentParser:
    """A parser of `flags` whose own complaints are QtjaxErrors."""
    parser = argparse.ArgumentParser(prog=prog, description=description, allow_abbrev=False, add_help=add_help)
    parser._negative_number_matcher = re.compile(r"^-(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?$|^-inf$")  # values, not flags

    def fail(message: str) -> typing.NoReturn:
        raise QtjaxError(f"{message}; --help lists every flag")

    parser.error = fail
    for name, (default, doc) in flags.items():
        flag, doc = f"--{dashed(name)}", doc.replace("%", "%%")  # argparse would format them
        if isinstance(default, bool):
            parser.add_argument(flag, dest=name, action="store_true", help=doc)
        elif isinstance(default, list):
            parser.add_argument(flag, dest=name, action="append", metavar="str", help=f"{doc} (may be repeated)")
        else:
            parser.add_argument(flag, dest=name, metavar=type(default).__name__, help=f"{doc} (default: {default!r})")
    return parser


def refuse_unknown(parser: argparse.ArgumentParser, unknown: Sequence[str]) -> None:
    """Raises QtjaxError for the first argument that is no flag, naming near ones."""
    if unknown:
        bad, known = unknown[0].split("=")[0], [option for action in parser._actions for option in action.option_strings]
        raise QtjaxError(f"{bad}: no such flag{near_names(bad, known)}; --help lists every flag")


def typed_flags(given: argparse.Namespace, flags: Flags) -> dict[str, Any]:
    """{name: value} of `flags`, defaults where a flag was not given."""
    values = {}
    for name, (default, _) in flags.items():
        value = getattr(given, name)
        if isinstance(value, str):
            value = typed(f"--{dashed(name)}", type(default), value, dashed(name))
        values[name] = default if value is None else value
    return values


def typed(where: str, kind: type, text: str, flag: str) -> Any:
    """`text` as an int, float, bool or str. Raises QtjaxError that begins with `where`."""
    if kind is bool:
        if text.lower() in ("true", "yes", "1", "false", "no", "0"):
            return text.lower() in ("true", "yes", "1")
        raise QtjaxError(f"{where} {text!r}: must be {KINDS[kind]}")
    try:
        return kind(text)
    except ValueError:
        raise QtjaxError(f"{where} {text!r}: must be {KINDS[kind]}, for example --{flag} 1") from None


def dashed(name: str) -> str:
    """A field's name as a flag's."""
    return name.replace("_", "-")
