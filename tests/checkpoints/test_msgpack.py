"""Flax msgpack folders in, as transformers 4 wrote them."""

import json

import ml_dtypes
import numpy as np
import pytest
from flax.serialization import msgpack_restore, msgpack_serialize

from qtjax.checkpoints import load_pretrained, save_pretrained
from qtjax.errors import QtjaxError
from qtjax.tree import flatten, unflatten


def flax_tree(folder) -> dict[str, np.ndarray]:
    """The source tensors in Flax's names and (in, out) layout."""
    flat = {}
    for name, array in folder.tensors.items():
        path = name.replace(".", "/")
        if "proj" in path or path.startswith("lm_head"):
            path, array = path.replace("/weight", "/kernel"), array.T
        elif "embed" in path:
            path = path.replace("/weight", "/embedding")
        flat[path] = np.ascontiguousarray(array)
    return flat


def write(folder, flat, files: int = 1):
    folder.path.mkdir(exist_ok=True)
    (folder.path / "config.json").write_text(json.dumps(folder.config))
    if files == 1:
        (folder.path / "flax_model.msgpack").write_bytes(msgpack_serialize(unflatten(flat)))
        return folder.path
    weight_map = {}
    for i, names in enumerate(np.array_split(sorted(flat), files), 1):
        file = f"flax_model-{i:05d}-of-{files:05d}.msgpack"
        (folder.path / file).write_bytes(msgpack_serialize(unflatten({str(n): flat[n] for n in names})))
        weight_map |= {str(n): file for n in names}
    (folder.path / "flax_model.msgpack.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return folder.path


@pytest.mark.parametrize("files", (1, 5))
@pytest.mark.parametrize("stored", ("float32", "bfloat16"))
def test_msgpack_equals_safetensors(hf_folder, files, stored):
    """The same weights as msgpack (single, sharded) and as safetensors give the same tree, bit for bit."""
    folder = hf_folder()
    expected = flatten(load_pretrained(folder.write(dtype=stored))[1])
    (folder.path / "model.safetensors").unlink()
    write(folder, {k: v.astype(np.dtype(stored)) for k, v in flax_tree(folder).items()}, files)
    found = flatten(load_pretrained(folder.path)[1])
    assert set(found) == set(expected)
    for path, leaf in expected.items():
        np.testing.assert_array_equal(found[path], leaf, err_msg=path)


def test_params_collection_and_tied_head(hf_folder):
    """A file that wraps the tree in "params" is read too; a tied model's equal head is ignored, another one refused."""
    folder = hf_folder(tie_word_embeddings=True)
    flat = flax_tree(folder)
    expected = load_pretrained(write(folder, flat))[1]
    head = {"lm_head/kernel": np.ascontiguousarray(flat["model/embed_tokens/embedding"].T)}
    wrapped = {f"params/{k}": v for k, v in (flat | head).items()}
    again = load_pretrained(write(folder, wrapped))[1]
    np.testing.assert_array_equal(again["embed_tokens"]["embedding"], expected["embed_tokens"]["embedding"])
    head["lm_head/kernel"][0, 0] += 1
    with pytest.raises(QtjaxError, match="lm_head.weight differs"):
        load_pretrained(write(folder, flat | head))


def test_misfits_are_listed(hf_folder):
    """Missing, unknown (in Flax's spelling) and mis-shaped leaves are listed as for safetensors."""
    folder = hf_folder()
    flat = flax_tree(folder)
    del flat["model/layers/2/mlp/down_proj/kernel"]
    flat["model/layers/0/self_attn/q_norm/scale"] = np.zeros(4, np.float32)
    flat["model/layers/1/mlp/up_proj/kernel"] = flat["model/layers/1/mlp/up_proj/kernel"].T.copy()
    with pytest.raises(QtjaxError) as caught:
        load_pretrained(write(folder, flat))
    message = str(caught.value)
    assert "1 missing: model.layers.2.mlp.down_proj.weight" in message
    assert "1 unknown: model/layers/0/self_attn/q_norm/scale" in message
    assert "model.layers.1.mlp.up_proj.weight is (24, 16), expected (16, 24)" in message


def test_damage_is_one_line(hf_folder):
    """Truncated, foreign and incomplete files: the file is named, in one line."""
    folder = hf_folder()
    path = write(folder, flax_tree(folder)) / "flax_model.msgpack"
    whole = path.read_bytes()
    for damage, expected in (
        (whole[: len(whole) // 2], "truncated"),
        (b"", "truncated"),
        (msgpack_serialize({"model": 3}), "not an array"),
        (msgpack_serialize({"a": ml_dtypes.bfloat16(1)})[:-1], "truncated"),
    ):
        path.write_bytes(damage)
        with pytest.raises(QtjaxError) as caught:
            load_pretrained(folder.path)
        assert expected in str(caught.value) and "flax_model.msgpack" in str(caught.value) and "\n" not in str(caught.value)
    path.unlink()
    write(folder, flax_tree(folder), files=3)
    (folder.path / "flax_model-00002-of-00003.msgpack").unlink()
    with pytest.raises(QtjaxError, match="1 of 3 files it names are missing"):
        load_pretrained(folder.path)


@pytest.mark.shared
@pytest.mark.parametrize("name, files", (("flax-llama-random", 1), ("flax-mistral-random-sharded", 12)))
def test_folders_that_transformers_4_wrote(shared, tmp_path, name, files):
    """Real FlaxLlama (one file) and FlaxMistral (12 shards): each leaf is the stack of its layers, and saves as HF."""
    folder = shared / "models" / name
    config, params = load_pretrained(folder)
    flat, found = {}, flatten(params)
    sources = sorted(folder.glob("*.msgpack"))
    assert len(sources) == files
    for file in sources:
        flat |= flatten(msgpack_restore(file.read_bytes()))
    np.testing.assert_array_equal(found["embed_tokens/embedding"], flat["model/embed_tokens/embedding"])
    np.testing.assert_array_equal(found["lm_head/kernel"], flat["lm_head/kernel"])
    layers = [path for path in found if path.startswith("layers/")]
    assert len(layers) == 9
    for path in layers:
        expected = [flat[f"model/layers/{i}/{path.removeprefix('layers/')}"] for i in range(config.num_hidden_layers)]
        np.testing.assert_array_equal(found[path], np.stack(expected))
    again = flatten(load_pretrained(save_pretrained(tmp_path / "out", config, params))[1])
    for path, leaf in found.items():
        np.testing.assert_array_equal(again[path], leaf)
