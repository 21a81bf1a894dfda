"""Fixtures shared by all tests: where the reference data lies, and a strict numeric environment."""

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


def _quick_to_compile() -> str:
    """XLA_FLAGS for tests, whose time is compilation of programs that run once: LLVM need not optimise them, workers share the cores,
    and the older emitter of fusions takes half as long. An XLA without a flag (jaxlib 0.12 has one emitter) would end the process."""
    plain, alone, older = "--xla_backend_optimization_level=0", "--xla_cpu_parallel_codegen_split_count=1", "--xla_cpu_use_fusion_emitters=false"
    for flags in (f"{plain} {alone} {older}", f"{plain} {alone}"):
        if not subprocess.run([sys.executable, "-c", "import jax; jax.devices()"], env=os.environ | {"XLA_FLAGS": flags}, capture_output=True).returncode:
            return flags
    return plain


if "XLA_FLAGS" not in os.environ:  # workers have it from the process that starts them
    os.environ["XLA_FLAGS"] = _quick_to_compile()

import pytest


@pytest.fixture(scope="session", autouse=True)
def compile_once(tmp_path_factory) -> None:
    """Programs that several tests compile are compiled once per session."""
    import jax

    settings = {
        "jax_compilation_cache_dir": str(tmp_path_factory.mktemp("compiled")), "jax_persistent_cache_min_compile_time_secs": 0.2,
        "jax_persistent_cache_min_entry_size_bytes": -1,
    }  # fmt: skip
    for name, value in settings.items():
        jax.config.update(name, value)
        os.environ[name.upper()] = str(value)  # and of interpreters that a test starts


@pytest.fixture(autouse=True)
def few_mappings() -> Iterator[None]:
    """Every compiled program maps memory, and Linux grants a process 65,530 mappings: a worker that kept them all would die."""
    yield
    mappings = Path("/proc/self/maps")
    if mappings.exists() and mappings.read_bytes().count(b"\n") > 15_000:
        import jax

        jax.clear_caches()


@pytest.fixture
def runs_by_mask() -> Callable[..., Any]:
    """What cuDNN's kernel is asked for (models/packed.py, `by_runs`), in plain attention: every slot sees its own run."""
    import jax
    import jax.numpy as jnp

    from qtjax.models.attention import visible

    def attend(q: Any, k: Any, v: Any, given: Any) -> Any:
        slots = jnp.arange(q.shape[1])
        run = jnp.sum(jnp.where(given.start < 0, q.shape[1], given.start)[:, :, None] <= slots, axis=1)
        return jax.nn.dot_product_attention(q, k, v, mask=visible(slots, slots, run, run, None), implementation="xla")

    return attend


@pytest.fixture
def run_python() -> Callable[..., str]:
    """run_python(source, *arguments, devices=1) -> standard output of a fresh interpreter with so many CPU devices.

    A one-line source is the name of a module to run. Fails with the interpreter's standard error.
    """

    def run(source: str, *arguments: str, devices: int = 1) -> str:
        root = Path(__file__).resolve().parents[1]  # this checkout's code, wherever pytest was started
        path = os.pathsep.join(filter(None, [str(root), os.environ.get("PYTHONPATH")]))
        flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={devices}"
        done = subprocess.run(
            [sys.executable, "-c" if "\n" in source else "-m", source, *arguments], cwd=root, capture_output=True, text=True,
            env=os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": path, "XLA_FLAGS": flags}, timeout=1500,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr[-3000:]
        return done.stdout

    return run


@pytest.fixture
def libtpu(monkeypatch) -> None:
    """Skips where the TPU's compiler is missing. It would end the process at XLA_FLAGS that it does not know, as are those of the CPU
    here; a plan leaves other devices' flags out, which is undone after the test."""
    pytest.importorskip("libtpu", reason="compiling for TPUs needs the extra plan")
    import jax

    jax.devices()  # the CPU's own part of XLA has read its flags
    monkeypatch.setenv("XLA_FLAGS", f"{os.environ['XLA_FLAGS']} --xla_cpu_of_a_later_xla=1 --xla_gpu_of_a_later_xla=1")


@pytest.fixture
def power_cut(monkeypatch) -> Callable[..., None]:
    """power_cut(run, when): run() up to the first optimizer step at which when(loop, step number from 0) is true."""

    class Cut(Exception):
        pass

    def cut(run: Callable[[], Any], when: Callable[[Any, int], bool]) -> None:
        from qtjax.training.loop import Loop

        true_step = Loop.step

        def step(self, number, last):
            if when(self, number):
                raise Cut
            return true_step(self, number, last)

        with monkeypatch.context() as here:
            here.setattr(Loop, "step", step)
            with pytest.raises(Cut):
                run()

    return cut


@pytest.fixture
def small_disk(tmp_path) -> Iterator[Callable[[str], Path]]:
    """small_disk("64k") -> an empty file system of that size; the test is skipped where mounting is not allowed."""
    disk = tmp_path / "disk"

    def mount(size: str) -> Path:
        disk.mkdir()
        if subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(disk)], capture_output=True).returncode:
            pytest.skip("may not mount a small file system here")
        return disk

    yield mount
    if disk.is_mount():
        subprocess.run(["umount", "-l", str(disk)], check=True)  # lazily: a failed save may still hold a file open


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder `shared` beside the checkout; in CI its absence is a failure, elsewhere a skip."""
    folder = Path(__file__).resolve().parents[2] / "shared"
    if not folder.is_dir():
        if os.environ.get("CI"):
            pytest.fail("the reference data beside the checkout is missing, and CI must run these tests")
        pytest.skip("needs the reference data in ../shared, which is not part of the package")
    return folder
