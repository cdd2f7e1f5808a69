"""Accelerators as their makers describe them, and topologies by name: `v5p:4x4x4`, `h100:8`."""

from __future__ import annotations

import dataclasses
import math
import re

from cotgrpo.config.files import nearest
from cotgrpo.config.settings import ConfigError

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Chip:
    """One chip, by its public figures.

    Attributes:
        name: as in a topology's name.
        platform: JAX's name, "tpu" or "gpu".
        hbm_bytes: memory.
        flops: peak bfloat16 operations a second, without sparsity.
        hbm_bandwidth: bytes a second.
        network_bandwidth: bytes a second that it can send to its neighbours over all its links together (ICI, NVLink).
        source: where the figures are published.
        devices: JAX devices of a chip.
        clock: cycles a second of a TPU's core, from its peak and its matrix units; 0: not published.
        node: chips of a node, GPUs only; nodes are joined by
        nic_bandwidth: bytes a second that a GPU can send to other nodes.
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
        name: `v5p:4x4x4`: TPUs by the sides of their torus; `h100:8`: GPUs by their number.
        chip: what they are.
        num_chips: how many.
    """

    name: str
    chip: Chip
    num_chips: int

    @property
    def num_devices(self) -> int:
        """As JAX counts them."""
        return self.num_chips * self.chip.devices

    @property
    def hbm_bytes(self) -> float:
        """Of one device."""
        return self.chip.hbm_bytes / self.chip.devices

    @property
    def network_bandwidth(self) -> float:
        """Bytes a second that one device can send; between nodes of GPUs, those of the slower network."""
        beyond_node = bool(self.chip.node) and self.num_chips > self.chip.node
        return (self.chip.nic_bandwidth if beyond_node else self.chip.network_bandwidth) / self.chip.devices


def parse_topology(name: str) -> Topology:
    """The topology of a name.

    Raises:
        ConfigError: it is none; says what one looks like.
    """
    kind, _, sides = name.partition(":")
    if kind not in CHIPS:
        raise ConfigError(
            f"--topology {name}: unknown chip {kind!r}; there are {', '.join(CHIPS)}.{nearest(kind, list(CHIPS)).removesuffix(' See --help for all settings.')}"
        )
    chip = CHIPS[kind]
    pattern, example = (r"\d+(x\d+){1,2}", "v5p:4x4x4") if chip.platform == "tpu" else (r"\d+", "h100:8")
    if not re.fullmatch(pattern, sides) or not all(int(side) for side in sides.split("x")):
        raise ConfigError(
            f"--topology {name}: expected {'the sides of a slice' if chip.platform == 'tpu' else 'a number of GPUs'}, as in {example}."
        )
    return Topology(name, chip, math.prod(int(side) for side in sides.split("x")))
