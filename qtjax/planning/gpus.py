"""GPUs that can be compiled for without one: what their makers publish, written as XLA wants to be told of a device.

The compiler comes with JAX's CUDA plugin and needs no CUDA library and no driver. Without a device it tries no kernel out, so that
kernels, and the temporaries that they need, are not quite those of a run.
"""

import importlib.util
import os
from dataclasses import dataclass
from typing import Any

from qtjax.errors import QtjaxError
from qtjax.planning.chips import Chip


@dataclass(frozen=True)
class _Multiprocessor:
    """What CUDA's programming guide says of a compute capability, table of technical specifications. Bytes; lanes: float32 units."""

    major: int
    minor: int
    threads: int
    shared: int
    shared_of_block: int
    lanes: int


@dataclass(frozen=True)
class _Gpu:
    """title: as the driver calls it; multiprocessors: how many; l2: bytes; clock: GHz at most."""

    title: str
    chip: Chip
    kind: _Multiprocessor
    multiprocessors: int
    l2: int
    clock: float


_AMPERE = _Multiprocessor(8, 0, 2048, 164 * 1024, 163 * 1024, 64)
_ADA = _Multiprocessor(8, 9, 1536, 100 * 1024, 99 * 1024, 128)
_HOPPER = _Multiprocessor(9, 0, 2048, 228 * 1024, 227 * 1024, 128)
_MIB = 2**20
# NVIDIA's data sheets and architecture papers, read in November 2026: bfloat16 without sparsity; links are NVLink's one direction, of L4
# PCI Express 4.0 x16's. Memory in GiB as drivers report it with error correction, rounded down.
_GPUS = {
    "a100-40gb": _Gpu("NVIDIA A100-SXM4-40GB", Chip(39.3, 312, 1555, 300), _AMPERE, 108, 40 * _MIB, 1.41),
    "a100-80gb": _Gpu("NVIDIA A100-SXM4-80GB", Chip(79.2, 312, 2039, 300), _AMPERE, 108, 40 * _MIB, 1.41),
    "h100": _Gpu("NVIDIA H100 80GB HBM3", Chip(79.1, 989, 3352, 450), _HOPPER, 132, 50 * _MIB, 1.98),
    "h200": _Gpu("NVIDIA H200", Chip(139.7, 989, 4800, 450), _HOPPER, 132, 50 * _MIB, 1.98),
    "l4": _Gpu("NVIDIA L4", Chip(22.0, 121, 300, 32), _ADA, 58, 48 * _MIB, 2.04),
}
GPU_NAMES = tuple(f"{name}:{count}" for name in _GPUS for count in (1, 2, 4, 8))
# What JAX takes of a GPU's memory unless it is told otherwise, and how it is told.
_SHARE, SHARE_VARIABLE = 0.75, "XLA_PYTHON_CLIENT_MEM_FRACTION"


def gpu_share() -> float:
    """Fraction (0-1] of a GPU's memory that a run started with these environment variables would take."""
    name = next((each for each in (SHARE_VARIABLE, "XLA_CLIENT_MEM_FRACTION") if os.environ.get(each)), "")
    text = os.environ.get(name, str(_SHARE))
    try:
        share = float(text)
    except ValueError:
        share = 0.0
    if not 0 < share <= 1:
        raise QtjaxError(f"{name} = {text!r}: must be a fraction above 0 and at most 1, for example 0.92")
    return share


def open_gpus(name: str) -> tuple[list[Any], Chip]:
    """(devices that can be compiled for and hold nothing, what each has) of one of GPU_NAMES; Chip.share as `gpu_share` says.

    Raises QtjaxError without JAX's CUDA plugin.
    """
    import jax

    kind, count = name.split(":")
    if not any(importlib.util.find_spec(f"jax_{each}_plugin") for each in ("cuda12", "cuda13")):
        raise QtjaxError(
            f"--topology {name}: compiling for a GPU needs JAX's CUDA plugin, no CUDA and no driver; pip install"
            f" jax-cuda12-plugin=={jax.__version__} jax-cuda12-pjrt=={jax.__version__}"
        )
    gpu, share = _GPUS[kind], gpu_share()
    from jax.experimental import topologies

    layout = f"1x1x{count}"
    try:
        devices = topologies.get_topology_desc(platform="cuda", topology_name=layout, topology=layout, target_config=_target(gpu)).devices
    except Exception as error:  # noqa: BLE001 - whatever this version of the plugin says of a target
        raise QtjaxError(
            f"--topology {name}: JAX's CUDA plugin does not take it ({' '.join(str(error).split())[:120]}); it must be of JAX's own"
            f" version, {jax.__version__}"
        ) from None
    return list(devices), gpu.chip.shared(share)


def _target(gpu: _Gpu) -> str:
    """XLA's GpuTargetConfigProto as text: the limits that every CUDA device has, and this one's own."""
    kind = gpu.kind
    info = {
        "threads_per_block_limit": 1024, "threads_per_warp": 32, "shared_memory_per_block": 48 * 1024, "shared_memory_per_core": kind.shared,
        "shared_memory_per_block_optin": kind.shared_of_block, "threads_per_core_limit": kind.threads, "core_count": gpu.multiprocessors,
        "fpus_per_core": kind.lanes, "block_dim_limit_x": 2**31 - 1, "block_dim_limit_y": 65535, "block_dim_limit_z": 65535,
        "thread_dim_limit_x": 1024, "thread_dim_limit_y": 1024, "thread_dim_limit_z": 64, "registers_per_core_limit": 65536,
        "registers_per_block_limit": 65536, "memory_bandwidth": int(gpu.chip.bandwidth * 1e9), "l2_cache_size": gpu.l2,
        "clock_rate_ghz": gpu.clock, "device_memory_size": int(gpu.chip.memory * 2**30),
    }  # fmt: skip
    lines = "\n".join(f"  {name}: {value}" for name, value in info.items())
    capability = f"cuda_compute_capability {{ major: {kind.major} minor: {kind.minor} }}"
    return (
        f'gpu_device_info {{\n{lines}\n  {capability}\n}}\nplatform_name: "CUDA"\ndnn_version_info {{ major: 9 minor: 10 }}\n'
        f'device_description_str: "{gpu.title}"\n'
    )
