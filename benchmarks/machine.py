"""What a table says about where it was measured."""

import os
import platform
from datetime import date

import jax


def machine() -> str:
    """"2 cores (x86_64), 2026-11-25", or the accelerator's kind in place of the cores."""
    kind = f"{os.cpu_count()} cores ({platform.machine()})" if jax.default_backend() == "cpu" else jax.devices()[0].device_kind
    return f"{kind}, {date.today()}"
