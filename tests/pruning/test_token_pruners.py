"""Each token pruner is its rule written out with Python lists, on any batch; budgets are exact, padding is not seen."""

import inspect
import math

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qtjax.errors import QtjaxError
from qtjax.pruning import TOKEN_PRUNERS, Targets, choose_tokens, select_tokens, token_pruner

B, L = 4, 9
KEYS = jax.random.split(jax.random.key(3), B)
NEEDS = {
    "none": set(), "random": set(), "perplexity": {"scores"}, "fastv": {"attention"}, "sparsevlm": {"attention"},
    "rho-1": {"scores", "reference"}, "token-cleaning": {"scores", "reference"}, "q-tuning": {"scores"},
}  # fmt: skip
FIELDS = {"scores": "token_nll", "reference": "reference_nll", "attention": "attention"}


@pytest.fixture(scope="module")
def draws():
    """The draw of the n-th target (from 1) of each sample, taken one at a time."""
    return [[float(jax.random.uniform(jax.random.fold_in(key, n))) for n in range(L + 1)] for key in KEYS]


def drawn(seed, rows=B, length=L):
    r = np.random.default_rng(seed)
    nll, reference, attention = r.uniform(0, 5, (3, rows, length)).astype(np.float32)
    return Targets(nll, r.random((rows, length)) < 0.7, KEYS[:rows], reference, attention)


def rate_written_out(name, t, b, draws):
    """{position: rate} of one row's targets; None where it cannot be rated."""
    T = [i for i in range(t.mask.shape[1]) if t.mask[b, i]]
    ppl = {i: np.float32(math.exp(min(50.0, t.token_nll[b, i]))) for i in T}  # min(50, NaN) is 50
    rates = {}
    for n, i in enumerate(T):
        rates[i] = {
            "none": lambda: 0.0,
            "random": lambda: draws[b][n + 1],
            "perplexity": lambda: ppl[i],
            "fastv": lambda: -t.attention[b, i],
            "sparsevlm": lambda: -t.attention[b, i],
            "rho-1": lambda: -(t.token_nll[b, i] - t.reference_nll[b, i]),
            "token-cleaning": lambda: -(t.token_nll[b, i] - t.reference_nll[b, i]),
            "q-tuning": lambda: (ppl[i] + ppl[T[max(n - 1, 0)]] + ppl[T[min(n + 1, len(T) - 1)]]) / 2,
        }[name]()
    return {i: float(x) if math.isfinite(x) else math.inf for i, x in rates.items()}


def written_out(name, t, keep, protect, draws):
    """The kept (row, position) pairs by method.md: each row's own budget, or one for the batch."""
    lines = [[((b, i), x) for i, x in rate_written_out(name, t, b, draws).items()] for b in range(len(t.mask))]
    if name == "none":
        return {where for line in lines for where, _ in line}
    if name == "token-cleaning":
        lines = [sum(lines, [])]
    kept = set()
    for line in lines:
        must = [where for where, _ in line if protect[where]]
        count = max(1, math.floor(keep * len(line) + 1e-6), len(must)) if line else 0
        free = sorted((x, where) for where, x in line if where not in must)
        kept |= set(must) | {where for _, where in free[: count - len(must)]}
    return kept


# nll whose exponentials differ and whose differences are exact in binary, so that ties are ties in any arithmetic.
NLLS = [0.0, 0.5, 1.25, 2.0, 3.5, 7.0, 49.0, 60.0, math.nan, math.inf]
SLOT = st.tuples(
    st.sampled_from(NLLS),
    st.booleans(),
    st.sampled_from([0.0, 0.5, 2.0, 4.25, math.nan]),
    st.sampled_from([0.0, 0.125, 0.5, math.nan]),
    st.integers(0, 6),
)


@pytest.mark.parametrize("name", [n for n in TOKEN_PRUNERS if n != "q-tuning"])
@settings(deadline=None, max_examples=25)
@given(rows=st.lists(SLOT, min_size=B * L, max_size=B * L), keep=st.sampled_from([1e-6, 0.1, 0.3, 0.5, 0.7, 1.0]))
def test_equals_its_rule_written_out(draws, name, rows, keep):
    """Any masks, ties, NaN, inf and protected targets: the kept positions of the rule in lists, so the exact budget too."""
    nll, mask, reference, attention, protect = (np.array(x).reshape(B, L) for x in zip(*rows))
    protect = protect == 0
    t = Targets(nll.astype(np.float32), mask, KEYS, reference.astype(np.float32), attention.astype(np.float32))
    got = np.asarray(choose_tokens(name, t, keep, protect))
    assert {(int(b), int(i)) for b, i in np.argwhere(got)} == written_out(name, t, keep, protect, draws)


@pytest.mark.parametrize("name", TOKEN_PRUNERS)
def test_degenerate_batches(draws, name):
    """All rates equal: the earlier stay. No target at all: none. One row without targets beside others: none there."""
    ones = np.ones((B, L), np.float32)
    flat = Targets(ones, ones > 0, KEYS, ones, ones)
    lone = flat._replace(mask=np.arange(B * L).reshape(B, L) == 14)
    nothing, gap = flat._replace(mask=np.zeros((B, L), bool)), flat._replace(mask=np.repeat([[1], [0], [1], [1]], L, 1) > 0)
    for t in (flat, lone, nothing, gap):
        got = np.asarray(choose_tokens(name, t, 0.4))
        assert {(int(b), int(i)) for b, i in np.argwhere(got)} == written_out(name, t, 0.4, np.zeros((B, L), bool), draws)
    empty = np.zeros((2, 0))
    assert choose_tokens(name, Targets(empty, empty, KEYS[:2], empty, empty), 0.4).shape == (2, 0)


@pytest.mark.parametrize("name", TOKEN_PRUNERS)
def test_budgets_are_exact(name):
    """Rows of 90, 0, 4 and 55 targets at 0.7: 63, 0, 2, 38; over the batch: floor(0.7 * 149) = 104; none: all."""
    r = np.random.default_rng(0)
    counts = [90, 0, 4, 55]
    mask = np.stack([r.permutation(np.arange(128) < n) for n in counts])
    t = drawn(1, B, 128)._replace(mask=mask)
    got = np.asarray(choose_tokens(name, t, 0.7)).sum(1)
    if name == "none":
        assert got.tolist() == counts
    elif name == "token-cleaning":
        assert got.sum() == 104
    else:
        assert got.tolist() == [63, 0, 2, 38]


@pytest.mark.parametrize("name", TOKEN_PRUNERS)
def test_padding_is_not_seen(name):
    """A row of padding on top, columns before (a longer prompt) and behind: every target is decided as before."""
    t = drawn(2)
    keys = np.asarray(jax.random.key_data(KEYS))

    def wider(x, filler):
        return np.pad(x, ((1, 0), (5, 3)), constant_values=filler)

    keys = np.concatenate([keys[2:3], keys])
    padded = Targets(
        wider(t.token_nll, np.nan), wider(t.mask, False), keys, wider(t.reference_nll, -9), wider(t.attention, 9)
    )
    np.testing.assert_array_equal(choose_tokens(name, padded, 0.5), wider(np.asarray(choose_tokens(name, t, 0.5)), False))


@pytest.mark.parametrize("keep", [1e-6, 0.3, 0.5, 1.0])
def test_q_tuning_and_perplexity_are_select_tokens(keep):
    """By name, the decisions of select_tokens; perplexity is lambda 0, as which the own PPL ranks."""
    t = drawn(4, B, 40)
    protect = np.random.default_rng(5).random((B, 40)) < 0.1
    for weight, neighbors in ((0.5, "sum"), (0.3, "mean")):
        got = choose_tokens("q-tuning", t, keep, protect, neighbor_weight=weight, neighbors=neighbors)
        np.testing.assert_array_equal(got, select_tokens(t.token_nll, t.mask, keep, weight, neighbors, protect))
    np.testing.assert_array_equal(choose_tokens("q-tuning", t, keep), select_tokens(t.token_nll, t.mask, keep))
    np.testing.assert_array_equal(choose_tokens("perplexity", t, keep), select_tokens(t.token_nll, t.mask, keep, 0.0))


def test_excess_loss_by_hand():
    """nll - reference = 2 1 | 3 -1 4, half of it: per sample 1 and 1, over the batch the two highest, both of row 1."""
    nll = np.array([[3, 3, 0], [5, 1, 4]], np.float32)
    reference = np.array([[1, 2, 0], [2, 2, 0]], np.float32)
    t = Targets(nll, np.array([[1, 1, 0], [1, 1, 1]], bool), KEYS[:2], reference)
    assert choose_tokens("rho-1", t, 0.5).tolist() == [[True, False, False], [False, False, True]]
    assert choose_tokens("token-cleaning", t, 0.5).tolist() == [[False] * 3, [True, False, True]]


@pytest.mark.parametrize("name", TOKEN_PRUNERS)
def test_rates_are_read_at_targets_only(name):
    """float32, 0 outside the mask, whatever stands there; in a numpy mask of integers as well."""
    t = drawn(6)
    nll, reference, attention = (np.where(t.mask, x, np.nan) for x in (t.token_nll, t.reference_nll, t.attention))
    spoiled = Targets(nll, t.mask.astype(np.int8), KEYS, reference, attention)
    rate = np.asarray(TOKEN_PRUNERS[name].rate(spoiled))
    assert rate.dtype == np.float32 and rate.shape == (B, L) and not rate[~t.mask].any() and np.isfinite(rate).all()
    np.testing.assert_array_equal(choose_tokens(name, spoiled, 0.5), choose_tokens(name, t, 0.5))


def test_random_draws_differ_between_targets_samples_and_keys():
    """A draw is uniform, its own for each target: mean 1/2 within 5 standard errors over 64 x 64, no value many times."""
    keys = jax.random.split(jax.random.key(0), 64)
    rate = np.asarray(TOKEN_PRUNERS["random"].rate(Targets(None, np.ones((64, 64), bool), keys)))
    assert abs(rate.mean() - 0.5) < 5 * math.sqrt(1 / 12 / rate.size) and len(np.unique(rate)) > 0.99 * rate.size
    assert 0 <= rate.min() < 0.01 and 0.99 < rate.max() < 1


@pytest.mark.parametrize("name", TOKEN_PRUNERS)
def test_works_under_jit_and_new_budgets_do_not_recompile(name, compilations):
    """Inside jit the same choice; outside, one compilation serves every keep."""
    t = drawn(7)
    inside = jax.jit(lambda t: choose_tokens(name, t, 0.3))(t)
    np.testing.assert_array_equal(inside, choose_tokens(name, t, 0.3))
    with compilations() as events:
        for keep in (0.1, 0.2, 0.9):
            choose_tokens(name, t, keep).block_until_ready()
    assert events == []


def test_the_registry_says_what_its_pruners_are():
    """The names of method.md, what each needs, its rater, its options as its function has them, a source."""
    assert {name: set(p.needs) for name, p in TOKEN_PRUNERS.items()} == NEEDS
    assert {name: p.rater for name, p in TOKEN_PRUNERS.items() if p.rater} == {"fastv": "fastv", "sparsevlm": "sparsevlm"}
    assert [name for name, p in TOKEN_PRUNERS.items() if p.whole_batch] == ["token-cleaning"]
    assert [name for name, p in TOKEN_PRUNERS.items() if not p.exact] == ["none"]
    for pruner in TOKEN_PRUNERS.values():
        options = {p.name for p in inspect.signature(pruner.rate).parameters.values() if p.kind is p.KEYWORD_ONLY}
        assert pruner.options == options and pruner.source and "\n" not in pruner.source


@pytest.mark.parametrize("name", TOKEN_PRUNERS)
def test_only_what_is_needed_must_be_given(name):
    """With all that is not needed missing it works; each needed one missing is one line that says so."""
    t = drawn(8)
    bare = t._replace(**{field: None for need, field in FIELDS.items() if need not in NEEDS[name]})
    np.testing.assert_array_equal(choose_tokens(name, bare, 0.5), choose_tokens(name, t, 0.5))
    for need in NEEDS[name]:
        for value, message in ((None, f"{FIELDS[need]} is missing"), (np.ones((B, 3)), f"{FIELDS[need]} has shape (4, 3)")):
            with pytest.raises(QtjaxError) as caught:
                choose_tokens(name, bare._replace(**{FIELDS[need]: value}), 0.5)
            assert message in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("name", TOKEN_PRUNERS)
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"keep": 0.0}, "keep = 0.0"),
        ({"keep": 1.1}, "keep = 1.1"),
        ({"keep": True}, "keep = True"),
        ({"protect": np.ones((B, 3), bool)}, "protect has shape"),
    ],
)
def test_bad_arguments_are_one_line(name, change, message):
    """Every pruner, also one that does not use keep: a QtjaxError of one line that names field, value and rule."""
    with pytest.raises(QtjaxError) as caught:
        choose_tokens(name, drawn(0), **{"keep": 0.5, **change})
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_unknown_names_masks_and_keys_are_one_line():
    """A near name is offered; a mask of one row, keys of another batch."""
    for call in (lambda: choose_tokens("rho1", drawn(0), 0.5), lambda: token_pruner("rho1")):
        with pytest.raises(QtjaxError, match="token pruner 'rho1': .*did you mean 'rho-1'"):
            call()
    with pytest.raises(QtjaxError, match=r"mask has shape \(9,\): must be \[B, L\]"):
        choose_tokens("none", drawn(0)._replace(mask=np.ones(L, bool)), 0.5)
    with pytest.raises(QtjaxError, match="one per sample"):
        choose_tokens("random", drawn(0)._replace(keys=KEYS[:2]), 0.5)
