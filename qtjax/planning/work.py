"""Floating-point operations of a step, counted from the model's shape, and the seconds that a chip's published rates make of them."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

from qtjax.config import Config, PruneSection
from qtjax.models import ModelConfig
from qtjax.planning.chips import Chip
from qtjax.planning.need import Need
from qtjax.pruning.budget import budget_table
from qtjax.training.ladder import cut
from qtjax.training.pruners import pruners

# Of a chip's published matrix rate, what well-tuned dense transformers reach on it; an assumption of the estimate.
REACHED = 0.6


class Matrices(NamedTuple):
    """Weights that a token is multiplied by: in the layers, and in the head."""

    layers: int
    head: int


def matrices(config: ModelConfig) -> Matrices:
    """The embedding is looked up, not multiplied by; norms and biases are left out."""
    d, heads, kv = config.hidden_size, config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
    layer = d * (2 * heads + 2 * kv) + 3 * d * config.intermediate_size
    return Matrices(config.num_hidden_layers * layer, d * config.vocab_size)


def attention_flops(config: ModelConfig, keys: float) -> float:
    """Of one token that sees so many keys, in all layers, forward: queries times keys, weights times values."""
    return 4 * keys * config.num_attention_heads * config.head_dim * config.num_hidden_layers


def keys_seen(length: int, window: int | None) -> float:
    """Mean number of keys that a causal query of a row of `length` sees, itself among them."""
    window = min(window or length, length)
    return window - window * (window - 1) / (2 * length)


def needed_flops(config: ModelConfig, tokens: float, length: int, *, trains: bool, frozen: bool = False) -> float:
    """What `tokens` need and no program can leave out: 2 N forward, 6 N with full training and 4 N with a frozen base, N the weights
    that a token meets, and causal attention: forward, and twice that backward.

    As in PaLM, arXiv 2204.02311, appendix B, but for the half of the attention that the causal mask takes away.
    """
    weights = sum(matrices(config))
    times = (2 if frozen else 3) if trains else 1
    return tokens * (2 * times * weights + (3 if trains else 1) * attention_flops(config, keys_seen(length, config.sliding_window)))


def spent_flops(config: ModelConfig, slots: float, length: int, *, trains: bool, frozen: bool = False) -> float:
    """What the programs compute over `slots`, padding among them: plain attention over whole rows, a kernel's over what is seen; under
    remat full or offload all layers a second time, under dots plain attention alone."""
    layers, head = matrices(config)
    plain = config.attention == "xla"
    times, passes = ((2 if frozen else 3), 3) if trains else (1, 1)
    weights = times * (layers + head)
    if trains and config.remat in ("full", "offload"):
        weights, passes = weights + layers, passes + 1
    elif trains and config.remat == "dots" and plain:
        passes += 1
    return slots * (2 * weights + passes * attention_flops(config, length if plain else keys_seen(length, config.sliding_window)))


@dataclass(frozen=True)
class Part:
    """A part of an optimizer step. tokens: real ones; slots: launched for them; flops: needed by the tokens; compute, memory, links:
    seconds that matrix units, memory and links are busy, links None where the compiler would not say what moves."""

    name: str
    tokens: float
    slots: int
    flops: float
    compute: float
    memory: float
    links: float | None

    @property
    def seconds(self) -> tuple[float, float]:
        """From all at once to one after the other."""
        return max(self.compute, self.memory, self.links or 0), self.compute + self.memory + (self.links or 0)


def kept_samples(prune: PruneSection) -> float:
    """Fraction (0-1] of a scoring batch that is trained on; InfoBatch drops its fraction of those below the mean, about half."""
    if prune.sample_pruner == "infobatch":
        return 1 - prune.infobatch_fraction / 2
    return 1.0 if prune.sample_pruner == "none" else int(budget_table(prune.sample_keep, prune.batch_size)[-1]) / prune.batch_size


def step_parts(
    config: Config, model: ModelConfig, chip: Chip, devices: int, needs: Mapping[str, Need], ladder: tuple[int, ...], length: int,
    tokens_per_sample: float, touched: int,
) -> list[Part]:  # fmt: skip
    """Scoring, training and update of a step, in perfectly packed rows.

    Args: needs: by these names; ladder: rows of a launch, largest first; length: of a row; tokens_per_sample: mean; touched: bytes
    that the update reads and writes on each device.
    """
    needed, kept = pruners(config.prune), kept_samples(config.prune)
    frozen, parts = config.overlay.method != "none", []
    samples = {"scoring": (kept if needed.early else 1) / config.prune.score_every if needed.passes else 0, "training": kept}
    for name, share in samples.items():
        tokens, trains = config.prune.batch_size * share * tokens_per_sample, name == "training"
        if not tokens:
            continue
        launches = cut(math.ceil(tokens / length), ladder)
        slots = sum(launches) * length
        flops = needed_flops(model, tokens, min(length, math.ceil(tokens_per_sample)), trains=trains, frozen=frozen)
        spent = spent_flops(model, slots, length, trains=trains, frozen=frozen)
        if trains and config.prune.reuse_forward:  # where a scoring pass was kept, layers run once: in the backward pass
            once = spent_flops(model.replace(remat="none"), slots, length, trains=True, frozen=frozen)
            spent += (once - spent) / config.prune.score_every
        compute = spent / devices / (chip.peak * 1e12 * REACHED)
        parts.append(Part(name, tokens, slots, flops, compute, 0.0, _links(needs.get(name), len(launches), chip)))
    parts.append(Part("update", 0, 0, 0.0, 0.0, touched / (chip.bandwidth * 1e9), _links(needs.get("update"), 1, chip)))
    return parts


def _links(need: Need | None, launches: int, chip: Chip) -> float | None:
    if need is None or need.moved is None:
        return None
    return launches * sum(each.bytes for each in need.moved) / (chip.links * 1e9)
