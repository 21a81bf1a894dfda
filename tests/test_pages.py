"""Huge and lasting pages are asked for once, where they help, and the public names come when they are asked for."""

import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest

import qtjax
from qtjax import pages


HUGE, KEPT = pages.HUGE, pages.KEPT
MADVISE = "always [madvise] never"


@pytest.mark.parametrize(
    ("said", "keep", "environ", "device", "tunables"),
    [
        (MADVISE, False, {}, "", HUGE),
        (MADVISE, True, {}, "", f"{HUGE}:{KEPT}"),
        ("[always] madvise never", False, {}, "", None),
        ("[always] madvise never", True, {}, "", KEPT),
        (None, False, {}, "", None),
        (None, True, {}, "", KEPT),
        (MADVISE, True, {"GLIBC_TUNABLES": "x"}, "", None),
        (MADVISE, True, {}, "nvidia0", HUGE),
        ("[always] madvise never", True, {}, "vfio/0", None),
        (MADVISE, True, {"JAX_PLATFORMS": "cpu"}, "accel0", f"{HUGE}:{KEPT}"),
    ],
)
def test_the_process_starts_again_only_where_it_helps(tmp_path, monkeypatch, said, keep, environ, device, tunables):
    """Huge pages only under madvise; kept memory where asked for, not beside an accelerator; neither beside settings of the user's own;
    the same command, once."""
    started, environ = [], dict(environ)
    switch, devices = tmp_path / "enabled", tmp_path / "dev"
    if said is not None:
        switch.write_text(said)
    devices.mkdir()
    if device:
        (devices / device).parent.mkdir(exist_ok=True)
        (devices / device).touch()
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setattr(os, "execv", lambda program, argv: started.append((program, argv)))
    monkeypatch.setattr(os, "environ", environ)
    before = environ.get("GLIBC_TUNABLES")
    for _ in range(2):  # the new process comes here too
        pages.with_own_pages(keep=keep, switch=switch, devices=devices)
    assert started == ([(sys.executable, [sys.executable, *sys.orig_argv[1:]])] if tunables else [])
    assert environ.get("GLIBC_TUNABLES") == (tunables or before)


@pytest.mark.skipif(sys.platform != "linux", reason="Linux's own settings")
def test_a_process_starts_again_as_itself(tmp_path):
    """The same process, module and arguments, blanks and all, with memory kept; what it does before it asks it does twice."""
    (tmp_path / "asks.py").write_text("""
import os, sys
print(os.getpid(), flush=True)
from qtjax.pages import KEPT, with_own_pages
with_own_pages(keep=True)
print(os.environ["GLIBC_TUNABLES"].endswith(KEPT), sys.argv[1:])
""")
    env = {name: value for name, value in os.environ.items() if name != "GLIBC_TUNABLES"} | {"JAX_PLATFORMS": "cpu"}
    env["PYTHONPATH"] = os.pathsep.join([str(tmp_path), str(Path(__file__).parents[1])])
    started = subprocess.Popen([sys.executable, "-m", "asks", "--a", "b c"], env=env, stdout=subprocess.PIPE, text=True)
    said = started.communicate(timeout=60)[0]
    assert said.splitlines() == [str(started.pid)] * 2 + ["True ['--a', 'b c']"]


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="glibc's own settings")
def test_kept_memory_is_not_asked_for_again():
    """An array of 128 MiB that is freed and made again by another thread: with KEPT its pages are still there, without they come anew."""
    code = """
import resource, threading
import numpy as np
faults = []
def fill():
    for _ in range(5):
        begin = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        np.ones(1 << 24)
        faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - begin)
thread = threading.Thread(target=fill)
thread.start()
thread.join()
print(faults[-1])
"""
    counted = {}
    for tunables in ("glibc.malloc.hugetlb=0", KEPT):
        done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True, env={**os.environ, "GLIBC_TUNABLES": tunables})
        counted[tunables] = int(done.stdout)
    assert counted[KEPT] < 10 < counted["glibc.malloc.hugetlb=0"], counted


def test_a_door_says_its_help_without_loading_jax():
    """`python -m qtjax.train --help` loads neither jax nor flax; a public name loads what it needs."""
    code = "import sys; sys.argv = ['train', '--help']\nimport qtjax.train as t\ntry:\n    t.main()\nexcept SystemExit: pass\nassert 'jax' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
    assert qtjax.ModelConfig is qtjax.__getattr__("ModelConfig") and set(qtjax.__all__) <= set(dir(qtjax))
    with pytest.raises(AttributeError, match="no attribute 'Nothing'"):
        qtjax.Nothing  # noqa: B018
