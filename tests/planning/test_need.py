"""What a run needs of a device, weighed on the devices that are here."""

import contextlib
import io
import json
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from rich.console import Console

from qtjax import plan, planning, smol
from qtjax.config import override, read_config
from qtjax.errors import QtjaxError
from qtjax.models import ModelConfig

SMOL = ModelConfig.from_hf(json.loads((Path(smol.__file__).parent / "model" / "config.json").read_text()))
CONFIG = override(read_config("configs/smol.py"), {"data.max_length": 64, "train.row_length": 64, "train.rows": 4})


@pytest.mark.slow
def test_a_scoring_pass_that_is_kept_is_counted():
    """Every layer's width for every token of the batch lies beside all programs, and that of a launch is an argument of training."""
    own, reuses = (
        planning.weigh(override(CONFIG, {"prune.reuse_forward": on}), SMOL, jax.devices()[:1]).needs for on in (False, True)
    )
    token = 4 * SMOL.num_hidden_layers * SMOL.hidden_size
    kept = token * CONFIG.prune.batch_size * 64  # launches of 4, 2 and 1 rows hold a sample each at the least
    assert reuses["scoring"].beside - own["scoring"].beside == reuses["backward"].beside - own["training"].beside == kept
    assert reuses["backward"].arguments - own["training"].arguments == token * 4 * 64
    assert reuses["training"] == own["training"] and reuses["update"] == own["update"]  # of steps without a scoring pass; after the last use


def test_a_scoring_pass_that_cannot_be_kept_is_no_plan():
    """The plan refuses what the run would."""
    config = override(CONFIG, {"prune.reuse_forward": True, "prune.mode": "drop"})
    with pytest.raises(QtjaxError, match="prune.reuse_forward = True: prune.mode = 'drop'"):
        planning.weigh(config, SMOL, jax.devices()[:1])


GATHERED = """ENTRY %main (p: f32[8]) -> f32[32] {
  ROOT %all-gather.1 = f32[32]{0} all-gather(f32[8]{0} %p), replica_groups={{0,1,2,3}}, dimensions={0}
}
"""


def program(temporaries, text):
    """A compiled program of so many bytes; text: what it prints, or what is raised instead."""

    def as_text():
        if isinstance(text, Exception):
            raise text
        return text

    sizes = {"argument": 100, "output": 0, "alias": 0, "temp": temporaries}
    memory = SimpleNamespace(**{f"{name}_size_in_bytes": size for name, size in sizes.items()})
    return SimpleNamespace(memory_analysis=lambda: memory, as_text=as_text)


@pytest.fixture
def need_of(monkeypatch):
    """need_of(platform, *programs, **options) -> (what the first weighs and moves, which compiler options were tried); for each
    compilation a program, or what the compiler raises."""

    def weigh(platform, *programs, **options):
        monkeypatch.setattr(jax, "set_mesh", lambda mesh: contextlib.nullcontext())
        mesh = SimpleNamespace(size=4, devices=np.array([SimpleNamespace(platform=platform)]))
        left, tried = list(programs), []

        def job(compiler_options):
            tried.append(compiler_options)
            found = left.pop(0)
            if isinstance(found, Exception):
                raise found
            return found

        return planning.need_of(job, mesh, 100, 7, **options), [bool(each) for each in tried]

    return weigh


UNREAD = jax.errors.JaxRuntimeError("INTERNAL: async-update instruction should have 1 operands but sees 4")
NO_OPTION = jax.errors.JaxRuntimeError("INVALID_ARGUMENT: No such compile option")


@pytest.mark.parametrize("unread", [UNREAD, None])
def test_a_program_that_cannot_be_read_is_compiled_again_to_be_read(need_of, unread):
    """Memory is the first one's, as it runs; what moves is the second's."""
    need, tried = need_of("tpu", program(50, unread), program(30, GATHERED))
    assert (need.arguments, need.temporaries, need.beside) == (100, 50, 7) and not need.refused
    assert [(each.kind, each.bytes) for each in need.moved] == [("all-gather", 96)]
    assert tried == [False, True]


def test_nothing_is_compiled_twice_without_need(need_of):
    """What can be read at once, what nobody wants to read, and GPUs, whose compiler has no such options."""
    assert need_of("tpu", program(50, GATHERED))[1] == [False]
    assert need_of("tpu", program(50, UNREAD), read=False) == need_of("gpu", program(50, UNREAD))
    assert need_of("gpu", program(50, UNREAD))[1] == [False]


@pytest.mark.parametrize("second", [program(30, UNREAD), NO_OPTION])
def test_what_cannot_be_read_at_all_is_said(need_of, second):
    """Its memory is known; what moves is called unreadable in the table, and unknown is not nothing."""
    need, tried = need_of("tpu", program(50, UNREAD), second)
    assert need.moved is None and not need.refused and tried == [False, True]
    console = Console(file=io.StringIO(), width=80)
    console.print(plan.memory_table({"scoring": need}, 16))
    assert "unreadable" in console.file.getvalue()
