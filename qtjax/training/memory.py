"""Out of memory in one line: how much is missing, and what makes a run smaller."""

import contextlib
import re
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import jax

from qtjax.checkpoints.folder import read_config, resolve_folder
from qtjax.config import Config
from qtjax.errors import QtjaxError
from qtjax.flags import dashed

GIB = 2**30
COMPILING = "while compiling "  # begins the note that an error of a compiler carries
_SIZE = r"[\d.]+ ?(?:[KMGT](?:iB)?|B|bytes)"
# As XLA says it: compiling for a TPU (both of the whole program, its arguments among it, whatever they call it), and allocating.
_SAYINGS = (
    ("program", rf"Used (?P<needed>{_SIZE}) of (?P<there>{_SIZE}) hbm"),
    ("program", rf"HLO temporaries \((?P<needed>{_SIZE})\) exceeds available HBM \((?P<there>{_SIZE})\)"),
    ("allocation", rf"(?:allocate|reserve|allocating) (?P<needed>{_SIZE})(?:.*?There are (?P<there>{_SIZE}) free)?"),
)


class Shortage(NamedTuple):
    """kind: needed bytes are those of a whole "program", or of one more "allocation"; there: bytes of the device, of an allocation
    those that are free; None where nothing is said of it."""

    kind: str
    needed: int
    there: int | None

    def __str__(self) -> str:
        more = self.kind == "allocation"
        needed = f"{'no room for' if more else 'it needs'} {self.needed / GIB:.2f} GiB{' more' if more else ''}"
        if self.there is None:
            return needed
        return f"{needed}, {self.there / GIB:.2f} GiB are {'free' if more else 'there'}: {max(self.needed - self.there, 0) / GIB:.2f} GiB are lacking"


def shortage(text: str) -> Shortage | None:
    """What an error of XLA says of memory, None where it is about something else."""
    if "RESOURCE_EXHAUSTED" not in text:
        return None
    for kind, saying in _SAYINGS:
        if found := re.search(saying, text, re.DOTALL):
            return Shortage(kind, _bytes(found["needed"]), _bytes(found["there"]) if found["there"] else None)
    return None


def _bytes(size: str) -> int:
    number, unit = re.match(r"([\d.]+) ?(\w)", size).groups()
    return int(float(number) * {"K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}.get(unit, 1))


def smaller(config: Config, devices: int, width: int = 0) -> list[dict[str, Any]]:
    """Changes of the config that need less memory and train the same, the cheapest first, each beside those before it.

    Args: devices: how many; width: of the model, which mesh.fsdp must divide, 0 where it is not known.
    """
    out: list[dict[str, Any]] = []
    full = {} if config.model.remat == "full" else {"model.remat": "full"}
    if config.prune.reuse_forward:  # which is computed as remat full is
        out.append({"prune.reuse_forward": False} | full)
    tensor = config.mesh.tensor
    fsdp = max(ways for ways in range(1, devices // tensor + 1) if (devices // tensor) % ways == 0 and width % ways == 0)
    if fsdp > config.mesh.fsdp:
        out.append({"mesh.fsdp": fsdp} | ({} if config.mesh.data == -1 else {"mesh.data": -1}))
    if full and not config.prune.reuse_forward:
        out.append(full)
    if config.train.rows > (ways := devices // tensor):
        out.append({"train.rows": ways})
    return out


def as_flags(changes: Mapping[str, Any]) -> str:
    """As a command line has them."""
    return " ".join(f"--{dashed(name)} {str(value).lower() if isinstance(value, bool) else value}" for name, value in changes.items())


@contextlib.contextmanager
def memory_errors(config: Config) -> Iterator[None]:
    """Turns XLA's errors of memory into a QtjaxError: what was under way, how much is missing, what to change."""
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if (missing := shortage(str(error))) is None:
            raise
        doing = next((note for note in getattr(error, "__notes__", ()) if note.startswith(COMPILING)), "while running")
        width = read_config(resolve_folder(config.model.path)).hidden_size
        changes = [as_flags(each) for each in smaller(config, jax.device_count(), width)]
        if config.overlay.method == "none":
            changes.append("--overlay.method lora")
        remedy = f"try {', '.join(changes)}" if changes else "use more devices, or a smaller model"
        share = " (XLA_PYTHON_CLIENT_MEM_FRACTION=0.95 gives JAX more of a GPU than its 75 %)" if jax.default_backend() == "gpu" else ""
        raise QtjaxError(f"out of memory {doing}: {missing}{share}; {remedy}; python -m qtjax.plan compiles without the devices, and tries") from None
