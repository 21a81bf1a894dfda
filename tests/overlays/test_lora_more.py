"""LoRA beyond the layers' products: initial factors from the base, embedding and head, modules trained whole."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from tests.overlays.test_lora import CONFIG, KEY, logits

from qtjax import models
from qtjax.checkpoints import load_adapter, save_adapter
from qtjax.errors import QtjaxError
from qtjax.models import LinearEdit
from qtjax.overlays import abstract_overlay, init_overlay, merge, overlay_axes
from qtjax.tree import flatten, unflatten

pytestmark = pytest.mark.slow

PLAIN = CONFIG.replace(attention_bias=False, mlp_bias=False)
TIED = PLAIN.replace(tie_word_embeddings=True)


@pytest.fixture(scope="module", params=[PLAIN, TIED], ids=["untied", "tied"])
def model(request):
    return request.param, models.init_params(request.param, jax.random.key(0))


@pytest.fixture(scope="module")
def params():
    return models.init_params(PLAIN, jax.random.key(0))


def by(amount, overlay):
    return overlay.replace(params=jax.tree.map(lambda v: v + amount, overlay.params))


@pytest.mark.parametrize("init", ["pissa", "pissa_niter_6", "olora"])
def test_initial_factors_are_the_base_s_and_change_nothing(params, init):
    """A0, B0 are frozen twins of A, B; pissa's s A0 B0 is the best rank-r part of W, olora's B has orthonormal rows."""
    fields = dict(r=4, lora_alpha=6, rank_pattern={"layers.1.mlp.up_proj": 2}, target_modules="up_proj")
    overlay = init_overlay("lora", PLAIN, params, KEY, init_lora_weights=init, **fields)
    flat, kept = flatten(overlay.params), flatten(overlay.frozen)
    a, b = (np.asarray(flat[f"layers/mlp/up_proj/lora_{x}"], np.float64) for x in "AB")
    for x, own in (("A", a), ("B", b)):
        np.testing.assert_array_equal(own.astype(np.float32), kept[f"layers/mlp/up_proj/initial_{x}"])
    np.testing.assert_allclose(logits(params, overlay, PLAIN), logits(params, None, PLAIN), atol=2e-5)
    for n, rank in enumerate((4, 2, 4)):
        w = np.asarray(params["layers"]["mlp"]["up_proj"]["kernel"][n], np.float64)
        assert not a[n, :, rank:].any() and not b[n, rank:].any()
        if init == "olora":
            np.testing.assert_allclose(b[n, :rank] @ b[n, :rank].T, np.eye(rank), atol=1e-5)
            continue
        left, values, right = np.linalg.svd(w, full_matrices=False)
        best = (left[:, :rank] * values[:rank]) @ right[:rank]
        got = 6 / rank * a[n] @ b[n]
        if init == "pissa":
            np.testing.assert_allclose(got, best, atol=1e-4)
        else:  # close to the optimum, not it
            assert np.linalg.norm(w - got) <= 1.02 * np.linalg.norm(w - best)


def test_initial_factors_get_no_gradient_and_training_goes_on_after_saving(params, tmp_path):
    """Only A and B move; save -> load keeps A0 and B0 bitwise, and the loaded overlay computes and trains the same."""
    overlay = by(0.02, init_overlay("lora", PLAIN, params, KEY, r=2, init_lora_weights="pissa", target_modules="v_proj"))
    slope = jax.jit(jax.grad(lambda o: logits.__wrapped__(params, o, PLAIN).std()))
    gradient = slope(overlay)
    assert all(np.asarray(g).any() for g in jax.tree.leaves(gradient.params))
    assert not any(np.asarray(g).any() for g in jax.tree.leaves(gradient.frozen))
    save_adapter(tmp_path, overlay)
    back = load_adapter(tmp_path, PLAIN, None)
    assert back.spec == overlay.spec
    jax.tree.map(np.testing.assert_array_equal, back, overlay)
    jax.tree.map(np.testing.assert_array_equal, slope(back), gradient)


def test_a_file_of_trainables_beside_another_adapter_is_refused(params, tmp_path):
    """When peft writes a newer adapter into the folder, the older trainables are not read silently."""
    overlay = init_overlay("lora", PLAIN, params, KEY, r=2, init_lora_weights="olora", target_modules="v_proj")
    save_adapter(tmp_path, overlay)
    weights = tmp_path / "adapter_model.safetensors"
    save_file({key: value + 1 for key, value in load_file(weights).items()}, weights)
    with pytest.raises(QtjaxError, match="belongs to another adapter_model.safetensors") as error:
        load_adapter(tmp_path, PLAIN, None)
    assert "\n" not in str(error.value)
    save_adapter(tmp_path, init_overlay("lora", PLAIN, params, KEY, r=2))
    assert not (tmp_path / "qtjax_trainable.safetensors").exists()
    assert load_adapter(tmp_path, PLAIN, None).frozen == {}


def test_dropout_leaves_the_initial_factors_alone():
    """y = x W + drop(x) A B - x A0 B0: as in PEFT, where A0 B0 is part of the base."""
    shapes = [(10, 4), (4, 7), (10, 7)]
    down, up, w = (np.random.default_rng(n).normal(size=s).astype(np.float32) for n, s in enumerate(shapes))
    x = jax.random.normal(KEY, (5, 10))
    edit = LinearEdit(down=down, up=up, dropout_key=KEY, dropout_rate=0.4, undropped=2)
    dropped = edit.drop(x)
    assert (np.asarray(dropped) == 0).any()
    expected = x @ w + dropped @ (down[:, :2] @ up[:2]) + x @ (down[:, 2:] @ up[2:])
    np.testing.assert_allclose(edit(x, w), expected, rtol=1e-4, atol=1e-4)


def test_orthogonal_factors_multiply_to_zero():
    """A and B are dense and their product is zero, so the base is left alone."""
    overlay = init_overlay("lora", PLAIN, None, KEY, r=4, init_lora_weights="orthogonal", target_modules="up_proj")
    a, b = (np.asarray(flatten(overlay.params)[f"layers/mlp/up_proj/lora_{x}"]) for x in "AB")
    assert np.abs(a).mean() > 0.02 and np.abs(b).mean() > 0.02 and overlay.frozen == {}
    np.testing.assert_allclose(a @ b, 0, atol=1e-6)


def test_embedding_and_head_keep_their_own_changes(model):
    """E + s A B and W + s A B each, by hand on an untied copy; the merge of a tied model unties it."""
    config, params = model
    fields = dict(r=3, lora_alpha=6, target_modules=["embed_tokens", "lm_head"])
    fresh = init_overlay("lora", config, params, KEY, **fields)
    np.testing.assert_array_equal(logits(params, fresh, config), logits(params, None, config))
    flat = flatten(fresh.params)
    assert {k: v.shape for k, v in flat.items()} == {
        "embed_tokens/lora_A": (61, 3), "embed_tokens/lora_B": (3, 32), "lm_head/lora_A": (32, 3), "lm_head/lora_B": (3, 61),
    }  # fmt: skip
    assert not np.asarray(flat["embed_tokens/lora_A"]).any() and abs(float(np.std(flat["embed_tokens/lora_B"])) - 1) < 0.2
    overlay = by(0.1, fresh)
    a = {path: 2 * np.asarray(own["lora_A"]) @ np.asarray(own["lora_B"]) for path, own in overlay.params.items()}
    table = params["embed_tokens"]["embedding"]
    head = table.T if config.tie_word_embeddings else params["lm_head"]["kernel"]
    by_hand = params | {"embed_tokens": {"embedding": table + a["embed_tokens"]}, "lm_head": {"kernel": head + a["lm_head"]}}
    expected = logits(by_hand, None, PLAIN)
    np.testing.assert_allclose(logits(params, overlay, config), expected, rtol=2e-4, atol=2e-4)
    own, merged = merge(config, params, overlay)
    assert not own.tie_word_embeddings
    np.testing.assert_allclose(logits(merged, None, own), expected, rtol=2e-4, atol=2e-4)
    axes = flatten(overlay_axes(overlay, config).params)
    assert axes["embed_tokens/lora_A"] == ("vocab", None) and axes["lm_head/lora_B"] == (None, "vocab")
    with pytest.raises(QtjaxError, match=r"merge: lora needs embed_tokens/embedding of shape \(61, 32\)"):
        merge(config.replace(vocab_size=62), models.init_params(config.replace(vocab_size=62), KEY), overlay)


def test_dropout_acts_on_the_head_and_not_on_the_embedding():
    """As in PEFT, whose embedding path has no dropout."""
    config = PLAIN
    params = models.init_params(config, jax.random.key(0))
    for name, drops in (("embed_tokens", False), ("lm_head", True)):
        overlay = by(0.1, init_overlay("lora", config, params, KEY, lora_dropout=0.5, target_modules=[name]))
        hidden = jax.random.normal(KEY, (2, 32))
        first, second = (models.readout(config, params, hidden, overlay, rng=rng)[0] for rng in (None, KEY))
        same = models.hidden_states(config, params, jnp.ones((1, 4), int), overlay=overlay, rng=KEY)
        np.testing.assert_array_equal(same, models.hidden_states(config, params, jnp.ones((1, 4), int), overlay=overlay))
        assert np.array_equal(first, second) is not drops


def test_modules_to_save_are_copies_in_the_place_of_the_base(model):
    """Bitwise the base at first; moved, the logits are those of a base with the moved weights; PEFT's endswith rule."""
    config, params = model
    fields = dict(r=2, target_modules="q_proj", modules_to_save=["norm", "head", "0.mlp.up_proj"])
    overlay = init_overlay("lora", config, params, KEY, **fields)
    np.testing.assert_array_equal(logits(params, overlay, config), logits(params, None, config))
    saved = {path for path in flatten(overlay.params) if path.endswith("saved")}
    assert saved == {
        "layers/input_layernorm/saved", "layers/post_attention_layernorm/saved", "norm/saved", "lm_head/saved",
        "layers/mlp/up_proj/saved",
    }  # fmt: skip
    base = flatten(params)
    moved = {path: value + 0.1 if path.endswith("saved") else value for path, value in flatten(overlay.params).items()}
    by_hand = dict(base)
    head = base["embed_tokens/embedding"].T if config.tie_word_embeddings else base["lm_head/kernel"]
    by_hand["lm_head/kernel"] = head + 0.1
    by_hand["layers/mlp/up_proj/kernel"] = base["layers/mlp/up_proj/kernel"].at[0].add(0.1)
    for path in ("layers/input_layernorm/weight", "layers/post_attention_layernorm/weight", "norm/weight"):
        by_hand[path] = base[path] + 0.1
    overlay = overlay.replace(params=unflatten(moved))
    expected = logits(unflatten(by_hand), None, PLAIN)
    np.testing.assert_allclose(logits(params, overlay, config), expected, rtol=2e-4, atol=2e-4)
    own, merged = merge(config, params, overlay)
    np.testing.assert_allclose(logits(merged, None, own), expected, rtol=2e-4, atol=2e-4)


def test_counts_and_refusals_of_modules_to_save():
    """Copies count whole; a linear module with a bias is refused by name, since its bias is no part of the copy."""
    plain = abstract_overlay("lora", PLAIN, r=2).trainable_count
    assert abstract_overlay("lora", PLAIN, r=2, modules_to_save="lm_head").trainable_count == plain + 61 * 32
    with pytest.raises(QtjaxError, match="model.layers.0.self_attn.k_proj has a bias, whose copy is not supported"):
        abstract_overlay("lora", CONFIG, target_modules="q_proj", modules_to_save=["k_proj"])
    with pytest.raises(QtjaxError, match=r"weights \(lm_head/kernel\): give init_overlay its params"):
        init_overlay("lora", PLAIN, None, KEY, modules_to_save=["lm_head"])


@pytest.mark.parametrize("method, fields", [
    ("lora", {"init_lora_weights": "pissa"}), ("lora", {"init_lora_weights": "olora"}), ("ln_tuning", {}), ("bitfit", {}),
    ("lora", {"modules_to_save": ["embed_tokens", "lm_head", "norm"]}), ("dora", {}),
])  # fmt: skip
def test_what_is_trained_shares_no_memory_with_what_is_not(params, method, fields):
    """Training donates the trained arrays: none may be an array of the base or a frozen one under another name."""
    overlay = init_overlay(method, PLAIN, params, KEY, **fields)
    kept = {leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves((params, overlay.frozen))}
    shared = [path for path, leaf in flatten(overlay.params).items() if leaf.unsafe_buffer_pointer() in kept]
    assert not shared
