"""Where a step's scoring pass has what its survivors need again: prune.reuse_forward, on the host's side.

N layers, R rows, L slots per row, D model.
"""

import jax
import numpy as np
from jax.sharding import Mesh

from qtjax.parallel import rows_on_device
from qtjax.training.batch import Microbatch
from qtjax.training.programs import Programs


class Origins:
    """Where the scoring pass of a step has each of its samples: launch, row and first slot int64 [samples]."""

    def __init__(self, scoring: list[Microbatch], samples: int):
        self.launch, self.row, self.first = np.full((3, samples), -1)
        for launch, part in enumerate(scoring):
            row, slot = np.nonzero((part.sample >= 0) & (part.rows["position_ids"] == 0))
            sample = part.sample[row, slot]
            self.launch[sample], self.row[sample], self.first[sample] = launch, row, slot

    def missing(self, part: Microbatch) -> bool:
        """Whether `part` trains on a sample that was not scored: what the layers give for it is then not known."""
        return bool((self.launch[part.sample[part.sample >= 0]] < 0).any())

    def of(self, part: Microbatch, launch: int) -> tuple[np.ndarray, np.ndarray] | None:
        """(row, slot) int32 [R, L] in a scoring launch of what `part` trains on; row -1: not there. None: nothing of it is there."""
        there = (part.sample >= 0) & (self.launch[part.sample] == launch)
        if not there.any():
            return None
        row = np.where(there, self.row[part.sample], -1)
        slot = np.where(there, self.first[part.sample] + part.rows["position_ids"], 0)
        return row.astype(np.int32), slot.astype(np.int32)


class Kept:
    """What the layers gave in a step's scoring pass, and the programs that carry it. outputs: of each scoring launch, [N, R, L, D]."""

    def __init__(self, programs: Programs, mesh: Mesh, scoring: list[Microbatch], outputs: list[jax.Array], samples: int):
        self.programs, self.mesh, self.outputs, self.origins = programs, mesh, outputs, Origins(scoring, samples)

    def of(self, part: Microbatch) -> jax.Array:
        """What the layers gave for the tokens of a microbatch, [N, R, L, D], 0 at padding."""
        assert not self.origins.missing(part), "a sample that was not scored is trained on"
        out = self.programs.unknown[part.size]()
        for launch, given in enumerate(self.outputs):
            if (found := self.origins.of(part, launch)) is not None:
                row, slot = rows_on_device(self.mesh, dict(zip(("row", "slot"), found))).values()
                out = self.programs.carry[given.shape[1], part.size](out, given, row, slot)
        return out
