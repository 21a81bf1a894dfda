"""Where a step's seconds go."""

import time

CLOCKS = ("score", "pack", "train")


class Clock:
    """The host's wall clock, cut at every change of what it does or waits for, so that the parts add up to the step.

    With score_lag 1 the device trains while the host packs, or while it waits for the next batch's scores: time that
    both share goes to packing or scoring, and "train" is what is left to wait for afterwards.
    `cpu` are the CPU seconds of the process in the same parts, all threads: what a busy machine does not falsify.
    """

    def __init__(self) -> None:
        self.seconds, self.cpu = dict.fromkeys(CLOCKS, 0.0), dict.fromkeys(CLOCKS, 0.0)
        self._at, self._cpu = time.perf_counter(), time.process_time()

    def lap(self, name: str) -> None:
        now, cpu = time.perf_counter(), time.process_time()
        self.seconds[name] += now - self._at
        self.cpu[name] += cpu - self._cpu
        self._at, self._cpu = now, cpu
