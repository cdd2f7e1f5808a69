"""Compare the memory that a step needs with the memory there is, before the first step."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax

from cotgrpo.terminal import complain

if TYPE_CHECKING:
    from cotgrpo.types import PyTree

CGROUP_FILES = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")
"""Limits of a container, in both versions of Linux's control groups."""


class TooLarge(MemoryError):
    """Raised for what cannot fit into memory. The message says what is needed, and what is there."""


def check_step(compiled: Any, say: Callable[[str], None] = complain) -> int | None:
    """Check that a compiled step fits, by the compiler's own sizes of its arguments, temporaries and results.

    Returns:
        The bytes that it needs on a device; None if the backend does not tell.

    Raises:
        TooLarge: as `check_fits` does.
    """
    sizes = compiled.memory_analysis()
    if sizes is None:
        return None
    new = sizes.temp_size_in_bytes + sizes.output_size_in_bytes - sizes.alias_size_in_bytes
    total: int = sizes.argument_size_in_bytes + new
    check_fits("a step", total, new, say)
    return total


def check_fits(what: str, total: int, new: int, say: Callable[[str], None] = complain) -> None:
    """Check that a device of this process, or this machine, has the memory for `what`.

    Args:
        what: what needs it.
        total: all bytes on one device.
        new: those of them that are not allocated yet.
        say: prints a warning. Memory of a machine may be swapped, or never touched, so only a warning is certain there.

    Raises:
        TooLarge: more than a device has, or than this process may still map.
    """
    need = f"{what} needs {total / 1e9:.2f} GB"
    limits = [stats["bytes_limit"] for stats in map(memory_stats, jax.local_devices()) if stats.get("bytes_limit")]
    if limits:
        if total > min(limits) and not os.environ.get("TF_FORCE_UNIFIED_MEMORY"):
            raise TooLarge(f"{need}, and a device has {min(limits) / 1e9:.2f} GB")
        return
    left = address_space_left()
    if left is not None and new > left:
        raise TooLarge(f"{need}, {new / 1e9:.2f} GB of them new, and the limit (ulimit -v) leaves {left / 1e9:.2f} GB")
    there = host_memory()
    if total > there:
        say(f"Memory: {need}, and this machine has {there / 1e9:.2f} GB. The system may end the run.")


def memory_stats(device: jax.Device) -> dict[str, int]:
    """Return a device's figures of its memory; empty if it has none, as a CPU."""
    try:
        return device.memory_stats() or {}
    except (RuntimeError, NotImplementedError):
        return {}


def memory_in_use() -> dict[str, float]:
    """Return the memory that this process takes, in GB.

    On devices that tell, it is that of the fullest: `memory_gb` now, and `peak_memory_gb` at most so far. Elsewhere it
    is the process's share of the machine's memory: `host_memory_gb`. Empty if neither is known.
    """
    stats = [found for found in map(memory_stats, jax.local_devices()) if "bytes_in_use" in found]
    if stats:
        names = {"memory_gb": "bytes_in_use", "peak_memory_gb": "peak_bytes_in_use"}
        return {ours: max(found[key] for found in stats) / 1e9 for ours, key in names.items() if key in stats[0]}
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
    except (OSError, ValueError, IndexError):
        return {}
    return {"host_memory_gb": pages * os.sysconf("SC_PAGE_SIZE") / 1e9}


def address_space_left() -> int | None:
    """Return the bytes that this process may still map; None without a limit."""
    try:
        import resource

        limit = resource.getrlimit(resource.RLIMIT_AS)[0]
        pages = int(Path("/proc/self/statm").read_text().split()[0])
    except (ImportError, OSError, ValueError):
        return None
    return None if limit == resource.RLIM_INFINITY else max(limit - pages * os.sysconf("SC_PAGE_SIZE"), 0)


def host_memory() -> int:
    """Return the bytes of this machine's memory, or of its container's; without a known size, more than any has."""
    found = [sys.maxsize]
    if hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names:
        found.append(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    for name in CGROUP_FILES:
        try:
            found.append(int(Path(name).read_text()))
        except (OSError, ValueError):  # "max"
            continue
    return min(size for size in found if size > 0)


def size_of(tree: PyTree) -> int:
    """Return the bytes of all arrays of a tree, which may be abstract. Random keys are left out."""
    leaves = [leaf for leaf in jax.tree.leaves(tree) if not jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key)]
    return sum(leaf.size * leaf.dtype.itemsize for leaf in leaves)
