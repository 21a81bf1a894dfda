"""prune.reuse_forward: training starts from what the scoring pass computed, and ends as if it had not."""

from functools import partial

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qtjax.config import PruneSection
from qtjax.data.packing import Sample
from qtjax.errors import QtjaxError
from qtjax.training.batch import microbatches
from qtjax.training.kept import Kept, Origins
from qtjax.training.pruners import pruners
from qtjax.training.reuse import carry, check_reuse
from qtjax.tree import flatten

REUSE = {"prune.reuse_forward": True}


@pytest.mark.parametrize(
    "changes",
    [
        {},
        pytest.param({"overlay.method": "lora"}, marks=pytest.mark.slow),
        pytest.param({"overlay.method": "qlora", "model.quantization": "nf4"}, marks=pytest.mark.slow),
        pytest.param({"model.remat": "full", "prune.token_scope": "q2+q4", "train.loss": "dft"}, marks=pytest.mark.slow),
        {"prune.score_every": 2, "prune.warmup_fraction": 0.34, "train.epochs": 4.0},
        {"prune.sample_pruner": "random"},
    ],
    ids=["full", "lora", "qlora", "remat", "steps-without-a-pass", "scored-after-the-choice"],
)
def test_a_run_that_reuses_its_scoring_pass_trains_alike(opened, changes):
    """Step by step the same choice, the same loss and, at the end, the same weights as a run that computes everything twice.

    Float32, sums in another order, six to twelve steps of AdamW at 1e-2, which divides small gradients by their own size: 2e-4.
    """
    own, reused = opened(**changes), opened(**changes, **REUSE, **{"run.folder": str(opened.root / "reused")})
    assert not own.loop.programs.backward
    used = {"backward": 0, "accumulate": 0}
    for name in used:

        def counted(*given, name=name, program):
            used[name] += 1
            return program(*given)

        calls = {rows: partial(counted, program=program) for rows, program in getattr(reused.loop.programs, name).items()}
        setattr(reused.loop.programs, name, calls)
    for step in range(own.total_steps):
        (want, rows), (got, chosen) = (session.loop.step(step, session.total_steps) for session in (own, reused))
        assert got["scored_tokens"] == want["scored_tokens"] and got["kept_tokens"] == want["kept_tokens"]
        assert used["backward" if got["scored_tokens"] else "accumulate"] > 0 and min(used.values()) == 0, (step, used)
        used |= {"backward": 0, "accumulate": 0}
        np.testing.assert_allclose(got["loss"], want["loss"], rtol=1e-4)
        np.testing.assert_allclose(got["grad_norm"], want["grad_norm"], rtol=1e-3)
        if rows is not None:
            np.testing.assert_array_equal(chosen["keep"], rows["keep"])
    one, other = (flatten(session.loop.state.trainable) for session in (own, reused))
    for path, leaf in one.items():
        np.testing.assert_allclose(other[path], leaf, atol=2e-4, err_msg=path)


def test_what_is_carried_is_what_the_layers_gave_there(opened):
    """For every slot that a step trains on: the layers' outputs of the scoring launch in which its sample was, at its own token."""
    loop = opened(**REUSE).loop
    scored = loop.score(loop.prepare(0), 0)
    chosen = loop._choose(scored, loop.clock)
    given = {}
    for part, outputs in zip(scored.prepared.scoring, scored.outputs, strict=True):
        for r, t in np.argwhere(part.sample >= 0).tolist():
            given[part.sample[r, t], part.rows["position_ids"][r, t]] = np.asarray(outputs)[:, r, t]
    kept, seen = Kept(loop.programs, loop.mesh, scored.prepared.scoring, scored.outputs, loop.samples), 0
    for part in chosen.parts:
        carried = np.asarray(kept.of(part))
        for r, t in np.argwhere(part.sample >= 0).tolist():
            np.testing.assert_array_equal(carried[:, r, t], given[part.sample[r, t], part.rows["position_ids"][r, t]])
            seen += 1
        assert not carried[:, part.sample < 0].any()
    assert seen == sum(part.tokens for part in chosen.parts) > 0 and len(scored.outputs) > 1


@settings(deadline=None, max_examples=60)
@given(st.lists(st.integers(0, 12), min_size=1, max_size=24), st.integers(0, 2**16))
def test_every_survivor_finds_its_own_tokens(lengths, seed):
    """Any samples, any of them cut or gone: through all scoring launches each survivor's slots get its own tokens back."""
    rng = np.random.default_rng(seed)
    ids = rng.integers(1, 10**6, (len(lengths), 12))

    def sample(i: int, n: int) -> Sample:
        return Sample(ids[i, :n].astype(np.int32), np.ones(n, bool), np.arange(n, dtype=np.int32))

    scoring = microbatches([sample(i, n) for i, n in enumerate(lengths)], (4, 2), 16, 1)
    training = microbatches([sample(i, int(rng.integers(0, n + 1))) for i, n in enumerate(lengths)], (4, 2), 16, 1)
    origins = Origins(scoring, len(lengths))
    for part in training:
        out = np.zeros((1, *part.sample.shape, 1), np.int32)
        for launch, scored in enumerate(scoring):
            if (found := origins.of(part, launch)) is not None:
                out = np.asarray(carry(out, scored.rows["input_ids"][None, ..., None], *found))
        np.testing.assert_array_equal(out[0, ..., 0], part.rows["input_ids"])


@pytest.mark.slow
def test_a_crash_changes_nothing(differ_after_a_cut):
    """Nothing of a scoring pass outlives its step: a run that was cut ends bitwise like one that never stopped."""
    assert differ_after_a_cut(4, **REUSE) == []


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"score_lag": 1}, "score_lag = 1 scores under older weights; leave one of them out"),
        ({"score_dtype": "bfloat16"}, "score_dtype = 'bfloat16' is of scoring alone"),
        ({"score_model": "x"}, "score_model's scores are not the trained model's"),
        ({"mode": "drop"}, "mode = 'drop' takes context away"),
        ({"sample_pruner": "entropy", "token_pruner": "fastv"}, "scoring pass of the token pruner fastv is not kept; choose another"),
        ({"sample_pruner": "none", "token_pruner": "none"}, "use no scores"),
    ],
)
def test_scores_that_are_not_what_training_would_compute_are_refused(changes, message):
    with pytest.raises(QtjaxError, match=f"prune.reuse_forward = True: .*{message}"):
        check_reuse(PruneSection(reuse_forward=True, **changes), None, 1)
    pruners(PruneSection(**changes))  # alone they may be


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"overlay.lora_dropout": 0.1, "overlay.method": "lora"}, "lora draws random numbers"),
        ({"overlay.method": "prompt"}, "prompt puts virtual tokens before each row"),
        ({"overlay.method": "diffprune"}, "diffprune draws .* if it has one, or leave it out"),
    ],
)
def test_overlays_that_train_otherwise_than_they_score_are_refused(opened, changes, message):
    """Before anything is loaded."""
    with pytest.raises(QtjaxError, match=f"prune.reuse_forward = True: {message}"):
        opened(**REUSE, **changes)


def test_a_mesh_that_shares_samples_is_refused():
    with pytest.raises(QtjaxError, match="survivors move between the mesh's 4 devices of data x fsdp; use one of them"):
        check_reuse(PruneSection(reuse_forward=True), None, 4)
    assert jax.device_count() == 1
