"""Real optimizer steps on an overlay: those of training/step.py with AdamW and the method's own rule, without files and clocks."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from qtjax.config import MeshSection, TrainSection
from qtjax.parallel import make_mesh
from qtjax.training.optimizer import make_optimizer
from qtjax.training.state import Subject, TrainState
from qtjax.training.step import accumulate, update

# A rate at which three steps move the logits of a tiny model by far more than any tolerance.
TRAIN = TrainSection(learning_rate=0.02, warmup_fraction=0.0, weight_decay=0.01)
TOTAL = 8


def packed_rows(vocabulary: int, tasks: int = 0) -> dict[str, np.ndarray]:
    """Four packed rows of two segments each, 2 in 3 targets trained, a task of its own in every segment."""
    count, length, half = 4, 16, 8
    at = np.broadcast_to(np.arange(length), (count, length))
    segment = np.arange(count)[:, None] * 2 + at // half
    return {
        "input_ids": np.random.default_rng(8).integers(3, vocabulary, (count, length)).astype(np.int32),
        "position_ids": (at % half).astype(np.int32),
        "segment_ids": (1 + at // half).astype(np.int32),
        "task_ids": (segment % max(tasks, 1)).astype(np.int32),
        "weights": ((at % 3 > 0) & (at % half > 0)).astype(np.float32),
    }


def _optimizer(subject: Subject):
    return make_optimizer(TRAIN, TOTAL, subject.decayed(), subject.rates())


def begin(config, overlay) -> TrainState:
    """The state before the first step."""
    subject = Subject(config, overlay)
    return TrainState(overlay.params, _optimizer(subject).init(overlay.params), subject.method_state(overlay.params))


@partial(jax.jit, static_argnums=0)
def step(config, params, overlay, state: TrainState, number) -> TrainState:
    """One step on the state's trainables; of the overlay its settings and frozen arrays. number: 1, 2, ..., for what is drawn."""
    subject, mesh = Subject(config, overlay), make_mesh(MeshSection(), jax.devices()[:1])
    rows = packed_rows(config.vocab_size, overlay.tasks)
    rng = jax.random.fold_in(jax.random.key(3), number) if overlay.draws else None
    zeros = jax.tree.map(jnp.zeros_like, state.trainable)
    frozen = subject.split(params)[1]
    gradients, _, _ = accumulate(subject, mesh, "plain", state.trainable, frozen, zeros, jnp.float32(0), rows, rng)
    return update(subject, _optimizer(subject), state, gradients, jnp.float32(rows["weights"][:, 1:].sum()))[0]


def trained(config, params, overlay, count: int):
    """(overlay, state) after so many steps from the overlay as it is."""
    state = begin(config, overlay)
    for number in range(1, count + 1):
        state = step(config, params, overlay, state, number)
    return overlay.replace(params=state.trainable), state
