"""P-tuning (Liu et al. 2021, arXiv 2103.10385): the prompt before every row is what a small network makes of embeddings.

p = encoder(e), e [P, D] ~ N(0, 1). "MLP": Linear-ReLU-Linear-ReLU-Linear of width h. "LSTM": a bidirectional LSTM of
encoder_num_layers layers and h units a direction, then Linear(2h, 2h)-ReLU-Linear(2h, D). Torch's layouts, gate order
(input, forget, cell, output) and initialisations; the network runs once a step, in float32. encoder_dropout acts between
the LSTM's layers, in training; in PEFT neither it nor encoder_num_layers mean anything to the MLP, so a fresh overlay
refuses them there.

PEFT stores p and drops the encoder. We store both, and training goes on from ours; a folder with PEFT's file alone
becomes a plain prompt p, which is served and trained as such.
"""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from qtjax.models import Edits
from qtjax.overlays.base import Base, Context, Method
from qtjax.overlays.fields import require, setting, to_peft
from qtjax.overlays.leaves import Leaf, normal, uniform
from qtjax.overlays.prompt import prompt_leaf
from qtjax.overlays.sites import claims
from qtjax.overlays.tokens import Sizes, TokenFields, dense, dense_leaves, described, exact, read_tokens, whole
from qtjax.tree import Tree

_KEY = "prompt_encoder"


@dataclass(frozen=True)
class PtuningFields(TokenFields):
    """encoder_hidden_size: h, by default the model's width; encoder_dropout: fraction [0, 1) of the LSTM's inner outputs."""

    encoder_reparameterization_type: str = setting("MLP", "choice", ("MLP", "LSTM"))
    encoder_hidden_size: int | None = setting(None, "int>0")
    encoder_num_layers: int = setting(2, "int>0")
    encoder_dropout: float = setting(0.0, "[0,1)")


@dataclass(frozen=True)
class PtuningSpec:
    """Settings by PEFT's names, sizes, and whether the encoder is gone and the prompt itself is trained."""

    fields: PtuningFields
    sizes: Sizes
    flat: bool = False

    @property
    def lstm(self) -> bool:
        return self.fields.encoder_reparameterization_type == "LSTM"


def _read(base: Base, given: Mapping[str, Any], strict: bool) -> PtuningSpec:
    settings, sizes = read_tokens("ptuning", PtuningFields, base, given, strict)
    if strict and settings.encoder_reparameterization_type == "MLP":
        for name, only in (("encoder_num_layers", 2), ("encoder_dropout", 0.0)):
            value = getattr(settings, name)
            require(value == only, name, value, f"means nothing to the MLP encoder; leave it at {only}, or use the LSTM")
    if settings.encoder_hidden_size is None:
        settings = dataclasses.replace(settings, encoder_hidden_size=sizes.token_dim)
    return PtuningSpec(settings, sizes)


def _lstm_leaves(inputs: int, hidden: int, layers: int) -> list[Leaf]:
    """Torch's names and layouts, all U(+-1/sqrt(h))."""
    leaves = []
    for n in range(layers):
        width, axis = (inputs, "embed") if n == 0 else (2 * hidden, None)
        for way in ("", "_reverse"):
            for name, shape, axes in (
                ("weight_ih", (4 * hidden, width), (None, axis)),
                ("weight_hh", (4 * hidden, hidden), (None, None)),
                ("bias_ih", (4 * hidden,), (None,)),
                ("bias_hh", (4 * hidden,), (None,)),
            ):
                name = f"{name}_l{n}{way}"
                leaves.append(whole(f"lstm_head/{name}", shape, axes, f"{_KEY}.lstm_head.{name}", uniform(hidden**-0.5)))
    return leaves


def _leaves(spec: PtuningSpec) -> list[Leaf]:
    width, hidden, count = spec.sizes.token_dim, spec.fields.encoder_hidden_size, spec.fields.num_virtual_tokens
    if spec.flat:
        return [prompt_leaf(spec.sizes, count, normal(1.0))]
    leaves = [whole("embedding", (count, width), (None, "embed"), f"{_KEY}.embedding.weight", normal(1.0))]
    sizes = [width, hidden, hidden, width]
    if spec.lstm:
        leaves += _lstm_leaves(width, hidden, spec.fields.encoder_num_layers)
        sizes = [2 * hidden, 2 * hidden, width]
    for n, (inputs, outputs) in enumerate(zip(sizes, sizes[1:])):
        first, last = n == 0 and not spec.lstm, n == len(sizes) - 2
        axes = ("embed" if first else None, "embed" if last else None)
        leaves += dense_leaves(f"mlp_head/{2 * n}", f"{_KEY}.mlp_head.{2 * n}", inputs, outputs, axes)
    return leaves


def _one_way(weights: Tree, name: str, x: Array, reverse: bool) -> Array:
    """One direction of one LSTM layer: x [P, in] -> [P, h]."""
    kinds = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
    w_ih, w_hh, b_ih, b_hh = (jnp.asarray(weights[f"{kind}_{name}"]) for kind in kinds)

    def step(state: tuple[Array, Array], given: Array) -> tuple[tuple[Array, Array], Array]:
        h, c = state
        i, f, g, o = jnp.split(given + exact(h, w_hh.T), 4)
        c = jax.nn.sigmoid(f) * c + jax.nn.sigmoid(i) * jnp.tanh(g)
        h = jax.nn.sigmoid(o) * jnp.tanh(c)
        return (h, c), h

    start = jnp.zeros(w_hh.shape[1], jnp.float32)
    return jax.lax.scan(step, (start, start), exact(x, w_ih.T) + b_ih + b_hh, reverse=reverse)[1]


def _lstm(weights: Tree, x: Array, layers: int, rate: float, rng: Array | None) -> Array:
    """x [P, D] -> [P, 2h], forward and reverse side by side."""
    for n in range(layers):
        if n and rng is not None and rate > 0:
            keep = jax.random.bernoulli(jax.random.fold_in(rng, n), 1 - rate, x.shape)
            x = jnp.where(keep, x / (1 - rate), 0)
        x = jnp.concatenate([_one_way(weights, f"l{n}", x, False), _one_way(weights, f"l{n}_reverse", x, True)], axis=-1)
    return x


def _prompt(spec: PtuningSpec, params: Tree, rng: Array | None = None) -> Array:
    """The prompt [P, D], float32."""
    if spec.flat:
        return params["prompt_embeddings"]
    x, layers = params["embedding"], list(params["mlp_head"].values())
    if spec.lstm:
        x = _lstm(params["lstm_head"], x, spec.fields.encoder_num_layers, spec.fields.encoder_dropout, rng)
    for layer in layers[:-1]:
        x = jax.nn.relu(dense(layer, x))
    return dense(layers[-1], x)


def _expand(spec: PtuningSpec, params: Tree, frozen: Tree, context: Context) -> Edits:
    del frozen
    return Edits({}, virtual=_prompt(spec, params, context.rng)[None])


def _file(spec: PtuningSpec, params: Tree, frozen: Tree) -> dict[str, Any] | None:
    del frozen
    return None if spec.flat else {"prompt_embeddings": _prompt(spec, params)}


def _from_file(spec: PtuningSpec, tensors: Mapping[str, Any]) -> tuple[PtuningSpec, Tree, Tree]:
    prompt = jnp.asarray(tensors["prompt_embeddings"], jnp.float32)
    return dataclasses.replace(spec, flat=True), {"prompt_embeddings": prompt}, {}


METHOD = Method(
    fields=PtuningFields,
    read=_read,
    leaves=_leaves,
    expand=_expand,
    to_peft=lambda spec: {"peft_type": "P_TUNING", **to_peft(spec.fields), **described(spec.sizes)},
    claims=claims("P_TUNING"),
    unmergeable="a prompt is tokens before the row, no weight",
    draws=lambda spec: not spec.flat and spec.lstm and spec.fields.encoder_dropout > 0 and spec.fields.encoder_num_layers > 1,
    file=_file,
    from_file=_from_file,
)
