"""Which data a compiled program moves between devices, read from its HLO text."""

import re
from collections import Counter
from typing import NamedTuple

import numpy as np

_KINDS = "all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute"
# `%x = bf16[8,128]{1,0} all-gather(...)`, or a tuple of arrays; of an asynchronous pair only the start counts.
_OP = re.compile(rf"= (?P<type>\(.*?\)|\S+) (?P<kind>{_KINDS})(?P<start>-start)?\(")
_ARRAY = re.compile(r"\b(?P<dtype>pred|[sufb]f?\d+\w*)\[(?P<dims>[\d,]*)\]")
_BODY = re.compile(r"\bwhile\(.*?body=%?([\w.\-]+)")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')
_CALLED = re.compile(r"\b(?:calls|to_apply|branch_computations|called_computations)=\{?%?([\w.\-]+)")
_COMPUTATION = re.compile(r"^(?:ENTRY )?%?([\w.\-]+) .*\{$")


class Collective(NamedTuple):
    """kind: "all-gather", ...; count: how often a launch runs it; bytes: what each device sends or receives by it in a launch."""

    kind: str
    count: int
    bytes: int


def collectives(text: str) -> list[Collective]:
    """By kind, over one launch: what stands in a loop counts as often as the loop turns.

    Args: text: `compiled.as_text()`. Bytes are those of the result (of an all-reduce twice: it is scattered, then gathered).
    """
    own: dict[str, list[tuple[str, int]]] = {}
    calls: dict[str, list[tuple[str, int]]] = {}
    entry = name = ""
    for line in text.splitlines():
        if head := _COMPUTATION.match(line):
            name = head[1]
            own[name], calls[name] = [], []
            if line.startswith("ENTRY"):
                entry = name
            continue
        if not name:
            continue
        if found := _OP.search(line):
            kind = found["kind"]
            arrays = [_bytes(array) for array in _ARRAY.finditer(found["type"])]
            size = (max(arrays, default=0) if found["start"] else sum(arrays)) * (2 if kind == "all-reduce" else 1)
            own[name].append((kind, size))
        if body := _BODY.search(line):
            trips = _TRIPS.search(line)
            calls[name].append((body[1], int(trips[1]) if trips else 1))
        else:
            calls[name] += [(called, 1) for called in _CALLED.findall(line)]
    counts: Counter[str] = Counter()
    sizes: Counter[str] = Counter()

    def walk(computation: str, times: int) -> None:
        for kind, size in own.get(computation, ()):
            counts[kind] += times
            sizes[kind] += times * size
        for called, trips in calls.get(computation, ()):
            walk(called, times * trips)

    walk(entry, 1)
    return [Collective(kind, counts[kind], sizes[kind]) for kind in sorted(counts)]


def _bytes(array: re.Match) -> int:
    bits = 8 if array["dtype"] == "pred" else int(re.search(r"\d+", array["dtype"])[0])
    return int(np.prod([int(d) for d in array["dims"].split(",") if d], dtype=np.int64)) * bits // 8
