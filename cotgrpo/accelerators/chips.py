"""Published figures of accelerators, and topologies by name: `v5p:4x4x4`, `v5p-128`, `2xv5e:4x4`, `h100:8`."""

from __future__ import annotations

import dataclasses
import difflib
import math
import re
from collections.abc import Iterator, Sequence

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Chip:
    """The published figures of one chip.

    Attributes:
        name: first part of a topology's name.
        platform: JAX's name, "tpu" or "gpu".
        hbm_bytes: size of the memory.
        flops: peak bfloat16 operations per second, without sparsity.
        hbm_bandwidth: bytes per second.
        network_bandwidth: bytes per second to its neighbours, over all its links together (ICI, NVLink).
        source: where the figures are published.
        devices: JAX devices of a chip.
        clock: cycles per second of a TPU's core, as the compiler counts them. It is the peak over the operations of a
            cycle that the compiler's estimate of a large matrix product has. 0 for GPUs.
        cores: TensorCores of a TPU chip, which names such as `v5p-32` count; 1 where such names count chips.
        sides: dimensions of a TPU's torus, with two links each.
        wrap: what divides a side that wraps around.
        matrix_unit: width of the TPU's systolic array.
        node: GPUs of a node; 0 for TPUs.
        nic_bandwidth: bytes per second that a GPU can send to other nodes, and a TPU to other slices (DCN).
    """

    name: str
    platform: str
    hbm_bytes: float
    flops: float
    hbm_bandwidth: float
    network_bandwidth: float
    source: str
    devices: int = 1
    clock: float = 0.0
    cores: int = 1
    sides: int = 0
    wrap: int = 0
    matrix_unit: int = 128
    node: int = 0
    nic_bandwidth: float = 0.0

    @property
    def link_bandwidth(self) -> float:
        """Bytes per second of one link of a TPU, one way."""
        return self.network_bandwidth / (2 * self.sides)


CLOUD = "docs.cloud.google.com/tpu/docs/"


def tpu(name: str, hbm: float, flops: float, hbm_bandwidth: float, ici: float, dcn: float, **rest: float) -> Chip:
    """Return a TPU with this memory in GiB; its figures are those of Google's documentation.

    Bytes per second go to neighbours by `ici`, and to other slices by `dcn`: a chip's share of its host's network.
    """
    whole: dict[str, int] = {key: int(value) for key, value in rest.items() if key != "clock"}
    return Chip(
        name,
        "tpu",
        hbm * GIB,
        flops,
        hbm_bandwidth,
        ici,
        CLOUD + name,
        clock=rest["clock"],
        nic_bandwidth=dcn,
        **whole,
    )


CHIPS = {
    chip.name: chip
    for chip in (
        tpu("v4", 32, 275e12, 1228e9, 300e9, 6.25e9, clock=1.05e9, cores=2, sides=3, wrap=4),
        tpu("v5e", 16, 197e12, 819e9, 200e9, 3.125e9, clock=1.5e9, sides=2, wrap=16),
        tpu("v5p", 95, 459e12, 2765e9, 600e9, 6.25e9, clock=1.75e9, cores=2, sides=3, wrap=4),
        tpu("v6e", 32, 918e12, 1638e9, 400e9, 12.5e9, clock=1.75e9, sides=2, wrap=16, matrix_unit=256),
        tpu(
            "tpu7x",
            192,
            2307e12,
            7380e9,
            600e9,
            12.5e9,
            clock=2.2e9,
            cores=2,
            sides=3,
            wrap=4,
            matrix_unit=256,
            devices=2,
        ),
        Chip("a100", "gpu", 80e9, 312e12, 2039e9, 300e9, "NVIDIA A100 80GB SXM data sheet", node=8, nic_bandwidth=25e9),
        Chip("h100", "gpu", 80e9, 989e12, 3350e9, 450e9, "NVIDIA H100 SXM data sheet", node=8, nic_bandwidth=50e9),
        Chip("h200", "gpu", 141e9, 989e12, 4800e9, 450e9, "NVIDIA H200 SXM data sheet", node=8, nic_bandwidth=50e9),
        Chip("b200", "gpu", 180e9, 2250e12, 8000e9, 900e9, "NVIDIA DGX B200 data sheet", node=8, nic_bandwidth=50e9),
        Chip(
            "gb200", "gpu", 186e9, 2500e12, 8000e9, 900e9, "NVIDIA GB200 NVL72 data sheet", node=72, nic_bandwidth=50e9
        ),
        # A PCIe card of 24 GB that clouds have, and one that people have. Nodes of L4: g2-standard-96, 100 Gbit/s.
        Chip("mi300x", "gpu", 192e9, 1307e12, 5300e9, 448e9, "AMD MI300X data sheet", node=8, nic_bandwidth=50e9),
        Chip("l4", "gpu", 24e9, 121e12, 300e9, 32e9, "NVIDIA L4 data sheet", node=8, nic_bandwidth=1.6e9),
        Chip("rtx4090", "gpu", 24e9, 165e12, 1008e9, 32e9, "NVIDIA Ada GPU architecture", node=8, nic_bandwidth=1.25e9),
    )
}
ALIASES = {"v5litepod": "v5e", "v7x": "tpu7x"}
"""Other names of chips, as Google's tools write them."""


@dataclasses.dataclass(frozen=True)
class Topology:
    """Chips joined by their network.

    Attributes:
        name: `v5p:4x4x4` (TPUs by the sides of their torus), `2xv5p:4x4x4` (two such slices) or `h100:8` (GPUs by
            their number).
        chip: the kind of chip.
        num_chips: number of chips, of all slices.
        sides: the sides of a slice's torus in chips; empty for GPUs.
        slices: number of slices of TPUs, which the data-center network connects.
    """

    name: str
    chip: Chip
    num_chips: int
    sides: tuple[int, ...] = ()
    slices: int = 1

    @property
    def slice_name(self) -> str:
        """The name of one of the slices."""
        return self.name.removeprefix(f"{self.slices}x")

    @property
    def num_devices(self) -> int:
        """Number of JAX devices."""
        return self.num_chips * self.chip.devices

    @property
    def hbm_bytes(self) -> float:
        """Memory of one device."""
        return self.chip.hbm_bytes / self.chip.devices

    @property
    def network_bandwidth(self) -> float:
        """Bytes per second that one device can send. With several nodes of GPUs it is the slower network's."""
        beyond_node = bool(self.chip.node) and self.num_chips > self.chip.node
        return (self.chip.nic_bandwidth if beyond_node else self.chip.network_bandwidth) / self.chip.devices

    @property
    def rings(self) -> tuple[bool, ...]:
        """Whether each side of the torus wraps around. Three do so only between whole cubes."""
        whole = tuple(side % self.chip.wrap == 0 for side in self.sides)
        return whole if self.chip.sides == 2 else (all(whole),) * len(whole)

    def links(self, spans: Sequence[int]) -> int:
        """Return how many links of a chip a group uses at once, in one direction each.

        A side that wraps around is a ring with two links. One that does not is a line, where only one link brings the
        whole payload to a chip at its end. So is an axis of two chips, and a part of a ring.

        Args:
            spans: number of chips of the group along each side.
        """
        whole = zip(spans, self.sides, self.rings, strict=True)
        return sum(2 if ring and span == side and side > 2 else 1 for span, side, ring in whole if span > 1)


class TopologyError(ValueError):
    """Raised for the name of a topology that cannot be read."""


def parse_topology(name: str) -> Topology:
    """Return the topology with this name.

    TPUs are named by the sides of their slice, `v5p:2x2x4`, or as Google names accelerators, `v5p-32`. Numbers after
    v4, v5p and tpu7x count TensorCores, of which a chip has two; numbers after v5e and v6e count chips. Several slices
    have their number in front, `2xv5e:4x4`.

    Raises:
        TopologyError: the name is not that of a known topology; the message shows what one looks like.
    """
    several, one = re.match(r"(?:(\d+)x)?(.*)", name.strip().lower(), re.DOTALL).groups()  # type: ignore[union-attr]
    slices = int(several or 1)
    found = re.match(r"([^:-]*)([:-]?)(.*)", one, re.DOTALL)
    kind, sign, size = found.groups() if found else ("", "", "")
    kind = ALIASES.get(kind, kind)
    if kind not in CHIPS:
        close = difflib.get_close_matches(kind, CHIPS, n=1)
        hint = f" Did you mean {close[0]}?" if close else ""
        raise TopologyError(f"--topology {name}: unknown chip {kind!r}; there are {', '.join(CHIPS)}.{hint}")
    chip = CHIPS[kind]
    if slices < 1 or (chip.platform != "tpu" and several):
        wanted = (
            f"a number of slices, as in 2x{examples(chip)}"
            if chip.platform == "tpu"
            else f"all GPUs together, as in {kind}:16"
        )
        raise TopologyError(f"--topology {name}: expected {wanted}.")
    if chip.platform != "tpu":
        if not re.fullmatch(r"0*[1-9]\d{0,6}", size):
            raise TopologyError(f"--topology {name}: expected a number of GPUs, as in {kind}:8.")
        return Topology(f"{kind}:{int(size)}", chip, int(size))
    if sign == "-" and re.fullmatch(r"\d{1,7}", size):
        sides = sides_of(name, chip, int(size))
    elif re.fullmatch(r"0*[1-9]\d*(x0*[1-9]\d*){1,2}", size):
        sides = tuple(int(side) for side in size.split("x"))
    else:
        raise TopologyError(f"--topology {name}: expected the sides of a slice, as in {examples(chip)}.")
    if len(sides) != chip.sides:
        raise TopologyError(f"--topology {name}: expected {chip.sides} sides for {kind}, as in {examples(chip)}.")
    canonical = f"{kind}:{'x'.join(map(str, sides))}"
    return Topology(
        canonical if slices == 1 else f"{slices}x{canonical}", chip, slices * math.prod(sides), sides, slices
    )


def examples(chip: Chip) -> str:
    """Return what names of this TPU's slices look like."""
    sides = "4x4" if chip.sides == 2 else "4x4x4"
    return f"{chip.name}:{sides} or {chip.name}-{math.prod(map(int, sides.split('x'))) * chip.cores}"


def sides_of(name: str, chip: Chip, size: int) -> tuple[int, ...]:
    """Return the sides of the slice that Google makes for `v5p-32` and its like.

    Raises:
        TopologyError: there is no such slice; the message lists those that are near.
    """
    known = {math.prod(sides) * chip.cores: sides for sides in standard_slices(chip)}
    if size not in known:
        near = ", ".join(f"{chip.name}-{number}" for number in sorted(sorted(known, key=lambda n: abs(n - size))[:5]))
        counted = "TensorCores, two a chip" if chip.cores == 2 else "chips"
        raise TopologyError(f"--topology {name}: there is no slice of this size (in {counted}). Near it are {near}.")
    return known[size]


def standard_slices(chip: Chip) -> Iterator[tuple[int, ...]]:
    """Yield the slices that are named by their size alone, the most compact of a size last."""
    if chip.sides == 2:
        yield from ((1, 1), (2, 2), (2, 4), (4, 4), (4, 8), (8, 8), (8, 16), (16, 16))
        return
    yield from ((2, 2, 1), (2, 2, 2), (2, 2, 4), (2, 4, 4))
    quarters = range(4, 25, 4)
    whole = [(a, b, c) for a in quarters for b in quarters for c in quarters if a <= b <= c]
    yield from sorted(whole, key=lambda sides: -sum(sides))
