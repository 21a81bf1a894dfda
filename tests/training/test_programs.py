"""How the programs of a run are compiled."""

import gc
import threading
import time

import jax
import numpy as np
import pytest

from qtjax.config import Config, override
from qtjax.models import ModelConfig, abstract_params
from qtjax.planning import abstract_run
from qtjax.train import use_compile_cache
from qtjax.training import programs

SHAPE = ModelConfig(vocab_size=64, hidden_size=16, intermediate_size=24, num_attention_heads=2, num_key_value_heads=1, head_dim=8)
CACHE = ("jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs", "jax_persistent_cache_min_entry_size_bytes")


def test_one_program_is_traced_at_a_time(opened, monkeypatch):
    """Flax changes a module's class while it builds one ("dictionary changed size during iteration"): threads compile, none trace together."""
    busy, most, collected = [], [], []

    def alone(function):
        def traced(*arguments):
            busy.append(threading.get_ident())
            time.sleep(0.1)  # long enough for the other thread to come in
            most.append(len(busy))
            collected.append(gc.isenabled())
            busy.pop()
            return function(*arguments)

        return traced

    for name in ("_score", "_accumulate", "place"):
        monkeypatch.setattr(programs, name, alone(getattr(programs, name)))
    opened()
    assert len(most) == 6 and max(most) == 1  # two shapes of each
    assert not any(collected) and gc.isenabled()  # Python's collector would look through a trace's million objects


def test_unrolled_layers_train_alike(opened, monkeypatch):
    """A small model's run has its layers unrolled, as what is planned of it; one whose layers are in a loop, as every large model's, ends alike."""
    ends = {}
    for width, own in ((64, True), (0, False)):
        monkeypatch.setattr("qtjax.models.config.UNROLLED_WIDTH", width)
        session = opened(**{"run.folder": str(opened.root / str(width))})
        assert session.subject.config.unroll_layers == own
        assert abstract_run(session.config, session.subject.config, session.mesh).subject.config.unroll_layers == own
        losses = [session.loop.step(step, session.total_steps)[0]["loss"] for step in range(3)]
        ends[own] = (losses, session.loop.state.trainable)
    np.testing.assert_allclose(ends[True][0], ends[False][0], rtol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4), ends[True][1], ends[False][1])  # Adam's steps of 1e-2 amplify rounding


def test_programs_are_kept_in_the_run_folder_unless_said_otherwise(tmp_path):
    """A compile cache without being asked: below the run folder, from the first program on, or where run.compile_cache says."""
    before = {name: getattr(jax.config, name) for name in CACHE}
    try:
        for changes, folder in (({}, tmp_path / "run" / "compile_cache"), ({"run.compile_cache": str(tmp_path / "own")}, tmp_path / "own")):
            use_compile_cache(override(Config(), {"run.folder": str(tmp_path / "run")} | changes))
            assert [getattr(jax.config, name) for name in CACHE] == [str(folder), 0, -1]
    finally:
        for name, value in before.items():
            jax.config.update(name, value)


def test_a_step_hands_over_as_many_arrays_whatever_the_depth():
    """Layers are stacked: what Python does in a step, an array at a time, does not grow with the model."""
    counts = {len(jax.tree.leaves(abstract_params(SHAPE.replace(num_hidden_layers=layers)))) for layers in (2, 32)}
    assert len(counts) == 1 and counts.pop() < 20


@pytest.mark.parametrize("on", [True, False])
def test_the_garbage_collector_is_left_as_it_was(on):
    """On or off as before, also where the compiler fails."""
    before = gc.isenabled()
    try:
        (gc.enable if on else gc.disable)()
        with pytest.raises(ZeroDivisionError), programs._uncollected():
            assert not gc.isenabled()
            raise ZeroDivisionError
        assert gc.isenabled() == on
    finally:
        (gc.enable if before else gc.disable)()
