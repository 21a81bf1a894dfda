"""select_samples is Algorithm 1 of the paper: the same samples as its bisection, and the numbers of a hand-made table."""

import itertools
import math

import jax
import numpy as np
import pytest

from qtjax.errors import QtjaxError
from qtjax.pruning import select_samples

SLOTS = 200


def quantile(line, g):
    """Q_g: the smallest value such that at least a fraction g of the samples is <= it (line is sorted)."""
    return line[max(1, min(len(line), math.ceil(g * len(line)))) - 1]


def corners(perplexity, entropy, level, policy):
    """{code: mask} of the kept corners at one level (Algorithm 1: alpha = beta = level)."""
    p, e = np.sort(perplexity), np.sort(entropy)
    n = len(p)
    # 1 - level counted from the top, so that float64's 1 - level does not shift a rank.
    ppl_hi, ent_hi = p[n - 1 - math.floor(level * n)], e[n - 1 - math.floor(level * n)]
    ppl_lo, ent_lo = quantile(p, level), quantile(e, level)
    q2 = (perplexity >= ppl_hi) & (entropy <= ent_lo)
    if policy == "paper":
        return {2: q2, 4: (perplexity <= ppl_lo) & (entropy >= ent_hi)}
    return {2: q2, 3: (perplexity <= ppl_lo) & (entropy <= ent_lo)}


def unit(x):
    x = np.asarray(x, np.float32)
    return (x - x.min()) / (x.max() - x.min()) if x.max() > x.min() else np.full(len(x), np.float32(0.5))


def bisection(perplexity, entropy, K, policy, supplement):
    """Algorithm 1: (kept, code, supplement) by searching the level; exact unless a tie sits on it."""
    top = corners(perplexity, entropy, 0.49 - 1e-12, policy)
    # A batch of one lies in every corner at once; the first code, 2, names it.
    code_at_top = np.select(list(top.values()), list(top), 0)
    low, high, found = 0.0, 0.49 - 1e-12, top
    if np.logical_or.reduce(list(top.values())).sum() > K:
        for _ in range(60):
            level = (low + high) / 2
            found = corners(perplexity, entropy, level, policy)
            count = np.logical_or.reduce(list(found.values())).sum()
            if count == K:
                break
            low, high = (level, high) if count < K else (low, level)
    kept = np.logical_or.reduce(list(found.values()))
    extra = np.zeros(len(kept), bool)
    if kept.sum() < K:
        rank_p, rank_e = np.argsort(np.argsort(perplexity)), np.argsort(np.argsort(entropy))
        if policy == "paper":
            worst = -np.abs(unit(perplexity) - unit(entropy)) if supplement == "minmax" else -np.abs(rank_p - rank_e)
        else:
            worst = unit(entropy) if supplement == "minmax" else rank_e
        rest = [i for i in np.argsort(worst, kind="stable") if not kept[i]]
        extra[rest[: K - kept.sum()]] = True
    return kept | extra, code_at_top, extra


def draw_batch(r, trial):
    """(scores [2, SLOTS] padded, valid [SLOTS], scores [2, n]) of one random scoring batch with distinct float32 scores."""
    n = int(r.integers(1, SLOTS + 1)) if trial % 3 else int(r.integers(1, 12))
    rho = r.choice([-0.95, -0.5, 0.0, 0.5, 0.8, 0.9, 0.99])
    a, b = r.normal(size=(2, n))
    scores = np.exp([a, 0.4 * (rho * a + math.sqrt(1 - rho**2) * b)]).astype(np.float32)
    valid = np.zeros(SLOTS, bool)
    valid[r.choice(SLOTS, n, replace=False)] = True
    padded = np.where(r.random((2, SLOTS)) < 0.5, np.nan, 1e9).astype(np.float32)  # padding may hold anything
    padded[:, valid] = scores
    return padded, valid, scores


def tie_on_the_level(perplexity, entropy, K, policy):
    """Where Algorithm 1 cannot keep exactly K, and method.md decides by index; or a sample at exactly 0.49."""
    n = len(perplexity)
    rank_p, rank_e = np.argsort(np.argsort(perplexity)), np.argsort(np.argsort(entropy))
    other = np.maximum(rank_p, n - 1 - rank_e if policy == "paper" else rank_e)
    m = np.sort(np.minimum(np.maximum(n - 1 - rank_p, rank_e), other))
    placed = m[100 * m < 49 * n]
    return np.any(100 * m == 49 * n) or (K < len(placed) and placed[K - 1] == placed[K])


@pytest.mark.parametrize("policy", ["paper", "article"])
def test_equals_the_bisection(policy):
    """On 2400 random batches of 1..200 samples, correlations -0.95..0.99, padded: same kept, quadrants and supplement."""
    r = np.random.default_rng({"paper": 1, "article": 2}[policy])
    compared = supplemented = 0
    for keep, supplement in itertools.product([0.05, 0.125, 0.25, 0.5, 0.9, 1.0], ["minmax", "ranks"]):
        batches = [draw_batch(r, trial) for trial in range(200)]
        padded, valid = np.stack([b[0] for b in batches], 1), np.stack([b[1] for b in batches])
        many = jax.vmap(lambda p, e, v: select_samples(p, e, keep, policy, supplement, v))
        mine = jax.device_get(many(padded[0], padded[1], valid))
        for i, (_, real, (perplexity, entropy)) in enumerate(batches):
            K = max(1, math.floor(keep * len(perplexity) + 1e-6))
            distinct = len(set(perplexity)) == len(set(entropy)) == len(perplexity)
            if not distinct or tie_on_the_level(perplexity, entropy, K, policy):
                continue
            compared += 1
            expected = bisection(perplexity, entropy, K, policy, supplement)
            supplemented += expected[2].any()
            for name, want in zip(("keep", "quadrant", "supplement"), expected):
                got = getattr(mine, name)[i]
                assert not got[~real].any()
                np.testing.assert_array_equal(got[real], want, err_msg=f"{name}, {keep}, {supplement}, batch {i}")
            assert mine.keep[i].sum() == K
    assert compared > 1200 and supplemented > 300, (compared, supplemented)


#   sample          0     1      2     3    4      5      6      7
PERPLEXITY = np.array([9.0, 8.0, 7.0, 5.0, 4.0, 3.0, 2.0, 1.0])  # ranks 7 6 5 4 3 2 1 0
ENTROPY = np.array([0.0, 1.5, 4.0, 3.0, 3.5, 0.5, 2.5, 1.0])  # ranks 0 3 7 5 6 1 4 2
# m2 = max(7-rP, rE)      0     3    7    5    6    5    6    7
# m4 = max(rP, 7-rE)      7     6    5    4    3    6    3    5    placed iff 100 m < 392, i.e. m <= 3
# m3 = max(rP, rE)        7     6    7    5    6    2    4    2


@pytest.mark.parametrize(
    ("K", "supplement", "kept", "extra", "level"),
    [
        (1, "minmax", [0], [], 0 / 8),
        (2, "minmax", [0, 1], [], 3 / 8),  # 1, 4 and 6 tie at m = 3: lower index first
        (3, "minmax", [0, 1, 4], [], 3 / 8),
        (4, "minmax", [0, 1, 4, 6], [], 3 / 8),
        # Off the diagonal, min-max: 2: |6/8-1| = 1/4, 3: |4/8-3/4| = 1/4, 5: |2/8-1/8| = 1/8, 7: |0-1/4| = 1/4
        (5, "minmax", [0, 1, 2, 4, 6], [2], 0.49),
        (6, "minmax", [0, 1, 2, 3, 4, 6], [2, 3], 0.49),
        # by ranks: 2: |5-7| = 2, 3: |4-5| = 1, 5: |2-1| = 1, 7: |0-2| = 2
        (6, "ranks", [0, 1, 2, 4, 6, 7], [2, 7], 0.49),
        (7, "ranks", [0, 1, 2, 3, 4, 6, 7], [2, 3, 7], 0.49),
        (8, "minmax", list(range(8)), [2, 3, 5, 7], 0.49),
    ],
)
def test_paper_policy_by_hand(K, supplement, kept, extra, level):
    """Eight samples worked out on paper: each budget, its supplement and its level; quadrants do not depend on the budget."""
    choice = select_samples(PERPLEXITY, ENTROPY, K / 8, "paper", supplement)
    assert np.flatnonzero(choice.keep).tolist() == kept
    assert np.flatnonzero(choice.supplement).tolist() == extra
    assert choice.quadrant.tolist() == [2, 2, 0, 0, 4, 0, 4, 0]
    assert choice.median_quadrant.tolist() == [2, 2, 1, 1, 4, 3, 4, 3]
    np.testing.assert_allclose(choice.level, level)


@pytest.mark.parametrize(
    ("K", "supplement", "kept", "extra", "level"),
    [(1, "minmax", [0], [], 0), (2, "minmax", [0, 5], [], 2 / 8), (4, "ranks", [0, 1, 5, 7], [], 3 / 8), (5, "minmax", [0, 1, 5, 6, 7], [6], 0.49), (6, "ranks", [0, 1, 3, 5, 6, 7], [3, 6], 0.49)],
)  # fmt: skip
def test_article_policy_by_hand(K, supplement, kept, extra, level):
    """The same eight under the article's reading: Q2 and the low/low corner, then the lowest entropies."""
    choice = select_samples(PERPLEXITY, ENTROPY, K / 8, "article", supplement)
    assert np.flatnonzero(choice.keep).tolist() == kept
    assert np.flatnonzero(choice.supplement).tolist() == extra
    assert choice.quadrant.tolist() == [2, 2, 0, 0, 0, 3, 0, 3]
    np.testing.assert_allclose(choice.level, level)


def test_each_quadrant_alone():
    """Four clusters at the corners: Q2 and Q4 are placed, noise (Q1) and redundancy (Q3) are not."""
    perplexity, entropy = np.array([9.0, 9.1, 1.0, 1.1]), np.array([5.0, 1.0, 1.1, 5.1])
    choice = select_samples(perplexity, entropy, 0.5)
    assert choice.median_quadrant.tolist() == [1, 2, 3, 4]
    assert choice.quadrant.tolist() == [0, 2, 0, 4] and choice.keep.tolist() == [False, True, False, True]
    article = select_samples(perplexity, entropy, 0.5, "article")
    assert article.quadrant.tolist() == [0, 2, 3, 0] and article.keep.tolist() == [False, True, True, False]


def test_the_corners_end_just_below_0_49():
    """n = 100, scores on the diagonal but for ranks 48..51 mirrored: m = 48 is placed, m = 49 (exactly 0.49) is not."""
    perplexity = np.arange(100.0)
    entropy = np.arange(100.0)
    entropy[48:52] = [51, 50, 49, 48]  # m of 48, 51: 48 (Q4, Q2); m of 49, 50: 49
    quadrant = select_samples(perplexity, entropy, 0.02).quadrant
    assert {i: int(q) for i, q in enumerate(quadrant) if q} == {48: 4, 51: 2}


@pytest.mark.parametrize("keep", [1e-9, 0.5, 1.0])
@pytest.mark.parametrize("policy", ["paper", "article"])
def test_tiny_batches(keep, policy):
    """No slot, only padding, one sample, two samples: at least one is kept where there is one, nothing is NaN but level."""
    assert select_samples(np.zeros(0), np.zeros(0), keep, policy).keep.shape == (0,)
    nothing = select_samples(np.ones(3), np.ones(3), keep, policy, valid=np.zeros(3, bool))
    assert not nothing.keep.any() and not nothing.quadrant.any() and not nothing.eligible.any() and np.isnan(nothing.level)
    one = select_samples(np.ones(3), np.ones(3), keep, policy, valid=[False, True, False])
    assert one.keep.tolist() == [False, True, False] and one.quadrant[1] == 2 and one.level == 0
    rising = select_samples(np.array([1.0, 2.0]), np.array([1.0, 2.0]), keep, policy)
    assert rising.keep.sum() == (2 if keep == 1.0 else 1)
    if policy == "paper":
        assert rising.quadrant.tolist() == [0, 0] and np.isnan(rising.level) and rising.keep[0] and rising.supplement[0]


@pytest.mark.parametrize("supplement", ["minmax", "ranks"])
def test_equal_scores_go_by_index(supplement):
    """Everything tied: ranks are the indices, the range is zero (0.5), the budget is exact and the choice the first ones."""
    choice = select_samples(np.full(10, 3.0), np.full(10, 2.0), 0.3, supplement=supplement)
    assert choice.keep.tolist() == [True] * 3 + [False] * 7 and np.isnan(choice.level)


def test_samples_on_the_diagonal_tie_exactly():
    """Two samples, both scores rising: min-max puts them at (0, 0) and (1, 1), both at distance 0, so index 0 is kept."""
    r = np.random.default_rng(0)
    for _ in range(200):
        perplexity, entropy = np.sort(np.exp(r.normal(size=(2, 2))), axis=1)
        assert select_samples(perplexity, entropy, 0.5).keep.tolist() == [True, False]


def test_unscorable_samples_count_in_the_budget_but_are_never_kept():
    """N = 8 real samples of which 5 have no finite score: K = 4 of 8, so all 3 eligible are kept; padding does not count."""
    perplexity = np.array([np.nan, 2.0, np.inf, 3.0, 1.0, 5.0, 4.0, np.nan, 7.0, 7.0])
    entropy = np.array([1.0, 2.0, 1.0, 1.0, 3.0, np.nan, -np.inf, np.nan, 1.0, 1.0])
    choice = select_samples(perplexity, entropy, 0.5, valid=np.arange(10) < 8)
    assert np.flatnonzero(choice.keep).tolist() == np.flatnonzero(choice.eligible).tolist() == [1, 3, 4]
    assert not choice.quadrant[~choice.eligible].any() and not choice.median_quadrant[~choice.eligible].any()
    assert np.flatnonzero(select_samples(perplexity, entropy, 0.25, valid=np.arange(10) < 8).keep).size == 2


@pytest.mark.parametrize(("keep", "N", "K"), [(0.7, 90, 63), (0.25, 127, 31), (0.125, 200, 25), (0.1, 30, 3), (0.29, 100, 29), (1e-6, 200, 1), (1.0, 199, 199)])
def test_budget_is_exact(keep, N, K):
    """K = max(1, floor(keep * N + 1e-6)), also where float32 would miscount."""
    r = np.random.default_rng(N)
    assert select_samples(*r.normal(size=(2, 200)), keep, valid=np.arange(200) < N).keep.sum() == K


def test_order_of_the_batch_does_not_matter_without_ties():
    """Permuting a batch permutes the decision: 200 batches of a size whose decisive values do not tie."""
    r = np.random.default_rng(0)
    checked = 0
    for _ in range(200):
        perplexity, entropy = r.normal(size=(2, 40))
        rank_p, rank_e = np.argsort(np.argsort(perplexity)), np.argsort(np.argsort(entropy))
        m = np.minimum(np.maximum(39 - rank_p, rank_e), np.maximum(rank_p, 39 - rank_e))
        line = np.sort(m)
        if line[9] == line[10] and 100 * line[9] < 49 * 40:
            continue
        checked += 1
        order = r.permutation(40)
        a, b = select_samples(perplexity, entropy), select_samples(perplexity[order], entropy[order])
        for name in ("keep", "quadrant", "supplement", "median_quadrant"):
            np.testing.assert_array_equal(np.asarray(getattr(a, name))[order], getattr(b, name))
        assert a.level == b.level
    assert checked > 50


def test_works_under_jit_and_new_budgets_do_not_recompile():
    """Inside jit the same choice; outside, one compilation serves every keep."""
    r = np.random.default_rng(5)
    perplexity, entropy = r.normal(size=(2, 37))
    inside = jax.jit(lambda p, e: select_samples(p, e, 0.3))(perplexity, entropy)
    jax.tree.map(np.testing.assert_array_equal, inside, select_samples(perplexity, entropy, 0.3))
    with jax.log_compiles(False), count_compilations() as counted:
        for keep in (0.1, 0.2, 0.9):
            select_samples(perplexity, entropy, keep).keep.block_until_ready()
    assert counted == []


class count_compilations:
    """Collects the events of JAX's monitoring that mark a backend compilation."""

    def __enter__(self):
        self.events, self.on = [], True
        jax.monitoring.register_event_duration_secs_listener(
            lambda name, *_, **__: self.events.append(name) if self.on and "backend_compile" in name else None
        )
        return self.events

    def __exit__(self, *_):
        self.on = False


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"keep": 0}, "keep = 0"),
        ({"keep": 1.5}, "keep = 1.5"),
        ({"keep": float("nan")}, "keep = nan"),
        ({"keep": "a quarter"}, "keep = 'a quarter'"),
        ({"policy": "papers"}, "did you mean 'paper'"),
        ({"supplement": "rank"}, "did you mean 'ranks'"),
        ({"valid": np.ones(3, bool)}, "equal length"),
        ({"corners": "extremes"}, "did you mean 'extreme'"),
        ({"corners": "random"}, "draws is missing"),
        ({"supplement": "random"}, "draws is missing"),
        ({"supplement": "random", "draws": np.ones(3)}, "equal length"),
    ],
)
def test_bad_arguments_are_one_line(change, message):
    """Each misuse is a QtjaxError of one line that names field, value and rule."""
    with pytest.raises(QtjaxError) as caught:
        select_samples(PERPLEXITY, ENTROPY, **change)
    assert message in str(caught.value) and "\n" not in str(caught.value)


#                  0    1    2    3    4    5    6    7      placed: 0, 1 (Q2), 4, 6 (Q4), as the table above says
DRAWS = np.array([0.9, 0.2, 0.8, 0.1, 0.3, 0.4, 0.7, 0.6])


@pytest.mark.parametrize(
    ("corners", "supplement", "K", "kept", "extra"),
    [
        ("random", "minmax", 1, [1], []),
        ("random", "minmax", 3, [1, 4, 6], []),  # by draws 0.2, 0.3, 0.7, whatever their level
        ("random", "minmax", 5, [0, 1, 2, 4, 6], [2]),  # all placed, then the paper's supplement
        ("extreme", "random", 4, [0, 1, 4, 6], []),
        ("extreme", "random", 6, [0, 1, 3, 4, 5, 6], [3, 5]),  # not placed: 2, 3, 5, 7, by draws 3, 5
        ("random", "random", 7, [0, 1, 3, 4, 5, 6, 7], [3, 5, 7]),
    ],
)
def test_chosen_at_random_by_hand(corners, supplement, K, kept, extra):
    """Draws decide among what the corners hold, and among what they do not; codes stay those of the plane."""
    choice = select_samples(PERPLEXITY, ENTROPY, K / 8, supplement=supplement, corners=corners, draws=DRAWS)
    assert np.flatnonzero(choice.keep).tolist() == kept and np.flatnonzero(choice.supplement).tolist() == extra
    assert choice.quadrant.tolist() == [2, 2, 0, 0, 4, 0, 4, 0]
