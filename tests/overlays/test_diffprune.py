"""DiffPruning: gates by hand, the penalty, the projection to an exact number of values, the sparse file."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from qtjax import models
from qtjax.checkpoints import (
    add_sparse_delta, adapter_state_dict, load_adapter, load_pretrained, load_sparse_delta, save_adapter, save_pretrained,
    save_sparse_delta,
)  # fmt: skip
from qtjax.errors import QtjaxError
from qtjax.overlays import init_overlay, merge, method_named
from qtjax.overlays.diffprune import PINNED, largest, sparse_delta
from qtjax.tree import flatten, unflatten

pytestmark = pytest.mark.slow

CONFIG = models.ModelConfig(
    vocab_size=31, hidden_size=16, intermediate_size=24, num_hidden_layers=3, num_attention_heads=2,
    num_key_value_heads=1, head_dim=8, initializer_range=0.2,
)  # fmt: skip
IDS = np.random.default_rng(0).integers(0, 31, (2, 9))
KEY = jax.random.key(3)
METHOD = method_named("diffprune")
PATHS = ("layers/self_attn/q_proj", "layers/self_attn/v_proj")


@pytest.fixture(scope="module")
def params():
    return models.init_params(CONFIG, jax.random.key(0))


def made(params, seed=1, **fields):
    """An overlay with random differences and gates, half of them partly open; layers that are not edited stay zero."""
    overlay = init_overlay("diffprune", CONFIG, params, KEY, **fields)
    rng, flat = np.random.default_rng(seed), {}
    for leaf in METHOD.leaves(overlay.spec):
        values = rng.normal(0, 0.4, leaf.shape) if leaf.path.endswith("delta") else rng.normal(0.8, 1, leaf.shape)
        values = np.abs(values) if leaf.path.endswith("group") else values
        flat[leaf.path] = jnp.asarray(values if leaf.mask() is None else values * leaf.mask(), jnp.float32)
    return overlay.replace(params=unflatten(flat))


def logits(params, overlay, rng=None, config=CONFIG):
    hidden = models.hidden_states(config, params, jnp.asarray(IDS), overlay=overlay, rng=rng)
    return np.asarray(models.logits(config, params, hidden, overlay))


def gate(alpha, lower=-1.5, upper=1.5):
    return np.clip(1 / (1 + np.exp(-np.asarray(alpha, np.float64))) * (upper - lower) + lower, 0, 1)


def differences(overlay, **bounds):
    """{module path: z g D, float64 [N, in, out]}, by hand."""
    flat, out = flatten(overlay.params), {}
    for path in PATHS:
        z, g = (gate(flat[f"{path}/{name}"], **bounds) for name in ("alpha", "alpha_group"))
        out[path] = z * g[..., None] * np.asarray(flat[f"{path}/delta"], np.float64)
    return out


def after(overlay, steps, noise=0.0):
    """The overlay after `after_step` at each of the steps, `noise` standing for what an optimizer does before it."""
    traces = []

    @jax.jit
    def one(trees, state, step):
        traces.append(1)
        keys = iter(jax.random.split(jax.random.fold_in(KEY, step), 16))
        trees = jax.tree.map(lambda w: w + noise * jax.random.normal(next(keys), w.shape), trees)
        return METHOD.after_step(overlay.spec, trees, state, trees, step)

    trees, state = overlay.params, METHOD.state(overlay.spec, overlay.params)
    for step in steps:
        trees, state = one(trees, state, jnp.int32(step))
    assert len(traces) == 1
    return overlay.replace(params=trees), state


def test_fresh_overlay_is_bitwise_the_base_with_and_without_noise(params):
    """delta = 0 changes no bit of the logits; alpha starts open; by default few modules are edited, two values a weight."""
    overlay = init_overlay("diffprune", CONFIG, params, KEY)
    np.testing.assert_array_equal(logits(params, overlay), logits(params, None))
    np.testing.assert_array_equal(logits(params, overlay, jax.random.key(1)), logits(params, None))
    flat = flatten(overlay.params)
    assert {path.rsplit("/", 1)[0] for path in flat} == set(PATHS)
    assert (np.asarray(flat[f"{PATHS[0]}/alpha"]) == 5).all() and overlay.draws
    assert overlay.trainable_count == 3 * (2 * 16 * 16 + 1 + 2 * 16 * 8 + 1)
    assert METHOD.rates(overlay.spec) == {"alpha": 1000.0, "alpha_group": 1000.0}


@pytest.mark.parametrize("fields", [dict(), dict(layers_to_transform=[1]), dict(lower=-0.2, upper=1.3)])
def test_the_model_computes_with_w_plus_gated_difference(params, fields):
    """W + z g D with gates by hand in numpy float64, merged too; other layers are untouched."""
    overlay = made(params, **fields)
    kernels = {path: np.asarray(leaf, np.float64) for path, leaf in flatten(params).items()}
    for path, value in differences(overlay, **{k: fields[k] for k in ("lower", "upper") if k in fields}).items():
        layers = fields.get("layers_to_transform", [0, 1, 2])
        kernels[f"{path}/kernel"][layers] += value[layers]
    by_hand = logits(unflatten({p: jnp.asarray(k, jnp.float32) for p, k in kernels.items()}), None)
    assert np.abs(by_hand - logits(params, None)).max() > 0.05
    np.testing.assert_allclose(logits(params, overlay), by_hand, atol=2e-4)
    merged_config, merged = merge(CONFIG, params, overlay)
    np.testing.assert_allclose(logits(merged, None, config=merged_config), by_hand, atol=2e-4)
    if "layers_to_transform" in fields:
        for n in (0, 2):
            for path in PATHS:
                np.testing.assert_array_equal(flatten(merged)[f"{path}/kernel"][n], flatten(params)[f"{path}/kernel"][n])


def test_noise_is_that_of_the_hard_concrete_gate():
    """With a key a gate is closed or open as often as the distribution says, every value and matrix by its own draw."""
    from qtjax.overlays.diffprune import Gate

    own, alpha = Gate(-1.5, 1.5), 0.4
    z = np.asarray(own.opened(jnp.full((200, 200), alpha), jax.random.key(0)))
    closed = 1 / (1 + np.exp(alpha))  # P(sigmoid(logit u + alpha) < 1/2)
    opened = 1 / (1 + np.exp(np.log(5) - alpha))  # P(sigmoid(logit u + alpha) > 5/6)
    assert abs((z == 0).mean() - closed) < 0.01 and abs((z == 1).mean() - opened) < 0.01
    stack = [np.asarray(own(jnp.ones((4, 4)), jnp.zeros((4, 4)), jnp.full(1, 99.0), jax.random.key(k))) for k in (0, 1)]
    assert not np.array_equal(*stack)


def test_training_draws_anew_for_each_key_and_layer(params):
    """Another key, other logits; the same key, the same; no key, no noise."""
    overlay = made(params)
    one, two, again = (logits(params, overlay, jax.random.key(k)) for k in (0, 1, 0))
    np.testing.assert_array_equal(one, again)
    assert np.abs(one - two).max() > 1e-3 and np.abs(one - logits(params, overlay)).max() > 1e-3
    edit = overlay.expand(rng=jax.random.key(0)).tree["layers"]["self_attn"]["q_proj"]["edit"]
    keys = jax.random.key_data(edit.delta.args[3])
    assert len({tuple(key) for key in np.asarray(keys).tolist()}) == 3


def test_penalty_is_the_expected_number_of_open_gates(params):
    """sparsity_weight * sum sigmoid(alpha - log(-lower / upper)), group gates too, of edited layers alone."""
    overlay = made(params, layers_to_transform=[0, 2], sparsity_weight=0.01, lower=-0.5, upper=2.0)
    flat = {path: np.asarray(value, np.float64) for path, value in flatten(overlay.params).items()}
    gates = np.concatenate([flat[f"{p}/{a}"][[0, 2]].ravel() for p in PATHS for a in ("alpha", "alpha_group")])
    np.testing.assert_allclose(float(overlay.penalty()), 0.01 * (1 / (1 + np.exp(-(gates - np.log(0.25))))).sum(), rtol=1e-5)


@pytest.mark.parametrize("fraction", [0.005, 0.1, 1.0])
def test_projection_keeps_the_stated_number_of_largest_differences(params, fraction):
    """At project_at * total_step exactly the largest |z g D| of all matrices stay, as they are; before it nothing changes."""
    overlay = made(params, kept_fraction=fraction, project_at=0.5, total_step=10, layers_to_transform=[0, 2])
    untouched, state = after(overlay, [1, 2, 3, 4])
    assert not state["fixed"]
    jax.tree.map(np.testing.assert_array_equal, untouched.params, overlay.params)
    projected, state = after(overlay, [1, 2, 3, 4, 5])
    assert state["fixed"]
    before, now = differences(overlay), differences(projected)
    count = 2 * (16 * 16 + 16 * 8)
    all_values = np.sort(np.abs(np.concatenate([v.ravel() for v in before.values()])))
    keep = min(max(1, round(fraction * count)), int((all_values > 0).sum()))
    for path in PATHS:
        expected = np.where(np.abs(before[path]) >= all_values[-keep], before[path], 0)
        np.testing.assert_allclose(now[path], expected, rtol=1e-5, atol=1e-6)
    assert sum(int((v != 0).sum()) for v in now.values()) == keep


def test_the_gates_no_longer_move_after_the_projection(params):
    """The same logits with noise or without; no gradient of a gate or off the support; momentum revives no value."""
    overlay, _ = after(made(params, kept_fraction=0.1, total_step=4), [1, 2])
    np.testing.assert_array_equal(logits(params, overlay), logits(params, overlay, jax.random.key(5)))

    def loss(trees):
        logp = jax.nn.log_softmax(models.apply(CONFIG, params, IDS, overlay=overlay.replace(params=trees)))
        return -logp[..., 3].mean() + overlay.replace(params=trees).penalty()

    slopes, flat = flatten(jax.grad(loss)(overlay.params)), flatten(overlay.params)
    for path in PATHS:
        support = np.asarray(flat[f"{path}/delta"]) != 0
        assert np.asarray(slopes[f"{path}/delta"])[support].any() and not np.asarray(slopes[f"{path}/delta"])[~support].any()
        assert np.abs(slopes[f"{path}/alpha"]).max() < 1e-20 and not np.asarray(slopes[f"{path}/alpha_group"]).any()
    moved, _ = after(overlay, [3, 4, 5], noise=0.5)
    for path in PATHS:
        new, old = flatten(moved.params), flat
        np.testing.assert_array_equal(np.asarray(new[f"{path}/delta"]) != 0, np.asarray(old[f"{path}/delta"]) != 0)
        np.testing.assert_array_equal(new[f"{path}/alpha"], old[f"{path}/alpha"])
        assert np.abs(new[f"{path}/delta"] - old[f"{path}/delta"]).max() > 0.1


@pytest.mark.parametrize("count", [1, 5, 7, 11, 30, 100])
def test_largest_is_exact_with_ties_by_order(count):
    """The count largest magnitudes of several arrays, ties by index, zeros never: as a stable sort in numpy chooses."""
    rng = np.random.default_rng(count)
    arrays = [rng.integers(-4, 5, shape).astype(np.float32) / 8 for shape in ((3, 4), (2, 5, 2))]
    got = np.concatenate([np.asarray(mask).ravel() for mask in largest([jnp.asarray(a) for a in arrays], count)])
    flat = np.abs(np.concatenate([a.ravel() for a in arrays]))
    expected = np.zeros(flat.size, bool)
    expected[np.argsort(-flat, kind="stable")[:count]] = True
    np.testing.assert_array_equal(got, expected & (flat > 0))


def test_base_plus_sparse_file_is_the_merged_model(params, tmp_path):
    """save_sparse_delta -> load -> base + values is the merged tree bit by bit, here and on Hugging Face's tensors."""
    overlay, _ = after(made(params, kept_fraction=0.05, total_step=2, layers_to_transform=[0, 2]), [1])
    save_sparse_delta(tmp_path / "delta.safetensors", overlay)
    delta = load_sparse_delta(tmp_path / "delta.safetensors")
    assert set(delta) == {f"model.layers.{n}.self_attn.{m}_proj.weight" for n in (0, 2) for m in "qv"}
    assert sum(len(values) for _, values in delta.values()) == round(0.05 * 2 * (16 * 16 + 16 * 8))
    _, merged = merge(CONFIG, params, overlay)
    jax.tree.map(np.testing.assert_array_equal, add_sparse_delta(params, delta), merged)
    for name, tree in (("base", params), ("merged", merged)):
        save_pretrained(tmp_path / name, CONFIG, tree)
    base, tuned = (load_file(tmp_path / name / "model.safetensors") for name in ("base", "merged"))
    for name, ((rows, columns), values) in delta.items():
        base[name] = base[name].copy()
        base[name][rows, columns] += values
    for name in tuned:
        np.testing.assert_array_equal(base[name], tuned[name])


def test_sparse_difference_before_the_projection_holds_every_open_gate(params):
    """Without a projection the values are z g D, and base + values computes what the overlay does."""
    overlay = made(params)
    delta = sparse_delta(overlay)
    np.testing.assert_allclose(logits(add_sparse_delta(params, delta), None), logits(params, overlay), atol=2e-5)
    assert sum(len(v) for _, v in delta.values()) == sum(int((v != 0).sum()) for v in differences(overlay).values())


def test_a_wrong_sparse_file_is_refused(params, tmp_path):
    """Another method, a missing file, half a pair, another base: one line each, nothing changed silently."""
    with pytest.raises(QtjaxError, match="method = 'lora': has no sparse difference"):
        save_sparse_delta(tmp_path / "x", init_overlay("lora", CONFIG, params, KEY, r=2))
    with pytest.raises(QtjaxError, match="not projected yet, [0-9,]+ values are open"):
        save_sparse_delta(tmp_path / "x", made(params))
    with pytest.raises(QtjaxError, match="missing"):
        load_sparse_delta(tmp_path / "x")
    save_file({"a.indices": np.zeros((2, 3), np.int32), "a.values": np.zeros(2, np.float32)}, tmp_path / "x")
    with pytest.raises(QtjaxError, match="'a' must be a.indices, int32"):
        load_sparse_delta(tmp_path / "x")
    one = np.ones(1, np.float32)
    save_pretrained(tmp_path / "base", CONFIG, params)
    _, packed = load_pretrained(tmp_path / "base", quantization="int8")
    with pytest.raises(QtjaxError, match="is quantised \\(int8\\) here; load the base without quantization"):
        add_sparse_delta(packed, {"model.layers.0.self_attn.q_proj.weight": (np.zeros((2, 1), np.int32), one)})
    with pytest.raises(QtjaxError, match="is no linear module of this model; did you mean"):
        add_sparse_delta(params, {"model.layers.9.self_attn.q_proj.weight": (np.zeros((2, 1), np.int32), one)})
    with pytest.raises(QtjaxError, match="outside 8 x 16; it is for another base"):
        add_sparse_delta(params, {"model.layers.0.self_attn.v_proj.weight": (np.full((2, 1), 8, np.int32), one)})


def test_saved_overlay_goes_on_exactly_and_knows_its_support(params, tmp_path):
    """Folder -> overlay bitwise, by the authors' kind of names; a projected one is still fixed when it comes back."""
    overlay, _ = after(made(params, kept_fraction=0.1, total_step=4), [1, 2])
    save_adapter(tmp_path, overlay)
    assert sorted(f.name for f in tmp_path.iterdir()) == ["adapter_config.json", "qtjax_trainable.safetensors"]
    names = {f"model.layers.0.self_attn.q_proj.weight.{part}" for part in ("delta", "alpha", "alpha_group")}
    assert names <= set(adapter_state_dict(overlay))
    again = load_adapter(tmp_path, CONFIG, params)
    assert again.spec == overlay.spec and METHOD.state(again.spec, again.params)["fixed"]
    jax.tree.map(np.testing.assert_array_equal, again.params, overlay.params)
    assert set(np.unique(flatten(again.params)[f"{PATHS[0]}/alpha"])) == {-PINNED, PINNED}


@pytest.mark.parametrize(
    "fields, message",
    [
        (dict(lower=0.0), "lower = 0.0: must be below 0"),
        (dict(upper=1.0), "upper = 1.0: must be above 1"),
        (dict(kept_fraction=0.0), "kept_fraction = 0.0: is a fraction above 0 and at most 1"),
        (dict(kept_fraction=99.5), "kept_fraction = 99.5"),
        (dict(project_at=0.0), "project_at = 0.0"),
        (dict(alpha_init=30.0), "alpha_init = 30.0: must be at most 20"),
        (dict(sparsity_weight=-1.0), "sparsity_weight = -1.0: must be a number of 0 or more"),
        (dict(target_sparsity=0.99), "target_sparsity = 0.99: is not a field that diffprune supports"),
        (dict(target_modules=["q_prj"]), "'q_prj' matches no linear module; did you mean 'q_proj'"),
    ],
)
def test_refusals_name_field_value_and_remedy(fields, message):
    """Impossible and unknown settings are one line."""
    with pytest.raises(QtjaxError) as error:
        init_overlay("diffprune", CONFIG, None, KEY, **fields)
    assert re.search(message, str(error.value)) and "\n" not in str(error.value), str(error.value)


def test_a_step_without_the_run_s_length_is_refused(params):
    """total_step = 0 is for the run to set; a schedule without it is an error, not a silent one."""
    overlay = init_overlay("diffprune", CONFIG, params, KEY)
    with pytest.raises(QtjaxError, match="total_step = 0: .*set total_step"):
        METHOD.after_step(overlay.spec, overlay.params, METHOD.state(overlay.spec, overlay.params), overlay.params, 1)
