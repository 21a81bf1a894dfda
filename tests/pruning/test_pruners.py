"""Each sample pruner is its rule written out with Python lists, on any batch; budgets are exact, padding is not seen."""

import inspect
import math
from fractions import Fraction

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qtjax.errors import QtjaxError
from qtjax.pruning import SAMPLE_PRUNERS, Candidates, sample_pruner, select_samples

B = 24
KEYS = jax.random.split(jax.random.key(7), B)
SCORING = {"entropy", "perplexity-low", "perplexity-middle", "perplexity-high", "infobatch-budget", "q-tuning"}
EXACT = set(SAMPLE_PRUNERS) - {"none", "infobatch"}
PLAIN = sorted(set(SAMPLE_PRUNERS) - {"q-tuning"})
KEEPS = [1e-6, 0.125, 0.3, 0.5, 0.7, 1.0]


@pytest.fixture(scope="module")
def draws():
    """The draw of each key of KEYS, taken one at a time."""
    return [float(jax.random.uniform(key)) for key in KEYS]


def batch(perplexity, entropy, count, valid, keys=KEYS):
    scores = (np.asarray(x, np.float32) for x in (perplexity, entropy))
    return Candidates(*scores, np.asarray(count, np.int32), np.asarray(valid, bool), keys)


def drawn(seed, size=B):
    """A batch whose scores do not tie, with an unscored sample, one without targets and two paddings."""
    r = np.random.default_rng(seed)
    perplexity, entropy = np.exp(r.normal(1, 1, size)), r.uniform(0, 3, size)
    count, valid = r.permutation(size) + 1, np.ones(size, bool)
    perplexity[3], count[5], valid[[8, 17]] = np.nan, 0, False
    perplexity[5] = entropy[5] = np.nan
    return batch(perplexity, entropy, count, valid)


def plan(size=B):
    """What an epoch's InfoBatch plan says about the batch."""
    r = np.random.default_rng(size)
    keep = r.random(size) < 0.6
    return {"planned_keep": keep, "planned_weight": np.where(keep, r.choice([1.0, 2.0], size), 0).astype(np.float32)}


def choose(name, candidates, keep, given_plan=None):
    options = (given_plan or plan(len(candidates.count))) if name == "infobatch" else {}
    return jax.device_get(SAMPLE_PRUNERS[name].choose(candidates, keep, **options))


def written_out(name, c, keep, draws):
    """(eligible, kept, {index: weight}) by the rule of method.md in lists, one sample at a time."""
    real = [i for i in range(len(c.count)) if c.valid[i]]
    eligible = [i for i in real if c.count[i] > 0]
    if name in SCORING:
        eligible = [i for i in eligible if math.isfinite(c.perplexity[i]) and math.isfinite(c.entropy[i])]
    K = max(1, math.floor(keep * len(real) + 1e-6)) if real else 0
    weight = dict.fromkeys(eligible, 1.0)
    if name == "none":
        return eligible, eligible, weight
    if name == "infobatch":
        p = plan(len(c.count))
        kept = [i for i in eligible if p["planned_keep"][i]]
        return eligible, kept, {i: float(p["planned_weight"][i]) for i in kept}
    if name == "infobatch-budget":
        loss = {i: Fraction(math.log(c.perplexity[i])) for i in eligible}
        mean = sum(loss.values()) / max(len(loss), 1)
        above = sorted((i for i in eligible if loss[i] >= mean), key=lambda i: (-loss[i], i))
        below = sorted((i for i in eligible if loss[i] < mean), key=lambda i: (draws[i], i))
        kept = (above + below)[:K]
        filled = [i for i in kept if i in below]
        return eligible, kept, weight | {i: len(below) / len(filled) for i in filled}
    by_perplexity = sorted(eligible, key=lambda i: (c.perplexity[i], i))
    key = {
        "random": lambda i: draws[i],
        "longest": lambda i: -c.count[i],
        "shortest": lambda i: c.count[i],
        "entropy": lambda i: -c.entropy[i],
        "perplexity-low": lambda i: c.perplexity[i],
        "perplexity-high": lambda i: -c.perplexity[i],
        "perplexity-middle": lambda i: abs(2 * by_perplexity.index(i) + 1 - len(eligible)),
    }[name]
    return eligible, sorted(eligible, key=lambda i: (key(i), i))[:K], weight


def check(name, c, keep, draws):
    got = choose(name, c, keep)
    eligible, kept, weight = written_out(name, c, keep, draws)
    assert np.flatnonzero(got.eligible).tolist() == sorted(eligible)
    assert np.flatnonzero(got.keep).tolist() == sorted(kept)
    expected = np.zeros(len(c.count), np.float32)
    expected[list(kept)] = [weight[i] for i in kept]
    np.testing.assert_array_equal(got.weight, expected)
    assert not got.quadrant.any() and not got.supplement.any() and np.isnan(got.level)
    scored = c.valid & (c.count > 0)
    whole = select_samples(np.where(scored, c.perplexity, np.nan), c.entropy, 0.5, valid=c.valid)
    np.testing.assert_array_equal(got.median_quadrant, whole.median_quadrant)


# Perplexities with ties, no two subsets of which have a mean log that meets one of them.
PERPLEXITIES = [1.0, 1.7, 2.9, 5.3, 11.0, 37.0, 1e9, math.nan, math.inf]
SAMPLE = st.tuples(
    st.sampled_from(PERPLEXITIES), st.sampled_from([0.0, 0.5, 0.7, 2.0, math.nan]), st.integers(0, 3), st.integers(0, 4)
)


@pytest.mark.parametrize("name", PLAIN)
@settings(deadline=None, max_examples=25)
@given(samples=st.lists(SAMPLE, min_size=B, max_size=B), keep=st.sampled_from(KEEPS))
def test_equals_its_rule_written_out(draws, name, samples, keep):
    """Ties, NaN, inf, samples without targets, padding: eligible, kept, weights, medians, so the exact budget too."""
    perplexity, entropy, count, state = zip(*samples)
    check(name, batch(perplexity, entropy, count, np.array(state) > 0), keep, draws)


@pytest.mark.parametrize("name", PLAIN)
@pytest.mark.parametrize("keep", [1e-6, 0.3, 1.0])
def test_degenerate_batches(draws, name, keep):
    """All scores equal, one eligible, none eligible, only padding: the rule written out, no weight is NaN."""
    some = np.arange(B) == 11
    for c in (
        batch(np.full(B, 2.7), np.full(B, 0.3), np.full(B, 5), np.ones(B)),
        batch(np.where(some, 2.7, np.nan), np.where(some, 0.3, np.nan), some * 4, np.ones(B)),
        batch(np.full(B, np.nan), np.full(B, np.nan), np.zeros(B), np.ones(B)),
        batch(np.full(B, 2.7), np.full(B, 0.3), np.full(B, 5), np.zeros(B)),
    ):
        check(name, c, keep, draws)
        assert np.isfinite(choose(name, c, keep).weight).all()


@pytest.mark.parametrize("name", SAMPLE_PRUNERS)
def test_padding_is_not_seen(name):
    """Seven rows of padding with any content put in at random places: every real sample is decided as before."""
    c, r = drawn(1), np.random.default_rng(2)
    at = np.sort(r.choice(B + 7, B, replace=False))
    keys = jax.random.key_data(KEYS)

    def spread(values, filler):
        out = np.full((B + 7, *np.shape(values)[1:]), filler, np.asarray(values).dtype)
        out[at] = values
        return out

    padded = Candidates(
        spread(c.perplexity, 1e9), spread(c.entropy, 0.01), spread(c.count, 99), spread(c.valid, False), spread(keys, 5)
    )
    given_plan = plan()
    wide = {name: spread(given_plan[name], filler) for name, filler in (("planned_keep", True), ("planned_weight", np.nan))}
    for keep in (0.125, 0.5, 0.9):
        before, after = choose(name, c, keep, given_plan), choose(name, padded, keep, wide)
        for field in ("keep", "quadrant", "supplement", "median_quadrant", "eligible", "weight"):
            np.testing.assert_array_equal(getattr(after, field)[at], getattr(before, field), err_msg=field)
            assert not np.delete(getattr(after, field), at).any()
        np.testing.assert_array_equal(after.level, before.level)


@pytest.mark.parametrize("name", ["random", "infobatch-budget"])
def test_a_draw_follows_its_key(name):
    """The batch in another order with its keys: the same samples. Other keys: others. Key data: as the keys."""
    c, order = drawn(3), np.random.default_rng(4).permutation(B)
    first = choose(name, c, 0.6).keep
    turned = Candidates(*(x[order] for x in c))
    np.testing.assert_array_equal(choose(name, turned, 0.6).keep, first[order])
    np.testing.assert_array_equal(choose(name, c._replace(keys=np.asarray(jax.random.key_data(KEYS))), 0.6).keep, first)
    assert (choose(name, c._replace(keys=jax.random.split(jax.random.key(8), B)), 0.6).keep != first).any()


def test_random_keeps_each_sample_equally_often():
    """Over 2000 batches of keys each of 24 samples is kept 12 of 24 times: within 5 standard errors of a coin, 0.056."""
    c = batch(np.full(B, np.nan), np.full(B, np.nan), np.ones(B), np.ones(B), None)
    keys = jax.random.split(jax.random.key(0), (2000, B))
    kept = jax.jit(jax.vmap(lambda k: SAMPLE_PRUNERS["random"].choose(c._replace(keys=k), 0.5).keep))(keys)
    np.testing.assert_allclose(np.mean(kept, axis=0), 0.5, atol=5 * math.sqrt(0.25 / 2000))


def test_infobatch_budget_is_unbiased_while_the_budget_holds_all_above():
    """Above the mean always kept at 1; each below drawn with weight n_below/drawn: its mean weight over 4000 draws is 1.

    A below sample's weight is w = n_below / drawn with probability 1/w, else 0: variance w - 1, so 5 standard errors are
    5 sqrt((w - 1) / 4000). The weights of one batch sum to the number of its eligible samples.
    """
    c = drawn(5)
    keys = jax.random.split(jax.random.key(1), (4000, B))
    run = SAMPLE_PRUNERS["infobatch-budget"].choose
    got = jax.device_get(jax.jit(jax.vmap(lambda k: run(c._replace(keys=k), 0.6)))(keys))
    weight, keep, eligible = got.weight, got.keep, got.eligible[0]
    loss = np.log(np.where(eligible, c.perplexity, 1))
    above = eligible & (loss >= loss[eligible].mean())
    below = eligible & ~above
    drawn_each = math.floor(0.6 * c.valid.sum() + 1e-6) - above.sum()
    assert 0 < drawn_each < below.sum() and (keep.sum(1) == above.sum() + drawn_each).all()
    np.testing.assert_array_equal(weight[:, above], 1)
    np.testing.assert_allclose(weight.sum(1), eligible.sum(), rtol=1e-6)
    spread = below.sum() / drawn_each - 1
    np.testing.assert_allclose(weight[:, below].mean(0), 1, atol=5 * math.sqrt(spread / 4000))


def test_equal_losses_are_all_above_their_mean():
    """Whatever the value and the number, however its sum rounds: the first K by index with weight 1, no draw."""
    r = np.random.default_rng(0)
    values, valid = np.exp(r.uniform(0, 9, 300)).astype(np.float32), np.arange(B) < r.integers(1, B + 1, (300, 1))
    ones = np.ones(B, np.float32)
    run = SAMPLE_PRUNERS["infobatch-budget"].choose
    got = jax.jit(jax.vmap(lambda x, v: run(Candidates(x * ones, ones, ones.astype(np.int32), v, KEYS), 0.5)))(values, valid)
    K = np.maximum(1, valid.sum(1) // 2)
    np.testing.assert_array_equal(got.keep, np.arange(B) < K[:, None])
    np.testing.assert_array_equal(got.weight, got.keep)


def test_infobatch_budget_below_the_mean_is_not_touched_when_the_budget_is_smaller():
    """Losses 1..6, mean 3.5: K = 2 keeps 6 and 5, K = 4 keeps 4, 5, 6 and one of the three below for all three."""
    c = batch(np.exp([1, 4, 2, 6, 3, 5]), np.ones(6), np.ones(6), np.ones(6), KEYS[:6])
    assert choose("infobatch-budget", c, 2 / 6).keep.tolist() == [False, False, False, True, False, True]
    got = choose("infobatch-budget", c, 4 / 6)
    assert got.keep[[1, 3, 5]].all() and sorted(got.weight.tolist()) == [0, 0, 1, 1, 1, 3]


def test_middle_by_hand():
    """Ranks 4 3 2 1 0 of five samples: rank 2 first, then of ranks 1 and 3 (indices 3 and 1) the lower index."""
    c = batch([50, 4, 3, 2, 1], np.ones(5), np.ones(5), np.ones(5), KEYS[:5])
    assert np.flatnonzero(choose("perplexity-middle", c, 0.2).keep).tolist() == [2]
    assert np.flatnonzero(choose("perplexity-middle", c, 0.4).keep).tolist() == [1, 2]


@pytest.mark.parametrize("policy", ["paper", "article"])
@pytest.mark.parametrize("supplement", ["minmax", "ranks"])
def test_q_tuning_is_select_samples(policy, supplement):
    """By name, the decisions of select_samples; a sample without targets has no score whatever stands there."""
    c = drawn(6)
    bare = c._replace(count=c.count * (np.arange(B) != 2))
    got = SAMPLE_PRUNERS["q-tuning"].choose(bare, 0.4, policy=policy, supplement=supplement)
    perplexity = np.where(np.arange(B) == 2, np.nan, c.perplexity)
    jax.tree.map(np.testing.assert_array_equal, got, select_samples(perplexity, c.entropy, 0.4, policy, supplement, c.valid))
    np.testing.assert_array_equal(got.weight, got.keep)


@pytest.mark.parametrize("name", SAMPLE_PRUNERS)
def test_works_under_jit_and_new_budgets_do_not_recompile(name, compilations):
    """Inside jit the same choice; outside, one compilation serves every keep."""
    c = drawn(9)
    options = plan() if name == "infobatch" else {}
    run = SAMPLE_PRUNERS[name].choose
    inside = jax.jit(lambda c, o: run(c, 0.3, **o))(c, options)
    jax.tree.map(np.testing.assert_array_equal, inside, run(c, 0.3, **options))
    with compilations() as events:
        for keep in (0.1, 0.2, 0.9):
            run(c, keep, **options).keep.block_until_ready()
    assert events == []


def test_an_empty_batch_keeps_nothing():
    """B = 0: arrays of no element."""
    for name in SAMPLE_PRUNERS:
        c = batch([], [], [], [], KEYS[:0])
        assert choose(name, c, 0.5).keep.shape == (0,)


def test_the_registry_says_what_its_pruners_are():
    """The names of method.md, what each reads and keeps, its options as its function has them, a source."""
    assert list(SAMPLE_PRUNERS) == [
        "none", "random", "longest", "shortest", "entropy", "perplexity-low", "perplexity-middle", "perplexity-high",
        "infobatch", "infobatch-budget", "q-tuning",
    ]  # fmt: skip
    for name, pruner in SAMPLE_PRUNERS.items():
        assert (pruner.scores, pruner.exact, pruner.quadrants) == (name in SCORING, name in EXACT, name == "q-tuning")
        options = {p.name for p in inspect.signature(pruner.choose).parameters.values() if p.kind is p.KEYWORD_ONLY}
        assert pruner.options == options - set(getattr(pruner.choose, "keywords", {}))
        assert pruner.source and "\n" not in pruner.source


@pytest.mark.parametrize("name", SAMPLE_PRUNERS)
@pytest.mark.parametrize(
    ("change", "keep", "message"),
    [
        ({}, 0, "keep = 0"),
        ({}, 1.5, "keep = 1.5"),
        ({}, float("nan"), "keep = nan"),
        ({}, "half", "keep = 'half'"),
        ({"count": np.ones(3, np.int32)}, 0.5, "equal length"),
        ({"keys": jax.random.key(0)}, 0.5, "one per sample"),
        ({"keys": KEYS[:3]}, 0.5, "one per sample"),
        ({"keys": np.zeros((B, 2), np.int32)}, 0.5, "must be threefry2x32 keys [24] or uint32 [24, 2]"),
        ({"keys": jax.random.split(jax.random.key(0, impl="rbg"), B)}, 0.5, "key<rbg>"),
    ],
)
def test_bad_arguments_are_one_line(name, change, keep, message):
    """Every pruner, also one that does not use keep: a QtjaxError of one line that names field, value and rule."""
    with pytest.raises(QtjaxError) as caught:
        choose(name, drawn(0)._replace(**change), keep, plan())
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_unknown_names_and_plans_of_another_batch_are_one_line():
    """A near name is offered; a plan must be cut to the batch."""
    with pytest.raises(QtjaxError, match="sample pruner 'infobatch-bugdet'.*did you mean 'infobatch-budget'"):
        sample_pruner("infobatch-bugdet")
    with pytest.raises(QtjaxError, match=r"shapes \(5,\) and \(5,\): must be \(24,\)"):
        choose("infobatch", drawn(0), 0.5, plan(5))
    assert sample_pruner("random") is SAMPLE_PRUNERS["random"]
