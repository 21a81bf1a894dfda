"""Cached generation: one prefill, then one compiled loop over tokens; nothing is compiled per token."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from qtjax.models.api import logits as logits_of
from qtjax.models.attention import visible
from qtjax.models.config import ModelConfig
from qtjax.models.decoder import Decoder
from qtjax.models.edits import Edits, expanded
from qtjax.models.passes import variables
from qtjax.models.virtual import check_task_ids, of_rows, sees_virtual
from qtjax.tree import Tree


def generate(
    config: ModelConfig,
    params: Tree,
    input_ids: Array,
    attention_mask: Array | None = None,
    *,
    max_new_tokens: int,
    temperature: float = 0.0,
    top_p: float = 1.0,
    eos_token_id: int | tuple[int, ...] | None = None,
    pad_token_id: int | None = None,
    key: Array | None = None,
    overlay: Any = None,
    task_ids: Array | None = None,
) -> Array:
    """Continues a batch of left-padded prompts.

    Args:
      input_ids: int [B, L], padded on the left. attention_mask: [B, L], 0 on padding; default all real.
      max_new_tokens: tokens to produce at most. temperature: 0 is greedy. top_p: nucleus mass (0, 1].
      eos_token_id: a sequence ends with (and includes) the first of these; default config.eos_token_id.
      pad_token_id: fills a row after its end; default config.pad_token_id, else the first EOS, else 0.
      key: sampling key; default jax.random.key(0). overlay, task_ids (int [B]): as in `hidden_states`.
    Virtual tokens stand before the padding; a row's positions count from its own first token and start after them.
    Returns: int32 [B, max_new_tokens].
    """
    input_ids = jnp.asarray(input_ids, jnp.int32)
    mask = jnp.ones(input_ids.shape, bool) if attention_mask is None else jnp.asarray(attention_mask) != 0
    eos = config.eos_token_id if eos_token_id is None else eos_token_id
    eos = (eos,) if isinstance(eos, int) else tuple(eos)
    pad = config.pad_token_id if pad_token_id is None else pad_token_id
    pad = pad if pad is not None else (eos[0] if eos else 0)
    key = jax.random.key(0) if key is None else key
    knobs = (jnp.float32(temperature), jnp.float32(top_p))
    greedy = temperature == 0.0
    task_ids = None if task_ids is None else jnp.asarray(task_ids)
    if overlay is not None:
        check_task_ids(overlay.tasks, task_ids, (input_ids.shape[0],))
    return _generate(config, max_new_tokens, eos, pad, greedy, params, overlay, task_ids, input_ids, mask, knobs, key)


def _sample(logits_BV: Array, temperature: Array, top_p: Array, key: Array) -> Array:
    """Draws from the smallest set of most probable tokens whose mass reaches top_p (nucleus sampling)."""
    scaled = logits_BV / temperature
    order = jnp.argsort(-scaled, axis=-1)
    probability = jax.nn.softmax(jnp.take_along_axis(scaled, order, axis=-1), axis=-1)
    before = jnp.cumsum(probability, axis=-1) - probability
    kept = jnp.where(before < top_p, jnp.log(probability), -jnp.inf)
    rank = jax.random.categorical(key, kept, axis=-1)
    return jnp.take_along_axis(order, rank[:, None], axis=-1)[:, 0].astype(jnp.int32)


@partial(jax.jit, static_argnums=(0, 1, 2, 3, 4))
def _generate(config, max_new_tokens, eos, pad, greedy, params, overlay, task_ids, input_ids, mask, knobs, key):
    batch, length = input_ids.shape
    model, window = Decoder(config), config.sliding_window
    edits = Edits({}) if overlay is None else expanded(config, params, overlay, None, task_ids)
    virtual = None if edits.virtual is None else of_rows(edits.virtual, task_ids)
    ahead = 0 if virtual is None else virtual.shape[-2]  # virtual tokens take slots of the cache, a prefix does not
    start, total = edits.ahead, ahead + length + max_new_tokens
    shape = (config.num_hidden_layers, batch, total, config.num_key_value_heads, config.head_dim)
    empty = (jnp.zeros(shape, config.dtype), jnp.zeros(shape, config.dtype))
    two = overlay is not None and overlay.two_passes
    caches = (empty, empty) if two else (empty,)
    real_slots = [jnp.ones((batch, ahead), jnp.int32), mask.astype(jnp.int32), jnp.ones((batch, max_new_tokens), jnp.int32)]
    key_segments, slots = jnp.concatenate(real_slots, axis=1), jnp.arange(total)
    first = ahead + jnp.argmax(mask, axis=1)[:, None]  # as in a packed row, padding puts no distance before virtual tokens

    def forward(ids, positions, slot, caches, virtual=None):
        count = positions.shape[1]
        query_slots = slot + jnp.arange(count)
        queries = jax.lax.dynamic_slice_in_dim(key_segments, slot, count, axis=1)
        sight = visible(query_slots, slots, queries, key_segments, window)
        if ahead:
            seen = sees_virtual(query_slots - first, queries, ahead, window)
            own = (query_slots < ahead)[None, None, :, None]
            sight = sight.at[..., :ahead].set(jnp.where(own, sight[..., :ahead], seen))
        if edits.prefix:
            sight = jnp.concatenate([sees_virtual(query_slots - first, queries, edits.prefix, window), sight], axis=-1)

        def run(edits, cache):
            return model.apply(variables(params, edits), ids, positions, sight, cache, slot, virtual)[:2]

        hidden, cache = run(edits, caches[0])
        after = (cache,)
        if two:
            hidden, cache = run(overlay.expand(None, task_ids, hidden), caches[1])
            after += (cache,)
        return logits_of(config, params, hidden[:, -1], overlay, task_ids), after

    def choose(logits, step):
        if greedy:
            return jnp.argmax(logits, axis=-1).astype(jnp.int32)
        return _sample(logits, *knobs, jax.random.fold_in(key, step))

    positions = jnp.maximum(jnp.cumsum(mask, axis=1) - 1, 0) + start
    if ahead:
        positions = jnp.concatenate([jnp.broadcast_to(jnp.arange(ahead), (batch, ahead)), positions], axis=1)
    logits, cache = forward(input_ids, positions, 0, caches, virtual)
    real = mask.sum(axis=1) + start
    out = jnp.full((batch, max_new_tokens), pad, jnp.int32)
    ends = jnp.array(eos, jnp.int32)

    def alive(state):
        step, _, _, _, done = state
        return (step < max_new_tokens) & ~done.all()

    def one(state):
        step, logits, cache, out, done = state
        token = jnp.where(done, pad, choose(logits, step))
        out = jax.lax.dynamic_update_slice_in_dim(out, token[:, None], step, axis=1)
        done |= (token[:, None] == ends).any(axis=1)
        logits, cache = forward(token[:, None], (real + step)[:, None], ahead + length + step, cache)
        return step + 1, logits, cache, out, done

    return jax.lax.while_loop(alive, one, (0, logits, cache, out, jnp.zeros(batch, bool)))[3]
