"""Prompt tuning, P-tuning, multitask prompts, prefix tuning and LLaMA-Adapter: formulas, initial values, files, refusals."""

import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from tests.overlays.tokens import TINY, made, params_of, trained

from qtjax import models
from qtjax.checkpoints import adapter_state_dict, load_adapter, save_adapter
from qtjax.errors import QtjaxError
from qtjax.overlays import abstract_overlay, init_overlay, merge, overlay_axes
from qtjax.tree import flatten

pytestmark = pytest.mark.slow

KEY = jax.random.key(3)
IDS = np.random.default_rng(0).integers(1, 48, (2, 6))


def same_trees(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


def test_a_random_prompt_is_pefts_large_one_and_others_are_base_embeddings():
    """RANDOM is N(0, 1); SAMPLE_VOCAB rows of the embedding table; TEXT the given tokens', repeated or cut to P."""
    params = params_of(TINY)
    table = np.asarray(params["embed_tokens"]["embedding"])

    def start(**fields):
        return np.asarray(init_overlay("prompt", TINY, params, KEY, **fields).params["prompt_embeddings"])

    random = start(num_virtual_tokens=200)
    assert abs(random.std() - 1) < 0.03 and random.dtype == np.float32
    sampled = start(num_virtual_tokens=9, prompt_tuning_init="SAMPLE_VOCAB")
    found = [np.flatnonzero((table == row).all(axis=1)) for row in sampled]
    assert all(len(f) == 1 for f in found) and len({int(f[0]) for f in found}) > 4
    ids = [7, 3, 40]
    np.testing.assert_array_equal(start(num_virtual_tokens=5, prompt_tuning_init="TEXT", prompt_tuning_init_ids=ids), table[[7, 3, 40, 7, 3]])
    np.testing.assert_array_equal(start(num_virtual_tokens=2, prompt_tuning_init="TEXT", prompt_tuning_init_ids=ids), table[[7, 3]])


def test_a_prompt_of_embeddings_is_those_tokens():
    """A prompt made of tokens' embeddings has the logits of the row with those tokens before it."""
    params = params_of(TINY)
    overlay = init_overlay("prompt", TINY, params, KEY, num_virtual_tokens=3, prompt_tuning_init="TEXT", prompt_tuning_init_ids=[5, 9, 2])
    longer = np.concatenate([np.tile([5, 9, 2], (2, 1)), IDS], axis=1)
    np.testing.assert_allclose(
        models.apply(TINY, params, IDS, overlay=overlay), models.apply(TINY, params, longer)[:, 3:], atol=1e-4
    )


def test_multitask_prompts_are_the_product():
    """p_t = P * (cols_t rows_t), in numpy; the task's prompt alone, as plain prompt, has the same logits."""
    params, overlay = params_of(TINY), made("mpt")
    p, cols, rows = (np.asarray(overlay.params[k], np.float64) for k in ("prompt_embeddings", "prefix_task_cols", "prefix_task_rows"))
    expected = np.stack([p * (cols[t] @ rows[t]) for t in range(3)])
    np.testing.assert_allclose(overlay.expand().virtual, expected, atol=1e-5)
    plain = made("prompt").replace(params={"prompt_embeddings": jnp.asarray(expected[2], jnp.float32)})
    np.testing.assert_allclose(
        models.apply(TINY, params, IDS, overlay=overlay, task_ids=[2, 2]), models.apply(TINY, params, IDS, overlay=plain), atol=1e-4
    )


def test_a_prefix_is_read_as_peft_lays_it_out():
    """[P, 2 N K C] is [P, N, (k, v), K, C]; a zero prefix scales attention by what its zero keys take, as by hand."""
    overlay = made("prefix")
    edit = overlay.expand().tree["layers"]["self_attn"]["attention"]
    flat = np.asarray(overlay.params["prompt_embeddings"]).reshape(4, 2, 2, 2, 12)
    np.testing.assert_array_equal(edit.prefix_k, flat[:, :, 0].swapaxes(0, 1))
    np.testing.assert_array_equal(edit.prefix_v, flat[:, :, 1].swapaxes(0, 1))
    for projection in (False, True):
        zero = init_overlay("prefix", TINY, None, KEY, num_virtual_tokens=4, init_weights="zero", prefix_projection=projection)
        assert not any(np.asarray(x).any() for x in jax.tree.leaves(zero.expand().tree))


@pytest.mark.parametrize("gate", ["peft", "tanh_per_head"])
def test_llama_adapter_is_its_formula(gate):
    """One layer, heads whose size is not D / H: y + g softmax(q k_p^T / sqrt(C)) v_p, by hand in numpy, under both gates."""
    config = TINY.replace(num_hidden_layers=1)
    params = params_of(config)
    overlay = trained(init_overlay("llama_adapter", config, None, KEY, adapter_len=3, gate=gate))
    own = {k: np.asarray(v[0], np.float64) for k, v in overlay.params["layers"]["self_attn"].items()}
    assert own["adaption_gate"].shape == ((1,) if gate == "peft" else (4,))
    layer = {k: np.asarray(v[0], np.float64) for k, v in flatten(params["layers"]).items()}
    x = np.asarray(params["embed_tokens"]["embedding"], np.float64)[IDS]

    def norm(x, w):
        return x / np.sqrt((x * x).mean(-1, keepdims=True) + config.rms_norm_eps) * w

    h = norm(x, layer["input_layernorm/weight"])

    def heads(name, x, count):
        return (x @ layer[f"self_attn/{name}_proj/kernel"]).reshape(*x.shape[:-1], count, 12)

    angle = np.arange(6)[:, None, None] / 1000.0 ** (np.arange(6) / 6)

    def rotate(x):
        a, b = x[..., :6], x[..., 6:]
        return np.concatenate([a * np.cos(angle) - b * np.sin(angle), b * np.cos(angle) + a * np.sin(angle)], -1)

    def softmax(s):
        s = np.exp(s - s.max(-1, keepdims=True))
        return s / s.sum(-1, keepdims=True)

    q, k, v = rotate(heads("q", h, 4)), rotate(heads("k", h, 2)), heads("v", h, 2)
    kp, vp = heads("k", own["adaption_prompt"], 2), heads("v", own["adaption_prompt"], 2)
    k, v, kp, vp = (np.repeat(t, 2, axis=-2) for t in (k, v, kp, vp))
    scores = np.einsum("bqhc,bkhc->bhqk", q, k) / np.sqrt(12) + np.where(np.tri(6), 0, -1e30)
    y = np.einsum("bhqk,bkhc->bqhc", softmax(scores), v)
    g = own["adaption_gate"] if gate == "peft" else np.tanh(own["adaption_gate"])
    y += g[:, None] * np.einsum("bhqk,khc->bqhc", softmax(np.einsum("bqhc,khc->bhqk", q, kp) / np.sqrt(12)), vp)
    x = x + y.reshape(2, 6, 48) @ layer["self_attn/o_proj/kernel"]
    h = norm(x, layer["post_attention_layernorm/weight"])
    gated = h @ layer["mlp/gate_proj/kernel"]
    x = x + (gated / (1 + np.exp(-gated)) * (h @ layer["mlp/up_proj/kernel"])) @ layer["mlp/down_proj/kernel"]
    expected = norm(x, np.asarray(params["norm"]["weight"])) @ np.asarray(params["lm_head"]["kernel"])
    np.testing.assert_allclose(models.apply(config, params, IDS, overlay=overlay), expected, atol=1e-3, rtol=1e-4)


def test_a_fresh_llama_adapter_is_the_base_and_layers_without_a_prompt_stay_so():
    """Gate zero changes nothing; adapter_layers counts from the last, and the gradient of the others is zero."""
    params = params_of(TINY)
    for gate in ("peft", "tanh_per_head"):
        overlay = init_overlay("llama_adapter", TINY, params, KEY, adapter_layers=1, gate=gate)
        np.testing.assert_allclose(models.apply(TINY, params, IDS, overlay=overlay), models.apply(TINY, params, IDS), atol=1e-6)
        overlay = trained(overlay)
        slope = jax.grad(lambda t: (models.apply(TINY, params, IDS, overlay=overlay.replace(params=t)) ** 2).sum())(overlay.params)
        for name, value in slope["layers"]["self_attn"].items():
            assert not np.asarray(overlay.params["layers"]["self_attn"][name][0]).any()
            if name == "adaption_prompt":  # the gate of a zero prompt is padding too, which no optimizer sees move the model
                assert not np.asarray(value[0]).any() and np.asarray(value[1]).any()


def test_padding_of_a_llama_adapter_cannot_be_trained_into_effect():
    """After steps of gradient descent the layers before the last adapter_layers still have neither prompt nor gate."""
    params, overlay = params_of(TINY), made("llama_adapter")

    @jax.jit
    def step(trainable):
        slope = jax.grad(lambda t: (models.apply(TINY, params, IDS, overlay=overlay.replace(params=t)) ** 2).mean())(trainable)
        return jax.tree.map(lambda w, g: w - 0.1 * g, trainable, slope)

    trainable = overlay.params
    for _ in range(3):
        trainable = step(trainable)
    for name, value in trainable["layers"]["self_attn"].items():
        assert not np.asarray(value[0]).any(), name
        assert not np.array_equal(value[1], overlay.params["layers"]["self_attn"][name][1]), name


ENCODERS = {
    "mlp": ("ptuning", dict(num_virtual_tokens=4, encoder_hidden_size=6)),
    "lstm": ("ptuning", dict(num_virtual_tokens=4, encoder_hidden_size=6, encoder_reparameterization_type="LSTM")),
    "prefix": ("prefix", dict(num_virtual_tokens=4, encoder_hidden_size=6, prefix_projection=True)),
}


@pytest.mark.parametrize("name", ENCODERS)
def test_training_resumes_from_ours_and_pefts_file_alone_is_a_plain_prompt(name, tmp_path):
    """Both files: every array bitwise. PEFT's alone: same logits, its one array is trained, saved and read again."""
    method, fields = ENCODERS[name]
    params, overlay = params_of(TINY), trained(init_overlay(method, TINY, None, KEY, **fields))
    save_adapter(tmp_path, overlay)
    assert set(load_file(tmp_path / "adapter_model.safetensors")) == {"prompt_embeddings"}
    back = load_adapter(tmp_path, TINY, params)
    assert back.spec == overlay.spec
    same_trees(back.params, overlay.params)
    expected = models.apply(TINY, params, IDS, overlay=overlay)

    (tmp_path / "qtjax_trainable.safetensors").unlink()
    flat = load_adapter(tmp_path, TINY, params)
    assert list(flat.params) == ["prompt_embeddings"] and flat.trainable_count == flat.params["prompt_embeddings"].size
    np.testing.assert_allclose(models.apply(TINY, params, IDS, overlay=flat), expected, atol=1e-5)
    moved = flat.replace(params=jax.tree.map(lambda x: x + 0.5, flat.params))
    save_adapter(tmp_path, moved)
    assert not (tmp_path / "qtjax_trainable.safetensors").exists()
    again = load_adapter(tmp_path, TINY, params)
    assert again.spec == flat.spec
    same_trees(again.params, moved.params)


def test_two_files_of_different_trainings_are_refused(tmp_path):
    """peft overwriting its file beside our encoder must not go unnoticed."""
    method, fields = ENCODERS["mlp"]
    save_adapter(tmp_path, trained(init_overlay(method, TINY, None, KEY, **fields)))
    file = tmp_path / "adapter_model.safetensors"
    save_file({k: v * 1.1 for k, v in load_file(file).items()}, file)
    with pytest.raises(QtjaxError, match="qtjax_trainable.safetensors: belongs to another adapter_model.safetensors"):
        load_adapter(tmp_path, TINY, None)


def test_the_original_gate_has_a_file_of_its_own(tmp_path):
    """tanh_per_head: our file alone, in a folder whose type PEFT does not know; it comes back bitwise."""
    overlay = made("llama_adapter", gate="tanh_per_head")
    save_adapter(tmp_path, overlay)
    assert not (tmp_path / "adapter_model.safetensors").exists()
    assert json.loads((tmp_path / "adapter_config.json").read_text())["peft_type"] == "LLAMA_ADAPTER"
    back = load_adapter(tmp_path, TINY, None)
    assert back.spec == overlay.spec
    same_trees(back.params, overlay.params)


def test_lstm_dropout_draws_between_the_layers_only():
    """Without a key nothing is drawn; with keys prompts differ, and the embeddings' own gradient still flows."""
    fields = dict(num_virtual_tokens=4, encoder_hidden_size=6, encoder_reparameterization_type="LSTM", encoder_dropout=0.5)
    overlay = trained(init_overlay("ptuning", TINY, None, KEY, **fields))
    plain = trained(init_overlay("ptuning", TINY, None, KEY, **fields | dict(encoder_dropout=0.0)))
    assert overlay.draws and not plain.draws
    np.testing.assert_array_equal(overlay.expand().virtual, plain.expand(KEY).virtual)
    one, two = (overlay.expand(jax.random.key(n)).virtual for n in (0, 1))
    np.testing.assert_array_equal(one, overlay.expand(jax.random.key(0)).virtual)
    assert np.abs(one - two).max() > 1e-3


def test_counts_at_7b_are_the_closed_forms():
    """Trainable counts of LLaMA-7B and Mistral-7B equal those of PEFT."""
    llama = models.ModelConfig()
    mistral = llama.replace(model_type="mistral", intermediate_size=14336, num_key_value_heads=8)
    for config, method, fields, count in (
        (llama, "prompt", dict(num_virtual_tokens=20), 81_920),
        (llama, "prefix", dict(num_virtual_tokens=30), 7_864_320),
        (mistral, "prefix", dict(num_virtual_tokens=30), 1_966_080),
        (llama, "prefix", dict(num_virtual_tokens=30, prefix_projection=True, encoder_hidden_size=512), 136_700_416),
        (mistral, "prefix", dict(num_virtual_tokens=30, prefix_projection=True, encoder_hidden_size=512), 34_175_488),
        (llama, "ptuning", dict(num_virtual_tokens=20, encoder_hidden_size=128), 1_151_232),
        (llama, "mpt", dict(num_virtual_tokens=20), 86_036),
        (llama, "llama_adapter", dict(adapter_len=10, adapter_layers=30), 1_228_830),
    ):
        overlay = abstract_overlay(method, config, **fields)
        assert overlay.trainable_count == count, (method, fields)
        axes = overlay_axes(overlay, config).params
        for names, leaf in zip(jax.tree.leaves(axes, is_leaf=lambda x: isinstance(x, tuple)), jax.tree.leaves(overlay.params)):
            assert len(names) == leaf.ndim


@pytest.mark.parametrize("method", ["prompt", "ptuning", "mpt", "prefix", "llama_adapter"])
def test_none_can_be_merged(method):
    """merge refuses, and says why."""
    with pytest.raises(QtjaxError, match=f"{method} cannot be merged into weights: .*(no weight|is no weight)"):
        merge(TINY, params_of(TINY), made(method))


@pytest.mark.parametrize(
    "method, fields, message",
    [
        ("prompt", dict(num_virtual_tokens=0), "num_virtual_tokens = 0: must be an integer above 0"),
        ("prompt", dict(num_virtual_tokenz=3), "num_virtual_tokenz = 3.*did you mean 'num_virtual_tokens'"),
        ("prompt", dict(token_dim=64), "token_dim = 64: this base model has 32"),
        ("prompt", dict(num_layers=3), "num_layers = 3: this base model has 2"),
        ("prompt", dict(num_transformer_submodules=2), "num_transformer_submodules = 2: is not supported for prompt"),
        ("prompt", dict(modules_to_save=["lm_head"]), "modules_to_save = "),
        ("prompt", dict(prompt_tuning_init="VOCAB"), "prompt_tuning_init = 'VOCAB': must be one of"),
        ("prompt", dict(prompt_tuning_init="SAMPLE_VOCAB"), "give init_overlay its params"),
        ("prompt", dict(prompt_tuning_init="TEXT"), "prompt_tuning_init_ids = None: goes with 'TEXT'"),
        ("prompt", dict(prompt_tuning_init_ids=[1]), "goes with 'TEXT', got prompt_tuning_init = 'RANDOM'"),
        ("prompt", dict(prompt_tuning_init="TEXT", prompt_tuning_init_ids=[48]), "the vocabulary has 48 tokens"),
        ("prompt", dict(prompt_tuning_init="TEXT", prompt_tuning_init_ids="hi"), "must be a list of token ids"),
        ("prompt", dict(prompt_tuning_init="TEXT", prompt_tuning_init_text="hi"), "prompt_tuning_init_text = 'hi'.*prompt_tuning_init_ids"),
        ("mpt", dict(prompt_tuning_init="AVERAGE_SOURCE_TASKS"), "prompt_tuning_init = 'AVERAGE_SOURCE_TASKS': needs files"),
        ("mpt", dict(prompt_tuning_init_state_dict_path="x"), "prompt_tuning_init_state_dict_path = 'x'.*load_adapter"),
        ("mpt", dict(num_tasks=0), "num_tasks = 0"),
        ("ptuning", dict(encoder_num_layers=3), "encoder_num_layers = 3: means nothing to the MLP"),
        ("ptuning", dict(encoder_dropout=0.1), "encoder_dropout = 0.1: means nothing to the MLP"),
        ("ptuning", dict(encoder_reparameterization_type="GRU"), "must be one of 'MLP', 'LSTM'"),
        ("ptuning", dict(encoder_hidden_size=0), "encoder_hidden_size = 0"),
        ("prefix", dict(token_dim=48), "token_dim = 48: this base model has 24"),
        ("prefix", dict(init_weights="ones"), "init_weights = 'ones'"),
        ("llama_adapter", dict(adapter_layers=3), "adapter_layers = 3: the model has 2 layers"),
        ("llama_adapter", dict(gate="tanh"), "gate = 'tanh': must be one of 'peft', 'tanh_per_head'"),
        ("llama_adapter", dict(target_modules="mlp"), "target_modules = 'mlp': is not supported"),
        ("llama_adapter", dict(adapter_len=0), "adapter_len = 0"),
    ],
)
def test_refusals_name_field_value_and_remedy(method, fields, message):
    """Every bad or unsupported setting is one line that names it."""
    with pytest.raises(QtjaxError) as error:
        init_overlay(method, TINY, None, KEY, **fields)
    assert re.search(message, str(error.value)) and "\n" not in str(error.value), str(error.value)


def test_adapters_of_another_base_are_refused(tmp_path):
    """Sizes in the config, and shapes in the file, that are not this model's."""
    save_adapter(tmp_path, made("prefix"))
    with pytest.raises(QtjaxError, match="token_dim = 24: this base model has 48; it is for another base"):
        load_adapter(tmp_path, TINY.replace(num_key_value_heads=4), None)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (config["token_dim"], config["num_attention_heads"], config["num_layers"]) == (24, 2, 2)
    (tmp_path / "adapter_config.json").write_text(json.dumps(config | {"num_virtual_tokens": 5}))
    with pytest.raises(QtjaxError, match=r"prompt_embeddings is \(4, 96\), expected \(5, 96\)"):
        load_adapter(tmp_path, TINY, None)
    del config["num_virtual_tokens"]
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(QtjaxError, match="num_virtual_tokens: is missing"):
        load_adapter(tmp_path, TINY, None)
    assert set(adapter_state_dict(made("prefix"))) == {"prompt_embeddings"}
