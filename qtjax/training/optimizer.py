"""AdamW with linear warm-up and cosine decay, gradients clipped by global norm; matrices decay, vectors do not."""

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


def decayed(params: Tree) -> Tree:
    """True for the leaves that weight decay touches: kernels, embeddings and low-rank factors, not norms or biases."""
    return unflatten({p: p.rsplit("/", 1)[-1] not in ("weight", "bias") for p in flatten(params)})


def make_optimizer(train: TrainSection, total_steps: int) -> optax.GradientTransformation:
    """optax.adamw under optax.clip_by_global_norm (0: no clipping)."""
    adamw = optax.adamw(
        learning_rate_schedule(train, total_steps),
        b1=train.b1,
        b2=train.b2,
        eps=train.eps,
        weight_decay=train.weight_decay,
        mask=decayed,
    )
    return optax.chain(optax.clip_by_global_norm(train.clip_norm), adamw) if train.clip_norm else adamw


def global_norm(tree: Tree) -> jax.Array:
    """Euclidean norm over all leaves, float32."""
    return optax.tree.norm(tree)
