"""What a table says about where it was measured."""

import os
import platform
from datetime import date

import jax


def machine() -> str:
    """"2 cores (x86_64), 2026-11-25" (cores that this process may use), or the accelerator's kind in place of the cores."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    kind = f"{cores} core{'s' * (cores > 1)} ({platform.machine()})" if jax.default_backend() == "cpu" else jax.devices()[0].device_kind
    return f"{kind}, {date.today()}"
