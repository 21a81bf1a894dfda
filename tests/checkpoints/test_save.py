"""Hugging Face folders out: what was loaded comes back bitwise, and a failure leaves what was there untouched."""

import errno
import json
import os

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

from qtjax.checkpoints import load_pretrained, pretrained, save_pretrained
from qtjax.errors import QtjaxError


def contents(folder) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def same(a, b) -> None:
    assert jax.tree.structure(a) == jax.tree.structure(b)
    jax.tree.map(np.testing.assert_array_equal, a, b)


@pytest.mark.parametrize("dtype", ("float32", "float16", "bfloat16"))
@pytest.mark.parametrize("max_shard_bytes", (5_000_000_000, 4_000))
def test_load_save_load_is_bitwise(hf_folder, tmp_path, dtype, max_shard_bytes):
    """load -> save -> load gives the same bits, config and dtype; the second save writes the same bytes as the first."""
    config, params = load_pretrained(hf_folder(attention_bias=True, mlp_bias=True).write(dtype=dtype), dtype)
    first = save_pretrained(tmp_path / "first", config, params, max_shard_bytes=max_shard_bytes)
    again_config, again = load_pretrained(first, dtype)
    assert again_config == config
    same(again, params)
    second = save_pretrained(tmp_path / "second", again_config, again, max_shard_bytes=max_shard_bytes)
    assert contents(first) == contents(second)
    assert json.loads((first / "config.json").read_text())["torch_dtype"] == dtype
    shards = sorted(first.glob("model-*.safetensors"))
    assert bool(shards) == (max_shard_bytes == 4_000) and not list(first.glob(".saving*"))
    for shard in shards:
        largest = max(array.nbytes for array in load_file(shard).values())
        assert shard.stat().st_size <= max(max_shard_bytes, largest) + 4_000  # header


def test_safetensors_library_reads_every_tensor_back(hf_folder, tmp_path):
    """The file is plain safetensors: the library reads back exactly the tensors, names and layout of the source."""
    folder = hf_folder()
    config, params = load_pretrained(folder.write())
    save_pretrained(tmp_path / "out", config, jax.tree.map(np.asarray, params))
    written = load_file(tmp_path / "out" / "model.safetensors")
    assert set(written) == set(folder.tensors)
    for name, array in folder.tensors.items():
        np.testing.assert_array_equal(written[name], array)


def test_tied_model_writes_no_head(hf_folder, tmp_path):
    """A tied model's file holds the embedding once, and loads again."""
    config, params = load_pretrained(hf_folder(tie_word_embeddings=True).write())
    save_pretrained(tmp_path / "out", config, params)
    assert "lm_head.weight" not in load_file(tmp_path / "out" / "model.safetensors")
    same(load_pretrained(tmp_path / "out")[1], params)


def test_tree_that_does_not_fit_is_refused(hf_folder, tmp_path):
    """Missing, foreign and mis-shaped leaves and odd dtypes are named, and nothing is created."""
    config, params = load_pretrained(hf_folder().write())
    headless = {k: v for k, v in params.items() if k != "lm_head"}
    with pytest.raises(QtjaxError, match="1 missing: lm_head/kernel"):
        save_pretrained(tmp_path / "out", config, headless)
    with pytest.raises(QtjaxError, match="1 unknown: lm_head/kernel"):
        save_pretrained(tmp_path / "out", config.replace(tie_word_embeddings=True), params)
    with pytest.raises(QtjaxError, match="norm/weight is"):
        save_pretrained(tmp_path / "out", config, params | {"norm": {"weight": np.zeros(3, np.float32)}})
    with pytest.raises(QtjaxError, match="of dtype int32"):
        save_pretrained(tmp_path / "out", config, jax.tree.map(lambda x: x.astype(np.int32), params))
    assert not (tmp_path / "out").exists()


def test_tokenizer_comes_along(hf_folder, tmp_path):
    """tokenizer_from copies tokenizer files, templates and generation_config.json, and nothing else; without any: an error."""
    config, params = load_pretrained(hf_folder().write())
    source = tmp_path / "source"
    (source / "additional_chat_templates").mkdir(parents=True)
    kept = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json")
    kept += ("additional_chat_templates/tool.jinja",)
    for name in (*kept, "README.md", "modeling_x.py", "pytorch_model.bin"):
        (source / name).write_text(f'{{"from": "{name}"}}')
    out = save_pretrained(tmp_path / "out", config, params, tokenizer_from=source)
    assert set(contents(out)) == {*kept, "config.json", "model.safetensors"}
    assert all((out / name).read_text() == (source / name).read_text() for name in kept)
    plain = save_pretrained(tmp_path / "plain", config, params)
    generation = json.loads((plain / "generation_config.json").read_text())
    assert (generation["bos_token_id"], generation["eos_token_id"]) == (1, 2)
    (tmp_path / "empty").mkdir()
    with pytest.raises(QtjaxError, match="no tokenizer files"):
        save_pretrained(tmp_path / "bare", config, params, tokenizer_from=tmp_path / "empty")
    assert not (tmp_path / "bare").exists()


def test_saving_over_an_older_save(hf_folder, tmp_path):
    """A second save replaces weights whatever their number of files, and leaves foreign files of the folder alone."""
    config, params = load_pretrained(hf_folder().write())
    doubled = jax.tree.map(lambda x: x * 2, params)
    out = save_pretrained(tmp_path / "out", config, params, max_shard_bytes=4_000)
    (out / "README.md").write_text("mine")
    for other, limit in ((doubled, 5_000_000_000), (params, 2_000), (doubled, 4_000)):
        save_pretrained(out, config, other, max_shard_bytes=limit)
        same(load_pretrained(out)[1], other)
        assert (out / "README.md").read_text() == "mine"
        index = out / "model.safetensors.index.json"
        named = set(json.loads(index.read_text())["weight_map"].values()) if index.exists() else {"model.safetensors"}
        assert {p.name for p in out.glob("*.safetensors")} == named


@pytest.mark.parametrize("fails_at", ("first write", "last byte", "config", "rename"))
def test_disk_full_damages_nothing(hf_folder, tmp_path, monkeypatch, fails_at):
    """ENOSPC at any moment before completion: one line, the older save is byte for byte what it was, no rest is left."""
    config, params = load_pretrained(hf_folder().write())
    out = save_pretrained(tmp_path / "out", config, params)
    before = contents(out)
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def raising(*_, **__):
        raise full

    if fails_at in ("first write", "last byte"):
        real = pretrained.hf.encode_safetensors

        def cut(*arguments):
            pieces = list(real(*arguments))
            yield from () if fails_at == "first write" else pieces[:-1]
            raise full

        monkeypatch.setattr(pretrained.hf, "encode_safetensors", cut)
    elif fails_at == "config":
        monkeypatch.setattr(pretrained, "_json", raising)
    else:
        monkeypatch.setattr(pretrained, "_publish", raising)
    doubled = jax.tree.map(lambda x: x * 2, params)
    for target in (out, tmp_path / "new"):
        with pytest.raises(QtjaxError) as caught:
            save_pretrained(target, config, doubled)
        assert "No space left on device" in str(caught.value) and "\n" not in str(caught.value)
    assert contents(out) == before
    assert not (tmp_path / "new").exists()


def test_real_full_disk(hf_folder, small_disk):
    """A file system of 64 KiB really runs full: the one-line error, and the earlier file on it is intact."""
    disk = small_disk("64k")
    small = load_pretrained(hf_folder(num_hidden_layers=1, intermediate_size=8, vocab_size=8).write())
    out = save_pretrained(disk / "out", *small)
    before = contents(out)
    wide = hf_folder(vocab_size=2000).write()
    with pytest.raises(QtjaxError, match="No space left on device"):
        save_pretrained(out, *load_pretrained(wide))
    assert contents(out) == before
    same(load_pretrained(out)[1], small[1])


def test_what_a_killed_save_left_goes_with_the_next_one(hf_folder, run_python, tmp_path):
    """SIGKILL while weights are written leaves a folder, which the next save removes; the folder of a live save it lets be."""
    source, out = hf_folder().write(), tmp_path / "out"
    killed = """
import os, signal, sys
from qtjax.checkpoints import load_pretrained, pretrained, save_pretrained
config, params = load_pretrained(sys.argv[1])
pretrained._publish = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
save_pretrained(sys.argv[2], config, params)
"""
    with pytest.raises(AssertionError):  # the interpreter was killed
        run_python(killed, str(source), str(out))
    assert [p.name.startswith(".saving-") for p in out.iterdir()] == [True]
    config, params = load_pretrained(source)
    with pretrained._staging(out) as live:
        assert [p for p in out.iterdir()] == [live]
        (live / "x").write_text("mine")
        save_pretrained(out, config, params)
        assert (live / "x").read_text() == "mine" and len(list(out.glob(".saving-*"))) == 1
    same(load_pretrained(out)[1], params)
    assert not list(out.glob(".saving-*"))


def test_target_that_cannot_be_a_folder(hf_folder, tmp_path):
    """A file in the way, or a folder that may not be written, is one line."""
    config, params = load_pretrained(hf_folder().write())
    (tmp_path / "file").write_text("mine")
    with pytest.raises(QtjaxError, match="cannot save to"):
        save_pretrained(tmp_path / "file", config, params)
    with pytest.raises(QtjaxError, match="cannot save to"):
        save_pretrained(tmp_path / "file" / "below", config, params)
    assert (tmp_path / "file").read_text() == "mine"
