"""What the processes of both frameworks share: the job they are given, the answer they leave, and how long they measure.

Standard library only: the other framework's interpreter may have neither jax nor qtjax.
"""

import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

LEAST, MOST = 3, 40  # timed steps


def serve(kinds: dict[str, Callable[[dict[str, Any]], dict[str, Any]]], out_of_memory: Callable[[BaseException], bool]) -> None:
    """Does the job whose file the command line names and writes its answer: {"status": "done", ...}, or why there is none.

    A job names its `kind` and the file `out`; other errors are left to end the process.
    """
    job = json.loads(Path(sys.argv[1]).read_text())
    try:
        answer = {"status": "done"} | kinds[job["kind"]](job)
    except Missing as missing:
        answer = {"status": "missing", "said": str(missing)}
    except Exception as error:
        if not out_of_memory(error):
            raise
        answer = {"status": "no memory", "said": " ".join(str(error).split())[:200]}
    partial = Path(f"{job['out']}.part")
    partial.write_text(json.dumps(answer))
    partial.replace(job["out"])
    sys.stdout.flush()
    os._exit(0)  # threads of prefetching, and freeing tens of gigabytes, need not be waited for


class Missing(Exception):
    """This interpreter cannot run the job at all."""


def timed(step: Callable[[], Any], seconds: float, most: int = MOST, clock: Callable[[], float] = time.perf_counter) -> list[float]:
    """Seconds of each call of `step`, which waits for the device: LEAST calls, then more while another one fits into `seconds`."""
    begin, out = clock(), []
    while len(out) < min(LEAST, most) or (len(out) < most and clock() - begin + out[-1] < seconds):
        start = clock()
        step()
        out.append(clock() - start)
    return out
