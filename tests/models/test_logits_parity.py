"""Logits equal transformers/torch in float32 within 2e-4, for every variant of the decoder that is supported."""

import copy
import json

import jax
import numpy as np
import pytest

from qtjax import models
from qtjax.checkpoints import load_pretrained, save_pretrained

pytestmark = [pytest.mark.parity, pytest.mark.usefixtures("torch")]
TOLERANCE = 2e-4
apply = jax.jit(models.apply, static_argnums=0)
NAMES = (
    "llama-gqa-untied",
    "llama-mha-tied",
    "llama-biases",
    "llama-llama3-rope",
    "llama-linear-rope",
    "llama-gelu-head-dim",
    "llama-gelu-tanh",
    "mistral-window",
    "mistral-no-window",
)


def torch_logits(model, ids, **arguments) -> np.ndarray:
    import torch

    with torch.no_grad():
        return model(torch.tensor(ids), **{k: torch.tensor(v) for k, v in arguments.items()}).logits.numpy()


def random_ids(vocab: int, batch: int = 2, length: int = 40, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(3, vocab, (batch, length))


@pytest.mark.parametrize("name", NAMES)
def test_logits_equal_transformers(reference, name):
    """Every variant: the same folder gives the same logits here and in torch, at length 40 (window 8, bands mixed)."""
    folder, model = reference(name)
    config, params = load_pretrained(folder)
    ids = random_ids(config.vocab_size)
    expected = torch_logits(model, ids)
    assert expected.std() > 0.3, "a reference whose logits are flat proves nothing"
    np.testing.assert_allclose(apply(config, params, ids), expected, atol=TOLERANCE, rtol=0)


@pytest.mark.shared
def test_stories260k_logits_equal_transformers(shared):
    """A pretrained LLaMA (GQA, tied): logits equal torch's on text-like input of 128 tokens."""
    import transformers

    folder = shared / "models" / "stories260K"
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    config, params = load_pretrained(folder)
    ids = random_ids(config.vocab_size, length=128)
    np.testing.assert_allclose(apply(config, params, ids), torch_logits(model, ids), atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("name", ("llama-gqa-untied", "mistral-window"))
@pytest.mark.parametrize("side", ("left", "right"))
@pytest.mark.parametrize("positions", ("arange", "from_mask"))
def test_padding_on_either_side(reference, name, side, positions):
    """Real slots of padded rows equal torch's, with transformers' default positions and with generate's (cumsum - 1)."""
    folder, model = reference(name)
    config, params = load_pretrained(folder)
    ids, mask = random_ids(config.vocab_size, batch=3, length=24), np.ones((3, 24), np.int64)
    for row, count in enumerate((0, 5, 17)):
        mask[row, slice(0, count) if side == "left" else slice(24 - count, 24)] = 0
    extra = {} if positions == "arange" else {"position_ids": np.maximum(mask.cumsum(1) - 1, 0)}
    ours = np.asarray(apply(config, params, ids, attention_mask=mask, **extra))
    theirs = torch_logits(model, ids, attention_mask=mask, **extra)
    np.testing.assert_allclose(ours[mask == 1], theirs[mask == 1], atol=TOLERANCE, rtol=0)
    assert np.isfinite(ours).all()


@pytest.mark.parametrize("name", ("llama-llama3-rope", "llama-linear-rope", "llama-gqa-untied", "mistral-window"))
@pytest.mark.parametrize("spelling", (4, 5))
def test_both_spellings_of_the_config(reference, tmp_path, name, spelling):
    """config.json as transformers 4 writes it (rope_theta, rope_scaling, torch_dtype) and as 5 does: the same logits."""
    folder, model = reference(name)
    raw = json.loads((folder / "config.json").read_text())
    assert "rope_parameters" in raw and "rope_theta" not in raw, "the reference is expected to be of version 5"
    if spelling == 4:
        rope = raw.pop("rope_parameters")
        raw["rope_theta"] = rope.pop("rope_theta")
        raw["rope_scaling"] = None if rope["rope_type"] == "default" else rope
        raw["torch_dtype"] = raw.pop("dtype")
        raw["head_dim"] = raw["head_dim"] if name == "mistral-window" else None
    (tmp_path / "config.json").write_text(json.dumps(raw))
    (tmp_path / "model.safetensors").symlink_to(folder / "model.safetensors")
    config, params = load_pretrained(tmp_path)
    ids = random_ids(config.vocab_size)
    np.testing.assert_allclose(apply(config, params, ids), torch_logits(model, ids), atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("max_shard_bytes", (5_000_000_000, 20_000))
def test_saved_folder_is_loaded_by_transformers(reference, tmp_path, name, max_shard_bytes):
    """load -> save -> transformers loads: bitwise the same torch logits, from one file and from shards with an index."""
    import transformers

    folder, model = reference(name)
    config, params = load_pretrained(folder)
    save_pretrained(tmp_path / "out", config, params, max_shard_bytes=max_shard_bytes)
    assert (tmp_path / "out" / "model.safetensors.index.json").exists() == (max_shard_bytes == 20_000)
    again, report = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(report.values()), report
    ids = random_ids(config.vocab_size)
    np.testing.assert_array_equal(torch_logits(again, ids), torch_logits(model, ids))
    for field in ("rms_norm_eps", "hidden_act", "rope_parameters", "tie_word_embeddings", "eos_token_id", "head_dim"):
        assert getattr(again.config, field) == getattr(model.config, field), field


@pytest.mark.shared
def test_flax_weights_give_torchs_logits(shared):
    """Flax msgpack folders: the same weights transposed into torch give the same logits (FlaxMistral's own mask is wrong)."""
    import torch
    import transformers
    from flax.serialization import msgpack_restore

    from qtjax.tree import flatten

    for name in ("flax-llama-random", "flax-mistral-random-sharded"):
        folder = shared / "models" / name
        model = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.from_pretrained(folder)).float().eval()
        flat = {}
        for file in sorted(folder.glob("*.msgpack")):
            flat |= flatten(msgpack_restore(file.read_bytes()))
        state = {}
        for path, array in flat.items():
            *module, leaf = path.split("/")
            state[".".join([*module, "weight"])] = torch.tensor(array.T if leaf == "kernel" else array)
        model.load_state_dict(state)
        config, params = load_pretrained(folder)
        ids = random_ids(config.vocab_size)
        np.testing.assert_allclose(apply(config, params, ids), torch_logits(model, ids), atol=TOLERANCE, rtol=0)




def test_bfloat16_compute_stays_near_float32(reference):
    """bf16 compute on fp32 weights differs from torch fp32 by bf16's rounding only, about as much as torch's own bf16."""
    import torch

    folder, model = reference("llama-gqa-untied")
    config, params = load_pretrained(folder, "bfloat16", param_dtype="float32")
    assert config.dtype == "bfloat16" and params["norm"]["weight"].dtype == "float32"
    ids = random_ids(config.vocab_size)
    exact = torch_logits(model, ids)
    with torch.no_grad():
        theirs = copy.deepcopy(model).to(torch.bfloat16)(torch.tensor(ids)).logits.float().numpy()
    error, allowed = np.abs(np.asarray(apply(config, params, ids)) - exact), np.abs(theirs - exact)
    assert error.mean() < 2 * allowed.mean() and error.max() < 4 * allowed.max()
    assert error.mean() > 1e-4, "bf16 was not used"
