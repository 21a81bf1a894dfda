"""Shared by the tests of pruners: a count of what JAX compiles."""

import contextlib

import jax
import pytest


@pytest.fixture
def compilations():
    """`with compilations() as events:` collects one event per backend compilation."""

    @contextlib.contextmanager
    def collect():
        events, on = [], [True]
        jax.monitoring.register_event_duration_secs_listener(
            lambda name, *_, **__: events.append(name) if on[0] and "backend_compile" in name else None
        )
        yield events
        on[0] = False

    return collect
