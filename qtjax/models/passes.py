"""One pass of the decoder over rows, with what an overlay changes, who is rated, and what is known of the layers already."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from qtjax.errors import QtjaxError
from qtjax.models.attention import Segments, by_segments, takes_runs, visible
from qtjax.models.blocks import first_slots
from qtjax.models.config import ModelConfig
from qtjax.models.decoder import Decoder
from qtjax.models.edits import Edits, expanded
from qtjax.models.packed import runs
from qtjax.models.ratings import plan
from qtjax.models.virtual import among_virtual, check_task_ids, of_rows, offsets, sees_virtual
from qtjax.tree import Tree


class Row(NamedTuple):
    """Arrays as in `api.hidden_states`; segment: of every slot, 0 where nothing real stands; targets: bool [B, L], whom `rater` rates;
    keep: what the layers give is wanted too; outputs: it is known."""

    input_ids: Array
    position_ids: Array | None
    segment: Array
    segment_ids: Array | None
    task_ids: Array | None
    targets: Array | None = None
    rater: str | None = None
    keep: bool = False
    outputs: Array | None = None

    def plan(self, config: ModelConfig, ahead: int = 0) -> Any:
        """Who is rated by whom where `ahead` virtual tokens stand before the row, or None."""
        if self.rater is None:
            return None
        targets, segment = (jnp.pad(x, ((0, 0), (ahead, 0))) for x in (self.targets, self.segment))
        return plan(self.rater, config.num_hidden_layers, targets, segment)


def segments(input_ids: Array, attention_mask: Array | None, segment_ids: Array | None) -> Array:
    """int32 [B, L]: the segment of every slot, 0 where nothing real stands."""
    own = jnp.ones(input_ids.shape, jnp.int32) if segment_ids is None else segment_ids.astype(jnp.int32)
    return own if attention_mask is None else jnp.where(attention_mask != 0, own, 0)


def row_of(
    input_ids: Array, attention_mask: Array | None, position_ids: Array | None, segment_ids: Array | None, task_ids: Array | None
) -> Row:
    """Rows as they are given, nobody rated and nothing known."""
    segment = segments(input_ids, attention_mask, segment_ids)
    return Row(input_ids, position_ids, segment, segment_ids, None if task_ids is None else jnp.asarray(task_ids))


def states(
    config: ModelConfig, params: Tree, row: Row, overlay: Any, rng: Array | None = None
) -> tuple[Array, Array | None]:
    """Hidden states and, where the row names a rater, the rating, or, where it is to be kept, what the layers gave."""
    if overlay is None:
        return _run(config, params, row, Edits({}))
    check_task_ids(overlay.tasks, row.task_ids, row.input_ids.shape, row.segment != 0)
    edits = expanded(config, params, overlay, rng, row.task_ids)
    if not overlay.two_passes:
        return _run(config, params, row, edits)
    _refuse_known(row, f"{overlay.method} takes two passes")
    first, _ = _run(config, params, row._replace(rater=None), edits)
    return _run(config, params, row, overlay.expand(rng, row.task_ids, jax.lax.stop_gradient(first)))


def variables(params: Tree, edits: Edits) -> dict[str, Tree]:
    """The decoder's variable collections."""
    return {"params": params} | ({"overlay": edits.tree} if edits.tree else {}) | ({"shared": edits.shared} if edits.shared else {})


def _run(config: ModelConfig, params: Tree, row: Row, edits: Edits) -> tuple[Array, Array | None]:
    slots, window = jnp.arange(row.input_ids.shape[1], dtype=jnp.int32), config.sliding_window
    alone, fits = edits.virtual is None and not edits.prefix and row.rater is None, None
    if alone and takes_runs(config, row.input_ids.shape[1]):
        mask, fits = runs(row.segment, config.max_segments)
    elif alone and by_segments(config, *row.input_ids.shape):
        mask = Segments(row.segment, first_slots(row.segment))
    else:
        mask = visible(slots, slots, row.segment, row.segment, window)
    # Only these need to know where a segment began.
    offset = offsets(slots, row.segment_ids) if edits.ahead or row.position_ids is None else slots
    positions = offset if row.position_ids is None else row.position_ids
    positions = jnp.broadcast_to(positions, row.input_ids.shape) + edits.ahead
    if edits.virtual is not None:
        return _run_behind(config, params, row, edits, offset, positions, mask)
    if edits.prefix:
        mask = jnp.concatenate([sees_virtual(offset, row.segment, edits.prefix, window), mask], axis=-1)
    known = {} if row.outputs is None else {"known": {"layers": {"output": row.outputs}}}
    given = (variables(params, edits) | known, row.input_ids, positions, mask)
    if row.keep:
        (hidden, *_), kept = Decoder(config).apply(*given, mutable=["known"])
        beside = kept["known"]["layers"]["output"]
    else:
        hidden, _, beside = Decoder(config).apply(*given, plan=row.plan(config))
    hidden = jnp.where((row.segment != 0)[..., None], hidden, 0)
    return (hidden if fits is None else jnp.where(fits[:, None, None], hidden, jnp.nan)), beside


def _refuse_known(row: Row, why: str) -> None:
    if row.keep or row.outputs is not None:
        raise QtjaxError(f"the layers' outputs: cannot be kept or known where {why}; use hidden_states without them")


def _run_behind(
    config: ModelConfig, params: Tree, row: Row, edits: Edits, offset: Array, positions: Array, mask: Array
) -> tuple[Array, Array | None]:
    """`_run` with virtual embeddings before the rows: the row's task's, or all tasks' where its tokens differ in task."""
    _refuse_known(row, "virtual tokens stand before the rows")
    groups, count = edits.virtual.shape[:2]
    batch, window, same, known = positions.shape[0], config.sliding_window, None, True
    if groups > 1 and row.task_ids is not None and row.task_ids.ndim == 2:
        virtual = edits.virtual.reshape(groups * count, -1)
        same = row.task_ids[..., None] == jnp.arange(groups)
        known = same.any(axis=-1)
    else:
        virtual, groups = of_rows(edits.virtual, row.task_ids), 1
    extra = groups * count
    own = jnp.broadcast_to(jnp.tile(jnp.arange(count, dtype=positions.dtype), groups), (batch, extra))
    top = jnp.pad(among_virtual(groups, count, window), ((0, 0), (0, mask.shape[-1])))
    seen = sees_virtual(offset, row.segment, count, window, same)
    mask = jnp.concatenate(
        [jnp.broadcast_to(top, (batch, 1, *top.shape)), jnp.concatenate([seen, mask], axis=-1)], axis=2
    )
    positions = jnp.concatenate([own, positions], axis=1)
    hidden, _, rating = Decoder(config).apply(
        variables(params, edits), row.input_ids, positions, mask, virtual=virtual, plan=row.plan(config, extra)
    )
    hidden = hidden[:, extra:] if same is None else jnp.where(known[..., None], hidden[:, extra:], jnp.nan)
    if rating is not None:
        rating = rating[:, extra:] if same is None else jnp.where(known | ~row.targets, rating[:, extra:], jnp.nan)
    return jnp.where((row.segment != 0)[..., None], hidden, 0), rating


def with_known(config: ModelConfig, row: Row, rng: Array | None) -> ModelConfig:
    """The config by which layers run whose outputs are known."""
    found, wanted = row.outputs, (config.num_hidden_layers, *row.input_ids.shape, config.hidden_size)
    if found.shape != wanted or found.dtype != config.dtype:
        raise QtjaxError(f"outputs: must be {config.dtype} {list(wanted)}, got {found.dtype} {list(found.shape)}")
    if rng is not None:
        raise QtjaxError("outputs: are known of a pass that draws nothing; leave rng out")
    # What none and dots keep of a forward pass would have to be computed.
    return config if config.remat == "offload" else config.replace(remat="full")
