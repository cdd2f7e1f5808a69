"""Read collectives from a compiled program's text: what they move, among how many devices, and how often.

    compiled = step.lower(state, batch).compile()
    for collective in collectives(compiled.as_text()):
        print(collective)

The text has the body of a loop once, and the loop runs it many times. So each collective knows the loops around it.
The text of CPU, GPU and TPU programs is understood. On TPUs that includes asynchronous fusions, which are one operation
written three times, and fused reduce-scatters.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import re
from collections.abc import Iterator

import numpy as np

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute", "collective-broadcast")
BITS = {"pred": 8, "c64": 64, "c128": 128}
"""Bits of the element types whose name does not end in them."""

COMPUTATION = re.compile(r"^(?:ENTRY )?%?([\w.\-]+) \(.*\{$")
END = re.compile(r"^\}(?:$|, execution_thread)")
"""The end of a computation. A kernel's settings may run over several lines, and one of them begins with a brace."""
INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?([\w.\-]+) = (.*)$")
ARRAY = re.compile(r"\b(pred|[a-z]+\d+\w*)\[([\d,]*)\]")
CALLED = re.compile(r"\b(?:calls|to_apply|body|true_computation|false_computation)=%?([\w.\-]+)")
BRANCHES = re.compile(r"\b(?:branch_computations|called_computations)=\{([^}]*)\}")
TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"')
CONDITION, BODY = re.compile(r"\bcondition=%?([\w.\-]+)"), re.compile(r"\bbody=%?([\w.\-]+)")
BELOW = re.compile(r"^pred\[\]\S* compare\(%?([\w.\-]+), %?([\w.\-]+)\), direction=LT")
CONSTANT = re.compile(r"^[su]32\[\]\S* constant\((\d+)\)")
ADDED = re.compile(r"^[su]32\[\]\S* add\(%?([\w.\-]+), %?([\w.\-]+)\)")
ELEMENT = re.compile(r" get-tuple-element\(.*\), index=(\d+)")
CHANNEL = re.compile(r"channel_id=(\d+)")
STARTS = 'custom_call_target="AsyncCollectiveStart"'
OPERATION = re.compile(rf"\s({'|'.join(KINDS)})(-start)?\(")


@dataclasses.dataclass(frozen=True)
class Collective:
    """One collective operation.

    Attributes:
        kind: one of `KINDS`.
        arrays: (element type, shape) of each result, on one device. The compiler may combine several operations.
        group: number of devices that take part together; for a permute, of pairs of sender and receiver.
        loops: trip counts of the loops around it, outermost first; None for a loop whose end depends on the data.
        name: where it comes from in the source, as JAX names operations.
        members: the devices of the first group, by their number in the mesh; empty for a permute.
        asynchronous: whether the program computes while it runs.
    """

    kind: str
    arrays: tuple[tuple[str, tuple[int, ...]], ...]
    group: int
    loops: tuple[int | None, ...]
    name: str
    members: tuple[int, ...] = ()
    asynchronous: bool = False

    @property
    def bytes(self) -> int:
        """Payload: what every device holds after a gather or reduction, or before a reduce-scatter."""
        return sum(self.sizes)

    @property
    def sizes(self) -> tuple[int, ...]:
        """Payload of each array."""
        parts = self.group if self.kind == "reduce-scatter" else 1
        return tuple(parts * math.prod(shape) * bits_of(dtype) // 8 for dtype, shape in self.arrays)

    @property
    def sent(self) -> float:
        """Bytes that each device sends, in the algorithms that send least.

        In a group of `g` that is `(g - 1) / g` of the payload, and twice that for an all-reduce.
        """
        if self.kind in ("collective-permute", "collective-broadcast"):
            return float(self.bytes)
        share = (self.group - 1) / self.group
        return (2 if self.kind == "all-reduce" else 1) * share * self.bytes

    def times(self, unknown: int = 1) -> int:
        """Return how often it runs in one call of the program; loops of unknown length run `unknown` times each."""
        return math.prod(unknown if trips is None else trips for trips in self.loops)

    def __str__(self) -> str:
        arrays = " ".join(f"{dtype}[{','.join(map(str, shape))}]" for dtype, shape in self.arrays)
        loops = "".join(f" x {'?' if trips is None else trips}" for trips in self.loops)
        return f"{self.kind} {arrays} among {self.group}{loops} ({self.name})"


@dataclasses.dataclass(frozen=True)
class Call:
    """A call of one computation by another.

    Attributes:
        callee: name of the computation.
        loop: whether it is a loop's body.
        trips: how often that loop runs, if known.
        share: 1 over the number of branches if it is one of a conditional's.
    """

    callee: str
    loop: bool
    trips: int | None
    share: float = 1.0


def collectives(text: str) -> list[Collective]:
    """Return every collective of a program from `compiled.as_text()`, except operations among single devices.

    An asynchronous collective of a TPU is several fusions that share a channel: one starts it, others do a part of it
    while they compute, one ends it. They may lie in different loops. It counts where it starts.

    Raises:
        ValueError: the text lacks an entry computation.
    """
    bodies, entry = computations(text)
    starts = channels_with_a_start(bodies)
    found: list[Collective] = []
    seen: set[tuple[str, Collective, tuple[int, ...]]] = set()

    def visit(name: str, loops: tuple[int | None, ...], path: tuple[int, ...], fused: bool) -> None:
        starting = any(STARTS in line for line in bodies.get(name, {}).values())
        for number, line in enumerate(bodies.get(name, {}).values()):
            collective = parse_collective(line, name, loops)
            # The fusions that start, continue and end one operation share a channel. Outside of fusions, all operations
            # of a `shard_map` share one.
            channel = CHANNEL.search(line) if fused else None
            if collective is not None and channel is not None:
                key = (channel[1], collective, path)
                counted = key not in seen and (starting or channel[1] not in starts)
                seen.add(key) if counted else None
                if channel[1] in starts:
                    collective = dataclasses.replace(collective, asynchronous=True)
            else:
                counted = collective is not None
            if counted and collective is not None and (collective.group > 1 or collective.kind == "collective-permute"):
                found.append(collective)
            for call in calls(line, bodies):
                inner = (*path, hash((name, number))) if call.loop else path
                visit(call.callee, (*loops, call.trips) if call.loop else loops, inner, " fusion(" in line)

    visit(entry, (), (), False)
    return found


def channels_with_a_start(bodies: dict[str, dict[str, str]]) -> set[str]:
    """Return the channels of asynchronous collectives for which a computation that starts them is known."""
    starting = (body.values() for body in bodies.values() if any(STARTS in line for line in body.values()))
    return {channel[1] for lines in starting for line in lines if (channel := CHANNEL.search(line))}


def bytes_sent(found: list[Collective], unknown: int = 1) -> dict[str, float]:
    """Sum the bytes that each device sends in one call, by kind of collective; `unknown` as in `Collective.times`."""
    sums: dict[str, float] = {}
    for collective in found:
        sums[collective.kind] = sums.get(collective.kind, 0.0) + collective.sent * collective.times(unknown)
    return sums


def computations(text: str) -> tuple[dict[str, dict[str, str]], str]:
    """Split the text into `({computation: {instruction: definition}}, name of the entry)`."""
    bodies: dict[str, dict[str, str]] = {}
    entry, current, last = None, None, ""
    for line in text.splitlines():
        if (head := COMPUTATION.match(line)) is not None:
            current = bodies.setdefault(head[1], {})
            entry = head[1] if line.startswith("ENTRY") else entry
        elif END.match(line) is not None:
            current = None
        elif current is not None and (instruction := INSTRUCTION.match(line)) is not None:
            last = instruction[1]
            current[last] = instruction[2]
        elif current:  # a kernel's settings, over several lines
            current[last] += line
    if entry is None:
        raise ValueError("This is not the text of a compiled program, compiled.as_text(): it has no ENTRY computation.")
    return bodies, entry


def calls(line: str, bodies: dict[str, dict[str, str]]) -> Iterator[Call]:
    """Yield the computations that an instruction runs."""
    loop = " while(" in line
    for callee in CALLED.findall(line):
        yield Call(callee, loop, trip_count(line, bodies) if loop else None, 0.5 if " conditional(" in line else 1.0)
    for branches in BRANCHES.findall(line):
        names = branches.split(",")
        share = 1 / len(names) if " conditional(" in line else 1.0
        for callee in names:
            yield Call(callee.strip().lstrip("%"), False, None, share)


def trip_count(line: str, bodies: dict[str, dict[str, str]]) -> int | None:
    """Return how often a loop runs, None if unknown.

    XLA may have noted the trip count. Otherwise it is N / step if the condition is `i < N`.
    JAX's scans and the loops that XLA makes around matrix products count from 0.
    """
    if known := TRIPS.search(line):
        return int(known[1])
    within, body = (bodies.get(found[1], {}) for found in (CONDITION.search(line), BODY.search(line)) if found)
    below = BELOW.match(list(within.values())[-1]) if within else None
    limit = CONSTANT.match(within.get(below[2], "")) if below else None
    if below is None or limit is None:
        return None
    element = ELEMENT.search(within.get(below[1], ""))
    return -(-int(limit[1]) // (step_of(int(element[1]), body) if element else 1))


def step_of(element: int, body: dict[str, str]) -> int:
    """Return by how much a loop's body raises this element of its tuple; 1 unless it has an addition of its own."""
    results = re.findall(r"%([\w.\-]+)", list(body.values())[-1].partition(" tuple(")[2].partition(")")[0])
    raised = ADDED.match(body.get(results[element], "")) if element < len(results) else None
    steps = [CONSTANT.match(body.get(name, "")) for name in raised.groups()] if raised else []
    return next((int(step[1]) for step in steps if step), 1)


def parse_collective(line: str, computation: str, loops: tuple[int | None, ...]) -> Collective | None:
    """Return the collective of an instruction, None if it is another operation."""
    operation = OPERATION.search(line)
    if operation is None:
        return None
    kind, result = operation[1], line[: operation.start()]
    arrays = [(dtype, tuple(int(n) for n in dims.split(",") if n)) for dtype, dims in ARRAY.findall(result)]
    if operation[2] and kind != "all-reduce":
        # The result of a start is (operands, results, and for a permute two counters).
        arrays = [array for array in arrays if array[1] or kind != "collective-permute"]
        arrays = arrays[len(arrays) // 2 :]
    if kind == "all-reduce" and computation.startswith("all-reduce-scatter"):
        # A TPU's reduce-scatter: a fusion of an all-reduce and of the slice that the device keeps.
        kind, size = "reduce-scatter", group_size(line)
        arrays = [(dtype, (shape[0] // size, *shape[1:])) for dtype, shape in arrays]
    name = re.search(r'op_name="([^"]*)"', line)
    members = first_group(line)
    return Collective(
        kind, tuple(arrays), group_size(line), loops, name[1] if name else "", members, operation[2] is not None
    )


def group_size(line: str) -> int:
    """Return how many devices work together, from any of the forms in which XLA writes groups."""
    if pairs := re.search(r"source_target_pairs=\{([{}\d,]*)\}", line):
        return pairs[1].count("{")
    if named := re.search(r"replica_groups=\w*mesh\[([^\]]*)\][^{]*\{([^}]*)\}", line):
        sizes = {axis: int(size) for axis, size in re.findall(r"'([^']+)'=(\d+)", named[1])}
        # An axis may take part with a factor of its size alone: 'fsdp':(1)2.
        axes = re.findall(r"'([^']+)'(?::\(\d+\)(\d+))?", named[2])
        return math.prod(int(factor) if factor else sizes[axis] for axis, factor in axes)
    if iota := re.search(r"replica_groups=\[\d+,(\d+)\]<=", line):
        return int(iota[1])
    if listed := re.search(r"replica_groups=\{\{([\d,]*)\}", line):
        return len(listed[1].split(","))
    raise ValueError(f"The devices of this collective cannot be read: {line.strip()[:300]}")


def first_group(line: str) -> tuple[int, ...]:
    """Return the devices of the first group of a collective; of a permute, none."""
    if listed := re.search(r"replica_groups=\{\{([\d,]*)\}", line):
        return tuple(int(number) for number in listed[1].split(","))
    if iota := re.search(r"replica_groups=\[\d+,(\d+)\]<=(\S+?)(?:, |$)", line):
        return tuple(iota_devices(iota[2])[: int(iota[1])].tolist())
    if named := re.search(r"replica_groups=\w*mesh\[([^\]]*)\](?:, device_ids=\((\S+)\))?[^{]*\{([^}]*)\}", line):
        axes = {axis: int(size) for axis, size in re.findall(r"'([^']+)'=(\d+)", named[1])}
        order = iota_devices(named[2]) if named[2] else np.arange(math.prod(axes.values()))
        taken = {axis: (before, size) for axis, before, size in re.findall(r"'([^']+)'(?::\((\d+)\)(\d+))?", named[3])}
        devices = order.reshape(tuple(axes.values()))
        for dim, (axis, size) in enumerate(axes.items()):
            before, part = taken.get(axis, ("1", "1"))
            stride = size // (int(before) * int(part)) if part else 1
            devices = devices.take(np.arange(int(part or size)) * stride, axis=dim)
        return tuple(devices.reshape(-1).tolist())
    return ()


def iota_devices(text: str) -> np.ndarray:
    """Return the device numbers of XLA's `[16]`, or of `[2,8]T(1,0)`: a range, reshaped and transposed."""
    shape, _, order = text.partition("T(")
    sizes = [int(size) for size in re.findall(r"\d+", shape)]
    devices = np.arange(math.prod(sizes)).reshape(sizes)
    axes = [int(axis) for axis in re.findall(r"\d+", order)]
    return (devices.transpose(axes) if axes else devices).reshape(-1)


def bits_of(dtype: str) -> int:
    """Return the bits of an element: 32 for `f32`, 16 for `bf16`, 8 for `f8e4m3fn` and `pred`."""
    return BITS.get(dtype) or int(re.findall(r"\d+", dtype)[0])


ESTIMATE = re.compile(r'"estimated_cycles":"(\d+)"')
FUSED = re.compile(r'use_fused_bwd_kernel\\*": true')
"""A setting in the metadata of a splash kernel."""
NO_ESTIMATE = 2**63 - 1
"""The compiler's mark for an operation that it cannot estimate, such as a custom kernel."""


def estimated_cycles(text: str, unknown: int = 1) -> int:
    """Sum the TPU compiler's own estimates over one call of the program, in cycles of a core.

    Each operation counts as often as its loops run. Of a conditional's branches it is the mean. Communication and
    Pallas kernels are not included.
    """
    bodies, entry = computations(text)

    @functools.cache
    def cycles(name: str) -> float:
        total = 0.0
        for line in bodies.get(name, {}).values():
            own = ESTIMATE.search(line)
            if own is not None and int(own[1]) != NO_ESTIMATE:
                total += int(own[1])
            elif own is None:  # a fusion's estimate is that of what it calls
                for call in calls(line, bodies):
                    times = 1 if not call.loop else unknown if call.trips is None else call.trips
                    total += call.share * times * cycles(call.callee)
        return total

    return round(cycles(entry))


@dataclasses.dataclass(frozen=True)
class Kernel:
    """A Pallas kernel of attention in a program.

    Attributes:
        name: as its source names it, such as `splash_mha_fwd_segmented_residuals`.
        shape: (B, Q, T, H) of the queries on one device.
        times: how often it runs in one call of the program; the mean over a conditional's branches.
        fused: whether the backward kernel of keys and values computes the queries' gradient too.
    """

    name: str
    shape: tuple[int, int, int, int]
    times: float
    fused: bool

    @property
    def products(self) -> int:
        """Return the matrix products of a tile of scores: forward 2; backward 4 and 3, or fused 5."""
        if "_dkv" in self.name:
            return 5 if self.fused else 4
        return 3 if "_dq" in self.name else 2

    def flops(self, seen_keys: float) -> float:
        """Return the FLOPs of all its runs if a query reads `seen_keys` keys on average."""
        B, Q, T, H = self.shape
        return self.times * self.products * 2 * B * Q * T * H * seen_keys


def attention_kernels(text: str, unknown: int = 1) -> list[Kernel]:
    """Return the splash-attention kernels of a TPU program; the compiler has no estimate of them."""
    bodies, entry = computations(text)
    found: list[Kernel] = []

    def visit(name: str, times: float) -> None:
        for instruction, line in bodies.get(name, {}).items():
            if "tpu_custom_call" in line and "splash" in instruction:
                arrays = [tuple(map(int, dims.split(","))) for _, dims in ARRAY.findall(constraints(line)) if dims]
                shape = next((dims for dims in arrays if len(dims) == 4), None)
                if shape is None:  # a shard with one sequence has no dimension for it; the mask's blocks have three too
                    shape = (1, *max((dims for dims in arrays if len(dims) == 3), key=math.prod))
                B, Q, T, H = shape
                found.append(Kernel(instruction, (B, Q, T, H), times, FUSED.search(line) is not None))
            for call in calls(line, bodies):
                trips = 1 if not call.loop else unknown if call.trips is None else call.trips
                visit(call.callee, times * call.share * trips)

    visit(entry, 1.0)
    return found


def constraints(line: str) -> str:
    """Return the operands' shapes of a custom call."""
    return line.partition("operand_layout_constraints={")[2].partition("frontend_attributes")[0]
