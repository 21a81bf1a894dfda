"""A step whose scores or loss are no numbers ends the run, before its state is saved."""

import jax
import numpy as np

from qtjax.errors import Diverged
from qtjax.training.step import Decision


def refuse_nan(step: int, decision: Decision, early: bool) -> None:
    """Raises Diverged where a sample was scored and its score is NaN: all that have targets, or of those chosen early the kept ones."""
    scored = np.asarray(decision.keep if early else decision.count) > 0
    unusable = scored & np.isnan(np.asarray(decision.entropy))
    if unusable.any():
        raise _diverged(step, f"the scores of {unusable.sum()} samples are NaN")


def finite_sums(step: int, sums: tuple[jax.Array, dict[str, jax.Array]] | None, divisor: float) -> tuple[float, dict[str, float]]:
    """(mean loss, gradient norm and an overlay's penalty by name), waited for; zeros for a step that was skipped."""
    if sums is None:
        return 0.0, {"grad_norm": 0.0}
    loss, measured = float(sums[0]) / divisor, {name: float(value) for name, value in sums[1].items()}
    if not np.isfinite([loss, *measured.values()]).all():
        raise _diverged(step, f"loss {loss}, gradient norm {measured['grad_norm']}")
    return loss, measured


def _diverged(step: int, what: str) -> Diverged:
    return Diverged(
        f"step {step + 1}: {what}: training diverged, or the model overflows its dtype; the last checkpoint is whole. Try a"
        " lower train.learning_rate, train.clip_norm 1.0, more warm-up, or model.dtype float32"
    )
