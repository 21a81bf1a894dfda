"""Huge pages are asked for once, where Linux waits to be asked, and the public names come when they are asked for."""

import os
import subprocess
import sys

import pytest

import qtjax
from qtjax import pages


@pytest.mark.parametrize(
    ("said", "tunables", "again"),
    [("always [madvise] never", None, True), ("always [madvise] never", "x", False), ("[always] madvise never", None, False), (None, None, False)],
)
def test_the_process_starts_again_only_where_it_helps(tmp_path, monkeypatch, said, tunables, again):
    """Only under madvise, only without settings of the user's own, with the same command and once."""
    started = []
    switch = tmp_path / "enabled"
    if said is not None:
        switch.write_text(said)
    monkeypatch.setattr(os, "execv", lambda program, argv: started.append((program, argv)))
    monkeypatch.setattr(os, "environ", {} if tunables is None else {"GLIBC_TUNABLES": tunables})
    pages.with_huge_pages(switch)
    pages.with_huge_pages(switch)  # the new process comes here too
    assert started == ([(sys.executable, sys.orig_argv)] if again else [])


def test_a_door_says_its_help_without_loading_jax():
    """`python -m qtjax.train --help` loads neither jax nor flax; a public name loads what it needs."""
    code = "import sys; sys.argv = ['train', '--help']\nimport qtjax.train as t\ntry:\n    t.main()\nexcept SystemExit: pass\nassert 'jax' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
    assert qtjax.ModelConfig is qtjax.__getattr__("ModelConfig") and set(qtjax.__all__) <= set(dir(qtjax))
    with pytest.raises(AttributeError, match="no attribute 'Nothing'"):
        qtjax.Nothing  # noqa: B018
