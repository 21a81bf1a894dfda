"""Huge pages for the arrays of a training step on a CPU."""

import os
import sys
from pathlib import Path

_SWITCH = Path("/sys/kernel/mm/transparent_hugepage/enabled")
_TUNABLE = "glibc.malloc.hugetlb=1"


def with_huge_pages(switch: Path = _SWITCH) -> None:
    """Starts this process again, once, with glibc told to ask Linux for huge pages, which it reads at no other time.

    A step's arrays come and go by the hundred megabytes; in pages of 4 KiB a tenth of a step on a CPU is the kernel's
    (docs/performance.md). Call it before anything is imported that takes long, from a program's own `__main__` only. Does nothing where
    Linux gives huge pages to everybody or to nobody, or where GLIBC_TUNABLES is set already.
    """
    if "GLIBC_TUNABLES" in os.environ or not switch.exists() or "[madvise]" not in switch.read_text():
        return
    os.environ["GLIBC_TUNABLES"] = _TUNABLE
    os.execv(sys.executable, sys.orig_argv)
