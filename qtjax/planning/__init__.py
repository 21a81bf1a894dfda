"""What a run would need on devices that are not here: compiled ahead of time, weighed against the chip."""

from qtjax.planning.chips import Chip
from qtjax.planning.collectives import Collective, collectives
from qtjax.planning.fit import COMPILED, SHARED, Attempt, attempts, kept_instead
from qtjax.planning.gpus import GPU_NAMES, SHARE_VARIABLE
from qtjax.planning.need import AbstractRun, Held, Need, Weighed, abstract_run, held_by, leaves_by_path, need_of, on_device, weigh
from qtjax.planning.shapes import PUBLISHED, model_shape
from qtjax.planning.topologies import open_topology
from qtjax.planning.tpus import TPU_NAMES
from qtjax.planning.work import REACHED, Part, needed_flops, spent_flops, step_parts

__all__ = [
    "AbstractRun", "Attempt", "COMPILED", "Chip", "Collective", "GPU_NAMES", "Held", "Need", "PUBLISHED", "Part", "REACHED", "SHARED",
    "SHARE_VARIABLE", "TPU_NAMES",
    "Weighed", "abstract_run", "attempts", "collectives", "held_by", "kept_instead", "leaves_by_path", "model_shape", "need_of",
    "needed_flops", "on_device", "open_topology", "spent_flops", "step_parts", "weigh",
]  # fmt: skip
