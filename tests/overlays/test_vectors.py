"""(IA)^3, LayerNorm tuning, BitFit and Houlsby adapters: formulas in plain numpy, layers left alone, merging, refusals."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tests.overlays.tiny_model import CONFIG, base_params, logits, record, shaken, trained

from qtjax import models
from qtjax.checkpoints import adapter_state_dict, load_adapter, save_adapter
from qtjax.errors import QtjaxError
from qtjax.overlays import abstract_overlay, init_overlay, merge
from qtjax.tree import flatten, unflatten

KEY = jax.random.key(7)
METHODS = ("ia3", "ln_tuning", "bitfit", "houlsby")


@pytest.fixture(scope="module")
def params():
    return base_params()


def arrays(overlay):
    return {path: np.asarray(value, np.float64) for path, value in flatten(overlay.params).items()}


@pytest.mark.parametrize("method", METHODS)
def test_fresh_is_the_base(params, method):
    """Ones, copies and zeros change no bit; a Houlsby adapter is nearly the identity, as its paper says."""
    fresh, base = logits(params, init_overlay(method, CONFIG, params, KEY)), logits(params)
    if method == "houlsby":
        assert 0 < np.abs(fresh - base).max() < 0.3
    else:
        assert np.array_equal(fresh.view(np.int32), base.view(np.int32))


@pytest.mark.parametrize("path", ["layers/self_attn/k_proj", "layers/mlp/down_proj"])
def test_ia3_formula(params, path):
    """k_proj: l * (x W + b), the bias scaled too; down_proj is a feed-forward module: (l * x) W + b."""
    overlay, flat = trained("ia3", params), flatten(params)
    kernel, vector = flat[f"{path}/kernel"][2], arrays(overlay)[f"{path}/ia3_l"][2]
    bias = jnp.linspace(-1, 1, kernel.shape[1])
    x = np.random.default_rng(1).normal(size=(4, kernel.shape[0]))
    w, b = np.asarray(kernel, np.float64), np.asarray(bias, np.float64)
    expected = (x * vector) @ w + b if path.endswith("down_proj") else vector * (x @ w + b)
    edit = record(overlay, path, 2)
    np.testing.assert_allclose(edit(jnp.asarray(x, jnp.float32), kernel, bias), expected, atol=1e-5)
    folded, folded_bias = edit.fold(kernel, bias)
    np.testing.assert_allclose(x @ np.asarray(folded) + folded_bias, expected, atol=1e-5)


def test_ia3_layers_by_regex_leave_the_others_alone(params):
    """Where a regex hits some layers only, the vectors of the others are one."""
    overlay = trained("ia3", params, target_modules=r".*layers\.1\..*(v|up|down)_proj")
    _, merged = merge(CONFIG, params, overlay)
    scaled = {"self_attn/v_proj/kernel", "self_attn/v_proj/bias", "mlp/up_proj/kernel", "mlp/down_proj/kernel"}
    for path, leaf in flatten(merged).items():
        before = flatten(params)[path]
        if path.removeprefix("layers/") in scaled:
            assert np.array_equal(leaf[0], before[0]) and np.array_equal(leaf[2], before[2])
            assert np.abs(leaf[1] - before[1]).max() > 0.01
        else:
            np.testing.assert_array_equal(leaf, before)
    np.testing.assert_allclose(logits(merged), logits(params, overlay), atol=2e-4, rtol=2e-4)


def test_ia3_which_side_is_scaled(params):
    """feedforward_modules by name or regex, [] for none; a file without it means down_proj; the subset rule is PEFT's."""
    def sides(**fields):
        overlay = init_overlay("ia3", CONFIG, params, KEY, **fields)
        return {site.linear.name: ahead for site, ahead in zip(overlay.spec.sites, overlay.spec.ahead)}

    assert sides() == {"k_proj": False, "v_proj": False, "down_proj": True}
    assert sides(feedforward_modules=[]) == {"k_proj": False, "v_proj": False, "down_proj": False}
    assert sides(target_modules="k_proj,v_proj") == {"k_proj": False, "v_proj": False}
    assert sides(target_modules=["mlp.down_proj"]) == {"down_proj": True}
    both = dict(target_modules="all-linear", feedforward_modules=r".*mlp\..*")
    assert [name for name, ahead in sides(**both).items() if ahead] == ["gate_proj", "up_proj", "down_proj"]


def test_norms_are_replaced_where_they_are_trained(params):
    """A tuned norm computes with its own scale: the logits are those of a model with these scales, the final one's too."""
    overlay = trained("ln_tuning", params)
    by_hand = unflatten(dict(flatten(params)) | dict(flatten(overlay.params)))
    np.testing.assert_array_equal(logits(params, overlay), logits(by_hand))
    assert np.abs(logits(by_hand) - logits(params)).max() > 0.1
    some = trained("ln_tuning", params, target_modules=r".*layers\.[02]\.input_layernorm")
    (path,) = flatten(some.params)
    assert path == "layers/input_layernorm/weight" and not flatten(some.params)[path][1].any()
    own = dict(flatten(params))
    own[path] = own[path].at[jnp.array([0, 2])].set(flatten(some.params)[path][jnp.array([0, 2])])
    np.testing.assert_array_equal(logits(params, some), logits(unflatten(own)))
    _, merged = merge(CONFIG, params, some)
    jax.tree.map(np.testing.assert_array_equal, merged, unflatten(own))
    assert some.trainable_count == 64 and set(adapter_state_dict(some)) == {
        f"base_model.model.model.layers.{n}.input_layernorm.ln_tuning_layers.weight" for n in (0, 2)
    }


def test_norms_of_another_base_are_refused(params):
    """Folding norms of another width names the leaf; without the base's weights there is nothing to copy."""
    overlay = trained("ln_tuning", params)
    with pytest.raises(QtjaxError, match=r"layers/input_layernorm/weight of shape \(3, 32\), which is \(3, 16\)"):
        other = CONFIG.replace(hidden_size=16)
        merge(other, models.init_params(other, KEY), overlay)
    with pytest.raises(QtjaxError, match="starts from the base model's weights.*give init_overlay its params"):
        init_overlay("ln_tuning", CONFIG, None, KEY)


def test_bitfit_adds_biases_and_merge_writes_them_into_the_config(params):
    """x W + b + d on every target; folded, attention's biases grow and the MLP's appear, with mlp_bias in the config."""
    overlay = trained("bitfit", params, target_modules="q_proj,o_proj,up_proj", layers_to_transform=[0, 2])
    config, merged = merge(CONFIG, params, overlay)
    assert config == CONFIG.replace(mlp_bias=True)
    flat, own, added = flatten(merged), flatten(params), flatten(overlay.params)
    for name in ("q", "k", "v", "o"):
        path = f"layers/self_attn/{name}_proj/bias"
        np.testing.assert_allclose(flat[path], own[path] + added.get(path, 0), rtol=1e-6)
    np.testing.assert_array_equal(flat["layers/mlp/up_proj/bias"], added["layers/mlp/up_proj/bias"])
    assert not flat["layers/mlp/down_proj/bias"].any() and not added["layers/mlp/up_proj/bias"][1].any()
    moved = logits(params, overlay)
    assert np.abs(moved - logits(params)).max() > 0.1
    np.testing.assert_allclose(logits(merged, config=config), moved, atol=2e-4, rtol=2e-4)
    jax.tree.map(lambda a, b: None, merged, models.abstract_params(config))  # the tree is that of the new config


def test_biases_have_no_place_in_mistral():
    """With a sliding window the merge is refused and says what to do; without one the same function is a LLaMA."""
    mistral = CONFIG.replace(model_type="mistral", attention_bias=False, sliding_window=4)
    params = base_params(mistral)
    overlay = trained("bitfit", params, mistral)
    with pytest.raises(QtjaxError, match="adds biases and a mistral checkpoint has no place for them; keep the adapter"):
        merge(mistral, params, overlay)
    config, merged = merge(mistral.replace(sliding_window=None), params, overlay)
    assert (config.model_type, config.attention_bias, config.mlp_bias) == ("llama", True, True)
    want = logits(params, overlay, mistral.replace(sliding_window=None))
    np.testing.assert_allclose(logits(merged, config=config), want, atol=2e-4, rtol=2e-4)


@pytest.mark.parametrize("act", ["silu", "relu", "gelu"])
def test_houlsby_formula(params, act):
    """h + up(act(down(h))) behind the product and the base's bias."""
    overlay, path = trained("houlsby", params, bottleneck=6, act=act), "layers/self_attn/o_proj"
    flat, own = flatten(params), arrays(overlay)
    kernel, bias = flat[f"{path}/kernel"][1], flat[f"{path}/bias"][1]
    x = np.random.default_rng(1).normal(size=(4, kernel.shape[0]))
    h = x @ np.asarray(kernel, np.float64) + np.asarray(bias, np.float64)
    inner = h @ own[f"{path}/down_weight"][1] + own[f"{path}/down_bias"][1]
    curve = {"silu": jax.nn.silu, "relu": jax.nn.relu, "gelu": lambda v: jax.nn.gelu(v, approximate=False)}[act]
    expected = h + np.asarray(curve(inner), np.float64) @ own[f"{path}/up_weight"][1] + own[f"{path}/up_bias"][1]
    got = record(overlay, path, 1)(jnp.asarray(x, jnp.float32), kernel, bias)
    np.testing.assert_allclose(got, expected, atol=2e-5)


@pytest.mark.parametrize("method", ["bitfit", "houlsby"])
def test_layers_to_transform_is_zero_elsewhere(params, method):
    """An overlay of layer 1 alone is the overlay of all layers whose other layers are zero, and saves layer 1 alone."""
    one, all_layers = (trained(method, params, **fields) for fields in (dict(layers_to_transform=[1]), {}))
    assert one.trainable_count * 3 == all_layers.trainable_count
    assert all(".layers.1." in key for key in adapter_state_dict(one))
    spread = jax.tree.map(lambda x: jnp.zeros_like(x).at[1].set(x[1]), one.params)
    np.testing.assert_array_equal(logits(params, one), logits(params, all_layers.replace(params=spread)))
    assert np.abs(logits(params, one) - logits(params)).max() > 0.05


@pytest.mark.parametrize("method", ["bitfit", "houlsby"])
def test_methods_that_peft_lacks_come_back_from_their_own_file(params, method, tmp_path):
    """save -> load keeps arrays and settings; adapter_config.json says whose method it is."""
    overlay = trained(method, params, layers_to_transform=[0, 2])
    save_adapter(tmp_path, overlay)
    assert sorted(f.name for f in tmp_path.iterdir()) == ["adapter_config.json", "qtjax_trainable.safetensors"]
    assert json.loads((tmp_path / "adapter_config.json").read_text())["peft_type"] == f"QTJAX_{method.upper()}"
    again = load_adapter(tmp_path, CONFIG, params)
    assert again.spec == overlay.spec and again.method == method
    jax.tree.map(np.testing.assert_array_equal, again.params, overlay.params)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["ia3", "oft", "boft", "ln_tuning", "bitfit"])
def test_merged_is_the_forward_in_bfloat16(method):
    """In bfloat16, forward and merged model both lie within 2^-6 of the largest float32 logit of the float32 forward."""
    config = CONFIG.replace(dtype="bfloat16", param_dtype="bfloat16", initializer_range=0.1)
    half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), base_params(config.replace(param_dtype="float32")))
    sizes = {"oft": dict(oft_block_size=8), "boft": dict(boft_block_size=4)}.get(method, {})
    overlay = shaken(init_overlay(method, config, half, KEY, **sizes), scale=0.05)
    full = config.replace(dtype="float32", param_dtype="float32")
    exact = logits(jax.tree.map(lambda x: x.astype(jnp.float32), half), overlay, full)
    gate = 2.0**-6 * np.abs(exact).max()
    merged_config, merged = merge(config, half, overlay)
    assert all(leaf.dtype == jnp.bfloat16 for leaf in jax.tree.leaves(merged))
    np.testing.assert_allclose(logits(half, overlay, config), exact, atol=gate)
    np.testing.assert_allclose(logits(merged, config=merged_config), exact, atol=gate)


def test_counts_at_7b_are_the_closed_forms():
    """The table of the design for LLaMA-7B and Mistral-7B."""
    llama = models.ModelConfig()
    mistral = llama.replace(model_type="mistral", num_key_value_heads=8, intermediate_size=14336)
    for method, expected in (
        ("ia3", (614_400, 524_288)), ("ln_tuning", (266_240, 266_240)), ("bitfit", (1_359_872, 1_376_256)),
        ("houlsby", (33_820_672, 33_820_672)),
    ):  # fmt: skip
        assert tuple(abstract_overlay(method, config).trainable_count for config in (llama, mistral)) == expected, method


@pytest.mark.parametrize(
    "method, fields, message",
    [
        ("ia3", dict(feedforward_modules=["dwn_proj"]), "feedforward_modules = 'dwn_proj': must be.*'down_proj'"),
        ("ia3", dict(layers_to_transform=[1]), "layers_to_transform = .*is not a field that ia3 supports"),
        ("ia3", dict(feedforward_modules=r".*1\.self_attn.*"), "feedforward_modules = .*in some layers"),
        ("ia3", dict(target_modules="lm_head"), "matches 'lm_head', which is not a linear module"),
        ("ia3", dict(init_ia3_weights="yes"), "init_ia3_weights = 'yes': must be true or false"),
        ("ln_tuning", dict(target_modules=["nrm"]), "'nrm' matches no norm; did you mean 'norm'"),
        ("ln_tuning", dict(target_modules="all-linear"), "target_modules = 'all-linear': norms are tuned"),
        ("ln_tuning", dict(target_modules=["norm", "q_proj"]), "'q_proj' matches no norm"),
        ("ln_tuning", dict(target_modules=".*proj"), "matches 'model.layers.0.self_attn.q_proj', which is no norm"),
        ("ln_tuning", dict(target_modules="model.l.*"), "which is no norm"),
        ("ln_tuning", dict(target_modules=".*layernrm"), "matches no norm; a text is a regex"),
        ("ln_tuning", dict(layers_to_transform=[1]), "layers_to_transform"),
        ("bitfit", dict(target_modules=["q_prj"]), "'q_prj' matches no linear module; did you mean 'q_proj'"),
        ("bitfit", dict(r=4), "r = 4: is not a field that bitfit supports"),
        ("houlsby", dict(bottleneck=0), "bottleneck = 0: must be an integer above 0"),
        ("houlsby", dict(act="swish"), "act = 'swish': must be one of 'silu'"),
        ("houlsby", dict(target_modules="all-linear"), "target_modules = 'q_proj': adapters stand behind a sub-layer"),
    ],
)  # fmt: skip
def test_refusals(params, method, fields, message):
    """Fields that mean nothing, or something else than they seem to, are one line with field, value and rule."""
    with pytest.raises(QtjaxError, match=message) as error:
        init_overlay(method, CONFIG, params, KEY, **fields)
    assert "\n" not in str(error.value)


def test_houlsby_cannot_be_merged(params):
    """The refusal says why."""
    with pytest.raises(QtjaxError, match="houlsby cannot be merged into weights: the adapter behind each"):
        merge(CONFIG, params, trained("houlsby", params))
