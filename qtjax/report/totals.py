"""What a run did in all, summed from the metrics of its steps; so it is right also for a run that was resumed."""

from collections.abc import Mapping, Sequence
from typing import Any


def totals(metrics: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The parts "steps", "samples", "tokens", "closing", "fill", "seconds" of a summary (schema: `qtjax.report.table`).

    `seconds` holds what the steps measured ("scoring", "packing", "training"); the caller adds "total". `fill` is the mean
    over the run weighted by slots; None if nothing was trained.
    """

    def add(name: str) -> float:
        values = [m[name] for m in metrics if m.get(name) is not None]
        return sum(v for v in values if v == v)

    def count(name: str) -> int:
        return int(add(name))

    slots = add("trained_slots")
    filled = sum(m["fill"] * m["trained_slots"] for m in metrics if m.get("trained_slots"))
    return {
        "steps": len(metrics),
        "samples": {
            "seen": count("samples"),
            "eligible": count("eligible"),
            "kept": count("kept_samples"),
            **{name: count(f"kept_{name}") for name in ("q2", "q3", "q4")},
            "supplement": count("supplement"),
            "supplement_median": {str(q): count(f"supplement_median_q{q}") for q in (1, 2, 3, 4)},
        },
        "tokens": {"seen": count("target_tokens"), "kept": count("kept_tokens"), "scored": count("scored_tokens")},
        "closing": {"seen": count("closing_tokens"), "pruned": count("closing_pruned")},
        "fill": filled / slots if slots else None,
        "seconds": {"scoring": add("seconds_score"), "packing": add("seconds_pack"), "training": add("seconds_train")},
    }
