"""Models by shape, the work of every row, and the arithmetic that turns tokens a second into a share of the card's rate.

L length, D model, V vocab, R rank; attention width = query heads x head dim.
"""

import math
from dataclasses import dataclass

from qtjax.models import ModelConfig

SMOL = ModelConfig(
    vocab_size=49152, hidden_size=2048, intermediate_size=8192, num_hidden_layers=24, num_attention_heads=32, num_key_value_heads=32,
    head_dim=64, rope_theta=130000.0, tie_word_embeddings=True, max_position_embeddings=8192, bos_token_id=1, eos_token_id=(2,),
)  # fmt: skip
LLAMA = ModelConfig(
    vocab_size=128256, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32, num_key_value_heads=8,
    head_dim=128, rope_theta=500000.0, max_position_embeddings=8192, bos_token_id=1, eos_token_id=(2,),
)  # fmt: skip
_TINY = {"vocab_size": 512, "hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 2, "num_attention_heads": 4, "head_dim": 16}


@dataclass(frozen=True)
class Size:
    """What --shape names. models: by the name in the table, of which `full` is trained whole and `lora` under an adapter of this rank;
    lengths: of a row; tokens: of one optimizer step, or of one pass of scoring; matrix: rows of the square product that is the rate."""

    models: dict[str, ModelConfig]
    full: str
    lora: str
    rank: int
    lengths: tuple[int, ...]
    tokens: int
    matrix: int


SIZES = {
    "full": Size({"SmolLM2-1.7B": SMOL, "LLaMA-3-8B": LLAMA}, "SmolLM2-1.7B", "LLaMA-3-8B", 16, (2048, 4096), 32768, 8192),
    "tiny": Size(
        {"tiny-tied": ModelConfig(**_TINY, num_key_value_heads=4, tie_word_embeddings=True), "tiny-grouped": ModelConfig(**_TINY, num_key_value_heads=2)},
        "tiny-tied", "tiny-grouped", 4, (64, 128), 1024, 256,
    ),
}  # fmt: skip

# Dense bfloat16 TFLOP/s with float32 sums, from NVIDIA's data sheets; the first name that stands in the device's counts.
PEAKS = (
    ("H100 PCIe", 756), ("H100 NVL", 835), ("H100", 989), ("H200", 989), ("GH200", 989), ("B200", 2250), ("A100", 312), ("L40S", 362), ("L4", 121),
)  # fmt: skip

CHECK_RATE = 1e-3  # learning rate of the small models, at which three steps change the loss by far more than rounding does

FORMULAS = {
    "full": "6 (N + D V t) + 6 layers L A",
    "lora": "4 (N + D V t) + 6 R + 6 layers L A",
    "score": "2 (N + D V t) + 2 layers L A",
}


def published_peak(device: str) -> float | None:
    """FLOP a second that the maker states for the device, None of one that is not listed."""
    return next((tera * 1e12 for name, tera in PEAKS if name in device), None)


def layer_weights(config: ModelConfig) -> int:
    """N: values of the layers' matrices, which every token meets once in a forward pass."""
    d, heads, kv = config.hidden_size, config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
    return config.num_hidden_layers * (d * (2 * heads + 2 * kv) + 3 * d * config.intermediate_size)


def lora_values(config: ModelConfig, rank: int) -> int:
    """R: values of an adapter of this rank on all linear modules of the layers."""
    d, f = config.hidden_size, config.intermediate_size
    heads, kv = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
    return config.num_hidden_layers * rank * (2 * (d + heads) + 2 * (d + kv) + 3 * (d + f))


def token_flops(kind: str, config: ModelConfig, length: int, rank: int = 0) -> float:
    """FLOPs that a token needs, whatever else the program does (what remat computes twice is not counted).

    Two for every weight it meets going forward; as much again for the gradient of the activations, and again for that of the weights
    where they are trained. Attention has no weights, so that its backward pass costs twice its forward whoever is trained; of its two
    products half is masked away: 2 L A a layer. t: the share of tokens that are targets, (L - 1) / L: the head runs on those only.

    Args: kind: full | lora | score; rank: of the adapter.
    """
    head = config.hidden_size * config.vocab_size * (length - 1) / length
    attention = 2 * config.num_hidden_layers * length * config.num_attention_heads * config.head_dim
    products = {"full": 6, "lora": 4, "score": 2}[kind]
    own = 6 * lora_values(config, rank) if kind == "lora" else 0
    return products * (layer_weights(config) + head) + own + (1 if kind == "score" else 3) * attention


def expected_loss(config: ModelConfig) -> tuple[float, float]:
    """(mean nll, mean entropy) in nats of random weights on random tokens.

    The final norm gives states of length sqrt(D), and a head of normal(s) then logits of variance s^2 D, which know nothing of the
    targets: ln V plus and minus half of that.
    """
    half = config.initializer_range**2 * config.hidden_size / 2
    return math.log(config.vocab_size) + half, math.log(config.vocab_size) - half


def shrunk(config: ModelConfig) -> ModelConfig:
    """The same family at a size where a check costs nothing: two layers, two key heads with their queries, a small vocabulary, and
    weights so large that every token's loss depends on all that is computed."""
    heads = 2 * config.num_attention_heads // config.num_key_value_heads
    width = heads * config.head_dim
    return config.replace(
        vocab_size=min(config.vocab_size, 1024), hidden_size=width, intermediate_size=config.intermediate_size * width // config.hidden_size,
        num_hidden_layers=2, num_attention_heads=heads, num_key_value_heads=2, initializer_range=1.5 * width**-0.5,
    )  # fmt: skip


def small_kinds(size: Size, name: str) -> list[str]:
    """What is checked on the small form of a model: what is measured on it."""
    return ["score", *(["full"] if name == size.full else []), *(["lora"] if name == size.lora else [])]
