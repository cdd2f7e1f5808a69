"""Compare the memory that weights take with what is free, before they are read."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax

if TYPE_CHECKING:
    from jax.sharding import NamedSharding

MEMINFO = Path("/proc/meminfo")
CONTAINER_LIMIT = Path("/sys/fs/cgroup/memory.max")


def missing_memory(leaves: Mapping[Any, jax.ShapeDtypeStruct], shardings: Mapping[Any, NamedSharding | None]) -> str:
    """Return what to say if arrays do not fit on this process's devices, with both figures. "" if they do.

    The memory of CPU devices is the host's, which they share. Unknown figures count as enough.
    """
    size = sum(shard_bytes(leaf, shardings[path]) for path, leaf in leaves.items())
    meshes = [sharding.mesh for sharding in shardings.values() if sharding is not None]
    devices = list(meshes[0].local_devices) if meshes else jax.local_devices()[:1]
    if is_host(devices[0]):
        size, free = size * len(devices), free_host_memory()
        return "" if free is None or size <= free else f"{gigabytes(size)}, and this machine has {gigabytes(free)} free"
    for device in devices:
        stats = device_memory(device)
        free = stats.get("bytes_limit", size) - stats.get("bytes_in_use", 0)
        if stats.get("bytes_limit") and size > free:
            return f"{gigabytes(size)} on each device, and {device} has {gigabytes(max(free, 0))} free"
    return ""


def is_host(device: jax.Device) -> bool:
    """Return whether a device's memory is the host's."""
    return device.platform == "cpu"


def shard_bytes(leaf: jax.ShapeDtypeStruct, sharding: NamedSharding | None) -> int:
    """Return the bytes of an array on one device."""
    shape = leaf.shape if sharding is None else sharding.shard_shape(leaf.shape)
    return math.prod(shape) * leaf.dtype.itemsize


def device_memory(device: jax.Device) -> Mapping[str, int]:
    """Return a device's figures of its memory; empty if it has none."""
    try:
        return device.memory_stats() or {}
    except (RuntimeError, NotImplementedError):
        return {}


def free_host_memory() -> int | None:
    """Return the bytes that this machine, or its container, can still give, swap included; None if unknown."""
    try:
        lines = (line.split() for line in MEMINFO.read_text().splitlines())
        found = {line[0].rstrip(":"): int(line[1]) * 1024 for line in lines}
        free = found["MemAvailable"] + found.get("SwapFree", 0)
    except (OSError, ValueError, KeyError, IndexError):
        return None
    try:
        # What the container uses is not subtracted: the pages of files count as used, and are given back.
        return min(free, int(CONTAINER_LIMIT.read_text()))
    except (OSError, ValueError):  # no container, or "max"
        return free


def gigabytes(size: int) -> str:
    """Return bytes as text."""
    return f"{size / 1e9:.2f} GB"
