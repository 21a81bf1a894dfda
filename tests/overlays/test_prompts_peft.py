"""Prompts, prefixes and LLaMA-Adapter between qtjax and peft itself, both ways, on models the recorded cases do not cover."""

import json
import shutil
import warnings

import jax
import numpy as np
import pytest
from safetensors.numpy import save_file
from tests.overlays.live_peft import Rows, base_fixture, same_gradients, torch, torch_base
from tests.overlays.tokens import trained

from qtjax import models
from qtjax.checkpoints import adapter_state_dict, load_adapter, save_adapter
from qtjax.overlays import init_overlay

pytestmark = pytest.mark.parity
peft = pytest.importorskip("peft")

SMALL = dict(
    vocab_size=53, hidden_size=48, intermediate_size=56, num_attention_heads=6, max_position_embeddings=64,
    initializer_range=0.15, bos_token_id=1, eos_token_id=2,
)  # fmt: skip
BASES = {
    "mistral-window": ("Mistral", SMALL | dict(num_hidden_layers=2, num_key_value_heads=3, sliding_window=5)),
    "llama-tied-biases": (
        "Llama",
        SMALL | dict(num_hidden_layers=3, num_key_value_heads=2, tie_word_embeddings=True, attention_bias=True, mlp_bias=True),
    ),
}
CASES = {
    "prompt": ("prompt", "PromptTuningConfig", dict(num_virtual_tokens=4)),
    "ptuning": ("ptuning", "PromptEncoderConfig", dict(num_virtual_tokens=3, encoder_hidden_size=10)),
    "ptuning-lstm": (
        "ptuning", "PromptEncoderConfig",
        dict(num_virtual_tokens=6, encoder_hidden_size=5, encoder_reparameterization_type="LSTM", encoder_num_layers=3),
    ),
    "mpt": ("mpt", "MultitaskPromptTuningConfig", dict(num_virtual_tokens=4, num_tasks=3, num_ranks=2)),
    "prefix": ("prefix", "PrefixTuningConfig", dict(num_virtual_tokens=4)),
    "prefix-longer-than-window": ("prefix", "PrefixTuningConfig", dict(num_virtual_tokens=7)),
    "prefix-mlp": ("prefix", "PrefixTuningConfig", dict(num_virtual_tokens=4, prefix_projection=True, encoder_hidden_size=10)),
    "llama_adapter": ("llama_adapter", "AdaptionPromptConfig", dict(adapter_len=4, adapter_layers=1)),
}  # fmt: skip
IDS = np.random.default_rng(3).integers(3, 53, (3, 12))
MASK = np.ones_like(IDS)
MASK[1, 9:] = 0
MASK[2, :4] = 0
ROWS = Rows(IDS, MASK)
REAL, close, logits = ROWS.real, ROWS.close, ROWS.logits
base = base_fixture(BASES, first_seed=11)
TASKS = np.array([2, 0, 1])


def tasks_of(method):
    return {"task_ids": TASKS} if method == "mpt" else {}


def torch_tasks(method):
    return {name: torch.tensor(ids) for name, ids in tasks_of(method).items()}


@pytest.mark.parametrize("name", CASES)
def test_peft_saves_and_qtjax_loads(base, name, tmp_path):
    """peft saves -> load_adapter: same logits; with the encoder's own tensors beside it, the same loss and every gradient."""
    (folder, config, params), (method, kind, fields) = base, CASES[name]
    torch.manual_seed(1)
    model = peft.get_peft_model(torch_base(folder), getattr(peft, kind)(task_type="CAUSAL_LM", **fields)).eval()
    with torch.no_grad():
        for _, weight in model.named_parameters():
            if weight.requires_grad:
                weight.add_(torch.randn_like(weight) * 0.4)
    model.save_pretrained(tmp_path)
    expected = ROWS.torch_logits(model, **torch_tasks(method))
    overlay = load_adapter(tmp_path, config, params)
    close(logits(config, params, overlay, **tasks_of(method)), expected)
    assert ROWS.apart(logits(config, params), expected) > 0.1

    raw = {k: w.detach().numpy() for k, w in model.named_parameters() if w.requires_grad}
    assert overlay.trainable_count == sum(w.size for w in raw.values()) or method in ("ptuning", "prefix")

    def ours(key):
        key = key.replace("default.", "")
        raw_prompt = method in ("prompt", "mpt") or (method == "prefix" and name != "prefix-mlp")
        plain = {"prompt_encoder.embedding.weight": "prompt_embeddings"} if raw_prompt else {}
        return plain.get(key, key.removeprefix("prompt_encoder.") if "prefix_task" in key else key)

    raw = {ours(k): v for k, v in raw.items()}
    if not set(raw) <= set(adapter_state_dict(overlay)):
        save_file({k: np.ascontiguousarray(v) for k, v in raw.items()}, tmp_path / "qtjax_trainable.safetensors")
        overlay = load_adapter(tmp_path, config, params)

    @jax.value_and_grad
    def loss(trainable):
        # peft's labels follow the slot before them, be it padding or, for prompts, the last virtual token
        own = overlay.replace(params=trainable)
        return ROWS.loss(logits(config, params, own, **tasks_of(method)), MASK[:, 1:] * MASK[:, :-1])

    labels = ROWS.labels
    labels[:, 1:] = np.where(MASK[:, :-1] == 1, labels[:, 1:], -100)
    labels[:, 0] = -100
    out = ROWS.run_torch(model, labels=labels, **torch_tasks(method))
    out.loss.backward()
    theirs = {ours(k): w.grad.numpy() for k, w in model.named_parameters() if w.requires_grad}
    value, gradient = loss(overlay.params)
    assert abs(float(value) - out.loss.item()) <= 1e-5
    mine = same_gradients(overlay, gradient, theirs, floor=1e-8)
    assert set(mine) == set(theirs)


@pytest.mark.parametrize("name", CASES)
def test_qtjax_saves_and_peft_loads(base, name, tmp_path):
    """init -> random trainables -> save_adapter: peft loads it without a warning, with the same config and logits."""
    (folder, config, params), (method, kind, fields) = base, CASES[name]
    overlay = trained(init_overlay(method, config, params, jax.random.key(5), **fields), seed=4)
    save_adapter(tmp_path / "ours", overlay, base_model_name=str(folder))
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        model = peft.PeftModel.from_pretrained(torch_base(folder), tmp_path / "ours").eval()
    close(logits(config, params, overlay, **tasks_of(method)), ROWS.torch_logits(model, **torch_tasks(method)))
    fresh = peft.get_peft_model(torch_base(folder), getattr(peft, kind)(task_type="CAUSAL_LM", **fields))
    fresh.save_pretrained(tmp_path / "theirs")
    ours, theirs = (json.loads((tmp_path / f / "adapter_config.json").read_text()) for f in ("ours", "theirs"))
    del ours["base_model_name_or_path"]
    assert {k: theirs[k] for k in ours} == ours
    assert overlay.trainable_count == sum(w.numel() for w in fresh.parameters() if w.requires_grad)
    shutil.rmtree(tmp_path / "theirs")


@pytest.mark.parametrize("name", ["prompt", "prefix"])
def test_generation_equals_pefts_forward_passes(base, name, tmp_path):
    """Greedy tokens are those of peft's full forward passes, past the window's end.

    Not of peft's cached `generate`: with peft 0.21.2 and transformers 5.23 that differs from peft's own forward pass, for
    prompts and prefixes, on LLaMA and Mistral alike (for prompts, generate with use_cache=False agrees with it and with us).
    """
    (folder, config, params), (method, _, fields) = base, CASES[name]
    overlay = trained(init_overlay(method, config, params, jax.random.key(5), **fields), seed=4)
    save_adapter(tmp_path, overlay)
    model = peft.PeftModel.from_pretrained(torch_base(folder), tmp_path).eval()
    row = torch.tensor(IDS[:, :6])
    with torch.no_grad():
        for _ in range(10):
            out = model(input_ids=row, attention_mask=torch.ones_like(row)).logits
            row = torch.cat([row, out[:, -1:].argmax(-1)], dim=1)
    ours = models.generate(config, params, IDS[:, :6], max_new_tokens=10, eos_token_id=(), overlay=overlay)
    np.testing.assert_array_equal(ours, row[:, 6:].numpy())
    assert len(np.unique(row[:, 6:])) > 2
