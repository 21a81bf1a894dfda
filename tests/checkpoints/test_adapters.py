"""PEFT folders: round trip, names, atomic writing, and every refusal."""

import json
import os
import shutil

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from qtjax import models
from qtjax.checkpoints import adapter_state_dict, adapters, load_adapter, save_adapter
from qtjax.checkpoints.names import place
from qtjax.errors import QtjaxError
from qtjax.overlays import init_overlay
from qtjax.tree import flatten

CONFIG = models.ModelConfig(
    vocab_size=16, hidden_size=16, intermediate_size=24, num_hidden_layers=3, num_attention_heads=2,
    num_key_value_heads=1, head_dim=8,
)  # fmt: skip
PARAMS = models.abstract_params(CONFIG)
FIELDS = dict(
    r=4, lora_alpha=2.5, lora_dropout=0.1, use_rslora=True, target_modules=["q_proj", "down_proj"],
    layers_to_transform=[0, 2], rank_pattern={"layers.2.mlp.down_proj": 2}, alpha_pattern={"q_proj": 3},
)  # fmt: skip


def made(**fields):
    """An overlay whose real tensors are all random; made by writing numbers through PEFT's names."""
    overlay = init_overlay("lora", CONFIG, PARAMS, jax.random.key(0), **fields)
    from qtjax.overlays.leaves import trees
    from qtjax.overlays.lora import lora_leaves

    generator = np.random.default_rng(0)
    tensors = {k: generator.normal(size=v.shape).astype(np.float32) for k, v in adapter_state_dict(overlay).items()}
    params, frozen = trees(lora_leaves(overlay.spec), tensors)
    return overlay.replace(params=params, frozen=frozen)


@pytest.fixture
def folder(tmp_path):
    save_adapter(tmp_path / "adapter", made(**FIELDS), base_model_name="org/base")
    return tmp_path / "adapter"


def change(folder, **fields):
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))


def rewrite(folder, edit):
    file = folder / "adapter_model.safetensors"
    tensors = load_file(file)
    edit(tensors)
    save_file(tensors, file)


def refused(folder, config=CONFIG):
    with pytest.raises(QtjaxError) as error:
        load_adapter(folder, config, None)
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize("fields", [FIELDS, {}, dict(target_modules=r".*\.[12]\.self_attn\.(q|v)_proj", r=3)])
def test_round_trip_is_bitwise(tmp_path, fields):
    """save -> load gives the same settings and bitwise the same tree; the padding comes back as zeros."""
    overlay = made(**fields)
    save_adapter(tmp_path, overlay)
    back = load_adapter(tmp_path, CONFIG, PARAMS)
    assert back.method == overlay.method and back.spec == overlay.spec and back.frozen == {}
    assert jax.tree.structure(back) == jax.tree.structure(overlay)
    jax.tree.map(np.testing.assert_array_equal, back.params, overlay.params)
    assert {leaf.dtype for leaf in jax.tree.leaves(back)} == {jnp.dtype("float32")}


def test_folder_holds_the_names_and_layouts_of_peft(folder):
    """Keys are base_model.model.<HF module>.lora_{A,B}.weight, [r, in] and [out, r]; unedited layers are not written."""
    tensors = load_file(folder / "adapter_model.safetensors")
    prefix = "base_model.model."
    assert all(place(key.removeprefix(prefix).replace(".lora_A", "").replace(".lora_B", "")) for key in tensors)
    shapes = {key.removeprefix(prefix + "model.layers."): value.shape for key, value in tensors.items()}
    assert shapes == {
        "0.self_attn.q_proj.lora_A.weight": (4, 16), "0.self_attn.q_proj.lora_B.weight": (16, 4),
        "2.self_attn.q_proj.lora_A.weight": (4, 16), "2.self_attn.q_proj.lora_B.weight": (16, 4),
        "0.mlp.down_proj.lora_A.weight": (4, 24), "0.mlp.down_proj.lora_B.weight": (16, 4),
        "2.mlp.down_proj.lora_A.weight": (2, 24), "2.mlp.down_proj.lora_B.weight": (16, 2),
    }  # fmt: skip
    overlay = made(**FIELDS)
    a = np.asarray(overlay.params["layers"]["mlp"]["down_proj"]["lora_A"])
    np.testing.assert_array_equal(tensors[prefix + "model.layers.2.mlp.down_proj.lora_A.weight"], a[2, :, :2].T)
    settings = json.loads((folder / "adapter_config.json").read_text())
    assert settings["peft_type"] == "LORA" and settings["task_type"] == "CAUSAL_LM"
    assert settings["base_model_name_or_path"] == "org/base"
    assert settings["lora_alpha"] == 2.5 and settings["alpha_pattern"] == {"q_proj": 3}
    assert isinstance(settings["alpha_pattern"]["q_proj"], int)


def test_state_dict_of_a_gradient_has_the_same_names(folder):
    """overlay.replace(params=gradient) carries a gradient to PEFT's names, unscaled."""
    overlay = made(**FIELDS)
    doubled = adapter_state_dict(overlay.replace(params=jax.tree.map(lambda x: 2 * x, overlay.params)))
    plain = adapter_state_dict(overlay)
    assert all(isinstance(v, np.ndarray) and np.array_equal(doubled[k], 2 * v) for k, v in plain.items())


@pytest.mark.parametrize(
    "method, fields, file",
    [
        ("lora", {"r": 2}, "adapter_model.safetensors"),
        pytest.param("lora", {"r": 2, "init_lora_weights": "pissa"}, "qtjax_trainable.safetensors", marks=pytest.mark.slow),
        ("ptuning", {"num_virtual_tokens": 2, "encoder_hidden_size": 4}, "qtjax_trainable.safetensors"),
        ("diffprune", {}, "qtjax_trainable.safetensors"),
    ],
)
def test_state_dict_is_the_file_that_training_goes_on_from(tmp_path, method, fields, file):
    """PEFT's file, or ours where PEFT's is derived; a gradient comes by the same names, whole, frozen arrays as they are."""
    params = models.init_params(CONFIG, jax.random.key(1)) if "init_lora_weights" in fields else None
    overlay = init_overlay(method, CONFIG, params, jax.random.key(0), **fields)
    plain = adapter_state_dict(overlay)
    save_adapter(tmp_path, overlay)
    stored = load_file(tmp_path / file)
    assert set(stored) == set(plain)
    frozen = {key for key in plain if "initial_" in key}
    assert bool(frozen) == bool(flatten(overlay.frozen))
    doubled = adapter_state_dict(overlay.replace(params=jax.tree.map(lambda x: 2 * x, overlay.params)))
    for key, value in plain.items():
        np.testing.assert_array_equal(stored[key], value)
        np.testing.assert_array_equal(doubled[key], value if key in frozen else 2 * value)


def test_saving_gathers_each_array_once_and_waits_for_the_file(tmp_path, monkeypatch):
    """On several hosts no array crosses the network twice, and none goes on before the files stand: of a stack, all of them."""
    overlay, gathered, stood = init_overlay("lora+bitfit", CONFIG.replace(attention_bias=True), None, jax.random.key(0), r=2), [], []

    def gather(value):
        gathered.append(id(value))
        return np.asarray(value)

    monkeypatch.setattr(adapters, "host_array", gather)
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(adapters, "wait_for_all", lambda what: stood.append(sorted(os.listdir(tmp_path))))
    save_adapter(tmp_path, overlay)
    assert sorted(gathered) == sorted(id(leaf) for leaf in jax.tree.leaves(overlay))
    assert stood[-1] == ["bitfit", "lora", "qtjax_stack.json"]


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, np.float64])
def test_other_float_types_are_read_as_float32(folder, dtype):
    """Half precision adapters are widened exactly, double ones rounded."""
    stored = {}

    def cast(tensors):
        for key in tensors:
            tensors[key] = tensors[key].astype(dtype)
        stored.update(tensors)

    rewrite(folder, cast)
    back = adapter_state_dict(load_adapter(folder, CONFIG, None))
    for key, value in stored.items():
        assert back[key].dtype == np.float32
        np.testing.assert_array_equal(back[key], value.astype(np.float32))


def test_names_for_other_architectures_are_passed_over(folder):
    """Adapters list names that this model lacks; what counts is that every tensor has its place and none is missing."""
    change(folder, target_modules=["c_attn", "down_proj", "q_proj"])
    assert load_adapter(folder, CONFIG, None).trainable_count == made(**FIELDS).trainable_count


def test_adapter_for_another_base_lists_what_does_not_fit(folder):
    """Missing, unknown and mis-shaped tensors are all named in one line."""
    message = refused(folder, CONFIG.replace(intermediate_size=40))
    assert "2 of another shape" in message and "down_proj.lora_A.weight is (4, 24), expected (4, 40)" in message
    message = refused(folder, CONFIG.replace(num_hidden_layers=2))
    assert "4 unknown: base_model.model.model.layers.2.mlp.down_proj.lora_A.weight" in message
    rewrite(folder, lambda tensors: tensors.pop("base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight"))
    assert "1 missing: base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight" in refused(folder)


def test_tensors_that_the_settings_do_not_explain_are_refused(folder):
    """An extra tensor (a magnitude vector, a saved head) is never dropped silently."""
    rewrite(folder, lambda t: t.update({"base_model.model.lm_head.weight": np.ones((16, 16), np.float32)}))
    assert "1 unknown: base_model.model.lm_head.weight" in refused(folder)


@pytest.mark.parametrize(
    "fields, message",
    [
        (dict(modules_to_save=["self_attn"]), "modules_to_save: 'self_attn' matches 'model.layers.0.self_attn'"),
        (dict(use_dora=True, target_modules=["q_proj", "lm_head"]), "target_modules = lm_head,q_proj: matches 'lm_head'"),
        (dict(use_dora="both"), "use_dora = 'both': is not supported"),
        (dict(bias="all"), "bias = 'all': is not supported"),
        (dict(lora_bias=True), "lora_bias = True: is not supported"),
        (dict(task_type="SEQ_CLS"), "task_type = 'SEQ_CLS': is not supported"),
        (dict(init_lora_weights="olora"), "init_lora_weights = 'olora': is not supported"),
        (dict(init_lora_weights="pissa_niter_4"), "init_lora_weights = 'pissa_niter_4': is not supported"),
        (dict(alora_invocation_tokens=[3]), "alora_invocation_tokens = [3]: is not supported"),
        (dict(velora_config={"num_groups": 2}), "velora_config = {'num_groups': 2}: is not a field"),
        (dict(target_modules=["q_proj", "norm"]), "target_modules = norm,q_proj: matches 'model.norm'"),
        (dict(init_lora_weights="corda"), "init_lora_weights = 'corda': is not supported"),
        (dict(target_modules=["c_attn"]), "'c_attn' matches no linear module"),
        (dict(target_modules=None), "target_modules: is missing"),
        (dict(r=None), "r: is missing"),
        (dict(lora_alpha=None), "lora_alpha: is missing"),
        (dict(r=400), "r = 400: model.layers.0.self_attn.q_proj is 16 x 16"),
        (dict(peft_type="LOHAA"), "peft_type 'LOHAA' is not supported; did you mean 'LO"),
        (dict(peft_type="HRA"), "peft_type 'HRA' is not supported"),
        (dict(peft_type=None), "peft_type None is not supported"),
    ],
)
def test_unsupported_settings_are_named(folder, fields, message):
    """A setting of adapter_config.json that would change the numbers is refused with the file, its name and value."""
    change(folder, **fields)
    text = refused(folder)
    assert message in text and text.startswith(str(folder / "adapter_config.json"))


def test_numbers_that_are_none_are_refused(folder):
    """NaN or infinity in the file: the tensor is named."""
    key = "base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight"
    rewrite(folder, lambda tensors: tensors[key].__setitem__((0, 0), np.nan))
    assert f"{key!r} holds NaN or infinity" in refused(folder)


def test_what_is_said_to_be_supported_is(folder):
    """The list of peft types holds each that some method reads, by PEFT's own names."""
    change(folder, peft_type="PROMPT")
    text = refused(folder)
    assert "did you mean 'PROMPT_TUNING'" in text
    listed = text.split("supported: ")[-1].split(", ")
    assert {"LORA", "P_TUNING", "PREFIX_TUNING", "ADAPTION_PROMPT", "QTJAX_HOULSBY"} <= set(listed)
    for name in listed:
        change(folder, peft_type=name)
        assert "is not supported" not in refused(folder).split(";")[0] if name != "LORA" else True


@pytest.mark.parametrize(
    "fields, message",
    [
        (dict(use_dora=True), "4 missing: base_model.model.model.layers.0.mlp.down_proj.lora_magnitude_vector"),
        (dict(modules_to_save=["lm_head"]), "1 missing: base_model.model.lm_head.weight"),
        (dict(target_modules=["q_proj", "down_proj", "lm_head"], layers_to_transform=None), "base_model.model.lm_head.lora_A.weight"),
    ],
)
def test_settings_without_their_tensors_are_named(folder, fields, message):
    """Settings that stand for tensors which the file lacks are refused with the names of those tensors."""
    change(folder, **fields)
    assert message in refused(folder)


def test_settings_that_change_nothing_are_accepted(folder):
    """Descriptive fields, and fields of newer PEFT versions that are off, do not stand in the way."""
    change(folder, peft_version="9.9.9", auto_mapping=None, inference_mode=False, future_config=None, future_switch=False)
    change(folder, init_lora_weights="orthogonal", megatron_core="megatron.core", qalora_group_size=16)
    assert load_adapter(folder, CONFIG, None).spec.fields.init_lora_weights == "orthogonal"


def test_damaged_or_missing_files_are_one_line(folder, tmp_path):
    """Truncated or foreign bytes, bad JSON, a missing file or folder: the file is named and what to do is said."""
    weights, settings = folder / "adapter_model.safetensors", folder / "adapter_config.json"
    whole = weights.read_bytes()
    for bad in (whole[:-40], whole[:5], b"", b"\xff" * 64, b"\x00" * 8 + whole[8:]):
        weights.write_bytes(bad)
        assert "adapter_model.safetensors: not a readable safetensors file" in refused(folder)
    weights.write_bytes(whole)
    rewrite(folder, lambda t: t.update({next(iter(t)): np.ones((4, 24), np.int32)}))
    assert "is stored as int32" in refused(folder)
    weights.unlink()
    assert "adapter_model.safetensors: missing" in refused(folder)
    (folder / "adapter_model.bin").write_bytes(b"\x80\x04.")
    assert "adapter_model.bin: pickled weights can run code and are not read" in refused(folder)
    for text in ("{", "[]", "\xff"):
        settings.write_text(text, encoding="latin-1")
        assert "adapter_config.json" in refused(folder)
    settings.unlink()
    assert "adapter_config.json: missing" in refused(folder)
    assert "no such folder" in refused(tmp_path / "nowhere")


def test_saving_over_an_adapter_replaces_it_and_leaves_nothing_behind(folder):
    """A second save leaves exactly the two files, with the second adapter in them."""
    overlay = made(r=2, target_modules="v_proj")
    save_adapter(folder, overlay)
    assert sorted(os.listdir(folder)) == ["adapter_config.json", "adapter_model.safetensors"]
    back = load_adapter(folder, CONFIG, None)
    assert back.spec == overlay.spec


def test_a_disk_that_refuses_is_one_line_and_keeps_the_old_adapter(folder, monkeypatch, tmp_path):
    """A full disk ends in one line; the adapter that was there still loads, bitwise, and no temporary file stays."""
    before = {p.name: p.read_bytes() for p in folder.iterdir()}

    def full(fd, data):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch, pytest.raises(QtjaxError, match="No space left") as error:
        patch.setattr(os, "write", full)
        save_adapter(folder, made(r=2))
    assert "\n" not in str(error.value)
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == before
    (tmp_path / "file").write_text("")
    with pytest.raises(QtjaxError, match="Not a directory|File exists"):
        save_adapter(tmp_path / "file" / "adapter", made(r=2))
    shutil.rmtree(folder)
    save_adapter(folder / "deeper" / "still", made(r=2))
    assert load_adapter(folder / "deeper" / "still", CONFIG, None).spec.fields.r == 2
