"""The one kind of error a user is meant to read: one line that says what, where, the rule and the remedy."""

import difflib
import sys
from collections.abc import Callable, Iterable


class QtjaxError(ValueError):
    """Bad input. The message is one line; doors print it without a traceback and exit with status 2."""


class Diverged(QtjaxError):
    """A loss, a gradient or a score is not finite."""


def near_names(name: str, known: Iterable[str], count: int = 3) -> str:
    """`"; did you mean 'a' or 'b'?"`, or an empty string when nothing is close."""
    close = difflib.get_close_matches(name, list(known), n=count, cutoff=0.5)
    return f"; did you mean {' or '.join(repr(c) for c in close)}?" if close else ""


def door(main: Callable[[], None]) -> None:
    """Runs a command-line door: bad input and Ctrl-C end in one line, everything else keeps its traceback."""
    try:
        main()
    except QtjaxError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    except KeyboardInterrupt as stop:
        done = f" ({stop})" if str(stop) else ""
        print(f"interrupted{done}; what was written stays, and the same command continues from it", file=sys.stderr)
        raise SystemExit(130) from None
