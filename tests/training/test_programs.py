"""How the programs of a run are compiled."""

import threading
import time

import pytest

from qtjax.planning import abstract_run
from qtjax.training import programs


def test_one_program_is_traced_at_a_time(opened, monkeypatch):
    """Flax changes a module's class while it builds one ("dictionary changed size during iteration"): threads compile, none trace together."""
    busy, most = [], []

    def alone(function):
        def traced(*arguments):
            busy.append(threading.get_ident())
            time.sleep(0.1)  # long enough for the other thread to come in
            most.append(len(busy))
            busy.pop()
            return function(*arguments)

        return traced

    for name in ("_score", "_accumulate", "place"):
        monkeypatch.setattr(programs, name, alone(getattr(programs, name)))
    opened()
    assert len(most) == 6 and max(most) == 1  # two shapes of each


@pytest.mark.parametrize(("choice", "own"), [("auto", True), ("true", True), ("false", False)])
def test_layers_are_unrolled_as_the_run_says(opened, choice, own):
    """model.unroll_layers reaches the run's programs, and what is planned of them; a small model's layers are unrolled unless it says no."""
    session = opened(**{"model.unroll_layers": choice})
    assert session.model.config.unroll_layers == own
    assert abstract_run(session.config, session.model.config, session.mesh).subject.config.unroll_layers == own
