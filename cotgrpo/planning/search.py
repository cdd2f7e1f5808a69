"""Search meshes, remat policies and micro-batches for the fastest way to run a stage."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator
from typing import Any

from rich.console import Console

from cotgrpo.config import ConfigError
from cotgrpo.models.config import RematPolicy
from cotgrpo.planning.stage_plan import StagePlan
from cotgrpo.planning.tables import gib, mesh_line
from cotgrpo.terminal import say

COMPILED, RANKED = 6, 20
"""Number of candidates that are compiled for TPUs, and that are ranked for GPUs; arithmetic finds these fastest."""
NEAR = 1.3
"""Candidates above this share of the memory by arithmetic are left out; arithmetic ignores what a compiler saves."""
SHARE = 1_024
"""Least tokens of a sequence on one device; a search does not split it further."""
SEARCHED: tuple[RematPolicy, ...] = ("none", "dots", "full")
"""Remat policies that a search tries; the cost of `offload` depends on the link to the host, which is not estimated."""


def rank_candidates(plan: StagePlan, console: Console) -> list[dict[str, Any]]:
    """Compile the most promising candidates by arithmetic, and rank them.

    Those that fit come first. Within each group, the fastest by the middle of its roofline comes first.
    For GPUs, nothing is compiled.

    Raises:
        ConfigError: no candidate comes near to fitting.
    """
    middle = lambda figures: (not figures["fits"], sum(figures["seconds"]["step"]))
    estimates = [(way, way.figures(by_arithmetic=True)) for way in candidates(plan)]
    near = [pair for pair in estimates if pair[1]["bytes_per_device"]["total"] <= NEAR * plan.topology.hbm_bytes]
    if not near:
        least = min(figures["bytes_per_device"]["total"] for _, figures in estimates) if estimates else 0
        raise ConfigError(
            f"Nothing comes near to fitting on {plan.topology.name}: "
            f"the smallest candidate takes {gib(least)} a device. "
            "Take more chips, bfloat16 parameters, adafactor, LoRA or a shorter seq_len."
        )
    near.sort(key=lambda pair: sum(pair[1]["seconds"]["step"]))
    if plan.topology.chip.platform != "tpu":
        return sorted((figures for _, figures in near[:RANKED]), key=middle)
    say(
        console,
        f"{len(estimates)} candidates by arithmetic; {len(near)} of them may fit. "
        f"The {len(near[:COMPILED])} fastest of these are compiled.",
    )
    found = []
    for number, (way, estimate) in enumerate(near[:COMPILED], start=1):
        what = f"{number} of {len(near[:COMPILED])}: {candidate_line(estimate)}"
        with console.status(f"compiling {what}"):
            figures = way.figures()
        verdict = "fits" if figures["fits"] else "does not fit"
        say(console, f"{what}: {verdict}, compiled in {figures['compile_seconds']:.0f} s")
        found.append(figures)
    return sorted(found, key=middle)


def candidates(plan: StagePlan) -> Iterator[StagePlan]:
    """Yield plans with each mesh that divides the batch and the heads, each remat policy and each micro-batch."""
    devices, batch, seq_len = plan.topology.num_devices, plan.settings.batch_size, plan.config.data.seq_len
    contexts = [n for n in divisors(devices) if n == 1 or seq_len // n >= SHARE]
    for tensor, context in itertools.product(divisors(devices), contexts):
        left, rest = divmod(devices, tensor * context)
        for fsdp in () if rest else divisors(left):
            mesh = {"data": left // fsdp, "fsdp": fsdp, "tensor": tensor, "context": context}
            for remat, parts in itertools.product(SEARCHED, divisors(max(batch // left, 1))):
                try:
                    way = change_plan(plan, mesh, remat, parts)
                except ConfigError:  # something does not divide
                    continue
                yield way


def change_plan(plan: StagePlan, mesh: dict[str, int], remat: RematPolicy, micro_batches: int) -> StagePlan:
    """Return the same plan with another mesh, remat policy and number of micro-batches."""
    config = plan.config
    settings: Any = dataclasses.replace(plan.settings, micro_batches=micro_batches)
    student = dataclasses.replace(config.student, remat=remat)
    stage: dict[str, Any] = {plan.stage: settings}
    return StagePlan(dataclasses.replace(config, student=student, **stage), plan.stage, plan.topology, mesh)


def divisors(number: int) -> list[int]:
    """Return all divisors of a number, in order."""
    return [n for n in range(1, number + 1) if number % n == 0]


def candidate_line(figures: dict[str, Any]) -> str:
    """Return what a search changes: mesh, remat policy and micro-batches."""
    mesh = mesh_line({axis: size for axis, size in figures["mesh"].items() if size > 1})
    parts = figures["batch"]["micro_batches"]
    return f"{mesh or 'one device'}, remat {figures['student']['remat']}, {parts} part{'s' if parts > 1 else ''}"
