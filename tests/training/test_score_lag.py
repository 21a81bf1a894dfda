"""prune.score_lag = 1: a batch is chosen on the weights of one step before, and on nothing else."""

import time

import jax
import numpy as np

from qtjax.training.batch import survivors

LAG = {"prune.score_lag": 1}


def watch(loop, monkeypatch) -> list:
    """What each step trains on from now on: its microbatches."""
    trained = []
    gradients = loop.gradients
    monkeypatch.setattr(loop, "gradients", lambda parts, *given: trained.append(parts) or gradients(parts, *given))
    return trained


def assert_trains_on(parts, loop, step, decision) -> None:
    """The microbatches are the survivors of this decision, slot by slot."""
    expected = loop.pack(survivors(loop.prepare(step).batch, np.asarray(decision.tokens), loop.config.prune))
    assert [p.size for p in parts] == [p.size for p in expected]
    for part, other in zip(parts, expected):
        for name in other.rows:
            np.testing.assert_array_equal(part.rows[name], other.rows[name], err_msg=f"step {step + 1}, {name}")


def test_a_step_is_decided_by_the_weights_before_the_last_update(opened, monkeypatch):
    """Step t + 1 keeps the samples and tokens of the exact decision before update t; step 1 those of its own weights."""
    session = opened(**LAG)
    loop, last = session.loop, session.total_steps
    trained, changed = watch(loop, monkeypatch), 0
    lagged = loop.score(loop.prepare(0), 0).decision
    for step in range(last):
        exact = loop.score(loop.prepare(step), step).decision
        ahead = loop.score(loop.prepare(step + 1), step + 1).decision if step + 1 < last else None
        _, records = loop.step(step, last)
        for name in ("keep", "quadrant", "kept_tokens", "perplexity"):
            np.testing.assert_array_equal(records[name], np.asarray(getattr(lagged, name)), err_msg=name)
        assert_trains_on(trained[step], loop, step, lagged)
        changed += not np.array_equal(lagged.tokens, exact.tokens)
        lagged = ahead
    assert len(trained) == last and changed > 0


def test_training_is_launched_before_any_lagged_score_is_waited_for(opened, monkeypatch):
    """The order of a step: the next batch's scores are launched, then gradients and update, and only then waited for."""
    session = opened(**LAG)
    loop, order = session.loop, []
    loop.step(0, session.total_steps)
    for name in ("token_scores", "gradients"):
        call = getattr(loop, name)
        monkeypatch.setattr(loop, name, lambda *given, name=name, call=call: order.append(name) or call(*given))
    update, wait = loop.programs.update, jax.block_until_ready
    monkeypatch.setattr(loop.programs, "update", lambda *given: order.append("update") or update(*given))
    monkeypatch.setattr(jax, "block_until_ready", lambda tree: order.append("wait") or wait(tree))
    loop.step(1, session.total_steps)
    assert order == ["token_scores", "gradients", "update", "wait"]


def test_nothing_compiles_after_warm_up_with_lagged_scores(opened):
    """Scoring ahead, and what it adds to a checkpoint, launch only what was compiled before the first step."""
    session = opened(**LAG, **{"train.shapes": 3, "train.row_length": 48, "prune.batch_size": 20})
    loop = session.loop
    jax.clear_caches()  # what another test's steps compiled would hide what these compile
    loop.step(0, session.total_steps)
    compiled = []
    jax.monitoring.register_event_duration_secs_listener(
        lambda name, *_, **__: compiled.append(name) if "backend_compile" in name else None
    )
    for step in range(1, session.total_steps):
        loop.resume(step, session.total_steps, loop.pending())
        loop.step(step, session.total_steps)
    assert loop.pending() is None
    assert compiled == []


def test_the_clocks_add_up_to_the_step(opened):
    """Overlapped or not, scoring, packing and training of a step are its wall time."""
    session = opened(**LAG)
    for step in range(3):
        begin = time.perf_counter()
        metrics, _ = session.loop.step(step, session.total_steps)
        wall = time.perf_counter() - begin
        assert 0.8 * wall < sum(metrics[f"seconds_{name}"] for name in ("score", "pack", "train")) <= wall


def test_full_data_has_nothing_to_lag(opened):
    """Without scoring the option changes nothing and adds nothing to a checkpoint."""
    session = opened(**LAG, **{"prune.sample_pruner": "none", "prune.token_pruner": "none"})
    session.loop.step(0, session.total_steps)
    assert session.loop.pending() is None and session.loop.pending_shape(1, session.total_steps) is None
