"""Memory for the arrays of a step on a CPU: pages that are large, and stay."""

import os
import sys
from pathlib import Path

_SWITCH = Path("/sys/kernel/mm/transparent_hugepage/enabled")
_DEVICES = Path("/dev")
_ACCELERATORS = ("nvidia[0-9]*", "kfd", "accel[0-9]*", "vfio/[0-9]*")  # NVIDIA, AMD, TPU
HUGE = "glibc.malloc.hugetlb=1"
# One heap that never shrinks: only the first arena may grow past 64 MB, and what is mapped on its own is given back when it is freed.
KEPT = "glibc.malloc.arena_max=1:glibc.malloc.mmap_max=0:glibc.malloc.trim_threshold=1099511627776"


def with_own_pages(*, keep: bool, switch: Path = _SWITCH, devices: Path = _DEVICES) -> None:
    """Starts this process again, once, with glibc told how to hold memory, which it reads at no other time (docs/performance.md).

    A step's arrays come and go by the hundred megabytes. In pages of 4 KiB a tenth of a step on a CPU is the kernel's: where Linux leaves
    huge pages to those who ask, they are asked for. And what is free for a second, as training's memory is while a batch is scored, a
    virtual machine may have taken away by its host and gets back slowly: with `keep` none of it is given back.

    Call it before anything is imported that takes long, from a program's own `__main__` only. Does nothing where GLIBC_TUNABLES is set
    already; keeps nothing where arrays live elsewhere: an accelerator's device file is there and JAX_PLATFORMS is not "cpu".
    """
    if sys.platform != "linux" or "GLIBC_TUNABLES" in os.environ:
        return
    keep = keep and (os.environ.get("JAX_PLATFORMS") == "cpu" or not any(found for name in _ACCELERATORS for found in devices.glob(name)))
    ask = switch.exists() and "[madvise]" in switch.read_text()
    tunables = [HUGE] * ask + [KEPT] * keep
    if tunables:
        os.environ["GLIBC_TUNABLES"] = ":".join(tunables)
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])
