"""Out of memory: one line with what is missing and what to change, from XLA's own words."""

import jax
import pytest
from rich.console import Console

from qtjax.config import Config, override, read_config
from qtjax.errors import QtjaxError
from qtjax.training import programs, story
from qtjax.training.memory import as_flags, memory_errors, shortage, smaller

GIB = 2**30
TPU = "RESOURCE_EXHAUSTED: XLA:TPU compile permanent error. Ran out of memory in memory space hbm. Used 121.50G of 15.75G hbm."
HBM = (
    "RESOURCE_EXHAUSTED: E1000: CompileTimeHbmOom: Ran out of memory on HBM, the total memory required for HLO temporaries (36.52G) exceeds"
    " available HBM (15.75G). HLO module: jit__accumulate."
)
LOAD = (
    "RESOURCE_EXHAUSTED: Error allocating device buffer: Attempting to allocate 1.50G. That was not possible. There are 512.00M free.;"
    " (0x0x0_HBM0)"
)


@pytest.mark.parametrize(("text", "kind", "needed", "there", "said"), [
    (TPU, "program", 121.5, 15.75, "it needs 121.50 GiB, 15.75 GiB are there: 105.75 GiB are lacking"),
    (HBM, "program", 36.52, 15.75, "it needs 36.52 GiB, 15.75 GiB are there: 20.77 GiB are lacking"),
    (LOAD, "allocation", 1.5, 0.5, "no room for 1.50 GiB more, 0.50 GiB are free: 1.00 GiB are lacking"),
    ("RESOURCE_EXHAUSTED: Out of memory while trying to allocate 17179869184 bytes.", "allocation", 16, None, "no room for 16.00 GiB more"),
    ("RESOURCE_EXHAUSTED: Out of memory while trying to allocate 16.00GiB.", "allocation", 16, None, "no room for 16.00 GiB more"),
    ("RESOURCE_EXHAUSTED: Out of memory allocating 4294967296 bytes.", "allocation", 4, None, "no room for 4.00 GiB more"),
])  # fmt: skip
def test_what_xla_says_of_memory(text, kind, needed, there, said):
    """TPU and GPU, at compile time and at run time; CPU."""
    found = shortage(text)
    assert (found.kind, str(found)) == (kind, said)
    assert found.needed == pytest.approx(needed * GIB) and found.there == (None if there is None else pytest.approx(there * GIB))


@pytest.mark.parametrize("text", ["INVALID_ARGUMENT: allocate 3 bytes", "RESOURCE_EXHAUSTED: Received message larger than max"])
def test_what_is_not_about_memory(text):
    """Other errors are left alone."""
    assert shortage(text) is None


def test_a_real_allocation_that_fails():
    """The words of this version of XLA are understood."""
    with pytest.raises(QtjaxError, match=r"out of memory while running: no room for 372529\.03 GiB more; try .*--model.remat full"):
        with memory_errors(Config()):
            jax.numpy.zeros((10**7, 10**7)).block_until_ready()


def test_what_makes_a_run_smaller():
    """Cheapest first: finer cuts, layers again, smaller launches; nothing that is done already, and no cut that the width forbids."""
    config = override(Config(), {"train.rows": 16})
    assert smaller(config, 8) == [{"mesh.fsdp": 8}, {"model.remat": "full"}, {"train.rows": 8}]
    assert smaller(config, 8, width=12)[0] == {"mesh.fsdp": 4}
    done = override(config, {"mesh.fsdp": 4, "mesh.tensor": 2, "model.remat": "full", "train.rows": 4})
    assert smaller(done, 8) == []
    assert smaller(override(done, {"prune.reuse_forward": True}), 8) == [{"prune.reuse_forward": False}]
    kept = override(config, {"prune.reuse_forward": True})  # without it layers would be kept: computed again, as with it, they take less
    assert as_flags(smaller(kept, 1)[0]) == "--prune.reuse-forward false --model.remat full" and len(smaller(kept, 1)) == 2
    assert smaller(override(config, {"mesh.data": 4, "mesh.fsdp": 2}), 8)[0] == {"mesh.fsdp": 8, "mesh.data": -1}


@pytest.mark.parametrize("when", ["compiling", "running"])
def test_a_run_that_is_refused_its_memory_ends_in_one_line(when, tmp_path, monkeypatch):
    """What was under way, how much is missing, what to change; the folder can be used again with other settings."""
    config = override(read_config("configs/smol.py"), {"run.folder": str(tmp_path / "run"), "data.max_samples": 64, "train.max_steps": 1})

    def refuse(*arguments, **options):
        raise jax.errors.JaxRuntimeError(HBM)

    if when == "compiling":
        monkeypatch.setattr(programs, "program_jobs", lambda *a, **b: {"accumulate 8": refuse})
    else:
        monkeypatch.setattr(story, "open_session", refuse)
    with pytest.raises(QtjaxError) as error:
        story.run(config, Console(quiet=True), quiet=True)
    text = str(error.value)
    doing = "while compiling accumulate 8" if when == "compiling" else "while running"
    assert f"out of memory {doing}: it needs 36.52 GiB" in text and "20.77 GiB are lacking" in text
    assert "try --model.remat full" in text and "--overlay.method lora" in text and "qtjax.plan" in text and "\n" not in text
