"""What a plan knows of one device."""

import dataclasses
from dataclasses import dataclass


@dataclass(frozen=True)
class Chip:
    """One device as the compiler sees it. memory: GiB; peak: 1e12 bfloat16 FLOP a second; bandwidth: 1e9 bytes a second of its
    memory; links: 1e9 bytes a second that it receives over all its links together (makers also publish twice that, as "bidirectional");
    share: fraction (0-1] of the memory that a run may take."""

    memory: float
    peak: float
    bandwidth: float
    links: float
    share: float = 1.0

    @property
    def usable(self) -> float:
        """GiB that a run may take."""
        return self.memory * self.share

    def shared(self, share: float) -> "Chip":
        return dataclasses.replace(self, share=share)
