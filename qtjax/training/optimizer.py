"""AdamW with linear warm-up and cosine decay, gradients clipped by global norm; matrices decay, vectors do not."""

from collections.abc import Mapping
from typing import Any

import jax
import optax

from qtjax.config import TrainSection
from qtjax.tree import Tree, flatten, unflatten


def learning_rate_schedule(train: TrainSection, total_steps: int) -> optax.Schedule:
    """Learning rate by optimizer step: peak / (warm-up steps + 1) -> peak over the warm-up, then a cosine to final_lr_fraction of it."""
    warmup = min(round(train.warmup_fraction * total_steps), max(total_steps - 1, 0))
    return optax.warmup_cosine_decay_schedule(
        init_value=train.learning_rate / (warmup + 1),
        peak_value=train.learning_rate,
        warmup_steps=warmup,
        decay_steps=max(total_steps, 1),
        end_value=train.learning_rate * train.final_lr_fraction,
    )


def make_optimizer(
    train: TrainSection, total_steps: int, decayed: Mapping[str, bool], rates: Mapping[str, float] | None = None
) -> optax.GradientTransformation:
    """optax.adamw under optax.clip_by_global_norm (0: no clipping).

    Args: decayed: {leaf path: whether weight decay touches it}; rates: {leaf path: factor on the learning rate}.
    """
    adamw = optax.adamw(
        learning_rate_schedule(train, total_steps),
        b1=train.b1,
        b2=train.b2,
        eps=train.eps,
        weight_decay=train.weight_decay,
        mask=lambda params: unflatten({path: decayed[path] for path in flatten(params)}),
    )
    parts = [optax.clip_by_global_norm(train.clip_norm)] if train.clip_norm else []
    parts += [adamw] + ([optax.stateless(lambda updates, _: _scaled(updates, rates))] if rates else [])
    return optax.chain(*parts) if len(parts) > 1 else adamw


def passed(optimizer: Any) -> Any:
    """The optax state after a step of the run that updated nothing: only the learning rate's schedule goes on."""
    kind = optax.ScaleByScheduleState
    return jax.tree.map(
        lambda x: x._replace(count=x.count + 1) if isinstance(x, kind) else x, optimizer, is_leaf=lambda x: isinstance(x, kind)
    )


def _scaled(updates: Tree, rates: Mapping[str, float]) -> Tree:
    return unflatten({path: update * rates.get(path, 1.0) for path, update in flatten(updates).items()})


def global_norm(tree: Tree) -> jax.Array:
    """Euclidean norm over all leaves, float32."""
    return optax.tree.norm(tree)
