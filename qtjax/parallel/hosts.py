"""What several processes must agree on: all call, with the same names and shapes; with one process each is the identity."""

import time
import uuid
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
from jax.experimental import multihost_utils

from qtjax.atomic import write_atomic
from qtjax.errors import QtjaxError

_DAY = 86400
_met: Counter[str] = Counter()  # how often the processes have met at each `what`


def wait_for_all(what: str, seconds: float = _DAY) -> None:
    """Returns when every process has come here; `what` must be the same on all.

    They meet at the coordinator and not on the devices, whose collectives some backends let wait for minutes only.
    Raises JaxRuntimeError when the others have not come in time.
    """
    if jax.process_count() > 1:
        from orbax.checkpoint.multihost import get_barrier_sync_fn  # a second to import, and one process needs none

        _met[what] += 1
        get_barrier_sync_fn()(key=f"qtjax: {what} ({_met[what]})", timeout_ms=int(seconds * 1000))


def first_alone(what: str, work: Callable[[], str]) -> str:
    """Process 0 does `work` while the others wait; then all go on with the text that it returns, or none does.

    Args: what: "prepare the data", for messages. Raises what `work` raises, on the others a QtjaxError that points there.
    """
    if jax.process_count() == 1:
        return work()
    refused, said = None, b""
    if jax.process_index() == 0:
        try:
            said = work().encode()
        except QtjaxError as error:
            refused = error
    wait_for_all(what)
    failed = agree_max(int(refused is not None))
    if refused is not None:
        raise refused
    if failed:
        raise QtjaxError(f"process 0 could not {what}: see what it says")
    text = np.zeros(agree_max(len(said)), np.uint8)
    text[: len(said)] = np.frombuffer(said, np.uint8)
    return np.max(multihost_utils.process_allgather(text), axis=0).tobytes().decode()


def check_shared(name: str, folder: Path) -> None:
    """Raises QtjaxError, on every process, when one of them does not see in `folder` what process 0 writes there.

    Args: name: of the setting that names the folder, for the message.
    """
    if jax.process_count() == 1:
        return

    def write() -> str:
        file = f".seen-{uuid.uuid4().hex}"  # a new name: of an old one a network disk may remember that it was not there
        write_atomic(folder / file, b"")
        return file

    mark = folder / first_alone("write to the run folder", write)
    tries = 20
    while not (seen := mark.exists()) and (tries := tries - 1):
        time.sleep(0.25)
    missing = np.flatnonzero(~all_rows(np.asarray([seen])))
    if jax.process_index() == 0:
        mark.unlink(missing_ok=True)
    if len(missing):
        raise QtjaxError(
            f"{name} = {str(folder)!r}: process {', '.join(map(str, missing))} of {jax.process_count()} does not see what process 0 writes"
            " there; give a folder, by its whole path, on a disk that all processes share"
        )


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


def local_rows(array: jax.Array) -> np.ndarray:
    """This process's rows of an array that is sharded by row over (data, fsdp)."""
    if jax.process_count() == 1:
        return np.asarray(array)
    shards = {shard.index[0].start or 0: shard.data for shard in array.addressable_shards}
    return np.concatenate([np.asarray(shards[start]) for start in sorted(shards)])
