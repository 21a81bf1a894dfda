"""Topologies by name: the devices of a machine that is not here."""

from typing import Any

from qtjax.errors import QtjaxError, near_names
from qtjax.planning.chips import Chip
from qtjax.planning.gpus import GPU_NAMES, open_gpus
from qtjax.planning.tpus import TPU_NAMES, open_tpus


def open_topology(name: str) -> tuple[list[Any], Chip]:
    """(devices that can be compiled for and hold nothing, what each has) of "v5e:4x4" or "h100:8".

    Raises QtjaxError for a name that is none, with near ones, and where the compiler for it is not installed.
    """
    if name in TPU_NAMES:
        return open_tpus(name)
    if name in GPU_NAMES:
        return open_gpus(name)
    known = TPU_NAMES + GPU_NAMES
    kinds = list(dict.fromkeys(each.partition(":")[0] for each in known))
    kind = name.lower().partition(":")[0]
    own = [each.partition(":")[2] for each in known if each.partition(":")[0] == kind]
    there = f"{kind} has {', '.join(own)}" if own else f"there are {', '.join(kinds)}"
    near = near_names(name.lower(), [each for each in known if each.startswith(f"{kind}:")] if own else known, count=2)
    raise QtjaxError(f"--topology {name!r}: must be CHIP:SHAPE, for example v5e:4x4, or GPU:COUNT, for example h100:8; {there}{near}")
