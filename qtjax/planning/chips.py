"""TPU topologies by name, and what their makers publish of a chip."""

import importlib.util
import os
from dataclasses import dataclass
from typing import Any

from qtjax.errors import QtjaxError, near_names


@dataclass(frozen=True)
class Chip:
    """One device as the compiler sees it. memory: GiB; peak: 1e12 bfloat16 FLOP a second; bandwidth: 1e9 bytes a second of its
    memory; links: 1e9 bytes a second that it receives over all its links together (makers also publish twice that, as "bidirectional")."""

    memory: float
    peak: float
    bandwidth: float
    links: float


# cloud.google.com/tpu/docs, system architecture pages, read in November 2026. Of v4 a device is one core, half a chip.
CHIPS = {
    "v4": Chip(16, 137.5, 614, 150),
    "v5e": Chip(15.75, 197, 819, 200),
    "v5p": Chip(95, 459, 2765, 600),
    "v6e": Chip(31.25, 918, 1638, 400),
}
_FLAT = ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")
_CUBES = ("2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x8x8", "8x8x8", "8x8x16", "8x16x16")
_SHAPES = {"v4": _CUBES, "v5e": _FLAT, "v5p": _CUBES, "v6e": _FLAT}
NAMES = tuple(f"{chip}:{shape}" for chip, shapes in _SHAPES.items() for shape in shapes)


def open_topology(name: str) -> tuple[list[Any], Chip]:
    """(devices that can be compiled for and hold nothing, their chip) of "v5e:4x4".

    Raises QtjaxError for a name that is none, near ones named, and without the package libtpu.
    """
    if name not in NAMES:
        near = near_names(name, NAMES) or f"; {name.split(':')[0]} has {', '.join(_SHAPES.get(name.split(':')[0], CHIPS))}"
        raise QtjaxError(f"--topology {name!r}: must be CHIP:SHAPE, for example v5e:4x4 or v5p:4x4x4{near}")
    if importlib.util.find_spec("libtpu") is None:
        raise QtjaxError("--topology: compiling for a TPU needs its compiler; pip install libtpu")
    quiet = {
        "TPU_SKIP_MDS_QUERY": "1", "TPU_WORKER_HOSTNAMES": "localhost", "TPU_ACCELERATOR_TYPE": "v5litepod-8", "TPU_STDERR_LOG_LEVEL": "3",
        "TF_CPP_MIN_LOG_LEVEL": "3", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    }  # fmt: skip
    for variable, value in quiet.items():  # libtpu would look for a TPU, and for its neighbours
        os.environ.setdefault(variable, value)
    from jax.experimental import topologies

    try:
        devices = topologies.get_topology_desc(platform="tpu", topology_name=name).devices
    except Exception as error:  # noqa: BLE001 - whatever this version of libtpu says of a name
        raise QtjaxError(f"--topology {name}: this libtpu does not know it ({' '.join(str(error).split())[:120]})") from None
    return list(devices), CHIPS[name.split(":")[0]]
