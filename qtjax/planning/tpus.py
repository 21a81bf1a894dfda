"""TPUs by name, and what their maker publishes of a chip."""

import importlib.util
import os
from typing import Any

from qtjax.errors import QtjaxError
from qtjax.planning.chips import Chip

# cloud.google.com/tpu/docs, system architecture pages, read in November 2026; memory as libtpu lets a program have it. Of v4 a device
# is one core, half a chip.
_CHIPS = {
    "v4": Chip(15.25, 137.5, 614, 150),
    "v5e": Chip(15.75, 197, 819, 200),
    "v5p": Chip(95.73, 459, 2765, 600),
    "v6e": Chip(31.24, 918, 1638, 400),
}
_FLAT = ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")
_CUBES = ("2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x8x8", "8x8x8", "8x8x16", "8x16x16")
_SHAPES = {"v4": _CUBES, "v5e": _FLAT, "v5p": _CUBES, "v6e": _FLAT}
TPU_NAMES = tuple(f"{chip}:{shape}" for chip, shapes in _SHAPES.items() for shape in shapes)


def open_tpus(name: str) -> tuple[list[Any], Chip]:
    """(devices that can be compiled for and hold nothing, what each has) of one of TPU_NAMES. Raises QtjaxError without libtpu."""
    if importlib.util.find_spec("libtpu") is None:
        raise QtjaxError(f"--topology {name}: compiling for a TPU needs its compiler, no TPU; pip install libtpu")
    quiet = {
        "TPU_SKIP_MDS_QUERY": "1", "TPU_WORKER_HOSTNAMES": "localhost", "TPU_ACCELERATOR_TYPE": "v5litepod-8", "TPU_STDERR_LOG_LEVEL": "3",
        "TF_CPP_MIN_LOG_LEVEL": "3", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    }  # fmt: skip
    for variable, value in quiet.items():  # libtpu would look for a TPU, and for its neighbours
        os.environ.setdefault(variable, value)
    if "XLA_FLAGS" in os.environ:  # libtpu ends the process at a flag that it does not know; those of other devices change nothing here
        flags = os.environ["XLA_FLAGS"].split()
        os.environ["XLA_FLAGS"] = " ".join(flag for flag in flags if not flag.startswith(("--xla_cpu_", "--xla_gpu_")))
    from jax.experimental import topologies

    try:
        devices = topologies.get_topology_desc(platform="tpu", topology_name=name).devices
    except Exception as error:  # noqa: BLE001 - whatever this version of libtpu says of a name
        raise QtjaxError(f"--topology {name}: this libtpu does not know it ({' '.join(str(error).split())[:120]})") from None
    return list(devices), _CHIPS[name.split(":")[0]]
