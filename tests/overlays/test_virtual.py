"""Virtual tokens, prefixes and gated prompts in the model: packing, windows, padding, caching, scoring and training."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tests.overlays.tokens import CONFIGS, FIELDS, TINY, made, params_of

import qtjax
from qtjax import models
from qtjax.config import MeshSection
from qtjax.errors import QtjaxError
from qtjax.models.generate import _generate
from qtjax.parallel import make_mesh
from qtjax.training.score import eu_scores
from qtjax.training.state import Subject
from qtjax.training.step import loss_sum

pytestmark = pytest.mark.slow

LENGTHS = (5, 7, 4)
SEGMENTS = np.array([[1] * 5 + [2] * 7 + [3] * 4 + [0] * 2])
RNG = np.random.default_rng(5)
SAMPLES = RNG.integers(1, 48, (3, 7)) * (np.arange(7) < np.array(LENGTHS)[:, None])
PACKED = np.concatenate([*(s[:n] for s, n in zip(SAMPLES, LENGTHS)), [0, 0]])[None]
POSITIONS = np.concatenate([*(np.arange(n) for n in LENGTHS), [0, 0]])[None]
TASKS = np.array([2, 0, 2])
apply = jax.jit(models.apply, static_argnums=0)


def tasks_of(method):
    """(task ids of the samples, of the packed row's tokens), None where the method has no tasks."""
    return (TASKS, np.concatenate([TASKS.repeat(LENGTHS), [0, 0]])[None]) if method == "mpt" else (None, None)


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("method", ["prompt", "mpt", "prefix", "llama_adapter"])
def test_packed_equals_separate(method, config):
    """Logits of samples packed into one row are those of each alone, positions given or not; padding gives zeros."""
    config = CONFIGS[config]
    params, overlay, (tasks, token_tasks) = params_of(config), made(method, config), tasks_of(method)
    mask = np.arange(7) < np.array(LENGTHS)[:, None]
    alone = apply(config, params, SAMPLES, attention_mask=mask, overlay=overlay, task_ids=tasks)
    expected = np.concatenate([np.asarray(row)[:n] for row, n in zip(alone, LENGTHS)])
    assert np.abs(expected - np.concatenate([r[:n] for r, n in zip(apply(config, params, SAMPLES, mask), LENGTHS)])).max() > 0.1
    for positions in (POSITIONS, None):
        packed = apply(
            config, params, PACKED, position_ids=positions, segment_ids=SEGMENTS, overlay=overlay, task_ids=token_tasks
        )
        assert packed.shape == (1, 18, 48)
        np.testing.assert_allclose(packed[0, :16], expected, atol=2e-4, rtol=2e-4)
        assert not np.asarray(packed[0, 16:]).any()


@pytest.mark.parametrize("method", ["prompt", "prefix"])
def test_a_masked_slot_inside_a_segment_does_not_begin_it_anew(method):
    """Distances to the virtual tokens count from the segment's first slot, real or not, as they do in a row alone."""
    config = CONFIGS["window"]
    params, overlay = params_of(config), made(method, config)
    hole = np.ones((1, 7), int)
    hole[0, [0, 3]] = 0
    alone = apply(config, params, SAMPLES[1:2], hole, overlay=overlay)
    row = np.concatenate([SAMPLES[:1, :5], SAMPLES[1:2]], axis=1)
    segments = np.array([[1] * 5 + [2] * 7])
    packed = apply(config, params, row, np.concatenate([np.ones((1, 5), int), hole], axis=1), segment_ids=segments, overlay=overlay)
    np.testing.assert_allclose(packed[:, 5:], alone, atol=2e-4, rtol=2e-4)


@pytest.mark.parametrize("method", ["prompt", "mpt", "prefix"])
def test_segments_are_apart_and_all_see_the_virtual_tokens(method):
    """d hidden of a token is exactly zero w.r.t. other segments, later tokens, padding and other tasks; not w.r.t. its own.

    Every slot has a row of the embedding table of its own, so that the table's gradient says which slots were seen.
    """
    overlay, token_tasks = made(method), tasks_of(method)[1]
    ids = np.arange(18)[None]

    @jax.jit
    def slopes(table, trainable, target):
        def probe(table, trainable):
            params = params_of(TINY) | {"embed_tokens": {"embedding": table}}
            own = overlay.replace(params=trainable)
            hidden = models.hidden_states(TINY, params, ids, segment_ids=SEGMENTS, overlay=own, task_ids=token_tasks)
            return (hidden[0, target] * jnp.arange(1.0, 33.0)).sum()

        return jax.grad(probe, (0, 1))(table, trainable)

    for target, seen in ((3, range(0, 4)), (8, range(5, 9)), (15, range(12, 16)), (17, range(0))):
        table, trainable = slopes(params_of(TINY)["embed_tokens"]["embedding"], overlay.params, target)
        assert set(np.flatnonzero(np.abs(table).max(axis=1))) == set(seen)
        for path, slope in trainable.items():
            reached = np.abs(np.asarray(slope)).reshape(slope.shape[0], -1).max(axis=1) > 0
            own = [target < 16 and token_tasks[0, target] == t for t in range(3)] if path.startswith("prefix_task") else target < 16
            assert (reached == own).all(), (target, path)


def test_windows_hide_virtual_tokens_like_others():
    """With one layer and window W, token t of a prefix of P sees virtual token j exactly when t + P - j < W (as in HF)."""
    config = CONFIGS["window"].replace(num_hidden_layers=1)
    for method in ("prefix", "prompt"):
        overlay = made(method, config)

        @jax.jit
        def slope(trainable, target):
            def probe(trainable):
                own = overlay.replace(params=trainable)
                hidden = models.hidden_states(config, params_of(config), SAMPLES[1:2], overlay=own)
                return (hidden[0, target] * jnp.arange(1.0, 33.0)).sum()

            return jax.grad(probe)(trainable)["prompt_embeddings"]

        for target in range(5):
            reached = np.abs(np.asarray(slope(overlay.params, target))).max(axis=1) > 0
            assert reached.tolist() == [target + 4 - j < 5 for j in range(4)], method


@pytest.mark.parametrize("config", ["full", "window"])
@pytest.mark.parametrize("method", FIELDS)
def test_cached_generation_equals_full_passes(method, config):
    """Greedy tokens of a left-padded batch are the argmax of full passes without a cache; one program for all tokens.

    Padding puts no distance between a row and its virtual tokens, as in a packed row: so the full passes call it a segment.
    """
    config = CONFIGS[config]
    params, overlay = params_of(config), made(method, config)
    tasks = np.array([1, 2]) if method == "mpt" else None
    mask = np.array([[1] * 6, [0] * 3 + [1] * 3])
    row = np.concatenate([RNG.integers(3, 48, (2, 6)) * mask, np.zeros((2, 8), int)], axis=1)
    before = _generate._cache_size()
    ours = models.generate(
        config, params, row[:, :6], mask, max_new_tokens=8, eos_token_id=(), overlay=overlay, task_ids=tasks
    )
    assert _generate._cache_size() == before + 1
    real = np.concatenate([mask, np.ones((2, 8), int)], axis=1)
    positions = np.maximum(real.cumsum(1) - 1, 0)
    for t in range(6, 14):
        logits = apply(config, params, row, None, positions, real, overlay=overlay, task_ids=tasks)
        row[:, t] = np.asarray(logits)[:, t - 1].argmax(-1)
    np.testing.assert_array_equal(ours, row[:, 6:])
    alone = models.generate(
        config, params, row[1:, 3:6], max_new_tokens=8, eos_token_id=(), overlay=overlay, task_ids=None if tasks is None else tasks[1:]
    )
    np.testing.assert_array_equal(alone[0], ours[1])  # whatever its batch mates' lengths
    if config.sliding_window is None:  # beyond the window little is left of virtual tokens
        plain = models.generate(config, params, row[:, :6], mask, max_new_tokens=8, eos_token_id=())
        assert not np.array_equal(ours, plain)


@pytest.mark.parametrize("method", ["prompt", "prefix"])
def test_scores_and_the_training_loss_see_the_virtual_tokens(method):
    """Under jit eu_scores and the packed training loss with its gradient are those of the overlay's logits."""
    params, overlay = params_of(TINY), made(method)
    logp = jax.nn.log_softmax(apply(TINY, params, PACKED, position_ids=POSITIONS, segment_ids=SEGMENTS, overlay=overlay))
    nll = -jnp.take_along_axis(logp[:, :-1], PACKED[:, 1:, None], -1)[..., 0]
    targets = (SEGMENTS[:, 1:] == SEGMENTS[:, :-1]) & (SEGMENTS[:, 1:] != 0)
    scores = eu_scores(
        TINY, params, PACKED, SEGMENTS != 0, position_ids=POSITIONS, segment_ids=SEGMENTS, overlay=overlay, num_segments=3
    )
    np.testing.assert_allclose(scores.token_nll[:, 1:], np.where(targets, nll, 0), atol=1e-4, rtol=1e-4)
    mesh, subject = make_mesh(MeshSection(), jax.devices()[:1]), Subject(TINY, overlay)
    weights = np.pad(targets, ((0, 0), (1, 0))).astype(np.float32)
    rows = {"input_ids": PACKED, "position_ids": POSITIONS, "segment_ids": SEGMENTS, "weights": weights, "task_ids": 0 * PACKED}
    rows = {name: jnp.asarray(array) for name, array in rows.items()}
    trainable, frozen = subject.split(params)
    loss = jax.jit(jax.value_and_grad(lambda t: loss_sum(subject, mesh, "plain", t, frozen, rows, None)[0]))
    value, gradient = loss(trainable)
    np.testing.assert_allclose(value, (nll * targets).sum(), rtol=1e-5)
    assert jax.tree.structure(gradient) == jax.tree.structure(trainable)
    assert np.abs(gradient["prompt_embeddings"]).max() > 1e-3
    # A step down the gradient lowers the loss: the sign and the wiring are right.
    assert loss(jax.tree.map(lambda w, g: w - 1e-3 * g, trainable, gradient))[0] < value


def test_task_ids_must_fit():
    """Missing, mis-shaped and unknown task ids are one-line errors at the door; unknown ones inside jit give NaN, never a guess."""
    params, overlay = params_of(TINY), made("mpt")
    run = partial(models.apply, TINY, params, SAMPLES, overlay=overlay)
    for tasks, message in (
        (None, "task_ids: the overlay has 3 tasks; say which"),
        ([0, 1], r"task_ids: must be int \[3\] or \[3, 7\], got int32 \[2\]"),
        ([0.0, 1.0, 2.0], r"task_ids: must be int \[3\] or \[3, 7\], got float32"),
        ([0, 1, 3], "task_ids: hold 0 to 3; the overlay's tasks are 0 to 2"),
        (np.full((3, 7), -1), "task_ids: hold -1 to -1"),
    ):
        with pytest.raises(QtjaxError, match=message):
            run(task_ids=tasks)
    with pytest.raises(QtjaxError, match=r"task_ids: must be int \[3\], got int32 \[3, 7\]"):
        models.generate(TINY, params, SAMPLES, max_new_tokens=2, overlay=overlay, task_ids=np.zeros((3, 7), int))
    traced = np.isnan(np.asarray(apply(TINY, params, SAMPLES, overlay=overlay, task_ids=np.array([0, -1, 3]))))
    assert traced[1:].all() and not traced[0].any()
    mixed = np.zeros((3, 7), int)
    mixed[0, 4] = 5
    assert np.flatnonzero(np.isnan(np.asarray(apply(TINY, params, SAMPLES, overlay=overlay, task_ids=mixed))[0, :, 0])).tolist() == [4]
    one = made("mpt", num_tasks=1)
    np.testing.assert_array_equal(
        models.apply(TINY, params, SAMPLES, overlay=one), models.apply(TINY, params, SAMPLES, overlay=one, task_ids=[0, 0, 0])
    )


def test_prompts_stack_with_other_overlays_and_not_with_each_other():
    """"lora+prompt" trains both; two overlays that both put tokens before the row are refused."""
    params = params_of(TINY)
    both = qtjax.init_overlay("lora+prompt", TINY, params, jax.random.key(0), r=2, num_virtual_tokens=4)
    alone = qtjax.init_overlay("prompt", TINY, params, jax.random.key(0), num_virtual_tokens=4)
    alone = alone.replace(params={"prompt_embeddings": both.params["prompt"]["prompt_embeddings"]})
    np.testing.assert_allclose(
        models.apply(TINY, params, SAMPLES, overlay=both), models.apply(TINY, params, SAMPLES, overlay=alone), atol=1e-5
    )
    with pytest.raises(QtjaxError, match="both put tokens before the row"):
        qtjax.init_overlay("prompt+prefix", TINY, params, jax.random.key(0))
