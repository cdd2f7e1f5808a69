"""Search meshes, remat policies and micro-batches for the fastest way to run a stage.

All candidates are compared by the roofline, which takes milliseconds each. The plan's own estimate ranks the fastest of
them. For TPUs the first few of these are compiled.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Iterator
from typing import Any

from rich.console import Console

from cotgrpo.accelerators.roofline import step_time
from cotgrpo.config import ConfigError
from cotgrpo.models.config import RematPolicy
from cotgrpo.planning.stage_plan import StagePlan
from cotgrpo.planning.tables import gib, mesh_line
from cotgrpo.terminal import say

RANKED, COMPILED, MOST = 20, 3, 6
"""Number of candidates that the estimate ranks, that are compiled for TPUs, and the most if none of these fits."""
NEAR = 1.3
"""Candidates above this share of the memory by arithmetic are left out; arithmetic ignores what a compiler saves."""
SHARE = 1_024
"""Least tokens of a sequence on one device; a search does not split it further."""
SEARCHED: tuple[RematPolicy, ...] = (
    "none",
    "dots",
    "minimal",
    "qkv_proj,attention,out_proj,gate_proj",
    "qkv_proj,attention,out_proj",
    "qkv_proj,out_proj",
    "out_proj",
    "full",
)
"""Remat policies that a search tries, from the most that is kept to the least.

What `offload` costs depends on the link to the host, which is not estimated.
"""


@dataclasses.dataclass(frozen=True)
class Candidate:
    """One way to run a stage, with what arithmetic says.

    Attributes:
        plan: of the stage.
        memory: bytes of a device.
        seconds: of a step.
    """

    plan: StagePlan
    memory: float
    seconds: float

    @property
    def place(self) -> tuple[object, ...]:
        """What two candidates have in common that differ in the remat policy alone."""
        return (*self.plan.mesh_sizes.items(), self.plan.settings.micro_batches)


def rank_candidates(plan: StagePlan, console: Console) -> list[dict[str, Any]]:
    """Compile the most promising candidates by arithmetic, and rank them.

    Those that fit come first. Within each group, the fastest by the plan's estimate comes first.
    For GPUs, nothing is compiled.

    Raises:
        ConfigError: no candidate comes near to fitting.
    """
    estimates = estimated_candidates(plan)
    near = [way for way in estimates if way.memory <= NEAR * plan.topology.hbm_bytes]
    if not near:
        least = min((way.memory for way in estimates), default=0.0)
        raise ConfigError(
            f"Nothing comes near to fitting on {plan.topology.name}: "
            f"the smallest candidate takes {gib(least)} a device. "
            "Take more chips, bfloat16 parameters, adafactor, LoRA or a shorter seq_len."
        )
    ranked = sorted(near, key=lambda way: way.seconds)[:RANKED]
    figures = [way.plan.figures(by_arithmetic=True) for way in ranked]
    if plan.topology.chip.platform != "tpu":
        return sorted(figures, key=by_speed)
    say(
        console,
        f"{len(estimates)} candidates by arithmetic; {len(near)} of them may fit. "
        f"The fastest {len(ranked)} are ranked, and {COMPILED} or more of these are compiled.",
    )
    order = sorted(range(len(ranked)), key=lambda index: sum(figures[index]["seconds"]["step"]))
    return sorted(compile_fastest([ranked[index] for index in order], console), key=by_speed)


def by_speed(figures: dict[str, Any]) -> tuple[bool, float, float]:
    """Return the key that sorts plans: those that fit first, then the faster, and of equal times the smaller."""
    return not figures["fits"], sum(figures["seconds"]["step"]), figures["bytes_per_device"]["total"]


def estimated_candidates(plan: StagePlan) -> list[Candidate]:
    """Return all candidates with their memory and time by the roofline."""
    _, arguments = plan.step()

    @functools.cache
    def argument_bytes(mesh: tuple[tuple[str, int], ...]) -> dict[str, int]:
        sizes = dict(mesh)
        return change_plan(plan, sizes, plan.decoder.remat, plan.settings.micro_batches).argument_bytes(arguments)

    found = []
    for way in candidates(plan):
        memory = argument_bytes(tuple(way.mesh_sizes.items()))
        state = float(memory["parameters"] + memory["optimizer"])
        times = step_time(way.work, way.topology, state, way.work.sent_bytes(way.mesh_sizes), way.mesh_sizes)
        total = sum(memory.values()) + sum(way.estimated(memory)["memory"].values())
        found.append(Candidate(way, total, times.overlapped + times.in_turn))
    return found


def compile_fastest(ranked: list[Candidate], console: Console) -> list[dict[str, Any]]:
    """Compile candidates in their order, without those that what was compiled rules out; return the plans.

    On one mesh with the same micro-batches, a policy that keeps more is faster and takes more memory. So those are left
    out that keep more than one that did not fit, or less than two that did.
    """
    compiled: list[tuple[Candidate, dict[str, Any]]] = []
    for way in ranked:
        enough = COMPILED if any(figures["fits"] for _, figures in compiled) else MOST
        if len(compiled) >= enough:
            break
        same = [(other, figures) for other, figures in compiled if other.place == way.place]
        too_large = any(not figures["fits"] and other.memory <= way.memory for other, figures in same)
        if too_large or sum(figures["fits"] for _, figures in same) >= 2:
            continue
        what = candidate_line(way.plan)
        with console.status(f"compiling {what}"):
            figures = way.plan.figures()
        verdict = "fits" if figures["fits"] else "does not fit"
        say(console, f"{what}: {verdict}, compiled in {figures['compile_seconds']:.0f} s")
        compiled.append((way, figures))
    return [figures for _, figures in compiled]


def candidates(plan: StagePlan) -> Iterator[StagePlan]:
    """Yield plans with each mesh that divides the batch and the heads, each remat policy and each micro-batch."""
    devices, batch, seq_len = plan.topology.num_devices, plan.settings.batch_size, plan.config.data.seq_len
    contexts = [n for n in divisors(devices) if n == 1 or seq_len // n >= SHARE]
    policies = [policy for policy in SEARCHED if plan.decoder.attention != "xla" or "attention" not in policy]
    experts = divisors(plan.decoder.experts.number) if plan.decoder.experts is not None else [1]
    for tensor, context, expert in itertools.product(divisors(devices), contexts, experts):
        left, rest = divmod(devices, tensor * context * expert)
        for fsdp in () if rest else divisors(left):
            mesh = {"data": left // fsdp, "fsdp": fsdp, "tensor": tensor, "context": context}
            mesh |= {"expert": expert} if expert > 1 else {}
            for remat, parts in itertools.product(policies, divisors(max(batch // (left * expert), 1))):
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


def candidate_line(plan: StagePlan) -> str:
    """Return what a search changes: mesh, remat policy and micro-batches."""
    mesh = mesh_line({axis: size for axis, size in plan.mesh_sizes.items() if size > 1})
    parts = plan.settings.micro_batches
    return f"{mesh or 'one device'}, remat {plan.decoder.remat}, {parts} part{'s' if parts > 1 else ''}"
