"""What a step counts for its metrics: samples, tokens and slots on the host, and what stage 1 chose."""

from typing import Any

import numpy as np

from qtjax.training.batch import Microbatch, Prepared
from qtjax.training.step import Decision


def count(prepared: Prepared, tokens: np.ndarray, parts: list[Microbatch]) -> dict[str, int]:
    """What this process counts in a step: samples, targets, closing tokens of kept samples, tokens and slots launched."""
    batch, kept = prepared.batch, tokens.any(axis=1)
    closing = batch.closing & batch.targets & kept[:, None]
    return {
        "samples": int(batch.valid.sum()),
        "kept_samples": int(kept.sum()),
        "target_tokens": int(batch.targets.sum()),
        "kept_tokens": int(tokens.sum()),
        "closing_tokens": int(closing.sum()),
        "closing_pruned": int((closing & ~tokens).sum()),
        "scored_tokens": sum(part.tokens for part in prepared.scoring),
        "trained_tokens": sum(part.tokens for part in parts),
        "trained_slots": sum(part.sample.size for part in parts),
    }


def choices(decision: Decision | None, counts: dict[str, int]) -> dict[str, Any]:
    """What stage 1 chose over the global batch: eligible, kept per quadrant, supplement by median quadrant."""
    if decision is None:
        return {"eligible": counts["samples"]}
    keep, supplement, quadrant, median = (
        np.asarray(x) for x in (decision.keep, decision.supplement, decision.quadrant, decision.median_quadrant)
    )
    placed = keep & ~supplement
    out: dict[str, Any] = {"eligible": int(np.asarray(decision.eligible).sum()), "kept_samples": int(keep.sum())}
    out |= {f"kept_q{q}": int((placed & (quadrant == q)).sum()) for q in (2, 3, 4)}
    out["supplement"] = int(supplement.sum())
    out |= {f"supplement_median_q{q}": int((supplement & (median == q)).sum()) for q in (1, 2, 3, 4)}
    return out | {"level": _finite(decision.level), "spearman": _finite(decision.spearman)}


def _finite(value: Any) -> float | None:
    value = float(value)
    return value if np.isfinite(value) else None
