"""The time to expect of a train step, from what one device does in it.

A `StepLoad` counts the work at published rates. `expected_seconds` turns it into a time:

    compute / share + kernels / KERNEL_SHARE + waited / LINK_SHARE + what async collectives take beyond all of that

The constants are fitted to published runs (`benchmarks/plan_calibration.py`, docs/plan.md).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence

from cotgrpo.accelerators.chips import Chip, Topology
from cotgrpo.accelerators.roofline import Work

COMPILED_SHARES = {"v4": 1.0, "v5e": 1.12, "v5p": 1.0, "v6e": 1.75, "tpu7x": 1.4}
"""The compiler's estimate of compute over the time that it takes.

It is most careful with a matrix unit of 256 columns (v6e, tpu7x): even a single large product has 0.6 to 0.9 of the
peak there. v5e and v6e are fitted to compiled steps, v5p to what `PEAK_SHARES` gives the same step. v4 and tpu7x are
scaled from single products, and are the least certain.
"""
PEAK_SHARES = {"v4": 0.74, "v5e": 0.82, "v5p": 0.72, "v6e": 0.64, "tpu7x": 0.75, "gpu": 0.42}
"""Share of the published peak that a step's matrix products reach. It is for steps that are not compiled."""
KERNEL_SHARE = 0.51
"""Share of the peak that attention kernels reach, if a head fills the matrix unit."""
LINK_SHARE = 0.8
"""Share of the links' published bandwidth that collectives reach."""
RANGE = (0.74, 1.35)
"""The range that is given with a time, as factors of it. All published runs but a few in a hundred lie within it."""


@dataclasses.dataclass(frozen=True)
class StepLoad:
    """What one device does in a step, in seconds at the published rates.

    Attributes:
        compute: matrix products and all else that is no kernel: the compiler's estimate, or FLOPs over the peak.
        kernels: FLOPs of attention kernels over the peak.
        memory: bytes read and written over HBM's bandwidth; 0 if `compute` includes them.
        waited: collectives that nothing else is computed with.
        hidden: collectives that run while the device computes.
    """

    compute: float
    kernels: float = 0.0
    memory: float = 0.0
    waited: float = 0.0
    hidden: float = 0.0

    @property
    def network(self) -> float:
        """Seconds of all collectives at the links' published bandwidth."""
        return self.waited + self.hidden


def expected_seconds(load: StepLoad, chip: Chip, head_dim: int, *, compiled: bool) -> float:
    """Return the time to expect of a step; `compiled` if the load's compute is the compiler's estimate."""
    compute = load.compute / (COMPILED_SHARES[chip.name] if compiled else peak_share(chip))
    busy = max(compute + load.kernels / kernel_share(chip, head_dim), load.memory)
    return busy + load.waited / LINK_SHARE + max(0.0, load.hidden / LINK_SHARE - busy)


def peak_share(chip: Chip) -> float:
    """Return the share of the published peak that a step's matrix products reach, without the compiler's estimate."""
    return PEAK_SHARES.get(chip.name, PEAK_SHARES["gpu"])


def kernel_share(chip: Chip, head_dim: int) -> float:
    """Return the share of the peak that an attention kernel reaches. A narrow head leaves part of a TPU's unit idle."""
    if chip.platform != "tpu":
        return PEAK_SHARES["gpu"]
    return KERNEL_SHARE * min(1.0, head_dim / chip.matrix_unit)


def arithmetic_load(work: Work, topology: Topology, state_bytes: float, mesh: Mapping[str, int]) -> StepLoad:
    """Return a step's load by arithmetic; `state_bytes` are the parameters and optimizer state of one device."""
    chip, devices = topology.chip, topology.num_devices
    peak = chip.flops / chip.devices
    kernels = work.tokens * work.kernel_flops / (devices * peak)
    seconds = {
        axis: sent / axis_bandwidth(topology, mesh, axis) for axis, sent in work.sent_by_axis(mesh).items() if sent
    }
    return StepLoad(
        compute=work.hardware_flops / (devices * peak) - kernels,
        kernels=kernels,
        memory=work.hbm_bytes(state_bytes, mesh) / (chip.hbm_bandwidth / chip.devices),
        # Gradients are summed over `data` when all of them are there.
        waited=seconds.pop("data", 0.0),
        hidden=sum(seconds.values()),
    )


def axis_bandwidth(topology: Topology, mesh: Mapping[str, int], axis: str) -> float:
    """Return the bytes per second at which a device sends along an axis of the mesh.

    TPUs: the links of the sides that the axis covers, if the mesh's inner axes take the inner sides. GPUs: NVLink
    within a node. A group that leaves a slice or a node sends through the cards of all its chips there, each a part.
    """
    axes = list(mesh)
    inner = math.prod(mesh[other] for other in axes[axes.index(axis) + 1 :])
    chip, size = topology.chip, mesh[axis]
    if chip.platform != "tpu":
        if size * inner <= chip.node:
            return chip.network_bandwidth
        return min(chip.network_bandwidth, max(chip.node // inner, 1) * chip.nic_bandwidth)
    outer = topology.slices if axis == "data" else 1
    own = size // outer
    chips = max(own // chip.devices, 1) if inner < chip.devices else own
    links = topology.links(covered_sides(topology.sides, max(inner // chip.devices, 1), chips))
    within = max(links, 1) * chip.link_bandwidth / chip.devices
    beyond = own * chip.nic_bandwidth / chip.devices
    if outer == 1:
        return within
    return beyond if own == 1 else 1 / (1 / within + 1 / beyond)


def covered_sides(sides: Sequence[int], inner: int, size: int) -> tuple[int, ...]:
    """Return how far an axis of `size` chips reaches along each side if `inner` chips lie within one of its steps."""
    spans = []
    for side in reversed(sides):
        taken = math.gcd(side, inner)
        inner //= taken
        own = math.gcd(side // taken, size)
        size //= own
        spans.append(own)
    return tuple(reversed(spans))


def collective_seconds(
    sent: float, members: Sequence[int], places: Sequence[Sequence[int]], topology: Topology
) -> float:
    """Return the time of a collective at the links' published bandwidth.

    Args:
        sent: bytes that each device sends, in the algorithm that sends least.
        members: the devices of one group; none for a permute, which sends to a neighbour over one link.
        places: of each device of the mesh, the number of its slice and the coordinates of its chip.
        topology: the slice, or slices.
    """
    chip = topology.chip
    slices = len({places[number][0] for number in members})
    spans = [len({places[number][side + 1] for number in members}) for side in range(len(topology.sides))]
    links = topology.links(spans) if members else 1
    # The devices of one chip share its memory.
    within = sent / (links * chip.link_bandwidth / chip.devices) if links else sent / chip.hbm_bandwidth
    if slices <= 1:
        return within
    own = len(members) // slices
    beyond = sent / (own * chip.nic_bandwidth / chip.devices)
    return beyond if own == 1 else within + beyond
