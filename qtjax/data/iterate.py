"""Which samples a step reads: a pure function of (seed, step), so that the iterator's whole state is one integer."""

from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from qtjax.errors import QtjaxError


# The epoch being read and, across its border, the next one.
@lru_cache(maxsize=2)
def permutation(count: int, seed: int, epoch: int) -> np.ndarray:
    """int64 [count], the order of an epoch. Read-only.

    Sorting raw Philox output (counter-based; its bit stream is fixed, unlike that of numpy's Generator methods) keeps the order
    the same under every numpy. Equal keys, 2^-64 each pair, are settled by index.
    """
    keys = np.random.Philox(key=np.array([seed, epoch], np.uint64)).random_raw(count)
    order = np.argsort(keys, kind="stable")
    order.flags.writeable = False
    return order


@dataclass(frozen=True)
class BatchPlan:
    """Batches of sample indices over epochs, split over hosts.

    count: samples. batch_size: samples per step, all hosts together. seed: of the shuffle. process_index, process_count: this
    host and all of them. Hosts take neighbouring slices of one global batch: put together in order, they are the batch
    that a single host would read.
    Raises QtjaxError when batch_size does not divide by process_count, or there is no sample.
    """

    count: int
    batch_size: int
    seed: int = 0
    process_index: int = 0
    process_count: int = 1

    def __post_init__(self) -> None:
        if self.count < 1:
            raise QtjaxError("there is no sample to train on")
        if self.batch_size % self.process_count:
            raise QtjaxError(
                f"prune.batch_size = {self.batch_size}: must divide evenly over {self.process_count} hosts; take a multiple of {self.process_count}"
            )
        if not 0 <= self.process_index < self.process_count:
            raise QtjaxError(f"host {self.process_index} of {self.process_count}: hosts are counted from 0")

    @property
    def steps_per_epoch(self) -> int:
        """Steps in which every sample is read once: ceil(count / batch_size); the last batch is padded, not dropped."""
        return -(-self.count // self.batch_size)

    def global_batch(self, step: int) -> np.ndarray:
        """int64 [batch_size], the samples of step 0, 1, ... on all hosts, -1 where an epoch's last batch is padded."""
        epoch, within = divmod(step, self.steps_per_epoch)
        batch = permutation(self.count, self.seed, epoch)[within * self.batch_size : (within + 1) * self.batch_size]
        return np.concatenate([batch, np.full(self.batch_size - len(batch), -1, np.int64)])

    def batch(self, step: int) -> np.ndarray:
        """int64 [batch_size / process_count], this host's part of `global_batch(step)`."""
        part = self.batch_size // self.process_count
        return self.global_batch(step)[self.process_index * part : (self.process_index + 1) * part]


def hold_out(count: int, fraction: float, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """(training, held-out) indices, int64, both ascending, disjoint, together all of 0..count-1.

    round(fraction * count) are held out: at least one when 0 < fraction, and never the last one left to train on. Drawn by `seed` from another
    stream than the epochs' orders.
    """
    held = min(max(round(fraction * count), int(fraction > 0)), max(count - 1, 0))
    order = permutation.__wrapped__(count, seed, 2**63)  # asked for once, not worth its memory
    return np.sort(order[held:]), np.sort(order[:held])
