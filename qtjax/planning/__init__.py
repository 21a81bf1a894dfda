"""What a run would need on devices that are not here: compiled ahead of time, weighed against the chip."""

from qtjax.planning.chips import CHIPS, Chip, open_topology
from qtjax.planning.collectives import Collective, collectives
from qtjax.planning.need import AbstractRun, Need, abstract_run, leaves_by_path, needs_of, on_device
from qtjax.planning.work import forward_flops, step_work

__all__ = [
    "CHIPS", "AbstractRun", "Chip", "Collective", "Need", "abstract_run", "collectives", "forward_flops", "leaves_by_path", "needs_of", "on_device",
    "open_topology", "step_work",
]  # fmt: skip
