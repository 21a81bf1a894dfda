"""Fixtures shared by all tests: where the reference data lies, and a strict numeric environment."""

import os
from collections.abc import Iterator
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
if "PYTEST_XDIST_WORKER" in os.environ:  # workers share the cores between them
    os.environ.setdefault("XLA_FLAGS", "--xla_cpu_multi_thread_eigen=false")

import pytest


@pytest.fixture(scope="session", autouse=True)
def compile_once(tmp_path_factory) -> None:
    """Programs that several tests compile are compiled once per session."""
    import jax

    jax.config.update("jax_compilation_cache_dir", str(tmp_path_factory.mktemp("compiled")))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


@pytest.fixture(autouse=True)
def few_mappings() -> Iterator[None]:
    """Every compiled program maps memory, and Linux grants a process 65,530 mappings: a worker that kept them all would die."""
    yield
    mappings = Path("/proc/self/maps")
    if mappings.exists() and mappings.read_bytes().count(b"\n") > 15_000:
        import jax

        jax.clear_caches()


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder `shared` beside the checkout; in CI its absence is a failure, elsewhere a skip."""
    folder = Path(__file__).resolve().parents[2] / "shared"
    if not folder.is_dir():
        if os.environ.get("CI"):
            pytest.fail("the reference data beside the checkout is missing, and CI must run these tests")
        pytest.skip("needs the reference data in ../shared, which is not part of the package")
    return folder
