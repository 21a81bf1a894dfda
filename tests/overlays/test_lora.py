"""LoRA as an overlay: identity at the start, the side path's formula, gradients, dropout, merging and sharding."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qtjax import models
from qtjax.checkpoints.names import hf_module
from qtjax.errors import QtjaxError
from qtjax.overlays import init_overlay, merge, overlay_axes
from qtjax.overlays.targets import linear_modules
from qtjax.tree import flatten, unflatten

CONFIG = models.ModelConfig(
    vocab_size=61, hidden_size=32, intermediate_size=40, num_hidden_layers=3, num_attention_heads=4,
    num_key_value_heads=2, head_dim=12, attention_bias=True, mlp_bias=True, initializer_range=0.2,
)  # fmt: skip
IDS = np.random.default_rng(0).integers(0, CONFIG.vocab_size, (2, 11))
KEY = jax.random.key(7)


@pytest.fixture(scope="module")
def params():
    return models.init_params(CONFIG, jax.random.key(0))


def trained(overlay, seed=1, scale=0.3):
    """The overlay with every real factor entry random (B too), its padding left at zero."""
    keys = iter(jax.random.split(jax.random.key(seed), 64))
    params = dict(flatten(overlay.params))
    for site in overlay.spec.sites:
        real = np.arange(site.rank) < np.asarray(site.ranks)[:, None]
        a, b = f"{site.linear.path}/lora_A", f"{site.linear.path}/lora_B"
        params[a] = jax.random.normal(next(keys), params[a].shape) * scale * real[:, None, :]
        params[b] = jax.random.normal(next(keys), params[b].shape) * scale * real[:, :, None]
    return overlay.replace(params=unflatten(params))


@functools.partial(jax.jit, static_argnames="config")
def logits(params, overlay, config=CONFIG, rng=None):
    hidden = models.hidden_states(config, params, jnp.asarray(IDS), overlay=overlay, rng=rng)
    return models.logits(config, params, hidden, overlay)


def loss(params, overlay, config=CONFIG, rng=None):
    logp = jax.nn.log_softmax(logits(params, overlay, config, rng)[:, :-1])
    return -jnp.take_along_axis(logp, jnp.asarray(IDS)[:, 1:, None], -1).mean()


@pytest.mark.parametrize("dtype, remat", [("float32", "none"), ("float32", "full"), ("bfloat16", "none")])
def test_fresh_overlay_is_bitwise_the_base(params, dtype, remat):
    """B = 0 changes no bit of the logits, eagerly and under jit."""
    config = CONFIG.replace(dtype=dtype, remat=remat)
    overlay = init_overlay("lora", config, params, KEY, r=4)
    for run in (logits.__wrapped__, logits) if (dtype, remat) == ("float32", "none") else (logits,):
        with_it, without = run(params, overlay, config), run(params, None, config)
        assert np.array_equal(np.asarray(with_it).view(np.int32), np.asarray(without).view(np.int32))


def test_factors_have_the_stated_shapes_and_law():
    """A [N, in, r] is U(+-1/sqrt(in)) float32, B [N, r, out] is zero; abstract parameters suffice."""
    config = CONFIG.replace(hidden_size=64, intermediate_size=64)
    overlay = init_overlay("lora", config, models.abstract_params(config), KEY, r=16)
    flat = flatten(overlay.params)
    a, b = flat["layers/mlp/up_proj/lora_A"], flat["layers/mlp/up_proj/lora_B"]
    assert a.shape == (3, 64, 16) and b.shape == (3, 16, 64) and a.dtype == b.dtype == jnp.float32
    assert not np.asarray(b).any() and overlay.frozen == {}
    bound = 1 / math.sqrt(64)
    values = np.asarray(a).ravel()
    assert 0.99 * bound < np.abs(values).max() <= bound
    # The standard error of the mean of 3072 draws is 0.0013; of the variance, 1.6 %.
    assert abs(values.mean()) < 0.006 and abs(values.var() / (bound**2 / 3) - 1) < 0.08


def test_gaussian_init_has_deviation_one_over_r():
    """init_lora_weights="gaussian": A ~ N(0, 1/r^2), each layer by its own rank."""
    overlay = init_overlay(
        "lora", CONFIG, None, KEY, r=16, init_lora_weights="gaussian", rank_pattern={"layers.0.mlp.up_proj": 4}
    )
    a = np.asarray(flatten(overlay.params)["layers/mlp/up_proj/lora_A"])
    assert not a[0, :, 4:].any()
    assert abs(a[0, :, :4].std() * 4 - 1) < 0.2 and abs(a[1:].std() * 16 - 1) < 0.1


def test_a_module_s_draw_does_not_depend_on_the_other_targets():
    """Adding a target leaves the other factors as they were; another key changes them."""
    few = flatten(init_overlay("lora", CONFIG, None, KEY, target_modules=["q_proj"]).params)
    many = flatten(init_overlay("lora", CONFIG, None, KEY).params)
    other = flatten(init_overlay("lora", CONFIG, None, jax.random.key(8)).params)
    path = "layers/self_attn/q_proj/lora_A"
    np.testing.assert_array_equal(few[path], many[path])
    assert not np.array_equal(many[path], other[path])
    assert not np.array_equal(many[path], many["layers/self_attn/k_proj/lora_A"])


@pytest.mark.parametrize(
    "fields",
    [
        dict(r=4, lora_alpha=16),
        dict(r=4, lora_alpha=3, use_rslora=True),
        dict(r=4, target_modules="q_proj,down_proj", layers_to_transform=[1]),
        dict(r=6, rank_pattern={"k_proj": 2, r"layers\.0\..*": 3}, alpha_pattern={"mlp.up_proj": 2, "o_proj": 40}),
    ],
)
def test_the_model_computes_with_w_plus_scaled_product(params, fields):
    """The logits equal those of a model whose kernels are W + s A B in numpy float64, layer by layer."""
    overlay = trained(init_overlay("lora", CONFIG, params, KEY, **fields))
    kernels = {path: np.asarray(leaf, np.float64) for path, leaf in flatten(params).items()}
    factors = {path: np.asarray(leaf, np.float64) for path, leaf in flatten(overlay.params).items()}
    for module in ("self_attn/q", "self_attn/k", "self_attn/o", "mlp/up", "mlp/down", "self_attn/v", "mlp/gate"):
        path = f"layers/{module}_proj"
        if f"{path}/lora_A" not in factors:
            continue
        for n in range(3):
            rank, alpha = fields["r"], fields.get("lora_alpha", 16)
            if "rank_pattern" in fields:
                rank = 2 if module.endswith("/k") else 3 if n == 0 else 6
                alpha = {"mlp/up": 2, "self_attn/o": 40}.get(module, 16)
            scale = alpha / (math.sqrt(rank) if fields.get("use_rslora") else rank)
            kernels[f"{path}/kernel"][n] += scale * factors[f"{path}/lora_A"][n] @ factors[f"{path}/lora_B"][n]
    by_hand = logits(unflatten({p: jnp.asarray(k, jnp.float32) for p, k in kernels.items()}), None)
    base = logits(params, None)
    assert np.abs(by_hand - base).max() > 0.1
    np.testing.assert_allclose(logits(params, overlay), by_hand, atol=2e-4, rtol=2e-4)
    merged_config, merged = merge(CONFIG, params, overlay)
    assert merged_config == CONFIG
    np.testing.assert_allclose(logits(merged, None), by_hand, atol=2e-4, rtol=2e-4)
    np.testing.assert_allclose(logits(merged, None), logits(params, overlay), atol=2e-4, rtol=2e-4)
    if "layers_to_transform" in fields:
        for n in (0, 2):
            np.testing.assert_array_equal(
                merged["layers"]["mlp"]["down_proj"]["kernel"][n], params["layers"]["mlp"]["down_proj"]["kernel"][n]
            )


def test_merge_leaves_the_base_untouched_and_keeps_dtype(params):
    """merge returns new edited leaves in the leaf's dtype, rounded once; unedited leaves are shared; the input stays."""
    config = CONFIG.replace(param_dtype="bfloat16")
    half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)
    before = {p: np.asarray(x).copy() for p, x in flatten(half).items()}
    overlay = trained(init_overlay("lora", config, half, KEY, target_modules=["v_proj"], r=3, lora_alpha=3))
    _, merged = merge(config, half, overlay)
    for path, leaf in flatten(half).items():
        np.testing.assert_array_equal(np.asarray(leaf), before[path])
        if "v_proj/kernel" not in path:
            assert flatten(merged)[path] is leaf
    path = "layers/self_attn/v_proj"
    a, b = (np.asarray(flatten(overlay.params)[f"{path}/{f}"], np.float64) for f in ("lora_A", "lora_B"))
    exact = before[f"{path}/kernel"].astype(np.float64) + a @ b
    got = flatten(merged)[f"{path}/kernel"]
    assert got.dtype == jnp.bfloat16
    np.testing.assert_allclose(np.asarray(got, np.float64), exact, rtol=2.0**-8, atol=1e-6)


def test_merge_refuses_another_base(params):
    """An overlay for other shapes, or for a module the tree lacks, is an error that names the leaf."""
    other = CONFIG.replace(intermediate_size=48)
    overlay = init_overlay("lora", other, None, KEY)
    with pytest.raises(QtjaxError, match=r"layers/mlp/gate_proj/kernel of shape \(3, 32, 48\).*\(3, 32, 40\)"):
        merge(CONFIG, params, overlay)


def test_gradient_flows_to_the_factors_alone_and_padding_stays_zero(params):
    """Both factors of every edited layer get a gradient, the base is not touched, and no step fills the padding."""
    fields = dict(r=4, layers_to_transform=[0, 2], rank_pattern={r"layers\.0\.mlp\..*": 2})
    overlay = init_overlay("lora", CONFIG, params, KEY, **fields)
    before = jax.tree.map(np.asarray, params)
    step = jax.jit(jax.value_and_grad(lambda o, p: loss(p, o)))
    losses = []
    for _ in range(4):
        value, gradient = step(overlay, params)
        losses.append(float(value))
        overlay = overlay.replace(params=jax.tree.map(lambda w, g: w - 0.3 * g, overlay.params, gradient.params))
    assert losses[-1] < losses[0] - 0.01
    jax.tree.map(np.testing.assert_array_equal, before, params)
    for site in overlay.spec.sites:
        assert site.ranks[1] == 0 and site.ranks[2] == 4 and site.ranks[0] == (2 if "mlp" in site.linear.path else 4)
        for n, rank in enumerate(site.ranks):
            for name, take in (("lora_A", lambda x: x.T), ("lora_B", lambda x: x)):
                path = f"{site.linear.path}/{name}"
                weight = take(np.asarray(flatten(overlay.params)[path][n]))
                slope = take(np.asarray(flatten(gradient.params)[path][n]))
                assert np.abs(slope[:rank]).max(initial=1.0 if rank == 0 else 0.0) > 0, path
                assert not slope[rank:].any() and not weight[rank:].any(), path


def test_jit_does_not_recompile_for_new_values(params):
    """The spec is static and hashable, the factors are not: new trainables reuse the compiled program."""
    traces = []

    @jax.jit
    def run(p, o):
        traces.append(1)
        return logits(p, o)

    overlay = init_overlay("lora", CONFIG, params, KEY, r=2)
    run(params, overlay)
    run(params, trained(overlay))
    run(params, init_overlay("lora", CONFIG, params, jax.random.key(3), r=2))
    assert len(traces) == 1
    run(params, init_overlay("lora", CONFIG, params, KEY, r=3))
    assert len(traces) == 2


def test_init_is_traceable_and_abstract():
    """eval_shape gives a 7B overlay for free; its count is the closed form r (in + out) summed."""
    config = models.ModelConfig()
    abstract = models.abstract_params(config)
    overlay = jax.eval_shape(lambda key: init_overlay("lora", config, abstract, key, r=16), jax.random.key(0))
    assert overlay.trainable_count == 39_976_960 == sum(x.size for x in jax.tree.leaves(overlay))
    small = init_overlay("lora", config, abstract, KEY, r=8, target_modules="q_proj,v_proj", layers_to_transform=[3])
    assert small.trainable_count == 4_194_304 // 32


def test_dropout_needs_a_key_and_is_unbiased():
    """Without a key nothing is dropped; different keys differ, the same key repeats; the mean over keys is no dropout.

    One layer whose only target is down_proj, read before the final norm's nonlinearity: the side path is linear in its
    dropped input, so the mean over keys converges to the path without dropout.
    """
    overlay = trained(init_overlay("lora", CONFIG, None, KEY, lora_dropout=0.4, r=4))
    plain = overlay.expand().tree["layers"]["mlp"]["down_proj"]["edit"]
    assert plain.dropout_key is None
    edit = jax.tree.map(lambda x: x[1], plain)
    x = jax.random.normal(jax.random.key(2), (5, 40))

    def drawn(key):
        e = overlay.expand(key).tree["layers"]["mlp"]["down_proj"]["edit"]
        return jax.tree.map(lambda v: v[1], e).side(x)

    once, again, other = drawn(jax.random.key(1)), drawn(jax.random.key(1)), drawn(jax.random.key(2))
    np.testing.assert_array_equal(once, again)
    assert np.abs(once - other).max() > 0.1 and np.abs(once - edit.side(x)).max() > 0.1
    many = np.asarray(jax.vmap(drawn)(jax.random.split(jax.random.key(3), 4000)), np.float64)
    error = many.std(axis=0) / math.sqrt(4000)
    assert (np.abs(many.mean(axis=0) - edit.side(x)) / error).max() < 4.5
    # E[(x'/x)^2] = 1/(1-p): the variance says that the rate is 0.4 and not 0.6.
    delta = np.asarray(edit.down @ edit.up, np.float64)
    expected = (0.4 / 0.6) * (np.asarray(x, np.float64) ** 2 @ delta**2)
    np.testing.assert_allclose(many.var(axis=0), expected, rtol=0.15)


def test_dropout_differs_by_layer_and_module_and_reaches_the_model(params):
    """Every module of every layer draws its own mask; the model's logits follow the key, and none without a key."""
    every = init_overlay("lora", CONFIG, params, KEY, lora_dropout=0.5)
    for key in (KEY, jax.random.PRNGKey(5)):
        edits = [site["edit"] for room in every.expand(key).tree["layers"].values() for site in room.values()]
        keys = np.concatenate([np.asarray(jax.random.key_data(edit.dropout_key)) for edit in edits])
        assert len(np.unique(keys, axis=0)) == 7 * 3
    fields = dict(r=4, target_modules="v_proj,down_proj")
    overlay = trained(init_overlay("lora", CONFIG, params, KEY, lora_dropout=0.5, **fields))
    undropped = trained(init_overlay("lora", CONFIG, params, KEY, **fields))
    still = logits(params, overlay)
    np.testing.assert_array_equal(still, logits(params, undropped))
    np.testing.assert_array_equal(still, logits(params, undropped, rng=KEY))
    one, same, two = (logits(params, overlay, rng=key) for key in (KEY, KEY, jax.random.key(9)))
    np.testing.assert_array_equal(one, same)
    assert np.abs(one - two).max() > 0.05 and np.abs(one - still).max() > 0.05
    gradient = jax.jit(jax.grad(lambda o: loss(params, o, rng=KEY)))(overlay)
    assert all(np.isfinite(np.asarray(g)).all() and np.asarray(g).any() for g in jax.tree.leaves(gradient))


def test_axes_derive_from_the_base_leaf():
    """A carries its kernel's input axis, B its output axis, both the layers axis; the rank is never sharded."""
    overlay = init_overlay("lora", CONFIG, None, KEY)
    axes = flatten(overlay_axes(overlay, CONFIG).params)
    base = flatten(models.logical_axes(CONFIG))
    assert set(axes) == set(flatten(overlay.params))
    assert axes["layers/mlp/down_proj/lora_A"] == ("layers", "mlp", None)
    assert axes["layers/mlp/down_proj/lora_B"] == ("layers", None, "embed")
    assert axes["layers/self_attn/k_proj/lora_B"] == ("layers", None, "kv_heads")
    for path, names in axes.items():
        layers, inputs, outputs = base[path.rsplit("/", 1)[0] + "/kernel"]
        assert names == ((layers, inputs, None) if path.endswith("lora_A") else (layers, None, outputs))


def test_module_names_are_those_of_checkpoints(params):
    """The HF module names that target rules see are the names checkpoints use."""
    for linear in linear_modules(params):
        assert linear.module(2) == hf_module(linear.path, 2)
    assert [linear.name[0] for linear in linear_modules(params)] == list("qkvogud")


def test_unknown_method_names_its_neighbours():
    """A mistyped method is one line with near names."""
    with pytest.raises(QtjaxError, match="'lroa': not known; did you mean 'lora'") as error:
        init_overlay("lroa", CONFIG, None, KEY)
    assert "\n" not in str(error.value)
