"""The regression guard: what the compiler says of the main steps, and how often it is asked, against committed values.

    python -m benchmarks.guard                       # compares with benchmarks/guard.json; status 1 and a line for each deviation
    python -m benchmarks.guard --only "15M full"     # of what it measures, that whose name begins so
    python -m benchmarks.guard --update              # writes what is measured now, after a change that is meant

Compiled, not run: FLOPs, bytes of arguments, outputs, donated outputs and temporaries, on 8 devices also the bytes that
collectives carry, and how many programs a run compiles. Run: a Loop of a few steps on random weights, whose later steps may compile
nothing. mask and drop do not differ in what is compiled (dropping is the host's packing), so programs are measured once for both.

None of these numbers depends on what else the machine does. They did not change either with the number of cores, the vector
instructions (SSE to AVX-512) or LLVM's optimisation level, which is therefore 0 here, to be quick. They depend on XLA's own passes,
and a little on flax and optax: values are kept by jaxlib version and architecture. Of a known version they must agree within 2 %, not
exactly, so that an edit which moves a few bytes, such as a scalar more, is no alarm; what improves by more must be committed
(--update), or the next step back would pass. Of an unknown version they stand beside the nearest known one's, and only 1.5 times
worse fails.

FLOPs: the compiler counts a loop's body once. The layers of the larger model are in one and the head walks chunks, so they are those of one
layer and one chunk (and of one block where attention loops over blocks): a layer that does more is seen, another number of layers or chunks is
not, and a larger chunk looks like more work. Temporaries, arguments and outputs are those of the whole.
"""

import json
import os
import platform
import subprocess
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import jaxlib
from rich import box
from rich.console import Console
from rich.table import Table

from benchmarks.guarded import CASES, DEVICES, Measured, selected
from qtjax.atomic import write_atomic
from qtjax.errors import QtjaxError, door, near_names
from qtjax.flags import parse_flags

FILE = Path(__file__).with_name("guard.json")
TOLERANCE = 0.02
WORSE = 1.5  # of an unknown version
LESS_IS_WORSE = ("donated",)
BYTES = ("arguments", "outputs", "donated", "temporaries", "moved")
NUMBERS = ("flops", *BYTES, "programs", "compilations")


class Deviation(NamedTuple):
    """A number that is not what was committed; None: on that side it is missing."""

    program: str
    number: str
    committed: int | None
    now: int | None

    def line(self) -> str:
        """What a reader is told."""
        where = f"{self.program}: {self.number}"
        if self.now is None:
            return f"{where}: committed as {self.committed:,}, no longer there; if that is meant, run --update"
        if self.committed is None:
            return f"{where}: {self.now:,}, not committed; run --update"
        better = (self.now < self.committed) != (self.number in LESS_IS_WORSE)
        times = f"{self.now / self.committed:.2f}x, " if self.committed else ""
        said = "better; run --update, so that it stays" if better else "worse; mend it, or if it is meant run --update"
        return f"{where}: committed {self.committed:,}, now {self.now:,}, {times}{said}"


def deviations(committed: Measured, now: Measured, *, exact: bool) -> list[Deviation]:
    """What fails. Args: exact: the values are of this very version; otherwise only what got WORSE counts."""
    out = []
    for program in dict.fromkeys([*committed, *now]):
        ours, theirs = now.get(program, {}), committed.get(program, {})
        for number in sorted({*ours, *theirs}, key=NUMBERS.index):
            found = Deviation(program, number, theirs.get(number), ours.get(number))
            if found.committed is None or found.now is None or _fails(found, exact):
                out.append(found)
    return out


def _fails(found: Deviation, exact: bool) -> bool:
    low, high = sorted((found.committed, found.now))
    if high <= low * (1 + TOLERANCE if exact else WORSE):
        return False
    return exact or (found.now > found.committed) != (found.number in LESS_IS_WORSE)


def this_version() -> str:
    """"0.10.2 x86_64": the jaxlib that compiles here, and for what."""
    return f"{jaxlib.__version__} {platform.machine()}"


def nearest(version: str, known: Sequence[str]) -> str:
    """The known "version architecture" nearest by version, of equally near ones that of the same architecture, then the newest."""

    def number(name: str) -> int:
        parts = [int("".join(filter(str.isdigit, part)) or 0) for part in name.split()[0].split(".")]
        return sum(part * 1000**place for part, place in zip(parts, (2, 1, 0)))

    def distance(name: str) -> tuple[int, bool, int]:
        return abs(number(name) - number(version)), name.split()[1] != version.split()[1], -number(name)

    return min(known, key=distance)


def measure(only: str = "") -> Measured:
    """All cases, or those whose name begins so, in a clean process for each number of devices."""
    wanted = [devices for devices in DEVICES if selected(only, devices)]
    if not wanted:
        names = [case.name for case in CASES]
        raise QtjaxError(f"--only {only!r}: no name begins so{near_names(only, names)}; names are {'; '.join(names)}")
    with ThreadPoolExecutor(len(DEVICES)) as pool:
        parts = list(pool.map(lambda devices: _child(devices, only), wanted))
    together = {name: numbers for part in parts for name, numbers in part.items()}
    return dict(sorted(together.items()))


def _child(devices: int, only: str) -> Measured:
    """guarded.measure_here in a fresh process that sees nothing of this one's flags for JAX and XLA."""
    env = {name: value for name, value in os.environ.items() if not name.startswith(("JAX_", "XLA_"))}
    flags = f"--xla_backend_optimization_level=0 --xla_force_host_platform_device_count={devices}"
    env |= {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags, "TF_CPP_MIN_LOG_LEVEL": "2"}
    call = [sys.executable, "-m", "benchmarks.guarded", str(devices), only]
    done = subprocess.run(call, env=env, cwd=Path(__file__).parents[1], capture_output=True, text=True)
    if done.returncode:
        raise QtjaxError(f"measuring on {devices} devices ended with status {done.returncode}: {done.stderr[-2000:].strip()}")
    return json.loads(done.stdout.splitlines()[-1])


def read(file: Path) -> dict[str, Measured]:
    """{version: values}. Raises QtjaxError for a file that is none."""
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise QtjaxError(f"--file {file}: cannot be read ({error}); write it with --update") from None


def updated(known: Mapping[str, Measured], version: str, now: Measured, only: str) -> dict[str, Measured]:
    """The file's new content. Where this version's values changed, those of other versions are of older code, and go."""
    before = known.get(version, {})
    kept = {name: numbers for name, numbers in before.items() if not name.startswith(only)}
    changed = before and deviations(_part(before, only), now, exact=True)
    others = {} if changed else {name: values for name, values in known.items() if name != version}
    return dict(sorted((others | {version: dict(sorted((kept | now).items()))}).items()))


def _part(values: Measured, only: str) -> Measured:
    return {name: numbers for name, numbers in values.items() if name.startswith(only)}


def tables(committed: Measured, now: Measured, title: str) -> list[Table]:
    """What is measured now, and in brackets what was committed where that is another number: of programs, and of what is only counted."""
    units = {"flops": ("MFLOP", 1e6)} | {name: (f"{name}, kB", 1e3) for name in NUMBERS if name in BYTES}
    counted = [name for name in NUMBERS if name not in units]
    out = []
    for names in ([*units], counted):
        drawn = Table("program" if not out else "counted", title="" if out else title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
        for name in names:
            drawn.add_column(units.get(name, (name,))[0], justify="right")
        for program in [program for program in now if now[program].keys() & set(names)]:
            cells = []
            for name in names:
                unit = units.get(name, ("", 1))[1]
                ours, theirs = (values.get(name) for values in (now[program], committed.get(program, {})))
                both = [] if ours is None else [_short(ours, unit)] + ([f"({_short(theirs, unit)})"] if theirs not in (None, ours) else [])
                cells.append("\n".join(both))
            drawn.add_row(program, *cells)
        if drawn.row_count:
            out.append(drawn)
    return out


def _short(value: int, unit: float) -> str:
    return f"{value / unit:,.{int(0 < value < 10 * unit and unit > 1)}f}"


def main(argv: Sequence[str] | None = None) -> None:
    own = parse_flags(
        "python -m benchmarks.guard", __doc__.splitlines()[0], argv,
        {
            "update": (False, "write what is measured instead of comparing with it"), "only": ("", "measure what has a name that begins so"),
            "file": (str(FILE), "the committed values"), "json": ("", "file to write what is measured to; empty: none"),
        },
    )  # fmt: skip
    file, only, version = Path(own["file"]), own["only"], this_version()
    known = read(file)
    if not known and not own["update"]:
        raise QtjaxError(f"--file {file}: holds no values; write it with --update")
    console = Console(width=None if Console().is_terminal else 140)
    now = measure(only)
    if own["json"]:
        write_atomic(own["json"], _text({version: now}))
    if own["update"]:
        write_atomic(file, _text(updated(known, version, now, only)))
        gone = [name for name in known if name not in read(file)]
        console.print(*tables(_part(known.get(version, {}), only), now, f"{file.name}: written for jaxlib {version}"))
        if gone:
            console.print(f"values of {', '.join(gone)} were of older code and are gone; update with that jaxlib too, if they are wanted")
        return
    exact = version in known
    other = version if exact else nearest(version, list(known))
    committed = _part(known[other], only)
    found = deviations(committed, now, exact=exact)
    rule = f"within {TOLERANCE:.0%}" if exact else f"jaxlib {version} is not committed: only {WORSE} times worse fails"
    console.print(*tables(committed, now, f"Compiled programs, jaxlib {version}, against {other}: {rule}"))
    for each in found:
        print(each.line())
    if found:
        raise SystemExit(1)
    console.print(f"{len(now)} entries as committed", highlight=False)


def _text(values: Mapping[str, Measured]) -> str:
    return json.dumps(values, indent=1) + "\n"


if __name__ == "__main__":
    door(main)
