"""Several processes, one run: every process starts the same command, and JAX joins their devices."""

import jax

from qtjax.errors import QtjaxError

HEARTBEAT = 30  # seconds without a sign of life after which a process counts as dead and the others stop
JOINING = 300  # seconds to wait for the others at the start


def join_processes(coordinator: str, processes: int, process: int) -> None:
    """Call it before anything touches a device; "" is a run of one process and does nothing.

    Args:
      coordinator: "auto" asks SLURM, the TPU pod, Kubernetes or Open MPI, whichever started this process; otherwise HOST:PORT of
        process 0, a free port there that the others can reach.
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
    except (ValueError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:200]
        remedy = (
            "start it under SLURM, a TPU pod or MPI, or give HOST:PORT" if coordinator == "auto" else "is process 0 started, and its port free and reachable?"
        )
        raise QtjaxError(f"--coordinator {coordinator}: {reason}; {remedy}") from None
