"""What makes a run fit that does not: tried by compiling it, or counted from shapes."""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

from qtjax.config import Config, override
from qtjax.errors import QtjaxError
from qtjax.models import ModelConfig
from qtjax.parallel import make_mesh, of_one_process
from qtjax.planning.chips import Chip
from qtjax.planning.need import Held, Weighed, abstract_run, held_by, weigh
from qtjax.training.memory import GIB, as_flags, smaller

COMPILED = 3  # at most
SHARED = 0.95  # of a GPU's memory, what JAX can be given: the rest is its driver's


@dataclasses.dataclass(frozen=True)
class Attempt:
    """flags: to add to the command line; free: GiB that stay free on each device, below 0: that lack; share: whether a GPU's memory is to
    be shared out more generously, SHARED of it to JAX."""

    flags: str
    free: float
    share: bool = False


def attempts(config: Config, shape: ModelConfig, devices: Sequence[Any], chip: Chip, plan: Weighed) -> Iterator[Attempt]:
    """Ways to make a run fit that trains the same, the cheapest first, up to the first that fits; at most COMPILED are compiled.

    Args: plan: the run that does not fit. What a run keeps is counted before anything is compiled, so that no compilation goes into
    a way that cannot fit.
    """
    most = max(chip.usable, SHARED * chip.memory if chip.share < 1 else 0.0)

    def against(worst: int, flags: str) -> Attempt:
        need = worst / GIB
        share = chip.usable < need <= most
        return Attempt(flags, (most if share else chip.usable) - need, share)

    first = against(plan.worst, "")
    if first.share:
        yield first
        return
    for changes in _ladder(config, shape, len(devices), of_one_process(devices)):
        tried = override(config, changes)
        held = _held(tried, shape, devices)
        if held is None or held.total > most * GIB:
            continue
        attempt = against(weigh(tried, shape, devices, enough=most * GIB, read=False).worst, as_flags(changes))
        yield attempt
        if attempt.free >= 0:
            return


def _ladder(config: Config, shape: ModelConfig, devices: int, own: int) -> list[dict[str, Any]]:
    """Sets of changes, each with those before it; last, devices that share a row where there is nothing else to share.

    Args: own: devices of a process, which reads whole rows.
    """
    steps = smaller(config, devices, shape.hidden_size)
    sets = [{name: value for each in steps[: i + 1] for name, value in each.items()} for i in range(len(steps))]
    wider = _tensor(shape, devices, own)
    if wider > config.mesh.tensor:
        ways = devices // wider
        shared = {"mesh.fsdp": ways, "mesh.tensor": wider} | ({} if config.mesh.data == -1 else {"mesh.data": -1})
        sets.append((sets[-1] if sets else {}) | shared | ({"train.rows": ways} if config.train.rows > ways else {}))
    return sets if len(sets) <= COMPILED else [*sets[: COMPILED - 1], sets[-1]]


def _tensor(shape: ModelConfig, devices: int, own: int) -> int:
    """The widest tensor axis, at most 8, that leaves heads whole."""
    sizes = (shape.num_key_value_heads, shape.intermediate_size, shape.vocab_size, own)
    return max((ways for ways in (1, 2, 4, 8) if not any(size % ways for size in sizes) and shape.hidden_size % (devices // ways) == 0), default=1)


def _held(config: Config, shape: ModelConfig, devices: Sequence[Any]) -> Held | None:
    """None where the mesh does not divide the model."""
    try:
        return held_by(abstract_run(config, shape, make_mesh(config.mesh, list(devices))))
    except QtjaxError:
        return None


def kept_instead(config: Config, shape: ModelConfig, devices: Sequence[Any]) -> list[tuple[str, Held]]:
    """(flags, what the run would keep) of ways that train something else, or a base of fewer bits; counted, not compiled."""
    if config.overlay.method == "none":
        changes = {"overlay.method": "lora", "model.param_dtype": "bfloat16"}
    elif config.model.quantization == "none":
        changes = {"model.param_dtype": "bfloat16"} if config.model.param_dtype == "float32" else {"model.quantization": "nf4"}
    else:
        return []
    held = _held(override(config, changes), shape, devices)
    return [] if held is None else [(as_flags(changes), held)]
