"""Read from a compiled program's text what devices send to other slices, over the data-center network (DCN).

XLA's collectives stay within a slice of TPUs. What crosses slices is written as transfers by the host, in pairs of a
`send` and a `recv`: each device hands over its array, and gets it back reduced over its counterparts in other slices.
"""

from __future__ import annotations

import dataclasses
import math
import re

from cotgrpo.planning.hlo import ARRAY, bits_of, calls, computations

SEND = re.compile(r" send\(.*_xla_megascale_")
TARGET = re.compile(r'_xla_megascale_target="\{([\d,:]+)\}')
KIND = re.compile(r'_xla_megascale_transfer_type="(\w+)"')


@dataclasses.dataclass(frozen=True)
class SliceTransfer:
    """One collective between slices.

    Attributes:
        kind: its name, such as `all-reduce`.
        bytes: what each device hands over.
        slices: number of slices that take part.
        loops: trip counts of the loops around it, outermost first; None for a loop whose end depends on the data.
    """

    kind: str
    bytes: int
    slices: int
    loops: tuple[int | None, ...]

    @property
    def sent(self) -> float:
        """Bytes that each device sends to other slices, in the algorithms that send least."""
        return (2 if self.kind == "all-reduce" else 1) * (self.slices - 1) / self.slices * self.bytes

    def times(self, unknown: int = 1) -> int:
        """Return how often it runs in one call of the program; loops of unknown length run `unknown` times each."""
        return math.prod(unknown if trips is None else trips for trips in self.loops)


def slice_transfers(text: str) -> list[SliceTransfer]:
    """Return what crosses slices in a program from `compiled.as_text()`; nothing for a program of one slice.

    Raises:
        ValueError: the text lacks an entry computation.
    """
    bodies, entry = computations(text)
    found: list[SliceTransfer] = []

    def visit(name: str, loops: tuple[int | None, ...]) -> None:
        for line in bodies.get(name, {}).values():
            if SEND.search(line):
                found.append(parse_transfer(line, loops))
            for call in calls(line, bodies):
                visit(call.callee, (*loops, call.trips) if call.loop else loops)

    visit(entry, ())
    return found


def parse_transfer(line: str, loops: tuple[int | None, ...]) -> SliceTransfer:
    """Return the transfer that a `send` starts."""
    kind, target, array = KIND.search(line), TARGET.search(line), ARRAY.search(line)
    if kind is None or target is None or array is None:
        raise ValueError(f"This transfer between slices cannot be read: {line.strip()[:300]}")
    size = math.prod(int(n) for n in array[2].split(",") if n) * bits_of(array[1]) // 8
    return SliceTransfer(kind[1].lower().replace("_", "-"), size, count_slices(target[1]), loops)


def count_slices(numbers: str) -> int:
    """Return how many numbers a list with ranges holds: 3 for `1,3:4`."""
    ends = [[int(end) for end in part.split(":")] for part in numbers.split(",")]
    return sum(part[-1] - part[0] + 1 for part in ends)
