"""Attention ratings equal what a plain forward pass with whole attention matrices gives, and hold no such matrix."""

import re
from functools import partial
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qtjax import models
from qtjax.checkpoints import load_pretrained
from qtjax.errors import QtjaxError
from qtjax.models import ModelConfig
from qtjax.models.ratings import attention_paid, plan
from qtjax.overlays import init_overlay, merge, method_named
from qtjax.tree import flatten, unflatten

FULL = ModelConfig(
    vocab_size=48, hidden_size=32, intermediate_size=48, num_hidden_layers=5, num_attention_heads=4,
    num_key_value_heads=2, head_dim=12, rope_theta=1000.0,
)  # fmt: skip
CONFIGS = {"full": FULL, "window": FULL.replace(model_type="mistral", sliding_window=20)}
DEPTHS = {"fastv": (4,), "sparsevlm": (0, 1, 2)}  # of five layers: 5 x 2/32, 6/32 and 15/32 are 0.31, 0.94 and 2.34
OVERLAYS = {"lora": dict(r=3), "prefix": dict(num_virtual_tokens=4), "prompt": dict(num_virtual_tokens=4)}
# Samples per row; 130 targets at least are more than two blocks of rows. The last row is padded on the left.
LENGTHS = ((150,), (74, 50, 1, 12), (100,))
LENGTH = 150
# float32 against float64 through five layers: logits of order ten err by about 1e-5, and so do weights, relatively.
close = partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-7)
rated = jax.jit(models.rated_hidden_states, static_argnums=(0, 4))
plain = jax.jit(models.hidden_states, static_argnums=0)


def params_of(config: ModelConfig) -> dict:
    rng = np.random.default_rng(0)
    flat = flatten(models.abstract_params(config))
    return unflatten({p: jnp.asarray(rng.normal("norm" in p, 0.2, s.shape), s.dtype) for p, s in flat.items()})


def made(method: str, config: ModelConfig, **fields):
    """An overlay of random values, large enough to move ratings and small enough to leave attention wide."""
    overlay, rng = init_overlay(method, config, params_of(config), jax.random.key(0), **fields), np.random.default_rng(1)
    leaves = (leaf for leaf in method_named(method).leaves(overlay.spec) if leaf.trained)
    scale = 0.1 if method == "lora" else 0.4
    values = {leaf.path: jnp.asarray(rng.normal(0, scale, leaf.shape), jnp.float32) for leaf in leaves}
    return overlay.replace(params=unflatten(values))


def samples():
    """[(ids, targets)] of LENGTHS in order; prompts are in front and some tokens amid an answer are none of it."""
    rng, out = np.random.default_rng(3), []
    for n in (n for row in LENGTHS for n in row):
        targets = (np.arange(n) >= n // 10) & (rng.random(n) < 0.97)
        out.append((rng.integers(1, 48, n), targets))
    return out


def packed():
    """input_ids, targets, segment_ids [3, 150] and the samples' places [(row, slice)]."""
    ids, targets, segments = np.full((3, LENGTH), 7), np.zeros((3, LENGTH), bool), np.zeros((3, LENGTH), int)
    places, own = [], iter(samples())
    for row, lengths in enumerate(LENGTHS):
        start = LENGTH - sum(lengths) if row == 2 else 0
        for segment, n in enumerate(lengths, 1):
            place = (row, slice(start, start + n))
            ids[place], targets[place] = next(own)
            segments[place] = segment
            places.append(place)
            start += n
    return ids, targets, segments, places


def softmax(x):
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def whole_attention(config, params, ids, prefix=None, virtual=None):
    """[(states entering the layer [n, D], attention weights [H, n, S])] of one sample, in float64, layer by layer.

    prefix: (k, v) [N, P, K, C] each; virtual: [P, D].
    """
    w = {path: np.asarray(leaf, np.float64) for path, leaf in flatten(params).items()}
    heads, kv, dim = config.num_attention_heads, config.num_key_value_heads, config.head_dim

    def norm(x, weight):
        return x / np.sqrt((x * x).mean(-1, keepdims=True) + config.rms_norm_eps) * weight

    def turn(x, positions):
        angle = positions[:, None, None] / config.rope_theta ** (np.arange(0, dim, 2) / dim)
        a, b = x[..., : dim // 2], x[..., dim // 2 :]
        return np.concatenate([a * np.cos(angle) - b * np.sin(angle), b * np.cos(angle) + a * np.sin(angle)], -1)

    x = w["embed_tokens/embedding"][ids]
    x = x if virtual is None else np.concatenate([virtual, x])
    extra, out = 0 if prefix is None else prefix[0].shape[1], []
    slots = np.arange(len(x)) + extra
    distance = slots[:, None] - np.arange(len(x) + extra)
    sees = (distance >= 0) & (distance < (config.sliding_window or 10**9))
    for n in range(config.num_hidden_layers):
        layer = {path.removeprefix("layers/"): leaf[n] for path, leaf in w.items() if path.startswith("layers/")}
        h = norm(x, layer["input_layernorm/weight"])
        q, k, v = (
            (h @ layer[f"self_attn/{name}_proj/kernel"]).reshape(len(x), count, dim)
            for name, count in (("q", heads), ("k", kv), ("v", kv))
        )
        q, k = turn(q, slots), turn(k, slots)
        if prefix is not None:
            k, v = np.concatenate([prefix[0][n], k]), np.concatenate([prefix[1][n], v])
        k, v = (np.repeat(y, heads // kv, axis=1) for y in (k, v))
        a = softmax(np.where(sees, np.einsum("ihc,jhc->hij", q, k) / np.sqrt(dim), -np.inf))
        out.append((x, a))
        x = x + np.einsum("hij,jhc->ihc", a, v).reshape(len(x), -1) @ layer["self_attn/o_proj/kernel"]
        h = norm(x, layer["post_attention_layernorm/weight"])
        gate = h @ layer["mlp/gate_proj/kernel"]
        x = x + (gate / (1 + np.exp(-gate)) * (h @ layer["mlp/up_proj/kernel"])) @ layer["mlp/down_proj/kernel"]
    return out


def expected(rater, depths, layers, targets):
    """The rating of one sample [n], word for word, from its layers' states and attention weights."""
    answers, out = np.flatnonzero(targets), np.zeros(len(targets))
    for depth in depths:
        x, a = (np.asarray(y, np.float64) for y in layers[depth])
        x, a = x[-len(targets) :], a.mean(0)[-len(targets) :, -len(targets) :]
        for j in answers:
            later = answers[answers > j]
            if rater == "fastv" or not len(later):
                out[j] += a[answers[-1], j] / len(depths)
                continue
            alike = x[later] @ x[j] / np.linalg.norm(x[later], axis=1) / np.linalg.norm(x[j])
            out[j] += (a[later, j] * np.maximum(alike, 0)).sum() / len(later) / len(depths)
    return out


def compare(rater, rating, places, layers_of):
    """Every sample's rating is the expected one; nothing stands elsewhere. Returns the expected [3, 150]."""
    wanted = np.zeros((3, LENGTH))
    for place, (ids, targets) in zip(places, samples()):
        wanted[place] = expected(rater, DEPTHS[rater], layers_of(ids), targets)
    assert (wanted > 1e-5).sum() > 50
    close(rating, wanted)
    assert not np.asarray(rating)[~packed()[1]].any()
    return wanted


@pytest.mark.parametrize(
    "kind, rater",
    (
        ("full", "sparsevlm"),
        ("window", "fastv"),
        pytest.param("full", "fastv", marks=pytest.mark.slow),
        pytest.param("window", "sparsevlm", marks=pytest.mark.slow),
    ),
)
def test_ratings_equal_those_of_whole_attention_matrices(kind, rater):
    """Samples packed, padded on the left and of several blocks of rows are rated as each alone by the definition."""
    config = CONFIGS[kind]
    params, (ids, targets, segments, places) = params_of(config), packed()
    hidden, rating = rated(config, params, ids, targets, rater, segment_ids=segments)
    assert rating.dtype == jnp.float32
    wanted = compare(rater, rating, places, partial(whole_attention, config, params))
    if (kind, rater) == ("window", "fastv"):
        assert not wanted[0, :130].any()  # what the last row's window of 20 does not reach
    np.testing.assert_array_equal(hidden, plain(config, params, ids, segment_ids=segments))


@pytest.mark.slow
@pytest.mark.parametrize("rater", models.RATERS)
@pytest.mark.parametrize("kind", CONFIGS)
@pytest.mark.parametrize("method", OVERLAYS)
def test_overlays_take_part(method, kind, rater):
    """Edited products change who is rated how; prefixes and virtual tokens share the softmax and are never rated."""
    config = CONFIGS[kind]
    params, (ids, targets, segments, places) = params_of(config), packed()
    overlay = made(method, config, **OVERLAYS[method])
    hidden, rating = rated(config, params, ids, targets, rater, segment_ids=segments, overlay=overlay)
    alone = rated(config, params, ids, targets, rater, segment_ids=segments)[1]
    assert np.abs(rating - alone).max() > 0.01
    more = {}
    if method == "lora":
        config, params = merge(config, params, overlay)
    elif method == "prefix":
        edit, edits = overlay.expand().tree["layers"]["self_attn"]["attention"], overlay.expand()
        more["prefix"] = tuple(np.asarray(x, np.float64) for x in (edit.prefix_k, edit.prefix_v))
        assert edits.prefix == 4 and more["prefix"][0].shape == (5, 4, 2, 12)
    else:
        more["virtual"] = np.asarray(overlay.expand().virtual, np.float64)[0]
    compare(rater, rating, places, partial(whole_attention, config, params, **more))
    still = plain(CONFIGS[kind], params_of(config), ids, segment_ids=segments, overlay=overlay)
    np.testing.assert_array_equal(hidden, still)


@pytest.mark.slow
def test_a_prompt_with_a_softmax_of_its_own_takes_no_part():
    """LLaMA-Adapter changes the states behind the first layer, not the attention weights in it."""
    config = FULL.replace(num_hidden_layers=1)
    params, (ids, targets, segments, _) = params_of(config), packed()
    overlay = made("llama_adapter", config, adapter_len=3, adapter_layers=1)
    for rater in models.RATERS:
        given = (config, params, ids, targets, rater, None, None, segments)
        before, after = rated(*given), rated(*given, overlay)
        assert np.abs(before[0] - after[0]).max() > 0.1
        close(before[1], after[1], rtol=1e-5)


@pytest.mark.slow
def test_virtual_tokens_of_several_tasks():
    """Packed samples of different tasks are rated as each alone with its own; an unknown traced task gives NaN."""
    overlay = made("mpt", FULL, num_virtual_tokens=4, num_tasks=3, num_ranks=2)
    params, (ids, targets, segments, _) = params_of(FULL), packed()
    ids, targets, segments = ids[1:2, :124], targets[1:2, :124], segments[1:2, :124]
    rating = {}
    for second in (0, 5):
        tasks = np.where(segments == 1, 2, second)
        given = dict(segment_ids=segments, overlay=overlay, task_ids=tasks)
        rating[second] = np.asarray(rated(FULL, params, ids, targets, "sparsevlm", **given)[1])
    alone = [
        rated(FULL, params, ids[:, place], targets[:, place], "sparsevlm", overlay=overlay, task_ids=np.array([task]))[1]
        for place, task in ((slice(0, 74), 2), (slice(74, 124), 0))
    ]
    close(rating[0], np.concatenate(alone, axis=1))
    np.testing.assert_array_equal(np.isnan(rating[5]), targets & (segments == 2))


@pytest.mark.slow
def test_an_overlay_of_two_passes_is_rated_in_the_second():
    """With X-LoRA the rating is that of the pass whose hidden states are returned, weighed by the first pass's."""
    config = FULL.replace(num_hidden_layers=2)
    params, (ids, targets, segments, _) = params_of(config), packed()
    overlay = made("xlora", config, adapters=2, r=2, use_trainable_adapters=True)

    def one_pass(*states):
        own = SimpleNamespace(
            tasks=0, two_passes=False, method="own", check_base=overlay.check_base,
            expand=lambda rng, tasks: overlay.expand(rng, tasks, *states),
        )  # fmt: skip
        return models.rated_hidden_states(config, params, ids, targets, "fastv", segment_ids=segments, overlay=own)

    first = jax.jit(one_pass)()
    wanted = jax.jit(one_pass)(first[0])
    hidden, rating = rated(config, params, ids, targets, "fastv", segment_ids=segments, overlay=overlay)
    close(hidden, wanted[0], atol=1e-4)
    close(rating, wanted[1])
    assert overlay.two_passes and np.abs(rating - first[1]).max() > 1e-3


@pytest.mark.slow
@pytest.mark.parametrize("rater", models.RATERS)
def test_remat_unrolled_layers_and_gradients(rater):
    """Neither changes the ratings; the states' gradient is that of `hidden_states`, and none passes the ratings."""
    params, (ids, targets, segments, _) = params_of(FULL), packed()
    wanted = rated(FULL, params, ids, targets, rater, segment_ids=segments)[1]
    for changes in ({"remat": "full"}, {"remat": "dots"}, {"unroll_layers": True}):
        close(rated(FULL.replace(**changes), params, ids, targets, rater, segment_ids=segments)[1], wanted, rtol=1e-4)

    def loss(params, config, weight):
        hidden, rating = models.rated_hidden_states(config, params, ids, targets, rater, segment_ids=segments)
        return jnp.square(hidden).mean() + weight * rating.sum()

    slope = jax.jit(jax.grad(lambda p: jnp.square(models.hidden_states(FULL, p, ids, segment_ids=segments)).mean()))(params)
    for config in (FULL, FULL.replace(remat="full")):
        own = jax.jit(jax.grad(loss), static_argnums=1)(params, config, 100.0)
        jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-6), own, slope)


@pytest.mark.parametrize("layers, depths", ((1, {0}), (2, {0, 1}), (8, {0, 2, 4}), (12, {1, 2, 6}), (32, {2, 6, 15})))
def test_depths(layers, depths):
    """SparseVLM's layers 2, 6 and 15 of 32 stand for the same depths of any model, each once; FastV's is the last."""
    targets = np.ones((1, 3), bool)
    sparsevlm, fastv = (plan(rater, layers, targets, targets.astype(int)) for rater in ("sparsevlm", "fastv"))
    assert set(np.flatnonzero(sparsevlm.layers).tolist()) == depths
    np.testing.assert_allclose(sparsevlm.share, np.array([[1 / 2, 1, 1]]) / len(depths), rtol=1e-6)
    assert np.flatnonzero(fastv.layers).tolist() == [layers - 1]


@pytest.mark.parametrize("rater", models.RATERS)
def test_degenerate_targets(rater):
    """No target and targets on padding: zeros; a segment's only target: its own row's weight on itself. All is finite."""
    config = FULL.replace(num_hidden_layers=1)
    ids, mask, targets = np.arange(1, 19).reshape(3, 6), np.ones((3, 6), int), np.zeros((3, 6), bool)
    mask[0, 4:] = mask[2] = 0
    targets[0, 5] = targets[1, 2] = targets[2, 1] = True
    params = params_of(config)
    rating = np.asarray(rated(config, params, ids, targets, rater, mask)[1])
    own = whole_attention(config, params, ids[1])[0][1].mean(0)[2, 2]
    wanted = np.zeros((3, 6))
    wanted[1, 2] = own
    close(rating, wanted)
    assert not np.asarray(rated(config, params, ids, np.zeros((3, 6), bool), rater, mask)[1]).any()


def test_bad_input():
    """An unknown rater names the near one; targets have to be bool and of the ids' shape."""
    ids = np.ones((2, 3), int)
    call = partial(models.rated_hidden_states, FULL, params_of(FULL), ids)
    with pytest.raises(QtjaxError, match="rater 'fastvv' is not known, known: fastv, sparsevlm; did you mean 'fastv'"):
        call(ids > 0, "fastvv")
    for targets, found in ((ids, r"int\d+ \[2, 3\]"), (ids[:, 1:] > 0, r"bool \[2, 2\]")):
        with pytest.raises(QtjaxError, match=rf"targets: must be bool \[2, 3\] like input_ids, got {found}"):
            call(targets, "fastv")


def temporary(compiled) -> int:
    return compiled.memory_analysis().temp_size_in_bytes


@pytest.mark.parametrize("rater", models.RATERS)
def test_memory_of_a_rating_grows_linearly(rater):
    """Four times the length: four times the compiler's temporary memory (plus a constant), where L^2 would be 16 times."""
    shape, sizes = jax.ShapeDtypeStruct, []
    for length in (256, 1024):
        x, q = shape((2, length, 32), np.float32), shape((2, length, 4, 12), np.float32)
        k, mask = shape((2, length, 2, 12), np.float32), shape((2, 1, length, length), bool)
        targets, segment = shape((2, length), bool), shape((2, length), np.int32)

        def paid(rates, targets, segment, *arrays):
            return attention_paid(plan(rater, 5, targets, segment), rates, *arrays)

        compiled = jax.jit(paid).lower(shape((), bool), targets, segment, x, q, k, mask).compile()
        sizes.append(temporary(compiled))
        assert 2 * 4 * 64 * length * 4 <= sizes[-1] < 4 * (2 * 4 * 64 * length * 4)  # weights of 64 rows, a few times
    assert sizes[1] < 4.5 * sizes[0]


@pytest.mark.slow
@pytest.mark.parametrize("rater", models.RATERS)
def test_the_forward_pass_holds_no_more_attention_weights_than_without(rater):
    """The compiled program has as many arrays of [B, H, L, L]'s size as `hidden_states`, and hardly more memory."""
    length, shape = 512, jax.ShapeDtypeStruct
    ids, targets, params = shape((2, length), np.int32), shape((2, length), bool), models.abstract_params(FULL)
    with_rating = rated.lower(FULL, params, ids, targets, rater, segment_ids=ids).compile()
    without = plain.lower(FULL, params, ids, segment_ids=ids).compile()

    def large(compiled) -> int:
        shapes = re.findall(r"\[([\d,]+)\]", compiled.as_text())
        return sum(np.prod([int(n) for n in s.split(",")]) >= 2 * 4 * length**2 for s in shapes)

    assert 0 < large(with_rating) <= large(without)
    assert temporary(with_rating) < temporary(without) + 4 * (2 * 4 * 64 * length * 4)


@pytest.mark.parity
@pytest.mark.parametrize("rater", models.RATERS)
@pytest.mark.parametrize("name", ("llama-gqa-untied", "mistral-window"))
def test_ratings_equal_those_of_transformers_attention(reference, name, rater):
    """From torch's attentions and hidden states of the same folder (eager attention), left-padded rows included."""
    import torch

    folder, model = reference(name)
    config, params = load_pretrained(folder)
    rng = np.random.default_rng(4)
    ids, mask, targets = rng.integers(3, 96, (2, 40)), np.ones((2, 40), np.int64), rng.random((2, 40)) < 0.7
    mask[1, :9] = 0
    before = model.config._attn_implementation
    model.set_attn_implementation("eager")
    with torch.no_grad():
        out = model(torch.tensor(ids), attention_mask=torch.tensor(mask), output_attentions=True, output_hidden_states=True)
    model.set_attn_implementation(before)
    rating = np.asarray(rated(config, params, ids, targets, rater, attention_mask=mask)[1])
    for row, real in enumerate(mask.sum(1)):
        layers = [(x[row, 40 - real :].numpy(), a[row].numpy()) for x, a in zip(out.hidden_states, out.attentions)]
        depths = {"fastv": (1,), "sparsevlm": (0, 1)}[rater]  # of two layers
        close(rating[row, 40 - real :], expected(rater, depths, layers, targets[row, 40 - real :]), atol=1e-5)
