"""Scores that cost less: kept for some epochs, taken in another dtype, or of another model. What they are, what they save."""

import dataclasses

import jax
import numpy as np
import pytest

from qtjax.checkpoints import load_pretrained, save_pretrained
from qtjax.config import PruneSection, override
from qtjax.errors import QtjaxError
from qtjax.evals.decisions import as_it_is, check_offline, left_out
from qtjax.training import reference
from qtjax.training.pruners import pruners
from qtjax.training.score import score_rows


def signals_of(loop, step: int) -> tuple[np.ndarray, np.ndarray]:
    """(sample indices, nll [N, T]) of what the decision of a step is made on."""
    prepared = loop.prepare(step)
    return prepared.batch.indices, np.asarray(loop.score(prepared, step).scores[0])


def test_scores_are_taken_every_second_epoch_and_used_again_in_between(opened):
    """Epochs of three steps: the second reads the first one's scores bit by bit, whatever was learned since, in its own order
    of samples and without a scoring pass; the third takes new ones."""
    session = opened(**{"prune.score_every": 2, "train.epochs": 3.0})
    loop, last, first = session.loop, session.total_steps, {}
    for step in range(3):
        indices, nll = signals_of(loop, step)
        first |= dict(zip(indices.tolist(), nll))
        assert loop.step(step, last)[0]["scored_tokens"] > 0
    for step in range(3, 6):
        indices, nll = signals_of(loop, step)
        assert [i for i, row in zip(indices.tolist(), nll) if not np.array_equal(row, first[i])] == []
        assert loop.step(step, last)[0]["scored_tokens"] == 0
    assert all(type(x) is np.ndarray for x in jax.tree.leaves(loop.pending()))  # no device holds what is kept
    indices, nll = signals_of(loop, 6)
    assert loop.step(6, last)[0]["scored_tokens"] > 0
    assert all(not np.array_equal(row, first[i]) for i, row in zip(indices.tolist(), nll))


def test_pruning_begins_after_the_warm_up(opened):
    """Two of six steps: all samples and tokens, no scoring pass and no records; then the budget. Epochs of three steps that
    keep scores count from the first one that prunes from its beginning."""
    session = opened(**{"prune.warmup_fraction": 0.33, "prune.score_every": 2, "train.epochs": 2.0})
    loop, last = session.loop, session.total_steps
    taken = [loop.step(step, last) for step in range(last)]
    metrics, records = zip(*taken)
    assert [m["kept_samples"] for m in metrics] == [16, 16, 8, 8, 8, 8]
    assert all(m["kept_tokens"] == m["target_tokens"] for m in metrics[:2])
    assert [m["scored_tokens"] > 0 for m in metrics] == [False, False, True, True, True, True]
    assert [r is None for r in records] == [True, True, False, False, False, False]


@pytest.mark.slow
@pytest.mark.parametrize("cut", [1, 2, 3, 4])
def test_a_crash_about_the_end_of_the_warm_up_changes_nothing(differ_after_a_cut, cut):
    """With lagged scores the last step of the warm-up launches the first scoring pass, and a checkpoint holds its scores."""
    changes = {"prune.warmup_fraction": 0.5, "prune.score_lag": 1, "train.checkpoint_every": 1}
    assert differ_after_a_cut(cut, **changes) == []


@pytest.mark.slow
@pytest.mark.parametrize("lag", [0, 1])
def test_a_crash_while_scores_are_used_again_changes_nothing(differ_after_a_cut, lag):
    """The scores that a checkpoint holds are those of the epoch before: bitwise the same trained values."""
    changes = {"prune.score_every": 2, "prune.score_lag": lag, "train.epochs": 3.0, "train.checkpoint_every": 2}
    assert differ_after_a_cut(5, **changes) == []


def test_another_model_scores_once_and_no_step_scores_again(opened, tiny_model, monkeypatch):
    """With the model's own folder as scorer the first step decides as an exact one does; the second still uses those scores.
    The pass counts as scoring time."""
    exact = opened()
    expected = exact.loop.score(exact.loop.prepare(0), 0)
    session = opened(**{"prune.score_model": tiny_model, "run.folder": str(opened.root / "other")})
    loop = session.loop
    found = loop.score(loop.prepare(0), 0)
    for ours, theirs in zip(found.scores, expected.scores):
        np.testing.assert_allclose(ours, theirs, rtol=2e-4, atol=2e-5)  # packed into other rows
    np.testing.assert_array_equal(found.decision.keep, expected.decision.keep)
    before = signals_of(loop, 1)[1]
    assert loop.step(0, session.total_steps)[0]["scored_tokens"] == 0
    np.testing.assert_array_equal(signals_of(loop, 1)[1], before)
    assert not loop.programs.score and len(list((opened.root / "other").glob("score_model-*.npy"))) == 1
    assert session.seconds["other_models"] > 0
    with monkeypatch.context() as gone:
        gone.setattr(reference, "load_pretrained", None)  # read back, not scored again
        kept = reference.other_model_scores(loop.config, "prune.score_model", loop.dataset, loop.mesh, opened.root / "other")
    np.testing.assert_array_equal(kept.scores, loop.store.scores)
    assert kept.seconds == session.seconds["other_models"]
    coarse = override(loop.config, {"model.dtype": "bfloat16"})  # computed anew, beside it
    other = reference.other_model_scores(coarse, "prune.score_model", loop.dataset, loop.mesh, opened.root / "other")
    assert len(list((opened.root / "other").glob("score_model-*.npy"))) == 2 and not np.array_equal(other.scores, kept.scores)


def test_the_scores_are_the_other_model_s(opened, tiny_model, tmp_path):
    """A folder with other weights gives its own nll, as `score_rows` computes it there, and not the trained model's."""
    config, params = load_pretrained(tiny_model)
    save_pretrained(tmp_path / "scaled", config, jax.tree.map(lambda x: x * 1.2, params), tokenizer_from=tiny_model)
    loop = opened(**{"prune.score_model": str(tmp_path / "scaled")}).loop
    batch, (_, found) = loop.prepare(0).batch, signals_of(loop, 0)
    rows = {"input_ids": batch.input_ids, "loss_mask": batch.targets,
            "attention_mask": np.arange(batch.input_ids.shape[1])[None] < batch.lengths[:, None]}  # fmt: skip
    theirs, own = (np.asarray(score_rows(config, p, None, rows)[0]) for p in (load_pretrained(str(tmp_path / "scaled"))[1], params))
    np.testing.assert_allclose(found[batch.targets], theirs[batch.targets], rtol=2e-4, atol=2e-5)
    assert np.abs(found - own)[batch.targets].max() > 0.1


def test_a_rater_s_scores_come_from_the_other_model_too(opened, tiny_model):
    """FastV's rating is a third signal of the stored scores."""
    flags = {"prune.score_model": tiny_model, "prune.sample_pruner": "entropy", "prune.token_pruner": "fastv"}
    loop = opened(**flags).loop
    assert loop.store.scores.shape[0] == 3
    batch = loop.prepare(0).batch
    rating = np.asarray(loop.score(loop.prepare(0), 0).scores[2])
    assert (rating[batch.targets] > 0).any() and not rating[~batch.targets].any()


def test_the_scoring_pass_has_its_own_dtype(opened):
    """bfloat16 scores are those of the model computed in bfloat16; what is trained stays float32."""
    exact, coarse = opened(), opened(**{"prune.score_dtype": "bfloat16", "run.folder": str(opened.root / "coarse")})
    (_, expected), (_, found) = (signals_of(session.loop, 0) for session in (exact, coarse))
    batch = exact.loop.prepare(0).batch
    assert 0 < np.abs(found - expected)[batch.targets].max() < 0.1  # 8 bits of mantissa over two layers
    config = dataclasses.replace(exact.subject.config, dtype="bfloat16")
    i = int(np.argmax(batch.lengths))
    rows = {"input_ids": batch.input_ids[i : i + 1], "loss_mask": batch.targets[i : i + 1],
            "attention_mask": np.arange(batch.input_ids.shape[1])[None] < batch.lengths[i]}  # fmt: skip
    alone = np.asarray(score_rows(config, exact.loop.state.trainable, None, rows)[0])[0]
    np.testing.assert_allclose(found[i], alone, atol=0.03)  # another row's layout rounds elsewhere
    assert {leaf.dtype for leaf in jax.tree.leaves(coarse.loop.state.trainable)} == {np.dtype("float32")}


def test_the_scoring_pass_can_use_eight_bits(opened):
    """int8 scores are near the exact ones and not them, and nothing that is trained changes its dtype; a packed base is refused."""
    exact, coarse = opened(), opened(**{"prune.score_dtype": "int8", "run.folder": str(opened.root / "int8")})
    (_, expected), (_, found) = (signals_of(session.loop, 0) for session in (exact, coarse))
    assert 0 < np.abs(found - expected)[exact.loop.prepare(0).batch.targets].max() < 0.1  # codes of 1/127 over two layers
    assert {leaf.dtype for leaf in jax.tree.leaves(coarse.loop.state.trainable)} == {np.dtype("float32")}
    packed = {"overlay.method": "lora", "model.quantization": "int8", "prune.score_dtype": "int8", "run.folder": str(opened.root / "packed")}
    with pytest.raises(QtjaxError, match="score_dtype = 'int8': the kernels are packed"):
        opened(**packed)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sample_pruner": "none", "token_pruner": "none", "score_every": 2}, "score_every = 2.*use no scores"),
        ({"sample_pruner": "random", "token_pruner": "random", "score_model": "x"}, "score_model = 'x'.*use no scores"),
        ({"sample_pruner": "random", "score_every": 2}, "score_every = 2: random chooses other samples"),
        ({"score_model": "x", "score_every": 2}, "score_model and prune.score_every"),
        ({"score_model": "x", "score_dtype": "bfloat16"}, "score_model and prune.score_dtype"),
        ({"score_model": "x", "score_lag": 1}, "score_model and prune.score_lag"),
        ({"sample_pruner": "none", "token_pruner": "none", "warmup_fraction": 0.1}, "warmup_fraction = 0.1: nothing is pruned"),
    ],
)
def test_ways_of_scoring_that_do_not_go_together_are_refused(changes, message):
    """What would do nothing, or contradict, is an error of one line."""
    with pytest.raises(QtjaxError, match=message):
        pruners(PruneSection(**changes))


def test_offline_the_model_itself_scores_and_says_so():
    """What only training has neither disturbs nor goes unmentioned, since a run's own config may hold it."""
    prune = PruneSection(score_model="x", warmup_fraction=0.5)
    assert as_it_is(prune) == PruneSection() and check_offline(prune).passes
    assert left_out(prune).startswith("prune.score_model, prune.warmup_fraction: of training only") and left_out(PruneSection()) == ""


def test_infobatch_plans_nothing_before_it_knows_an_epoch_s_losses(opened):
    """A warm-up that ends inside the first epoch leaves that epoch whole: every sample trains, with weight 1."""
    session = opened(**{"prune.sample_pruner": "infobatch", "prune.token_pruner": "none", "prune.warmup_fraction": 0.33})
    loop = session.loop
    for step in range(3):
        assert loop.step(step, session.total_steps)[0]["kept_samples"] == 16
        assert (loop.epochs.weight == 1).all()


def test_a_warm_up_leaves_a_step_to_prune(opened):
    """However near to 1 the fraction is, the last step prunes."""
    loop = opened(**{"prune.warmup_fraction": 0.99}).loop
    assert loop.warmup == 5  # of six


def test_tokens_of_all_samples_may_use_kept_scores(opened):
    """Full samples, pruned tokens: every sample is scored in the first epoch, so that the second has all scores."""
    session = opened(**{"prune.sample_pruner": "none", "prune.score_every": 2})
    taken = [session.loop.step(step, session.total_steps)[0] for step in range(6)]
    assert [m["scored_tokens"] > 0 for m in taken] == [True] * 3 + [False] * 3
    assert all(0 < m["kept_tokens"] < m["target_tokens"] for m in taken)
