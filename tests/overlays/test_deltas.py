"""LoHa, LoKr, FourierFT, VeRA, VB-LoRA: formulas against plain numpy, padding, dropout, files, counts, refusals."""

import dataclasses
import json
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from tests.overlays.randomized import own_layer, randomized, records

from qtjax import models
from qtjax.checkpoints import adapter_state_dict, load_adapter, save_adapter
from qtjax.errors import QtjaxError
from qtjax.models.edits import LinearEdit, combine
from qtjax.overlays import abstract_overlay, init_overlay, loha, merge, method_named, overlay_axes
from qtjax.overlays.lokr import factorization
from qtjax.overlays.targets import Linear
from qtjax.overlays.torch_random import permutation
from qtjax.tree import flatten

pytestmark = pytest.mark.slow

CONFIG = models.ModelConfig(
    vocab_size=31, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4,
    num_key_value_heads=2, head_dim=8, initializer_range=0.2,
)  # fmt: skip
KEY = jax.random.key(7)
SIZES = {"q_proj": (32, 32), "k_proj": (32, 16), "down_proj": (48, 32)}


def made(method, **fields):
    """A fresh overlay of two modules of unlike shapes."""
    return init_overlay(method, CONFIG, None, KEY, **{"target_modules": "k_proj,down_proj", **fields})


def sizes(path):
    return SIZES[path.rsplit("/", 1)[-1]]


def deltas(overlay):
    """{(module path, layer): what is added to its kernel, float64 [in, out]}."""
    out = {}
    for path, layers in records(overlay).items():
        for n, edit in enumerate(layers):
            out[path, n] = np.asarray(edit.fold(jnp.zeros(sizes(path)), None)[0], np.float64)
    return out


def by_loha(own, rank, alpha):
    return alpha / rank * (own["hada_w1_b"] @ own["hada_w1_a"]) * (own["hada_w2_b"] @ own["hada_w2_a"])


def by_lokr(own, rank, alpha):
    first, second = (
        own[f"lokr_{w}"] if f"lokr_{w}" in own else own[f"lokr_{w}_b"] @ own[f"lokr_{w}_a"] for w in ("w1", "w2")
    )
    return alpha / rank * np.kron(first, second)


@pytest.mark.parametrize(
    "method, fields, formula",
    [
        ("loha", dict(r=2, alpha=5), by_loha),
        ("loha", dict(r=7, alpha=3), by_loha),
        ("lokr", dict(r=2, alpha=5), by_lokr),
        ("lokr", dict(r=2, alpha=5, decompose_both=True, decompose_factor=2), by_lokr),
        ("lokr", dict(r=99, alpha=40, decompose_factor=4), by_lokr),
    ],
)
def test_deltas_are_the_formula(method, fields, formula):
    """dW is the paper's formula with alpha / r, in every layer of every module, in numpy float64."""
    overlay = randomized(made(method, **fields))
    for (path, n), delta in deltas(overlay).items():
        expected = formula(own_layer(overlay, path, n), fields["r"], fields["alpha"])
        assert expected.shape == sizes(path) and np.abs(expected).max() > 0.05
        np.testing.assert_allclose(delta, expected, atol=1e-5)


@pytest.mark.parametrize("target", ["down_proj", "up_proj"])
def test_fourierft_is_the_real_part_of_the_inverse_transform(target):
    """dW^T = scaling Re(ifft2(S)), S holding c at the first n of torch's permutation of out in, row-major; odd sizes too."""
    config = CONFIG.replace(intermediate_size=51)
    fields = dict(n_frequency=70, scaling=20, random_loc_seed=5, target_modules=target)
    overlay = randomized(init_overlay("fourierft", config, None, KEY, **fields), spectrum=1)
    path = next(path for path in records(overlay) if path.endswith(target))
    inputs, outputs = next((s.linear.inputs, s.linear.outputs) for s in overlay.spec.sites if s.linear.path == path)
    for n, edit in enumerate(records(overlay)[path]):
        dense = np.zeros((outputs, inputs))
        where = permutation(outputs * inputs, 70, 5)
        dense[where // inputs, where % inputs] = own_layer(overlay, path, n)["spectrum"]
        np.testing.assert_allclose(edit.delta(), 20 * np.fft.ifft2(dense).real.T, atol=1e-6)


def test_vera_is_the_formula_on_slices_of_one_pair():
    """dW = A[:in] diag(lambda_d) B[:, :out] diag(lambda_b); A and B are U(+-sqrt(6 / fan_in)) and exist once."""
    overlay = randomized(made("vera", r=5))
    a, b = (np.asarray(overlay.frozen[f"vera_{x}"], np.float64) for x in "AB")
    assert a.shape == (48, 5) and b.shape == (5, 32)
    assert 0.9 * math.sqrt(6 / 48) < np.abs(a).max() <= math.sqrt(6 / 48) and np.abs(b).max() <= math.sqrt(6 / 5)
    for (path, n), delta in deltas(overlay).items():
        own, (i, o) = own_layer(overlay, path, n), sizes(path)
        np.testing.assert_allclose(delta, (a[:i] * own["lambda_d"]) @ b[:, :o] * own["lambda_b"], atol=1e-5)
    for edit in flatten(overlay.expand().shared).values():
        assert edit.down.ndim == edit.up.ndim == 2
    q_only = made("vera", r=5, target_modules="q_proj")
    assert q_only.frozen["vera_A"].shape == (32, 5)


def test_vblora_mixes_the_bank():
    """Each piece of A and B is the softmax of the k largest logits times the bank's vectors; dW = A^T B^T, no alpha."""
    overlay = made("vblora", r=2, num_vectors=6, vector_length=8, topk=3)
    overlay = randomized(overlay, vblora_vector_bank=1, logits_A=1, logits_B=1)
    bank = np.asarray(overlay.params["vblora_vector_bank"], np.float64)

    def piece(logits):
        chosen = np.argsort(-logits)[:3]
        weight = np.exp(logits[chosen])
        return weight / weight.sum() @ bank[chosen]

    for (path, n), delta in deltas(overlay).items():
        own, (i, o) = own_layer(overlay, path, n), sizes(path)
        a = np.stack([np.concatenate([piece(own["logits_A"][r, t]) for t in range(i // 8)]) for r in range(2)])
        b = np.stack([np.concatenate([piece(own["logits_B"][t, r]) for t in range(o // 8)]) for r in range(2)])
        np.testing.assert_allclose(delta, a.T @ b, atol=1e-5)


MIXED = [
    ("loha", dict(
        r=2, rank_pattern={"1.self_attn.k_proj": 1, "0.mlp.down_proj": 9}, alpha_pattern={"k_proj": 2}, layers_to_transform=[0, 1])),
    ("lokr", dict(r=2, rank_pattern={"1.self_attn.k_proj": 8}, decompose_both=True, layers_to_transform=[0, 1])),
    ("fourierft", dict(n_frequency=9, n_frequency_pattern={"1.self_attn.k_proj": 4}, layers_to_transform=[0, 1])),
    ("vera", dict(r=3, layers_to_transform=[0, 1])),
    ("vblora", dict(r=2, num_vectors=5, vector_length=8, layers_to_transform=[0, 1])),
]  # fmt: skip


@pytest.mark.parametrize("method, fields", MIXED, ids=[m for m, _ in MIXED])
def test_side_path_is_the_fold_and_padding_has_no_effect(method, fields):
    """x dW through the record is x times the folded matrix; layers not edited have none; padding gets no gradient."""
    overlay = randomized(made(method, **fields), spectrum=1)
    x = jax.random.normal(KEY, (5, 48))

    def through(trained):
        out = {}
        for path, layers in records(overlay.replace(params=trained)).items():
            i, o = sizes(path)
            out[path] = [edit(x[:, :i], jnp.zeros((i, o))) for edit in layers]
        return out

    outputs = through(overlay.params)
    for (path, n), delta in deltas(overlay).items():
        assert (n == 2) != bool(np.abs(delta).max() > 1e-3)
        np.testing.assert_allclose(outputs[path][n], np.asarray(x[:, : len(delta)], np.float64) @ delta, atol=2e-5)
    gradient = flatten(jax.grad(lambda t: sum(jnp.sin(y).sum() for y in jax.tree.leaves(through(t))))(overlay.params))
    assert set(gradient) == set(flatten(overlay.params))
    for leaf in (leaf for leaf in _leaves(overlay) if leaf.trained):
        real = leaf.mask()
        real = np.ones(leaf.shape, bool) if real is None else real
        assert np.abs(gradient[leaf.path])[real].max() > 0, leaf.path
        assert not np.asarray(gradient[leaf.path])[~real].any(), leaf.path
    assert not any("layers.2." in key for key in adapter_state_dict(overlay))


def _leaves(overlay):
    return method_named(overlay.method).leaves(overlay.spec)


@pytest.mark.parametrize(
    "method, fields, identity",
    [
        ("loha", dict(r=2), True), ("loha", dict(r=2, init_weights=False), False),
        ("lokr", dict(r=2), True), ("lokr", dict(r=2, init_weights="lycoris"), True),
        ("lokr", dict(r=9, init_weights="lycoris"), True), ("lokr", dict(r=2, decompose_both=True), True),
        ("lokr", dict(r=2, init_weights=False), False),
        ("fourierft", dict(n_frequency=20), False), ("fourierft", dict(n_frequency=20, init_weights=True), True),
        ("vera", dict(r=4), True), ("vera", dict(r=4, init_weights=False), False),
        ("vblora", dict(r=2, num_vectors=5, vector_length=8), False),
    ],
)  # fmt: skip
def test_a_fresh_overlay_is_the_base_where_peft_s_is(method, fields, identity):
    """dW is exactly zero at the start, but not for FourierFT's and VB-LoRA's defaults; and every gradient is not."""
    overlay = made(method, **fields)
    largest = [np.abs(d).max() for d in deltas(overlay).values()]
    assert (max(largest) == 0) if identity else (min(largest) > 1e-5)

    x, kernel = jax.random.normal(KEY, (1, 48)), jax.random.normal(jax.random.key(1), (48, 48))

    def total(trained):
        edits = records(overlay.replace(params=trained))
        parts = {path: (x[:, :i], kernel[:i, :o]) for path, (i, o) in ((path, sizes(path)) for path in edits)}
        return sum(jnp.sin(e(*parts[path])).sum() for path, layers in edits.items() for e in layers)

    assert max(np.abs(g).max() for g in jax.tree.leaves(jax.grad(total)(overlay.params))) > 0


def test_initial_values_have_torch_s_bounds():
    """kaiming_uniform(a=sqrt 5) of a matrix is U(+-1/sqrt(columns)) in torch's layout, each layer by its own rank."""
    overlay = made("loha", r=16, rank_pattern={"0.self_attn.q_proj": 4}, target_modules="q_proj")
    flat = flatten(overlay.params)
    a, b = (np.abs(flat[f"layers/self_attn/q_proj/hada_w1_{x}"]) for x in "ab")
    assert 0.46 < a[0].max() <= 1 / 2 and 0.24 < a[1:].max() <= 1 / 4 and not a[0, 4:].any()
    assert 0.97 / math.sqrt(32) < b.max() <= 1 / math.sqrt(32)
    spectrum = flatten(made("fourierft", n_frequency=400, target_modules="q_proj").params)["layers/self_attn/q_proj/spectrum"]
    assert abs(float(spectrum.std()) - 1) < 0.1


def test_factorization_is_peft_s():
    """PEFT's split of a dimension, its own documented examples included."""
    lycoris = pytest.importorskip("peft.tuners.lokr.layer")
    assert factorization(256, -1) == (16, 16) and factorization(127, -1) == (1, 127) and factorization(128, 4) == (4, 32)
    for dimension in (*range(1, 80), 4096, 11008, 14336):
        for factor in (-1, 1, 2, 3, 5, 8, 64, 5000):
            assert factorization(dimension, factor) == lycoris.factorization(dimension, factor), (dimension, factor)


def test_loha_s_two_ways_agree_and_small_ranks_take_the_thin_one():
    """Both ways give the same output and gradient; 7B matrices at rank 8 go through R^2 columns, at rank 32 they do not."""
    overlay = randomized(made("loha", r=2, target_modules="q_proj"))
    edit = records(overlay)["layers/self_attn/q_proj"][0]
    assert edit.thin is not None
    x, kernel = jax.random.normal(KEY, (3, 32)), jax.random.normal(jax.random.key(1), (32, 32))

    def formed(edit):
        return dataclasses.replace(edit, thin=None)

    ways = [jax.value_and_grad(lambda e, w=w: jnp.sin(w(e)(x, kernel)).sum(), allow_int=True) for w in (lambda e: e, formed)]
    (one, slope), (two, other) = (way(edit) for way in ways)
    np.testing.assert_allclose(one, two, rtol=1e-5)
    # The two ways hold the same factors: what arrives through either is the gradient of the factors.
    for a, b in zip(jax.tree.leaves(slope.thin), jax.tree.leaves(other.delta)):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)
    big = Linear("layers/x", 1, 4096, 4096)
    assert loha.is_thin(big, 8) and not loha.is_thin(big, 32)


@pytest.mark.parametrize("method, fields", [("loha", dict(r=8)), ("fourierft", dict(n_frequency=50))])
def test_a_small_delta_survives_16_bits(method, fields):
    """In bfloat16 a delta of 2^-12 of the kernel still reaches the output, as in PEFT; W + delta alone would lose it."""
    overlay = randomized(made(method, **fields, target_modules="q_proj"), spectrum=1)
    edit = records(overlay)["layers/self_attn/q_proj"][0]
    # Rows of x sum to zero and all rows of the kernel are equal, so that its own product is zero and hides nothing.
    x = jnp.asarray([[1, -1, 2, -2] * 8, [1, 1, -1, -1] * 8], jnp.bfloat16)
    kernel = jnp.full((32, 32), 2.0**12 * float(jnp.abs(edit.delta()).max()), jnp.bfloat16)
    exact = x.astype(jnp.float32) @ edit.delta()
    got = edit(x, kernel).astype(jnp.float32)
    np.testing.assert_allclose(got, exact, atol=0.02 * float(jnp.abs(exact).max()))


@pytest.mark.parametrize("scale", [False, True])
def test_lycoris_dropout_drops_outputs_and_modules(scale):
    """rank_dropout zeroes a fraction of a delta's outputs (kept ones rescaled to mean 1 where PEFT does), module_dropout
    whole modules; nothing without a key; the key decides."""
    for method, more in (("loha", {}), ("lokr", {"rank_dropout_scale": scale})):
        overlay = randomized(made(method, r=2, rank_dropout=0.4, target_modules="down_proj", **more))
        x, kernel = jnp.ones((1, 48)), jnp.zeros((48, 32))

        def outputs(rng, overlay=overlay):
            return np.concatenate([e(x, kernel) for e in records(overlay, rng)["layers/mlp/down_proj"]])

        full, dropped = outputs(None), outputs(jax.random.key(3))
        np.testing.assert_array_equal(dropped, outputs(jax.random.key(3)))
        kept = dropped != 0
        assert 0.35 < kept.mean() < 0.85 and not (kept[0] == kept[1]).all()
        factor = 1 / kept.mean(axis=1, keepdims=True) if method == "loha" or scale else 1.0
        np.testing.assert_allclose(dropped, np.where(kept, full * factor, 0), atol=2e-5)
        modules = randomized(made(method, r=2, module_dropout=0.5, target_modules="down_proj"))
        whole = np.stack([outputs(jax.random.key(n), modules) != 0 for n in range(12)])
        assert (whole.all(-1) | ~whole.any(-1)).all() and 0.2 < whole.mean() < 0.8
        assert overlay.draws and modules.draws and not made(method, r=2).draws


@pytest.mark.parametrize(
    "method, fields",
    [("vera", dict(r=4, vera_dropout=0.5)), ("vblora", dict(r=2, num_vectors=5, vector_length=8, vblora_dropout=0.5))],
)
def test_input_dropout_needs_a_key_and_differs_by_layer(method, fields):
    """The side path's input is dropped with a key only, each layer and module by a key of its own."""
    overlay = made(method, **fields)
    assert overlay.draws and all(e.dropout_key is None for layers in records(overlay).values() for e in layers)
    keys = [jax.random.key_data(e.dropout_key) for layers in records(overlay, KEY).values() for e in layers]
    assert len(np.unique(np.stack(keys), axis=0)) == 6


def test_counts_at_7b_are_the_closed_forms():
    """Trainable values of LLaMA-7B and Mistral-7B settings, nothing allocated."""
    llama = models.ModelConfig()
    mistral = llama.replace(intermediate_size=14336, num_key_value_heads=8)
    qv = dict(target_modules=["q_proj", "v_proj"])
    for method, fields, counts in (
        ("loha", dict(r=8, **qv), (8_388_608, 6_815_744)),
        ("lokr", dict(r=8, **qv), (327_680, 253_952)),
        ("lokr", dict(r=8, decompose_factor=8, **qv), (528_384, 430_080)),
        ("fourierft", qv, (64_000, 64_000)),
        ("vera", qv, (278_528, 180_224)),
        ("vera", {}, (1_417_216, 1_433_600)),
        ("vblora", {}, (10_059_776, 10_551_296)),
        ("vblora", dict(num_vectors=2048), (80_478_208, 84_410_368)),
    ):
        assert tuple(abstract_overlay(method, c, **fields).trainable_count for c in (llama, mistral)) == counts, method


def test_axes_derive_from_the_base_leaf():
    """Factors that carry a kernel's input or output axis are sharded as it is; small shared arrays are not."""
    axes = flatten(overlay_axes(made("loha", r=2), CONFIG).params)
    assert axes["layers/mlp/down_proj/hada_w1_a"] == ("layers", None, "embed")
    assert axes["layers/mlp/down_proj/hada_w2_b"] == ("layers", "mlp", None)
    vera = overlay_axes(made("vera", r=2), CONFIG)
    assert vera.frozen["vera_A"] == (None, None)
    assert flatten(vera.params)["layers/self_attn/k_proj/lambda_b"] == ("layers", "kv_heads")


def test_vera_without_saved_projections_draws_them_again(tmp_path):
    """save_projection=False: the file holds no projection, and reading it gives bitwise the ones of the same seed; with
    them, the file's own are used, whatever the seed."""
    overlay = randomized(made("vera", r=4, save_projection=False, projection_prng_key=3))
    save_adapter(tmp_path, overlay)
    assert not any("vera_A" in key or "vera_B" in key for key in load_file(tmp_path / "adapter_model.safetensors"))
    back = load_adapter(tmp_path, CONFIG, None)
    jax.tree.map(np.testing.assert_array_equal, back.frozen, overlay.frozen)
    saved = made("vera", r=4, projection_prng_key=3)
    save_adapter(tmp_path, saved)
    file = tmp_path / "adapter_model.safetensors"
    save_file(load_file(file) | {"base_model.vera_A": np.full((4, 48), 0.5, np.float32)}, file)
    assert (np.asarray(load_adapter(tmp_path, CONFIG, None).frozen["vera_A"]) == 0.5).all()


@pytest.mark.parametrize("vectors, dtype", [(200, "uint8"), (300, "int16"), (40_000, "int32")])
def test_vblora_top_k_file_is_for_inference_and_ours_for_training(vectors, dtype, tmp_path):
    """save_only_topk_weights: PEFT's file holds k indices and k - 1 weights and computes the same; our own beside it keeps
    every logit."""
    fields = dict(r=2, num_vectors=vectors, vector_length=16, topk=3, save_only_topk_weights=True, target_modules="k_proj")
    overlay = randomized(made("vblora", **fields), vblora_vector_bank=1, logits_A=1, logits_B=1)
    save_adapter(tmp_path, overlay)
    file = load_file(tmp_path / "adapter_model.safetensors")
    key = "base_model.model.model.layers.1.self_attn.k_proj.vblora_logits_A_topk_"
    assert file[key + "indices"].dtype == dtype and file[key + "indices"].shape == (2, 2, 3)
    assert file[key + "weights"].shape == (2, 2, 2)
    again = load_adapter(tmp_path, CONFIG, None)
    jax.tree.map(np.testing.assert_array_equal, again.params, overlay.params)
    (tmp_path / "qtjax_trainable.safetensors").unlink()
    alone = load_adapter(tmp_path, CONFIG, None)
    logits = np.asarray(flatten(alone.params)["layers/self_attn/k_proj/logits_A"])
    assert (np.isfinite(logits).sum(-1) == 3).all()
    ours, theirs = deltas(overlay), deltas(alone)
    for place in ours:
        np.testing.assert_allclose(theirs[place], ours[place], atol=1e-4)
    outside = np.full_like(file[key + "indices"], vectors if vectors < 256 else -1)
    save_file(file | {key + "indices": outside}, tmp_path / "adapter_model.safetensors")
    with pytest.raises(QtjaxError, match="names vectors outside the bank"):
        load_adapter(tmp_path, CONFIG, None)


def test_without_top_k_saving_there_is_one_file(tmp_path):
    """A plain VB-LoRA adapter is PEFT's file alone, and a stale file of ours beside it is removed."""
    fields = dict(r=2, num_vectors=5, vector_length=16, target_modules="k_proj")
    save_adapter(tmp_path, made("vblora", save_only_topk_weights=True, **fields))
    overlay = made("vblora", **fields)
    save_adapter(tmp_path, overlay)
    assert {path.name for path in tmp_path.iterdir()} == {"adapter_config.json", "adapter_model.safetensors"}
    jax.tree.map(np.testing.assert_array_equal, load_adapter(tmp_path, CONFIG, None).params, overlay.params)
    assert "exclude_modules" in json.loads((tmp_path / "adapter_config.json").read_text())


def test_stacks_that_set_the_same_place_are_refused_at_once():
    """VeRA's shared factors and LoRA's own would meet in one product: an error at the start; LoHa adds to either."""
    with pytest.raises(QtjaxError, match="two overlays both set 'down'"):
        made("vera+lora", r=2)
    with pytest.raises(QtjaxError, match="two overlays both set 'delta'"):
        made("loha+fourierft", r=2, n_frequency=5)
    assert made("loha+lora", r=2).trainable_count == made("loha", r=2).trainable_count + made("lora", r=2).trainable_count


def test_a_delta_is_not_scaled_or_rotated_with_the_kernel():
    """W_eff = diag(pre) W + delta, in the forward pass as in the fold: records of two overlays at one place."""
    edit = records(randomized(made("loha", r=8, target_modules="q_proj")))["layers/self_attn/q_proj"][0]
    both = combine(edit, LinearEdit(pre=jnp.linspace(0.5, 2, 32)))
    x, kernel = jax.random.normal(KEY, (3, 32)), jax.random.normal(jax.random.key(1), (32, 32))
    np.testing.assert_allclose(both(x, kernel), x @ both.fold(kernel, None)[0], atol=2e-5)


def test_layers_to_transform_leave_the_other_layers_alone():
    """Merging changes the kernels of the named layers and no others, and the model computes the same before and after."""
    params = models.init_params(CONFIG, jax.random.key(0))
    ids = np.random.default_rng(0).integers(0, 31, (1, 9))
    for method, fields in MIXED:
        fields = {k: v for k, v in fields.items() if "pattern" not in k} | {"layers_to_transform": [1]}
        overlay = randomized(made(method, **fields), spectrum=1)
        _, merged = merge(CONFIG, params, overlay)
        for path, leaf in flatten(params).items():
            new, old = np.asarray(flatten(merged)[path]), np.asarray(leaf)
            if path.endswith(("k_proj/kernel", "down_proj/kernel")):
                assert not np.array_equal(new[1], old[1])
                new, old = new[[0, 2]], old[[0, 2]]
            np.testing.assert_array_equal(new, old)
        np.testing.assert_allclose(
            models.apply(CONFIG, params, ids, overlay=overlay), models.apply(CONFIG, merged, ids), atol=5e-4
        )


@pytest.mark.parametrize(
    "method, fields, message",
    [
        ("loha", dict(r=0), "r = 0: must be an integer above 0"),
        ("loha", dict(r=17), "r = 17: model.layers.0.self_attn.k_proj is 32 x 16, so its rank is at most 16; lower r"),
        ("loha", dict(rank_pattern={"q_prj": 2}), "rank_pattern: 'q_prj' matches no edited module; did you mean 'q_proj'"),
        ("loha", dict(rank_dropout=1.0), "rank_dropout = 1.0: is a fraction"),
        ("loha", dict(lora_alpha=3), "lora_alpha = 3: is not a field that loha supports"),
        ("loha", dict(modules_to_save=["lm_head"]), "modules_to_save = .*is not supported for loha"),
        ("lokr", dict(decompose_factor=0), "decompose_factor = 0: must be an integer above 0, or -1"),
        ("lokr", dict(init_weights="zero"), "init_weights = 'zero': must be one of True, False, 'lycoris'"),
        ("lokr", dict(r=-1), "r = -1"),
        ("fourierft", {}, "n_frequency = 1000: model.layers.0.self_attn.k_proj has 512 values in all; lower n_frequency"),
        ("fourierft", dict(n_frequency=5, n_frequency_pattern={"q_prj": 2}), "'q_prj' matches no edited module; did you mean"),
        ("fourierft", dict(n_frequency=5, bias="all"), "bias = 'all': is not supported"),
        ("fourierft", dict(n_frequency=5, random_loc_seed="a"), "random_loc_seed = 'a': must be an integer"),
        ("vera", dict(r=0), "r = 0"),
        ("vera", dict(exclude_modules=["q_proj"]), r"exclude_modules = \('q_proj',\): PEFT's VeRA has no such field"),
        ("vera", dict(save_projection="no"), "save_projection = 'no': must be true or false"),
        ("vblora", {}, "vector_length = 256: does not divide q_proj, 32 x 32; .*so 16 and its divisors do"),
        ("vblora", dict(vector_length=16, topk=9, num_vectors=8), "topk = 9: is at most num_vectors, which is 8"),
        ("vblora", dict(vector_length=16, r=17), "r = 17: k_proj is 32 x 16"),
        ("vblora", dict(vector_length=16, fan_in_fan_out=True), "fan_in_fan_out = True: is not supported for vblora"),
    ],
)
def test_refusals_name_field_value_and_rule(method, fields, message):
    """Every bad setting is one line that names it."""
    with pytest.raises(QtjaxError) as error:
        init_overlay(method, CONFIG, None, KEY, **fields)
    assert re.search(message, str(error.value)), str(error.value)
    assert "\n" not in str(error.value)
