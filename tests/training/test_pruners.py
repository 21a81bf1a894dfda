"""Any pair of pruners in the loop: what is scored, what weighs how much, what InfoBatch remembers, what is refused."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from rich.console import Console
from tests.training.test_loop import naive_loss_sum, worst

from qtjax import scoring
from qtjax.config import PruneSection
from qtjax.errors import QtjaxError
from qtjax.pruning import SAMPLE_PRUNERS as KNOWN_SAMPLE
from qtjax.pruning import TOKEN_PRUNERS as KNOWN_TOKEN
from qtjax.pruning import INITIAL_SCORE, epoch_choice
from qtjax.sections import LOSSES, SAMPLE_PRUNERS, TOKEN_PRUNERS
from qtjax.training import reference, story
from qtjax.training.batch import survivors
from qtjax.training.pruners import pruners
from qtjax.training.step import decide, step_key

N, T = 12, 10


def section(sample="q-tuning", token="q-tuning", **changes) -> PruneSection:
    reference = "somewhere" if token in ("rho-1", "token-cleaning") else ""
    own = {"sample_pruner": sample, "token_pruner": token, "sample_keep": 0.5, "token_keep": 0.5, "reference_model": reference}
    return PruneSection(**own | changes)


def made_up(needs, seed=0, padding=0):
    """A batch of N samples and `padding` rows, its signals, a key."""
    rng = np.random.default_rng(seed)
    targets = np.arange(T) >= rng.integers(1, T - 2, N)[:, None]
    scores = {name: rng.gamma(2.0, 1.0, (N, T)).astype(np.float32) * targets for name in needs.signals}
    batch = {"targets": targets, "closing": np.arange(T)[None] == np.full((N, 1), T - 1), "valid": np.ones(N, bool)}
    batch |= {"index": rng.permutation(100)[:N].astype(np.int32)}
    batch |= {"planned": (rng.random(N) < 0.7).astype(np.float32) * 2, "reference": rng.gamma(2.0, 1.0, (N, T)).astype(np.float32)}
    fill = lambda x: np.concatenate([x, np.zeros((padding, *x.shape[1:]), x.dtype)])  # noqa: E731
    batch, scores = ({name: fill(x) for name, x in tree.items()} for tree in (batch, scores))
    batch["index"][N:] = -1
    if not needs.by_epoch:
        del batch["planned"]
    if not needs.reference:
        del batch["reference"]
    return scores, batch, step_key(3, 5)


def test_the_config_names_every_pruner_and_loss():
    """The choices of the config are the registries' keys."""
    assert SAMPLE_PRUNERS == tuple(KNOWN_SAMPLE) and TOKEN_PRUNERS == tuple(KNOWN_TOKEN) and LOSSES == scoring.LOSSES


@pytest.mark.parametrize("sample", SAMPLE_PRUNERS)
def test_every_pairing_keeps_its_budget_and_ignores_padding(sample):
    """Exact K, exact tokens of the samples whose tokens are pruned, all tokens of the others; padding rows change nothing."""
    for token in TOKEN_PRUNERS:
        prune = section(sample, token)
        needs = pruners(prune)
        scores, batch, key = made_up(needs)
        decision = jax.tree.map(np.asarray, decide(prune, scores, batch, key))
        keep, count = decision.keep, batch["targets"].sum(axis=1)
        if needs.sample.exact:
            assert keep.sum() == N // 2
        scope = decision.quadrant == 2 if needs.sample.quadrants else keep
        pruned, whole = keep & scope, keep & ~scope
        if token == "none":
            pruned, whole = keep & False, keep
        kept = decision.tokens.sum(axis=1)
        assert not decision.tokens[~keep].any() and (decision.tokens <= batch["targets"]).all()
        np.testing.assert_array_equal(kept[whole], count[whole])
        if needs.token.whole_batch:
            assert kept[pruned].sum() == max(1, int(0.5 * count[pruned].sum())) * bool(pruned.any())
        else:
            np.testing.assert_array_equal(kept[pruned], np.maximum(1, count[pruned] // 2))
        scores, batch, key = made_up(needs, padding=4)
        padded = jax.tree.map(np.asarray, decide(prune, scores, batch, key))
        for name in ("keep", "tokens", "weight", "quadrant"):
            np.testing.assert_array_equal(getattr(padded, name)[:N], getattr(decision, name), err_msg=f"{sample} {token} {name}")
        assert not padded.keep[N:].any()


def test_a_draw_belongs_to_the_sample_and_the_step():
    """Random choices follow a sample wherever it stands in the batch, and change with the step."""
    prune = section("random", "random")
    scores, batch, key = made_up(pruners(prune))
    decision, order = decide(prune, scores, batch, key), np.random.default_rng(1).permutation(N)
    turned = decide(prune, scores, {name: x[order] for name, x in batch.items()}, key)
    np.testing.assert_array_equal(np.asarray(turned.tokens), np.asarray(decision.tokens)[order])
    other = decide(prune, scores, batch, step_key(3, 6))
    assert not np.array_equal(other.keep, decision.keep)


@pytest.mark.parametrize(("scope", "of"), [("q2", (2,)), ("q2+q4", (2, 4)), ("kept", (0, 2, 4))])
def test_scope_says_whose_tokens_are_pruned(scope, of):
    """q2, both corners, or all that is kept: exactly these lose tokens."""
    prune = section(token_scope=scope, sample_keep=1.0)
    scores, batch, key = made_up(pruners(prune))
    decision = decide(prune, scores, batch, key)
    lost = np.asarray(decision.tokens).sum(axis=1) < batch["targets"].sum(axis=1)
    np.testing.assert_array_equal(lost, np.isin(np.asarray(decision.quadrant), of))
    assert lost.any() and (scope == "kept" or not lost.all())


def test_what_is_chosen_without_scores_is_scored_alone(opened):
    """random x perplexity: only the kept samples go through the scoring pass, and only they have scores in the records."""
    loop = opened(**{"prune.sample_pruner": "random", "prune.token_pruner": "perplexity"}).loop
    metrics, records = loop.step(0, 6)
    lengths = loop.dataset.lengths[loop.plan.batch(0)]
    assert metrics["scored_tokens"] == lengths[records["keep"]].sum() < lengths.sum()
    np.testing.assert_array_equal(np.isfinite(records["perplexity"]), records["keep"])
    assert metrics["kept_samples"] == 8 and metrics["eligible"] == 16


def test_no_scoring_pass_where_nothing_needs_scores(opened):
    """random x random trains without one: no token is scored and no scoring program exists."""
    loop = opened(**{"prune.sample_pruner": "random", "prune.token_pruner": "random"}).loop
    metrics, records = loop.step(0, 6)
    assert metrics["scored_tokens"] == 0 and not loop.programs.score
    assert metrics["kept_samples"] == 8 and metrics["kept_tokens"] < metrics["target_tokens"]
    assert np.isnan(records["perplexity"]).all()


def test_infobatch_plans_each_epoch_by_the_losses_of_the_one_before(opened):
    """First epoch whole; then what epoch_choice says of the measured losses, weighed; the last one whole again."""
    session = opened(**{"prune.sample_pruner": "infobatch", "prune.token_pruner": "none", "train.epochs": 3.0})
    loop, last = session.loop, session.total_steps
    for step in range(3):
        metrics, records = loop.step(step, last)
        assert metrics["kept_samples"] == metrics["samples"]
    scores = loop.epochs.scores.copy()
    assert (scores != INITIAL_SCORE).all() and np.isfinite(scores).all()
    keep, weight = epoch_choice(scores, session.config.train.seed, 1, 0.5)
    assert 0 < (~keep).sum() < len(keep)
    before = jax.tree.map(jnp.copy, loop.state.trainable)
    prepared, scored = loop.prepare(3), loop.score(loop.prepare(3), 3)
    own = np.asarray(scored.decision.weight)
    np.testing.assert_allclose(own, weight[prepared.batch.indices], rtol=1e-6)
    weights = prepared.batch.targets * own[:, None]
    expected, gradient = jax.value_and_grad(
        lambda p: naive_loss_sum(session.subject.config, p, prepared.batch, weights) / weights.sum()
    )(before)
    chosen = loop._choose(scored, _Clock())
    got, loss = loop.gradients(chosen.parts, 3)
    assert float(loss) / chosen.divisor == pytest.approx(float(expected), rel=1e-5)
    assert worst(jax.tree.map(lambda g: g / chosen.divisor, got), gradient) < 1e-4
    for step in range(3, 6):
        metrics, records = loop.step(step, last)
        np.testing.assert_array_equal(records["keep"], keep[loop.plan.batch(step)])
    dropped = ~keep
    np.testing.assert_array_equal(loop.epochs.scores[dropped], scores[dropped])  # not trained on: the old loss stays
    assert (loop.epochs.scores[keep] != scores[keep]).all()
    assert loop.step(6, last)[0]["kept_samples"] == 16


def test_infobatch_s_score_is_the_sample_s_mean_nll(opened):
    """The loss remembered is the plain mean nll that the step was trained with, also under a re-weighted loss."""
    session = opened(**{"prune.sample_pruner": "infobatch", "prune.token_pruner": "none", "train.loss": "dft"})
    loop = session.loop
    batch, before = loop.prepare(0).batch, jax.tree.map(jnp.copy, loop.state.trainable)
    loop.step(0, session.total_steps)
    for i in (0, 5, 15):
        weights = batch.targets * (np.arange(16) == i)[:, None]
        expected = naive_loss_sum(session.subject.config, before, batch, weights.astype(np.float32)) / weights.sum()
        assert loop.epochs.scores[batch.indices[i]] == pytest.approx(float(expected), rel=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize(("sample", "token"), [("infobatch", "none"), ("random", "random"), ("infobatch-budget", "fastv")])
def test_a_crash_mid_epoch_changes_nothing(differ_after_a_cut, sample, token):
    """InfoBatch's memory and the draws of a step are those of an uninterrupted run: bitwise the same trained values."""
    changes = {"prune.sample_pruner": sample, "prune.token_pruner": token, "train.epochs": 3.0, "train.checkpoint_every": 2}
    # epochs of 3 steps; the checkpoint before the cut is of step 4, mid-epoch
    assert differ_after_a_cut(5, **changes) == []


@pytest.mark.parametrize("loss", ["dft", "eaft"])
def test_a_step_trains_on_the_loss_that_the_config_names(opened, loss):
    """The gradient of packed microbatches is that of the re-weighted loss written plainly over full logits."""
    session = opened(**{"prune.sample_pruner": "none", "prune.token_pruner": "none", "train.loss": loss})
    loop = session.loop
    batch = loop.prepare(0).batch

    def naive(params):
        from qtjax import models

        real = np.arange(batch.input_ids.shape[1])[None] < batch.lengths[:, None]
        logits = models.apply(session.subject.config, params, jnp.asarray(batch.input_ids), jnp.asarray(real))[:, :-1]
        labels, weights = batch.input_ids[:, 1:], batch.targets[:, 1:].astype(np.float32)
        return scoring.head_loss(logits, jnp.eye(logits.shape[-1]), labels, weights, loss=loss)

    expected, gradient = jax.value_and_grad(naive)(loop.state.trainable)
    parts = loop.pack(survivors(batch, batch.targets, session.config.prune))
    got, total = loop.gradients(parts, 0)
    assert float(total) == pytest.approx(float(expected), rel=1e-5)
    assert worst(got, gradient) < 1e-4


def test_the_reference_is_scored_once_and_read_back(opened, tiny_model, monkeypatch):
    """rho-1 keeps the tokens whose loss exceeds the reference's most; a second opening does not score again."""
    flags = {"prune.sample_pruner": "none", "prune.token_pruner": "rho-1", "prune.reference_model": tiny_model}
    loop = opened(**flags).loop
    nll = np.asarray(loop.score(loop.prepare(0), 0).scores[0])
    batch = loop.prepare(0).batch
    np.testing.assert_allclose(batch.reference[batch.targets], nll[batch.targets], rtol=2e-4, atol=2e-5)  # the same model
    folder = opened.root / "run"
    assert len(list(folder.glob("reference_model-*.npy"))) == 1
    monkeypatch.setattr(reference, "load_pretrained", None)
    found = reference.other_model_scores(loop.config, "prune.reference_model", loop.dataset, loop.mesh, folder)
    np.testing.assert_array_equal(found.scores[0], loop.reference)
    # Another host's copy of a hub's model has another date: it takes the name that process 0 tells it.
    (file,) = folder.glob("reference_model-*.npy")
    name, other = file.stem.partition("-")[2], "0123456789abcdef"
    for kept in folder.glob(f"reference_model-{name}.*"):
        kept.rename(kept.with_name(kept.name.replace(name, other)))
    monkeypatch.setattr(reference, "first_alone", lambda what, work: f"there {other}")
    found = reference.other_model_scores(loop.config, "prune.reference_model", loop.dataset, loop.mesh, folder)
    np.testing.assert_array_equal(found.scores[0], loop.reference)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sample_pruner": "random", "token_scope": "q2"}, "token_scope = 'q2'.*no quadrants"),
        ({"token_pruner": "rho-1"}, "reference_model = ''.*rho-1"),
        ({"reference_model": "x"}, "reference_model = 'x'.*uses none"),
        ({"sample_pruner": "infobatch", "score_lag": 1}, "score_lag = 1: infobatch"),
    ],
)
def test_pruners_that_do_not_go_together_are_refused(changes, message):
    """One line: field, value, rule, remedy."""
    with pytest.raises(QtjaxError, match=message):
        pruners(PruneSection(**changes))


def test_a_reference_with_another_vocabulary_is_refused(opened, tmp_path_factory):
    """Losses of other tokens do not compare: refused before anything is loaded."""
    import json
    import shutil

    from qtjax.smol import model_folder

    folder = tmp_path_factory.mktemp("reference") / "other"
    shutil.copytree(model_folder(), folder)
    file = folder / "tokenizer.json"
    tokenizer = json.loads(file.read_text())
    vocabulary = tokenizer["model"]["vocab"]
    first, second = sorted(vocabulary, key=vocabulary.get)[-2:]
    vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]
    file.write_text(json.dumps(tokenizer))
    with pytest.raises(QtjaxError, match="reference_model.*another vocabulary"):
        opened(**{"prune.token_pruner": "rho-1", "prune.reference_model": str(folder)})


@pytest.mark.parametrize("rater", ["fastv", "sparsevlm"])
def test_a_rater_on_a_model_that_cannot_be_read_is_refused(opened, tmp_path, rater):
    """Attention is rated inside the forward pass, so a folder of another architecture is refused as it is without a rater."""
    import json
    import shutil

    from qtjax.smol import model_folder

    shutil.copytree(model_folder(), tmp_path / "gpt2")
    file = tmp_path / "gpt2" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"model_type": "gpt2"}))
    with pytest.raises(QtjaxError, match="model_type 'gpt2'"):
        opened(**{"model.path": str(tmp_path / "gpt2"), "prune.token_pruner": rater})


def test_titles_name_the_pair():
    """"full data", the paper's name, or both pruners with their budgets."""
    names = {("none", "none"): "full data", ("q-tuning", "q-tuning"): "Q-Tuning 50 % x 50 %", ("random", "none"): "random 50 % x none",
             ("infobatch", "none"): "infobatch x none", ("none", "random"): "none x random 50 %"}  # fmt: skip
    for pair, name in names.items():
        assert story.describe(section(*pair)) == name


class _Clock:
    def lap(self, name):
        pass


@pytest.mark.slow
def test_every_pruner_takes_a_step_with_two_others(tiny_config, tmp_path):
    """Pairings of every kind open, compile and train one step with a finite loss; all 88 decide in the test above."""
    from qtjax.training.run import open_session
    from qtjax.training.run_folder import RunFolder

    pairs = [(sample, TOKEN_PRUNERS[(i + more) % len(TOKEN_PRUNERS)]) for i, sample in enumerate(SAMPLE_PRUNERS) for more in (0, 3)]
    assert {token for _, token in pairs} == set(TOKEN_PRUNERS)
    for number, (sample, token) in enumerate(pairs):
        path = tiny_config().model.path if token in ("rho-1", "token-cleaning") else ""
        config = tiny_config(**{
            "prune.sample_pruner": sample, "prune.token_pruner": token, "prune.reference_model": path, "train.shapes": 1,
            "run.folder": f"{tmp_path}/{number}",
        })  # fmt: skip
        with RunFolder.open(config) as folder:
            session = open_session(config, folder, Console(quiet=True))
            metrics, _ = session.loop.step(0, session.total_steps)
            session.close()
        assert np.isfinite(metrics["loss"]) and metrics["kept_tokens"] > 0 and not metrics["skipped"], (sample, token)
