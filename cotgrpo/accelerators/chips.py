"""Published figures of accelerators, and topologies by name: `v5p:4x4x4`, `h100:8`."""

from __future__ import annotations

import dataclasses
import difflib
import math
import re

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
        clock: cycles per second of a TPU's core, from its peak and its matrix units; 0 if not published.
        node: GPUs of a node; 0 for TPUs.
        nic_bandwidth: bytes per second that a GPU can send to other nodes.
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
    node: int = 0
    nic_bandwidth: float = 0.0


CLOUD = "docs.cloud.google.com/tpu/docs/"
CHIPS = {
    chip.name: chip
    for chip in (
        Chip("v4", "tpu", 32 * GIB, 275e12, 1228e9, 300e9, CLOUD + "v4", clock=1.05e9),
        Chip("v5e", "tpu", 16 * GIB, 197e12, 819e9, 200e9, CLOUD + "v5e", clock=1.5e9),
        Chip("v5p", "tpu", 95 * GIB, 459e12, 2765e9, 600e9, CLOUD + "v5p", clock=1.75e9),
        Chip("v6e", "tpu", 32 * GIB, 918e12, 1638e9, 400e9, CLOUD + "v6e"),
        Chip("tpu7x", "tpu", 192 * GIB, 2307e12, 7380e9, 600e9, CLOUD + "tpu7x", devices=2),
        Chip("a100", "gpu", 80e9, 312e12, 2039e9, 300e9, "NVIDIA A100 80GB SXM data sheet", node=8, nic_bandwidth=25e9),
        Chip("h100", "gpu", 80e9, 989e12, 3350e9, 450e9, "NVIDIA H100 SXM data sheet", node=8, nic_bandwidth=50e9),
        Chip("h200", "gpu", 141e9, 989e12, 4800e9, 450e9, "NVIDIA H200 SXM data sheet", node=8, nic_bandwidth=50e9),
    )
}


@dataclasses.dataclass(frozen=True)
class Topology:
    """Chips joined by their network.

    Attributes:
        name: `v5p:4x4x4` (TPUs by the sides of their torus) or `h100:8` (GPUs by their number).
        chip: the kind of chip.
        num_chips: number of chips.
    """

    name: str
    chip: Chip
    num_chips: int

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


class TopologyError(ValueError):
    """Raised for the name of a topology that cannot be read."""


def parse_topology(name: str) -> Topology:
    """Return the topology with this name.

    Raises:
        TopologyError: the name is not that of a known topology; the message shows what one looks like.
    """
    kind, _, sides = name.partition(":")
    if kind not in CHIPS:
        close = difflib.get_close_matches(kind, CHIPS, n=1)
        hint = f" Did you mean {close[0]}?" if close else ""
        raise TopologyError(f"--topology {name}: unknown chip {kind!r}; there are {', '.join(CHIPS)}.{hint}")
    chip = CHIPS[kind]
    what, pattern, example = "a number of GPUs", r"\d+", "h100:8"
    if chip.platform == "tpu":
        what, pattern, example = "the sides of a slice", r"\d+(x\d+){1,2}", "v5p:4x4x4"
    if not re.fullmatch(pattern, sides) or not all(int(side) for side in sides.split("x")):
        raise TopologyError(f"--topology {name}: expected {what}, as in {example}.")
    return Topology(name, chip, math.prod(int(side) for side in sides.split("x")))
