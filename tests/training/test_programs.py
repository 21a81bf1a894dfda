"""How the programs of a run are compiled."""

import threading
import time

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
