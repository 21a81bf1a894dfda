"""What several processes must agree on; with one process each of these is the identity."""

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from qtjax.parallel.mesh import BATCH_AXES


def wait_for_all(what: str) -> None:
    """Returns when every process has come here; `what` must be the same on all."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(what)


def agree_max(value: int) -> int:
    """The largest of all processes' values, so that all launch the same number of microbatches."""
    if jax.process_count() == 1:
        return value
    return int(np.max(multihost_utils.process_allgather(np.int64(value))))


def agree_sums(values: dict[str, int]) -> dict[str, int]:
    """Each entry summed over all processes."""
    if jax.process_count() == 1:
        return values
    totals = multihost_utils.process_allgather(np.asarray(list(values.values()), np.int64)).sum(axis=0)
    return dict(zip(values, totals.tolist()))


def all_rows(array: np.ndarray) -> np.ndarray:
    """The processes' rows one after the other, in the order in which they make up a sharded array."""
    if jax.process_count() == 1:
        return array
    return np.asarray(multihost_utils.process_allgather(array, tiled=True))


def local_rows(mesh: Mesh, array: jax.Array) -> np.ndarray:
    """This process's rows of an array that is sharded by row over (data, fsdp)."""
    if jax.process_count() == 1:
        return np.asarray(array)
    return np.asarray(multihost_utils.global_array_to_host_local_array(array, mesh, P(BATCH_AXES)))
