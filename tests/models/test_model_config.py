"""config.json: what is read, what is refused by name, what is written."""

import json

import pytest

from qtjax.errors import QtjaxError
from qtjax.models import ModelConfig, RopeScaling

LLAMA = dict(
    model_type="llama", vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4
)
LLAMA3 = dict(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=8192)


def read(**changes) -> ModelConfig:
    return ModelConfig.from_hf(LLAMA | changes, where="config.json")


def test_absent_and_null_fields_mean_what_transformers_takes_them_for():
    """Defaults of LlamaConfig and MistralConfig: head_dim null, no kv heads (all | 8), window absent (4096) or null."""
    config = read()
    assert (config.head_dim, config.num_key_value_heads, config.sliding_window) == (8, 4, None)
    assert (config.rms_norm_eps, config.rope_theta, config.tie_word_embeddings) == (1e-6, 1e4, False)
    assert read(head_dim=None, num_key_value_heads=None).head_dim == 8
    mistral = read(model_type="mistral", num_attention_heads=16)
    assert (mistral.num_key_value_heads, mistral.sliding_window) == (8, 4096)
    assert read(model_type="mistral", num_key_value_heads=2, sliding_window=None).sliding_window is None
    assert read(sliding_window=4).sliding_window is None  # LLaMA has none, whatever stands there
    assert read(head_dim=16).head_dim == 16


@pytest.mark.parametrize("eos, expected", ((2, (2,)), ([2, 7], (2, 7)), (None, ()), (0, (0,))))
def test_eos_is_a_tuple(eos, expected):
    """eos_token_id may be a number, a list (LLaMA 3 instruct) or null; it comes back as it was."""
    config = read(eos_token_id=eos)
    assert config.eos_token_id == expected
    assert config.to_hf()["eos_token_id"] == eos


@pytest.mark.parametrize(
    "fields, expected",
    (
        (dict(rope_theta=5e5, rope_scaling=dict(rope_type="llama3", **LLAMA3)), RopeScaling("llama3", *LLAMA3.values())),
        (dict(rope_parameters=dict(rope_type="llama3", rope_theta=5e5, **LLAMA3)), RopeScaling("llama3", *LLAMA3.values())),
        (dict(rope_theta=5e5, rope_scaling=dict(type="linear", factor=2.0)), RopeScaling("linear", 2.0)),
        (dict(rope_theta=5e5, rope_scaling=None), None),
        (dict(rope_parameters=dict(rope_type="default", rope_theta=5e5)), None),
    ),
)
def test_rope_in_both_spellings(fields, expected):
    """rope_theta + rope_scaling (transformers 4, also the old key "type") and rope_parameters (5) say the same."""
    config = read(**fields)
    assert (config.rope_theta, config.rope_scaling) == (5e5, expected)
    assert ModelConfig.from_hf(json.loads(json.dumps(config.to_hf()))) == config


@pytest.mark.parametrize(
    "changes, named",
    (
        (dict(model_type="qwen2"), "model_type 'qwen2'"),
        (dict(model_type="lama"), "did you mean 'llama'"),
        (dict(rope_scaling=dict(rope_type="yarn", factor=4.0)), "rope_scaling: rope_type 'yarn'"),
        (dict(rope_parameters=dict(rope_type="dynamic", factor=4.0)), "rope_parameters: rope_type 'dynamic'"),
        (dict(rope_scaling=dict(rope_type="llama3", factor=4.0)), "low_freq_factor"),
        (dict(rope_scaling=2.0), "rope_scaling must be"),
        (dict(partial_rotary_factor=0.5), "partial_rotary_factor"),
        (dict(quantization_config=dict(bits=4)), "quantization_config"),
        (dict(hidden_act="relu2"), "hidden_act 'relu2'"),
        (dict(num_key_value_heads=3), "num_key_value_heads = 3"),
        (dict(hidden_size=36, head_dim=9), "head_dim = 9"),
        (dict(vocab_size="64"), "vocab_size = '64'"),
        (dict(num_hidden_layers=0), "num_hidden_layers = 0"),
        (dict(layer_types=["full_attention", "sliding_attention"]), "layer_types"),
        (dict(model_type="mistral", sliding_window=4, layer_types=["full_attention"] * 2), "layer_types"),
    ),
)
def test_what_would_change_the_numbers_is_refused_by_name(changes, named):
    """A field that is not supported gives one line with the file and the field, never a silently other model."""
    with pytest.raises(QtjaxError) as caught:
        read(**changes)
    message = str(caught.value)
    assert named in message and message.startswith("config.json: ") and "\n" not in message


def test_missing_sizes_are_listed():
    """A config without its sizes is an error that lists them."""
    with pytest.raises(QtjaxError, match="hidden_size, intermediate_size missing"):
        ModelConfig.from_hf({k: v for k, v in LLAMA.items() if k not in ("hidden_size", "intermediate_size")})


def test_written_config_reads_back_the_same():
    """to_hf -> JSON -> from_hf is the identity for every field that config.json holds."""
    for config in (
        read(tie_word_embeddings=True, attention_bias=True, mlp_bias=True, bos_token_id=1, eos_token_id=[2, 3], pad_token_id=0),
        read(model_type="mistral", num_key_value_heads=2, head_dim=24, sliding_window=8, hidden_act="gelu"),
        read(model_type="mistral", num_key_value_heads=2, sliding_window=None, initializer_range=0.1, rms_norm_eps=1e-3),
    ):
        assert ModelConfig.from_hf(json.loads(json.dumps(config.to_hf()))) == config
