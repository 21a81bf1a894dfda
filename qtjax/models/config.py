"""Shape and numerics of a decoder of the LLaMA family, read from and written to Hugging Face's config.json."""

import dataclasses
from dataclasses import dataclass
from typing import Any

from qtjax.errors import QtjaxError, near_names

MODEL_TYPES = ("llama", "mistral")
ACTIVATIONS = ("silu", "gelu", "gelu_pytorch_tanh", "gelu_new", "relu")


@dataclass(frozen=True)
class RopeScaling:
    """Rotary frequencies rescaled: "linear" (divide by factor) or "llama3" (by wavelength bands)."""

    rope_type: str
    factor: float
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position_embeddings: int = 8192


# The largest width and number of layers at which a run unrolls them by itself (docs/performance.md): what the loop costs, slices of what it
# stacks, goes with the width, and products with its square; each layer more is as much more to compile.
UNROLLED_WIDTH, UNROLLED_LAYERS = 64, 8


@dataclass(frozen=True)
class ModelConfig:
    """Names are Hugging Face's; the last seven fields say how to compute, not what, and are not written to config.json.

    `dtype` is the compute dtype, `param_dtype` the storage dtype; `remat` none | dots | full | offload;
    `unroll_layers` trades compile time for step time; `quantization` None | nf4 | int8 | int4 of the layers' kernels;
    `attention` xla (any mask) | blocks (CPU) | cudnn (NVIDIA) | splash (TPU): all equal but for rounding (models/attention.py);
    `max_segments`: samples that a row holds at most, each in one piece, padding behind them, which lets cudnn do without a mask; 0: any rows. Another row is NaN.
    """

    model_type: str = "llama"
    vocab_size: int = 32000
    hidden_size: int = 4096
    intermediate_size: int = 11008
    num_hidden_layers: int = 32
    num_attention_heads: int = 32
    num_key_value_heads: int = 32
    head_dim: int = 128
    hidden_act: str = "silu"
    rms_norm_eps: float = 1e-5
    rope_theta: float = 10000.0
    rope_scaling: RopeScaling | None = None
    max_position_embeddings: int = 4096
    sliding_window: int | None = None
    tie_word_embeddings: bool = False
    attention_bias: bool = False
    mlp_bias: bool = False
    initializer_range: float = 0.02
    bos_token_id: int | None = None
    eos_token_id: tuple[int, ...] = ()
    pad_token_id: int | None = None
    dtype: str = "float32"
    param_dtype: str = "float32"
    remat: str = "none"
    unroll_layers: bool = False
    quantization: str | None = None
    attention: str = "xla"
    max_segments: int = 0

    def replace(self, **changes: Any) -> "ModelConfig":
        return dataclasses.replace(self, **changes)

    @staticmethod
    def from_hf(raw: dict[str, Any], where: str = "config.json") -> "ModelConfig":
        """Reads both spellings of transformers 4 (rope_theta, rope_scaling) and 5 (rope_parameters).

        Raises QtjaxError naming any field whose value would change the numbers and is not supported.
        """
        model_type = raw.get("model_type", "")
        if model_type not in MODEL_TYPES:
            raise QtjaxError(
                f"{where}: model_type {model_type!r} is not supported, known: {', '.join(MODEL_TYPES)}"
                f"{near_names(model_type, MODEL_TYPES)}"
            )
        absent = [k for k in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads") if k not in raw]  # fmt: skip
        if absent:
            raise QtjaxError(f"{where}: {', '.join(absent)} missing; is this a complete {model_type} config?")
        if raw.get("quantization_config"):
            raise QtjaxError(f"{where}: quantization_config is not supported; give the unquantised checkpoint")
        activation = raw.get("hidden_act", "silu")
        if activation not in ACTIVATIONS:
            raise QtjaxError(f"{where}: hidden_act {activation!r} is not supported, known: {', '.join(ACTIVATIONS)}")
        sizes = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
        optional = ("num_key_value_heads", "head_dim", "sliding_window", "max_position_embeddings")
        for name in (*sizes, *(k for k in optional if raw.get(k) is not None)):
            if type(raw[name]) is not int or raw[name] < 1:
                raise QtjaxError(f"{where}: {name} = {raw[name]!r}: must be an integer above 0")
        heads = raw["num_attention_heads"]
        eos = raw.get("eos_token_id")
        theta, scaling = _rope(raw, where)
        mistral = model_type == "mistral"
        window = raw.get("sliding_window", 4096) if mistral else None
        kinds = set(raw.get("layer_types") or ())
        if kinds - {"sliding_attention" if window else "full_attention"}:
            raise QtjaxError(
                f"{where}: layer_types mixes or contradicts sliding_window = {window}: {', '.join(sorted(kinds))};"
                " one kind of attention for all layers is supported"
            )
        config = ModelConfig(
            model_type=model_type,
            vocab_size=raw["vocab_size"],
            hidden_size=raw["hidden_size"],
            intermediate_size=raw["intermediate_size"],
            num_hidden_layers=raw["num_hidden_layers"],
            num_attention_heads=heads,
            num_key_value_heads=raw.get("num_key_value_heads") or (8 if mistral and "num_key_value_heads" not in raw else heads),
            head_dim=raw.get("head_dim") or raw["hidden_size"] // heads,
            hidden_act=activation,
            rms_norm_eps=raw.get("rms_norm_eps", 1e-6),
            rope_theta=theta,
            rope_scaling=scaling,
            max_position_embeddings=raw.get("max_position_embeddings", 131072 if mistral else 2048),
            sliding_window=window,
            tie_word_embeddings=raw.get("tie_word_embeddings", False),
            attention_bias=raw.get("attention_bias", False) and not mistral,
            mlp_bias=raw.get("mlp_bias", False) and not mistral,
            initializer_range=raw.get("initializer_range", 0.02),
            bos_token_id=raw.get("bos_token_id"),
            eos_token_id=() if eos is None else tuple(eos) if isinstance(eos, list) else (eos,),
            pad_token_id=raw.get("pad_token_id"),
        )
        if heads % config.num_key_value_heads:
            raise QtjaxError(
                f"{where}: num_key_value_heads = {config.num_key_value_heads}: must divide num_attention_heads = {heads}"
            )
        if config.head_dim % 2:
            raise QtjaxError(f"{where}: head_dim = {config.head_dim}: must be even, rotary positions turn pairs")
        return config

    def to_hf(self) -> dict[str, Any]:
        """A config.json that transformers 4 and 5 both read."""
        scaling = None
        if self.rope_scaling is not None:
            scaling = {"rope_type": self.rope_scaling.rope_type, "factor": self.rope_scaling.factor}
            if self.rope_scaling.rope_type == "llama3":
                scaling = dataclasses.asdict(self.rope_scaling)
        eos = self.eos_token_id
        out = {
            "architectures": ["LlamaForCausalLM" if self.model_type == "llama" else "MistralForCausalLM"],
            "model_type": self.model_type,
            "vocab_size": self.vocab_size,
            "hidden_size": self.hidden_size,
            "intermediate_size": self.intermediate_size,
            "num_hidden_layers": self.num_hidden_layers,
            "num_attention_heads": self.num_attention_heads,
            "num_key_value_heads": self.num_key_value_heads,
            "head_dim": self.head_dim,
            "hidden_act": self.hidden_act,
            "rms_norm_eps": self.rms_norm_eps,
            "rope_theta": self.rope_theta,
            "rope_scaling": scaling,
            "rope_parameters": {"rope_type": "default"} | (scaling or {}) | {"rope_theta": self.rope_theta},
            "max_position_embeddings": self.max_position_embeddings,
            "tie_word_embeddings": self.tie_word_embeddings,
            "initializer_range": self.initializer_range,
            "attention_dropout": 0.0,
            "bos_token_id": self.bos_token_id,
            "eos_token_id": eos[0] if len(eos) == 1 else list(eos) or None,
            "pad_token_id": self.pad_token_id,
            "use_cache": True,
            "torch_dtype": self.param_dtype,
        }
        if self.model_type == "mistral":
            out["sliding_window"] = self.sliding_window
        else:
            out |= {"attention_bias": self.attention_bias, "mlp_bias": self.mlp_bias, "pretraining_tp": 1}
        return out


def _rope(raw: dict[str, Any], where: str) -> tuple[float, RopeScaling | None]:
    field = "rope_parameters" if raw.get("rope_parameters") else "rope_scaling"
    parameters, scaling = raw.get("rope_parameters") or {}, raw.get("rope_scaling") or {}
    if not isinstance(parameters, dict) or not isinstance(scaling, dict):
        raise QtjaxError(f"{where}: {field} must be an object with rope_type, or null")
    merged = scaling | parameters
    theta = float(parameters.get("rope_theta", raw.get("rope_theta") or 10000.0))
    if merged.get("partial_rotary_factor", raw.get("partial_rotary_factor") or 1.0) != 1.0:
        raise QtjaxError(f"{where}: partial_rotary_factor other than 1 is not supported")
    kind = merged.get("rope_type", merged.get("type", "default"))
    if kind == "default":
        return theta, None
    needed = {
        "linear": ("factor",),
        "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
    }
    if kind not in needed:
        raise QtjaxError(f"{where}: {field}: rope_type {kind!r} is not supported, known: default, {', '.join(needed)}")
    absent = [name for name in needed[kind] if name not in merged]
    if absent:
        raise QtjaxError(f"{where}: {field}: rope_type {kind!r} needs {', '.join(absent)}")
    if kind == "linear":
        return theta, RopeScaling("linear", float(merged["factor"]))
    return theta, RopeScaling(
        "llama3",
        float(merged["factor"]),
        float(merged["low_freq_factor"]),
        float(merged["high_freq_factor"]),
        int(merged["original_max_position_embeddings"]),
    )


def unrolled(config: ModelConfig, asked: bool) -> bool:
    """ModelConfig.unroll_layers of a run: where it is asked for, and by itself in a small model."""
    return asked or (config.hidden_size <= UNROLLED_WIDTH and config.num_hidden_layers <= UNROLLED_LAYERS)
