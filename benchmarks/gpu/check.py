"""Whether what is measured computes what it should: small models beside plain float32 and beside the other framework, then every row's loss.

bfloat16 keeps 8 bits, so that one rounding is off by at most 2^-9 and about ten of them in a row on the way through each of two layers
leave states that are about 1 % off. The small models' logits have a standard deviation of 1.5, and a token's nll is then off by about
0.02 (measured: 0.022 to 0.026 in mean, 0.21 at most of 1,020 tokens). A loss is the mean of a thousand of those and off by 0.001 or so.
A target shifted by one slot, or a layer left out, moves nll by more than 1 and a loss by more than 0.1.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from benchmarks.gpu.plan import Row
from benchmarks.gpu.shapes import Size, expected_loss

TOKEN, WORST, LOSS = 0.06, 0.6, 0.01  # nats: mean and largest difference of a token, difference of a mean loss
STEP = 0.15  # of what three steps change in the loss: beside the rounding of each step, Adam's first one goes by the signs of gradients
NEAR = {"q-tuning": 1.0}  # nats from the expected loss; Q-Tuning trains on samples that it chose by their loss
NEAR_ALL = 0.3

Key = tuple[str, str, str]  # (framework, kind, model)


def problems(size: Size, ours: Mapping[str, Any], theirs: Mapping[str, Any] | None) -> dict[Key, str]:
    """What must not be measured, and why. Args: the answers of ours.check and peer.check, None where that one could not run."""
    out: dict[Key, str] = {}
    for model, mine in ours["models"].items():
        other = theirs["models"][model] if theirs else {}
        for framework, found in (("qtjax", mine), ("torch", other)):
            if "score" in found:
                out[framework, "score", model] = scores_differ(found["score"], mine["plain"])
        for kind in ("full", "lora"):
            if kind in mine:
                said = losses_differ(mine[kind], other.get(kind), float(np.mean(mine["plain"]["nll"])))
                out |= {("qtjax", kind, model): said, ("torch", kind, model): said}
    packed = [scores_differ(each["packed"], each["plain packed"]) for each in ours["models"].values()]
    out["qtjax", "q-tuning", size.full] = next(filter(None, packed), "") or out["qtjax", "score", size.full] or out["qtjax", "full", size.full]
    return {key: said for key, said in out.items() if said}


def scores_differ(found: Mapping[str, Sequence[float]], plain: Mapping[str, Sequence[float]]) -> str:
    """"" where nll and entropy are those of plain float32 logits but for rounding."""
    for name in ("nll", "entropy"):
        difference = np.abs(np.asarray(found[name]) - np.asarray(plain[name]))
        if not (difference.mean() <= TOKEN and difference.max() <= WORST):  # NaN is no agreement
            return f"{name} of a small model is {difference.mean():.3g} off in mean and {difference.max():.3g} at most, allowed are {TOKEN} and {WORST}"
    return ""


def losses_differ(mine: Sequence[float], other: Sequence[float] | None, plain: float) -> str:
    """"" where three steps of a small model begin at the loss of plain float32 logits, learn, and go as the other framework's do."""
    if not abs(mine[0] - plain) <= LOSS:
        return f"the first loss of a small model is {mine[0]:.4f}, plain float32 gives {plain:.4f}"
    if not mine[-1] < mine[0]:
        return f"a small model learns nothing in three steps: losses {', '.join(f'{x:.4f}' for x in mine)}"
    for one, two in zip(mine, other or ()):
        if not abs(one - two) <= LOSS + STEP * abs(mine[0] - mine[-1]):
            return f"losses of a small model are {', '.join(f'{x:.4f}' for x in mine)} in qtjax and {', '.join(f'{x:.4f}' for x in other)} in torch"
    return ""


def row_problem(row: Row, size: Size, result: Mapping[str, Any]) -> str:
    """"" where a row's losses are those of random weights on random tokens."""
    loss, entropy = expected_loss(size.models[row.model])
    near = NEAR.get(row.kind, NEAR_ALL)
    if not abs(result["first_loss"] - loss) <= near:
        return f"the first loss is {result['first_loss']:.3f}, random weights have {loss:.3f}"
    if "entropy" in result and not abs(result["entropy"] - entropy) <= near:
        return f"the mean entropy is {result['entropy']:.3f}, random weights have {entropy:.3f}"
    if not np.isfinite(result["last_loss"]):
        return f"the last loss is {result['last_loss']}"
    return ""
