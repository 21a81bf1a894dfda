"""Several processes, one run: every process starts the same command, and JAX joins their devices."""

import contextlib
import os
import sys
import time
import traceback
from collections.abc import Iterator

import jax

from qtjax.errors import QtjaxError, door
from qtjax.parallel.hosts import wait_for_all

HEARTBEAT = 20  # seconds without a sign of life after which a process counts as dead and the others stop
JOINING = 300  # seconds to wait for the others at the start
LEAVING = 10  # seconds in which the others come to the same end, where it is the same (bad input, a signal to all)


def join_processes(coordinator: str, processes: int, process: int) -> None:
    """Call it before anything touches a device; "" is a run of one process and does nothing.

    Args:
      coordinator: "auto" asks SLURM, Open MPI or the TPU pod, whichever started this process; otherwise HOST:PORT of process 0, a free
        port there that the others can reach.
      processes, process: how many, and which of them this is (0, 1, ...); given with HOST:PORT only.
    Raises QtjaxError for what contradicts itself, where "auto" finds nothing, and when the others do not come.
    """
    if not coordinator:
        if processes or process >= 0:
            raise QtjaxError("--processes and --process: need --coordinator HOST:PORT, the first process's address")
        return
    given = {}
    if coordinator == "auto":
        if processes or process >= 0:
            raise QtjaxError("--coordinator auto: finds --processes and --process by itself; leave them out")
    else:
        host, _, port = coordinator.rpartition(":")
        if not host or not port.isdigit():
            raise QtjaxError(f"--coordinator {coordinator!r}: must be HOST:PORT of the first process, or auto")
        if processes < 1 or not 0 <= process < processes:
            raise QtjaxError(f"--processes {processes} --process {process}: processes are counted from 0; give 0 <= process < processes")
        given = {"coordinator_address": coordinator, "num_processes": processes, "process_id": process}
    try:
        jax.distributed.initialize(**given, initialization_timeout=JOINING, heartbeat_timeout_seconds=HEARTBEAT)
    except Exception as error:  # noqa: BLE001 - also what the network says, and what JAX asks a launcher with
        kind = "" if isinstance(error, (ValueError, RuntimeError)) else f"{type(error).__name__}: "
        reason = kind + " ".join(str(error).split())[:200]
        if isinstance(error, ImportError):
            remedy = "JAX asks a TPU VM's metadata with requests; pip install -e '.[tpu]'"
        elif isinstance(error, OSError):
            remedy = "JAX asks a TPU VM's metadata server, which must answer"
        elif coordinator == "auto":
            remedy = "start it with SLURM or MPI or on a TPU pod, or give HOST:PORT"
        else:
            remedy = "is process 0 started, and its port free and reachable?"
        raise QtjaxError(f"--coordinator {coordinator}: {reason}; {remedy}") from None


@contextlib.contextmanager
def leaving_together() -> Iterator[None]:
    """Around a run of several processes: one that fails alone does not keep the others waiting for it.

    Python's own end would wait for them while they wait for it in a collective, for minutes. So where they do not come to
    the same end, this process says what happened and is gone at once, and the others stop as after a crash.
    """
    if jax.process_count() == 1:
        yield
        return
    try:
        yield
        wait_for_all("end the run")  # the first one writes and draws for all: nobody's end is to wait for it with a time limit
    except BaseException as error:
        failed = time.monotonic()
        if not _others_leave():
            _leave(error, failed)
        raise


def _others_leave() -> bool:
    try:
        wait_for_all("leave", LEAVING)
    except jax.errors.JaxRuntimeError:
        return False
    return True


def _leave(error: BaseException, failed: float) -> None:
    """Says what happened at `failed`, in seconds of the monotonic clock, and ends this process, whatever the others do."""
    code = 1
    try:
        door(lambda: _raise(error))
    except SystemExit as end:
        code = end.code
    except BaseException:  # noqa: BLE001 - it ends here, whatever it is
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    if isinstance(error, jax.errors.JaxRuntimeError) and "RESOURCE_EXHAUSTED" not in str(error):
        # Maybe a collective that failed, since another process is gone: the coordinator is about to say which, and to end this one.
        time.sleep(max(0.0, failed + HEARTBEAT + 5 - time.monotonic()))
    print(f"process {jax.process_index()} of {jax.process_count()} ends here; the others stop when they miss it", file=sys.stderr, flush=True)
    os._exit(code)


def _raise(error: BaseException) -> None:
    raise error
