"""Command lines of doors that need no experiment file: typed by their defaults, mistakes in one line."""

import argparse
import typing
from collections.abc import Mapping, Sequence
from typing import Any

from qtjax.errors import QtjaxError, near_names


def parse_flags(
    prog: str, description: str, argv: Sequence[str] | None, flags: Mapping[str, tuple[Any, str]]
) -> dict[str, Any]:
    """Parses `--name value` flags.

    Args: flags: {"max-new-tokens": (default, doc)}. The default's type is the flag's: a bool is a switch, a list may be
    given several times.
    Returns: {"max-new-tokens": value}. Raises QtjaxError for unknown flags (near ones named) and values of another type.
    """
    parser = argparse.ArgumentParser(prog=prog, description=description, allow_abbrev=False)
    for name, (default, doc) in flags.items():
        if isinstance(default, bool):
            parser.add_argument(f"--{name}", action="store_true", help=doc)
        elif isinstance(default, list):
            parser.add_argument(f"--{name}", action="append", default=None, metavar="str", help=f"{doc} (may be repeated)")
        else:
            shown = f"{doc} (default: {default!r})".replace("%", "%%")
            parser.add_argument(f"--{name}", default=default, metavar=type(default).__name__, help=shown)
    known = [option for action in parser._actions for option in action.option_strings]

    def fail(message: str) -> typing.NoReturn:
        raise QtjaxError(f"{message}; --help lists every flag")

    parser.error = fail
    given, unknown = parser.parse_known_args(argv)
    if unknown:
        bad = unknown[0].split("=")[0]
        raise QtjaxError(f"{bad}: no such flag{near_names(bad, known)}; --help lists every flag")
    return {name: _typed(name, default, getattr(given, name.replace("-", "_"))) for name, (default, _) in flags.items()}


def _typed(name: str, default: Any, value: Any) -> Any:
    if value is None:
        return []
    if not isinstance(value, str) or isinstance(default, str):
        return value
    try:
        return type(default)(value)
    except ValueError:
        kind = "an integer" if isinstance(default, int) else "a number"
        raise QtjaxError(f"--{name} {value!r}: must be {kind}, for example --{name} {default or 1}") from None
