"""Which data a compiled program moves between devices, read from its HLO text."""

import math
import re
from collections import Counter
from dataclasses import dataclass, field
from typing import NamedTuple

_KINDS = "all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute"
# `%x = bf16[8,128]{1,0} all-gather(...)`, or a tuple of arrays; of an asynchronous pair only the start counts.
_MOVES = re.compile(rf"= (?P<type>\(.*?\)|\S+) (?P<kind>{_KINDS})(?P<start>-start)?\(")
_ARRAY = re.compile(r"\b(?P<dtype>pred|[sufb]f?\d+\w*)\[(?P<dims>[\d,]*)\]")
_LISTED = re.compile(r"replica_groups=\{\{([\d,]*)\}")
_IOTA = re.compile(r"replica_groups=\[\d+,(\d+)\]")
_MESH = re.compile(r"replica_groups=mesh\[([^\]]*)\] ?\{([^}]*)\}")
_COMPUTATION = re.compile(r"^(?:ENTRY )?%?([\w.\-]+) .*\{$")
_CALLED = re.compile(r"\b(?:calls|to_apply|branch_computations|called_computations)=(\{[^}]*\}|%?[\w.\-]+)")
_WHILE = re.compile(r"\bwhile\(%?([\w.\-]+)\), condition=%?([\w.\-]+), body=%?([\w.\-]+)")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')
# What a loop's counter is made of.
_COUNTED = re.compile(
    r"^ *(?P<root>ROOT )?%?(?P<name>[\w.\-]+) = .*? (?P<op>constant|add|get-tuple-element|tuple|copy|compare)\((?P<of>[^)]*)\)(?P<rest>.*)"
)
_INDEX = re.compile(r"^, index=(\d+)")


class Collective(NamedTuple):
    """kind: "all-gather", ...; count: how often a launch runs it; bytes: what each device receives by it in a launch."""

    kind: str
    count: int
    bytes: int


class _Move(NamedTuple):
    kind: str
    bytes: int
    chain: tuple[str, str] | None  # TPUs lay one collective over several fusions, each of which names it; the same chain in all


class _Value(NamedTuple):
    op: str
    of: tuple[str, ...]  # operands, or the literal of a constant
    index: int


@dataclass
class _Computation:
    moves: list[_Move] = field(default_factory=list)
    calls: list[str] = field(default_factory=list)
    loops: list[tuple[str, str, str, int | None]] = field(default_factory=list)  # first values, condition, body, turns where they are said
    values: dict[str, _Value] = field(default_factory=dict)
    root: str = ""
    starts: bool = False  # holds the beginning of a chain


def collectives(text: str, devices: int) -> list[Collective]:
    """By kind, over one launch: what stands in a loop counts as often as the loop turns, once where only the program knows.

    Args: text: `compiled.as_text()`; devices: of the mesh. Of n devices that gather or scatter S bytes each receives S (n - 1) / n,
    of an all-reduce twice that: it is scattered, then gathered.
    """
    parts, entry = _parse(text, devices)
    begun = {move.chain for part in parts.values() if part.starts for move in part.moves if move.chain}
    counts: Counter[str] = Counter()
    sizes: Counter[str] = Counter()
    seen: set[tuple[str, str]] = set()

    def walk(name: str, times: int) -> None:
        part = parts.get(name, _Computation())
        for move in part.moves:
            if move.chain and not (part.starts or move.chain not in begun | seen):
                continue
            seen.add(move.chain or ("", ""))
            counts[move.kind] += times
            sizes[move.kind] += times * move.bytes
        for called in part.calls:
            walk(called, times)
        for first, condition, body, turns in part.loops:
            walk(body, times * (turns or _turns(part, first, parts.get(condition), parts.get(body))))

    walk(entry, 1)
    return [Collective(kind, counts[kind], sizes[kind]) for kind in sorted(counts)]


def _parse(text: str, devices: int) -> tuple[dict[str, _Computation], str]:
    parts: dict[str, _Computation] = {}
    name = entry = ""
    for line in text.splitlines():
        if head := _COMPUTATION.match(line):
            name = head[1]
            parts[name] = _Computation()
            entry = name if line.startswith("ENTRY") else entry
        elif name:
            _read(line, parts[name], scatters=name.startswith("all-reduce-scatter"), devices=devices)
    return parts, entry


def _read(line: str, part: _Computation, *, scatters: bool, devices: int) -> None:
    """One instruction. Args: scatters: in a fusion that keeps a slice only of what it reduces, as TPUs write a reduce-scatter."""
    if found := _MOVES.search(line):
        kind = found["kind"]
        size = _received(kind, sum(map(_bytes, _ARRAY.finditer(found["type"]))), bool(found["start"]), _group(line, devices))
        names = [re.search(pattern, line) for pattern in (r'chain_id="(\w+)"', r"channel_id=(\d+)")]
        chain = (names[0][1], names[1][1]) if all(names) else None
        part.moves.append(_Move("reduce-scatter", size // 2, chain) if scatters and kind == "all-reduce" else _Move(kind, size, chain))
    part.starts |= "AsyncCollectiveStart" in line
    if loop := _WHILE.search(line):
        trips = _TRIPS.search(line)
        part.loops.append((*loop.groups(), int(trips[1]) if trips else None))
        return
    for called in _CALLED.findall(line):
        part.calls += re.findall(r"[\w.\-]+", called)
    if made := _COUNTED.match(line):
        index = _INDEX.match(made["rest"])
        operands = tuple(each.split("*/")[-1].strip().lstrip("%") for each in made["of"].split(","))
        part.values[made["name"]] = _Value(made["op"], operands, int(index[1]) if index else -1)
        if made["root"]:
            part.root = made["name"]


def _turns(caller: _Computation, first: str, condition: _Computation | None, body: _Computation | None) -> int:
    """Of a loop that counts up to a constant: (limit - first) / step; 1 where that is not what it does."""
    if not condition or not body or (test := condition.values.get(condition.root)) is None or test.op != "compare":
        return 1
    counter = condition.values.get(test.of[0])
    if counter is None or counter.op != "get-tuple-element":
        return 1
    tuples = caller.values.get(first), body.values.get(body.root)
    if any(each is None or each.op != "tuple" for each in tuples):
        return 1
    before, after = (each.of for each in tuples)
    limit = _constant(condition, test.of[1])
    bound = condition.values.get(test.of[1])
    if limit is None and bound and bound.op == "get-tuple-element":
        limit = _constant(caller, before[bound.index])
    step = _added(body, after[counter.index], counter.index)
    if limit is None or not step:
        return 1
    return max(math.ceil((limit - (_constant(caller, before[counter.index]) or 0)) / step), 0)


def _constant(part: _Computation, name: str) -> int | None:
    value = part.values.get(name)
    while value and value.op == "copy":
        value = part.values.get(value.of[0])
    return int(value.of[0]) if value and value.op == "constant" and value.of[0].isdigit() else None


def _added(part: _Computation, name: str, index: int) -> int:
    """What the body adds to the loop's value number `index`; 0 where it does something else."""
    value, total = part.values.get(name), 0
    while value and value.op in ("copy", "add"):
        if value.op == "add":
            constants = [_constant(part, each) for each in value.of]
            if (found := next((each for each in constants if each is not None), None)) is None:
                return 0
            total += found
            name = value.of[constants.index(None)] if None in constants else ""
        else:
            name = value.of[0]
        value = part.values.get(name)
    return total if value and value.op == "get-tuple-element" and value.index == index else 0


def _received(kind: str, size: int, start: bool, n: int) -> int:
    """Bytes that each of n devices receives. Args: size: of the result; of a start, of operands and results together."""
    if kind == "all-reduce":
        return 2 * size * (n - 1) // n
    if kind == "collective-permute":
        return size // 2 if start else size
    if kind == "all-to-all":
        whole = size // 2 if start else size
    elif start:
        whole = size * n // (n + 1)  # the whole and one part of n
    else:
        whole = size if kind == "all-gather" else size * n
    return whole * (n - 1) // n


def _group(line: str, devices: int) -> int:
    """How many devices take part, all where no groups are named."""
    if listed := _LISTED.search(line):
        return listed[1].count(",") + 1
    if iota := _IOTA.search(line):
        return int(iota[1])
    if mesh := _MESH.search(line):
        axes = {name: int(size) for name, size in re.findall(r"'(\w+)'=(\d+)", mesh[1])}
        return math.prod(int(part or axes[name]) for name, part in re.findall(r"'(\w+)'(?::\(\d+\)(\d+))?", mesh[2]))
    return devices


def _bytes(array: re.Match) -> int:
    if array["dtype"].startswith("u32") and not array["dims"]:
        return 0  # the counter of an asynchronous start
    bits = 8 if array["dtype"] == "pred" else int(re.search(r"\d+", array["dtype"])[0])
    return math.prod(int(d) for d in array["dims"].split(",") if d) * bits // 8
