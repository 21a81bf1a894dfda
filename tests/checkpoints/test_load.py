"""Hugging Face folders in: values land where they belong, in the dtype asked for; damage is one line that says what."""

import json
import sys

import jax
import ml_dtypes
import numpy as np
import pytest

from qtjax.checkpoints import load_pretrained
from qtjax.errors import QtjaxError
from qtjax.tree import flatten


def refusal(path, **arguments) -> str:
    """The one line that loading gives."""
    with pytest.raises(QtjaxError) as caught:
        load_pretrained(path, **arguments)
    message = str(caught.value)
    assert "\n" not in message and len(message) < 800
    return message


@pytest.mark.parametrize("files", (1, 4))
@pytest.mark.parametrize("stored", ("float32", "float16", "bfloat16"))
@pytest.mark.parametrize("wanted", ("float32", "bfloat16"))
def test_values_of_every_stored_dtype(hf_folder, files, stored, wanted):
    """Single and sharded, fp32 | fp16 | bf16 on disk: each leaf is the stacked, transposed, once-rounded tensor."""
    folder = hf_folder(attention_bias=True, mlp_bias=True)
    config, params = load_pretrained(folder.write(files, stored), wanted)
    assert (config.dtype, config.param_dtype) == (wanted, wanted)
    on_disk = {k: v.astype(np.dtype(stored)).astype(np.dtype(wanted)) for k, v in folder.tensors.items()}

    def stack(block):
        return np.stack([on_disk[f"model.layers.{i}.{block}"] for i in range(3)])

    found = flatten(params)
    np.testing.assert_array_equal(found.pop("embed_tokens/embedding"), on_disk["model.embed_tokens.weight"])
    np.testing.assert_array_equal(found.pop("norm/weight"), on_disk["model.norm.weight"])
    np.testing.assert_array_equal(found.pop("lm_head/kernel"), on_disk["lm_head.weight"].T)
    for path, leaf in found.items():
        assert leaf.dtype == wanted
        block = path.removeprefix("layers/").replace("/", ".")
        expected = stack(block.replace("kernel", "weight"))
        np.testing.assert_array_equal(leaf, expected.swapaxes(1, 2) if block.endswith("kernel") else expected)


def test_parameter_and_compute_dtype_apart(hf_folder):
    """dtype is what computes, param_dtype what is stored."""
    config, params = load_pretrained(hf_folder().write(), "bfloat16", param_dtype="float32")
    assert (config.dtype, config.param_dtype, params["norm"]["weight"].dtype) == ("bfloat16", "float32", np.float32)
    assert "dtype 'int8'" in refusal(hf_folder().path, dtype="int8")


def test_every_misfit_is_listed_at_once(hf_folder):
    """Missing, unknown and mis-shaped tensors come in one message with their names and shapes."""
    folder = hf_folder()
    del folder.tensors["model.layers.1.mlp.up_proj.weight"]
    folder.tensors["model.layers.0.self_attn.q_norm.weight"] = np.zeros(4, np.float32)
    folder.tensors["model.norm.weight"] = np.zeros(17, np.float32)
    message = refusal(folder.write())
    assert "1 missing: model.layers.1.mlp.up_proj.weight" in message
    assert "1 unknown: model.layers.0.self_attn.q_norm.weight" in message
    assert "model.norm.weight is (17,), expected (16,)" in message


def test_vocabulary_and_layer_count_mismatch(hf_folder):
    """A config of another size than the weights: the message shows both shapes, or the layers too many."""
    folder = hf_folder()
    folder.write()
    (folder.path / "config.json").write_text(json.dumps(folder.config | {"vocab_size": 48}))
    assert "model.embed_tokens.weight is (40, 16), expected (48, 16)" in refusal(folder.path)
    (folder.path / "config.json").write_text(json.dumps(folder.config | {"num_hidden_layers": 2}))
    assert "9 unknown: model.layers.2.input_layernorm.weight" in refusal(folder.path)
    (folder.path / "config.json").write_text(json.dumps(folder.config | {"num_hidden_layers": 4}))
    assert "9 missing: model.layers.3.input_layernorm.weight" in refusal(folder.path)


def test_harmless_extras_are_ignored(hf_folder):
    """Rotary buffers of old checkpoints, and a tied model's head that equals its embedding, are not unknown tensors."""
    folder = hf_folder(tie_word_embeddings=True)
    expected = flatten(load_pretrained(folder.write())[1])
    folder.tensors["lm_head.weight"] = folder.tensors["model.embed_tokens.weight"].copy()
    folder.tensors["model.rotary_emb.inv_freq"] = np.ones(2, np.float32)
    for i in range(3):
        folder.tensors[f"model.layers.{i}.self_attn.rotary_emb.inv_freq"] = np.ones(2, np.float32)
    found = flatten(load_pretrained(folder.write())[1])
    assert set(found) == set(expected) and "lm_head/kernel" not in found
    for path, leaf in expected.items():
        np.testing.assert_array_equal(found[path], leaf)


def test_tied_with_another_head_is_refused(hf_folder):
    """tie_word_embeddings with a different lm_head.weight would silently lose one of them: an error; untied without: missing."""
    folder = hf_folder(tie_word_embeddings=True)
    folder.tensors["lm_head.weight"] = folder.tensors["model.embed_tokens.weight"].copy()
    folder.tensors["lm_head.weight"][39, 15] += 1
    assert "lm_head.weight differs" in refusal(folder.write())
    folder = hf_folder()
    del folder.tensors["lm_head.weight"]
    assert "1 missing: lm_head.weight" in refusal(folder.write())


@pytest.mark.parametrize("cut", (3, 60, -5))
def test_truncated_safetensors(hf_folder, cut):
    """Cut inside the length, the header or the data: the file is named and called truncated."""
    file = hf_folder().write() / "model.safetensors"
    file.write_bytes(file.read_bytes()[:cut])
    message = refusal(file.parent)
    assert "model.safetensors" in message and "truncated" in message


def test_corrupt_safetensors(hf_folder):
    """Not safetensors at all (a pointer file of git-lfs, random bytes) is the same one-line refusal."""
    folder = hf_folder().write()
    for damage in (b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 123\n", bytes(range(256)) * 4, b""):
        (folder / "model.safetensors").write_bytes(damage)
        assert "not a readable safetensors file" in refusal(folder)


def test_unreadable_stored_dtype(hf_folder):
    """Quantised tensors (fp8, int8) are refused by name instead of being cast to nonsense."""
    from safetensors.numpy import save_file

    folder = hf_folder()
    folder.write()
    arrays = dict(folder.tensors)
    arrays["lm_head.weight"] = arrays["lm_head.weight"].astype(ml_dtypes.float8_e4m3fn)
    save_file(arrays, folder.path / "model.safetensors")
    assert "'lm_head.weight' is stored as F8_E4M3" in refusal(folder.path)


def test_damaged_index(hf_folder):
    """An index that names a missing file, a foreign folder, a tensor no file holds, or is no index: each one line."""
    folder = hf_folder()
    index = folder.write(files=3) / "model.safetensors.index.json"
    whole = json.loads(index.read_text())
    (folder.path / "model-00002-of-00003.safetensors").rename(folder.path / "kept")
    message = refusal(folder.path)
    assert "1 of 3 files" in message and "model-00002-of-00003.safetensors" in message
    (folder.path / "kept").rename(folder.path / "model-00002-of-00003.safetensors")
    promised = {"weight_map": whole["weight_map"] | {"model.norm.bias": "model-00001-of-00003.safetensors"}}
    for text, expected in (
        (json.dumps({"weight_map": {"a": "../model.safetensors"}}), "same folder"),
        (json.dumps(promised), "'model.norm.bias'"),
        ("{", "not an index"),
        ("[]", "not an index"),
    ):
        index.write_text(text)
        assert expected in refusal(folder.path)


def test_what_is_not_a_model_folder(hf_folder, tmp_path):
    """No folder, a file, no config.json, broken JSON, an adapter, no weights: each says what to give instead."""
    folder = hf_folder().write()
    assert "no such folder" in refusal(tmp_path / "nowhere")
    assert "is a file" in refusal(folder / "model.safetensors")
    (folder / "config.json").rename(folder / "config.txt")
    assert "no config.json" in refusal(folder)
    (folder / "adapter_config.json").write_text("{}")
    assert "adapter" in refusal(folder)
    (folder / "config.json").write_text('{"model_type": ')
    assert "not readable JSON" in refusal(folder)
    (folder / "config.json").write_text("[1]")
    assert "must hold a JSON object" in refusal(folder)
    (folder / "config.txt").rename(folder / "config.json")
    (folder / "model.safetensors").rename(folder / "weights.safetensors")
    assert "only weights.safetensors" in refusal(folder)
    (folder / "weights.safetensors").unlink()
    assert "no weights" in refusal(folder)


def test_pickles_are_refused_with_the_way_out(hf_folder):
    """pytorch_model.bin alone: not opened, and the message holds the command that converts it."""
    folder = hf_folder().write()
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(b"\x80\x04.")
    message = refusal(folder)
    assert "pytorch_model.bin" in message and "save_pretrained" in message


def test_hub_name_offline(monkeypatch):
    """A name that looks like the hub's and is no folder: one line that says the hub did not give it, and what to do."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    message = refusal("nobody/has-this-model")
    assert "'nobody/has-this-model'" in message and "hub" in message and "local folder" in message


def test_hub_download_takes_only_what_is_needed(hf_folder, monkeypatch):
    """Patterns take config, tokenizer and model*.safetensors, and leave out pickles, code and duplicate weights."""
    import fnmatch

    folder, asked = hf_folder().write(), []

    def snapshot_download(name, *, allow_patterns):
        asked.append((name, allow_patterns))
        return str(folder)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    load_pretrained("org/name")
    [(name, patterns)] = asked
    assert name == "org/name"

    def taken(file):
        return any(fnmatch.fnmatch(file, p) for p in patterns)

    wanted = ("config.json", "model.safetensors", "model-00001-of-00002.safetensors", "tokenizer.json", "tokenizer.model")
    assert all(map(taken, wanted)) and taken("model.safetensors.index.json") and taken("chat_template.jinja")
    left = ("pytorch_model.bin", "consolidated.safetensors", "original/consolidated.00.pth", "modeling_x.py")
    assert not any(map(taken, (*left, "original/params.json")))


def test_local_folder_wins_over_a_hub_name(hf_folder, monkeypatch):
    """"org/name" that exists here is a folder; the hub is not asked."""
    folder = hf_folder().write()
    monkeypatch.chdir(folder.parent)
    (folder.parent / "org").mkdir()
    folder.rename(folder.parent / "org" / "name")
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *a, **k: pytest.fail("asked the hub"))
    assert load_pretrained("org/name")[0].vocab_size == 40


def test_random_init_needs_no_weights(hf_folder):
    """random_init draws new weights of the config's shapes, by key, whatever weights lie there."""
    folder = hf_folder().write()
    (folder / "model.safetensors").unlink()
    config, params = load_pretrained(folder, random_init=True, key=jax.random.key(3))
    other = load_pretrained(folder, random_init=True, key=jax.random.key(4))[1]
    again = load_pretrained(folder, random_init=True, key=jax.random.key(3))[1]
    kernel = params["layers"]["mlp"]["up_proj"]["kernel"]
    assert kernel.shape == (3, 16, 24) and abs(float(kernel.std()) - config.initializer_range) < 0.005
    np.testing.assert_array_equal(kernel, again["layers"]["mlp"]["up_proj"]["kernel"])
    assert (kernel != other["layers"]["mlp"]["up_proj"]["kernel"]).any()


_EIGHT_DEVICES = """
import sys, jax, numpy as np
from jax.sharding import Mesh
from qtjax.checkpoints import assemble, load_pretrained, save_pretrained
from qtjax.tree import flatten
mesh = Mesh(np.array(jax.devices()).reshape(2, 2, 2), ("data", "fsdp", "tensor"))
reads = []
real = assemble.StoredTensor.__init__
def counted(self, shape, read, transposed=True):
    def reading(index):
        part = read(index)
        reads.append(part.size)
        return part
    real(self, shape, reading, transposed)
assemble.StoredTensor.__init__ = counted
config, params = load_pretrained(sys.argv[1], mesh=mesh)
once = sum(leaf.size for leaf in jax.tree.leaves(params))
assert sum(reads) == once, (sum(reads), once)
plain = flatten(load_pretrained(sys.argv[1])[1])
for path, leaf in flatten(params).items():
    np.testing.assert_array_equal(leaf, plain[path], err_msg=path)
    assert len(leaf.sharding.device_set) == 8, path
kernel = params["layers"]["mlp"]["up_proj"]["kernel"]
assert kernel.addressable_shards[0].data.size * 4 == kernel.size, kernel.sharding
save_pretrained(sys.argv[2], config, params)
drawn = load_pretrained(sys.argv[1], mesh=mesh, random_init=True, key=jax.random.key(0))[1]
assert drawn["layers"]["mlp"]["up_proj"]["kernel"].sharding == kernel.sharding
print("as expected")
"""


def test_sharded_over_eight_devices(hf_folder, tmp_path, run_python):
    """On a (2, 2, 2) mesh: the same values, every byte read once, each device its part; saving them gives the same file."""
    folder = hf_folder().write()
    assert "as expected" in run_python(_EIGHT_DEVICES, str(folder), str(tmp_path / "out"), devices=8)
    again, first = load_pretrained(tmp_path / "out")[1], load_pretrained(folder)[1]
    jax.tree.map(np.testing.assert_array_equal, again, first)


_PEAK = """
import json, sys, jax
from qtjax.checkpoints import load_pretrained, save_pretrained
def status(field):
    line = next(line for line in open("/proc/self/status") if line.startswith(field))
    return int(line.split()[1]) * 1024
def growth(act):
    # ru_maxrss would begin with the parent's peak; this resets the high-water mark of this process.
    open("/proc/self/clear_refs", "w").write("5")
    before = status("VmRSS:")
    result = act()
    jax.block_until_ready(result[1] if isinstance(result, tuple) else 0)
    return status("VmHWM:") - before, result
load_pretrained(sys.argv[1])
loading, (config, params) = growth(lambda: load_pretrained(sys.argv[2]))
saving, _ = growth(lambda: str(save_pretrained(sys.argv[3], config, params)))
leaves = [leaf.nbytes for leaf in jax.tree.leaves(params)]
print(json.dumps(dict(loading=loading, saving=saving, model=sum(leaves), leaf=max(leaves))))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="the peak of resident memory is read and reset through Linux's /proc/self")
def test_no_second_copy_in_host_memory(hf_folder, tmp_path, run_python):
    """Peak memory while loading is the model and about one leaf, not two models; saving adds less than half a model."""
    small = hf_folder().write().rename(tmp_path / "small")
    sizes = dict(hidden_size=512, head_dim=128, intermediate_size=1024, num_hidden_layers=20, vocab_size=1000)
    big = hf_folder(**sizes).write()
    figures = json.loads(run_python(_PEAK, str(small), str(big), str(tmp_path / "out")).splitlines()[-1])
    slack = 16 * 2**20
    assert figures["model"] > 2 * (figures["leaf"] + slack), "the model is too small to tell one copy from two"
    assert 0.9 * figures["model"] < figures["loading"] < figures["model"] + figures["leaf"] + slack, figures
    assert figures["saving"] < figures["model"] / 2, figures  # one tensor, and what compiling the slices takes
