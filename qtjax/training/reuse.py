"""prune.reuse_forward: survivors' layers are not run again for what they gave in the scoring pass; it is carried to the survivors' rows.

N layers, R rows, L slots per row, D model. Exact, since the scoring pass of a step is taken under the weights that its gradients are of,
and since what a layer gives at a token depends on the sample up to that token only.
"""

import jax
import jax.numpy as jnp
from jax import Array

from qtjax.config import PruneSection
from qtjax.errors import QtjaxError
from qtjax.overlays import Overlay
from qtjax.training.kernels import edits_of
from qtjax.training.pruners import pruners


def check_reuse(prune: PruneSection, overlay: Overlay | None, ways: int) -> None:
    """Raises QtjaxError where what the scoring pass gave is not what training would compute, or lies on another device.

    Args: ways: devices along data x fsdp.
    """
    if not prune.reuse_forward:
        return
    needs, name = pruners(prune), "" if overlay is None else overlay.method
    others = (
        (not needs.scores, "the pruners chosen use no scores", "leave it out"),
        (bool(prune.score_model), "prune.score_model's scores are not the trained model's", "leave one of them out"),
        (bool(prune.score_dtype), f"prune.score_dtype = {prune.score_dtype!r} is of scoring alone", "leave one of them out"),
        (prune.score_lag > 0, "prune.score_lag = 1 scores under older weights", "leave one of them out"),
        (prune.mode == "drop", "prune.mode = 'drop' takes context away, so that survivors' layers give something else", "set it to mask"),
        (bool(needs.token.rater), f"the scoring pass of the token pruner {prune.token_pruner} is not kept", "choose another, or leave it out"),
        (ways > 1, f"survivors move between the mesh's {ways} devices of data x fsdp", "use one of them, and mesh.tensor for the others"),
        (jax.process_count() > 1, "survivors move between processes", "leave it out"),
        (overlay is not None and overlay.two_passes, f"{name} takes two passes", "leave it out, or choose another overlay"),
        (overlay is not None and _virtual(overlay), f"{name} puts virtual tokens before each row", "leave it out, or choose another overlay"),
        (
            overlay is not None and overlay.draws, f"{name} draws random numbers in training that scoring does not",
            "set its dropout to 0 if it has one, or leave it out",
        ),
    )
    for wrong, why, remedy in others:
        if wrong:
            raise QtjaxError(f"prune.reuse_forward = True: {why}; {remedy}")


def _virtual(overlay: Overlay) -> bool:
    return not overlay.two_passes and edits_of(overlay).virtual is not None


def carry(into: Array, outputs: Array, row: Array, slot: Array) -> Array:
    """`into` [N, R, L, D] with what one scoring launch gave, outputs [N, S, L', D], where row and slot int32 [R, L] name a place in it;
    row -1: stays as it is."""
    there = outputs[:, jnp.maximum(row, 0), slot]
    return jnp.where((row >= 0)[None, :, :, None], there, into)
