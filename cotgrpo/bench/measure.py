"""Time programs in turn, and read their memory and the machine that they ran on."""

from __future__ import annotations

import dataclasses
import platform
import resource
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

import jax

if TYPE_CHECKING:
    from cotgrpo.types import PyTree

PACKAGES = ("cotgrpo", "jax", "jaxlib", "flax", "optax", "numpy")


@dataclasses.dataclass
class Times:
    """Times of one program's repetitions.

    Attributes:
        seconds: wall time of each.
        cpu_seconds: processor time of each, all threads of this process; other programs disturb it least.
    """

    seconds: list[float] = dataclasses.field(default_factory=list)
    cpu_seconds: list[float] = dataclasses.field(default_factory=list)

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    def row(self) -> dict[str, float]:
        return {
            "median_s": self.median,
            "min_s": min(self.seconds),
            "max_s": max(self.seconds),
            "cpu_s": statistics.median(self.cpu_seconds),
        }


def in_turn(runs: Mapping[str, Callable[[], Any]], repeats: int, warmup: int = 2) -> dict[str, Times]:
    """Time each program in turn (A B A B ...), so that ratios hold when the machine's speed drifts.

    Args:
        runs: programs by name; each returns the arrays to wait for.
        repeats: repetitions that count.
        warmup: repetitions before them that do not count.
    """
    times = {name: Times() for name in runs}
    for repeat in range(warmup + repeats):
        for name, run in runs.items():
            start, cpu_start = time.perf_counter(), time.process_time()
            jax.block_until_ready(run())
            if repeat >= warmup:
                times[name].seconds.append(time.perf_counter() - start)
                times[name].cpu_seconds.append(time.process_time() - cpu_start)
    return times


def ratio(times: Times, base: Times) -> dict[str, Any]:
    """Return how many times as long as `base` a program took, which ran in turn with it.

    Returns:
        `median_of_pairs` and `range` over neighbouring repetitions, and the ratios of the `fastest` and of
        `cpu_seconds`. The last is None on an accelerator.
    """
    pairs = [mine / its for mine, its in zip(times.seconds, base.seconds, strict=True)]
    on_cpu = jax.default_backend() == "cpu"
    return {
        "median_of_pairs": statistics.median(pairs),
        "range": [min(pairs), max(pairs)],
        "fastest": min(times.seconds) / min(base.seconds),
        "cpu_seconds": statistics.median(times.cpu_seconds) / statistics.median(base.cpu_seconds) if on_cpu else None,
    }


def compile_timed(function: jax.stages.Wrapped, *arguments: PyTree) -> tuple[jax.stages.Compiled, dict[str, Any]]:
    """Compile a jitted function for the arguments; return it with its seconds and memory.

    `program_bytes` must fit in memory at once to run it: arguments, results and `temp_bytes`.
    """
    start = time.perf_counter()
    program = function.lower(*arguments).compile()
    seconds = time.perf_counter() - start
    memory: Any = program.memory_analysis()
    arrays = memory.argument_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
    return program, {
        "compile_s": seconds,
        "temp_bytes": memory.temp_size_in_bytes,
        "program_bytes": arrays + memory.temp_size_in_bytes,
    }


def peak_bytes() -> int:
    """Return the peak memory so far: of the device if it reports one, else of this process."""
    device = (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use")
    if device is not None:
        return int(device)
    unit = 1 if sys.platform == "darwin" else 1_024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def machine() -> dict[str, Any]:
    """Return the device and the versions of the packages."""
    versions = {}
    for name in PACKAGES:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:  # run from a source tree
            versions[name] = "not installed"
    return {
        "device": jax.devices()[0].device_kind,
        "backend": jax.default_backend(),
        "devices": jax.device_count(),
        "versions": versions | {"python": platform.python_version()},
    }
