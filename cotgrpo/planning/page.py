"""What `cotgrpo plan` prints and writes, and its search over meshes, remat policies and micro-batches."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from cotgrpo.accelerators.chips import GIB, Topology, parse_topology
from cotgrpo.config.settings import Config, ConfigError
from cotgrpo.planning.plan import Planned
from cotgrpo.training.steps import StageName

WIDTH = 110
COMPILED, RANKED = 6, 20
"""Ways that a search compiles, of those that arithmetic finds fastest; and that it ranks where it cannot compile."""
NEAR = 1.3
"""Ways that arithmetic puts above this share of the memory are not tried: it knows nothing of what a compiler saves."""
SHARE = 1_024
"""Tokens of a sequence on a device, at the least, that a search splits it to."""


def run_plan(
    config: Config, stage: StageName, topology: str, out: Path | None, console: Console, *, search: bool = False
) -> dict[str, Any]:
    """Plans a stage, prints it, and writes `out` (JSON) with the printed text beside it as `.txt`. Returns what the JSON holds.

    Args:
        config: the settings; neither data nor weights are read.
        stage: "sft" or "grpo".
        topology: as in `cotgrpo.accelerators.chips.parse_topology`.
        out: None: `run_dir/plans/STAGE-TOPOLOGY.json`.
        console: where it prints.
        search: try other meshes, remat policies and micro-batches too, and rank those that fit.

    Raises:
        ConfigError: an unknown topology, a mesh that does not fit it, or no libtpu.
    """
    chips = parse_topology(topology)
    out = out or Path(config.run_dir) / "plans" / f"{stage}-{topology.replace(':', '-')}.json"
    page = Console(record=True, width=WIDTH, file=console.file, highlight=False)
    planned = Planned(config, stage, chips)
    if search:
        found = ranked(planned, console)
        page.print(search_table(found, chips, stage))
        figures: dict[str, Any] = {"search": found}
    else:
        figures = planned.figures()
        page.print(plan_table(figures, chips))
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
    text = "\n".join(line.rstrip() for line in page.export_text().splitlines())
    out.with_suffix(".txt").write_text(text + "\n", encoding="utf-8")
    console.print(f"written: {out}", highlight=False, soft_wrap=True)
    return figures


def plan_table(figures: dict[str, Any], topology: Topology) -> Table:
    """One plan: memory, collectives, operations and time."""
    verdict = "fits" if figures["fits"] else "does not fit"
    how = "estimate by arithmetic" if figures["estimate"] else "compiled"
    table = Table(title=f"{figures['stage']} on {topology.name}: {verdict} ({how})", title_justify="left", width=WIDTH)
    table.add_column("what", no_wrap=True)
    table.add_column("figure")
    batch, student = figures["batch"], figures["student"]
    parts = f", in {batch['micro_batches']} parts" if batch["micro_batches"] > 1 else ""
    table.add_row("student", student_line(figures))
    table.add_row("batch", f"{batch['sequences']} sequences of {batch['seq_len']} tokens{parts}")
    table.add_row("layers", f"remat {student['remat']}, attention {student['attention']}")
    table.add_row("mesh", mesh_line(figures["mesh"]))
    table.add_section()
    memory = figures["bytes_per_device"]
    unit = "a chip" if topology.chip.devices == 1 else "a device (half a chip)"
    for kind, size in memory.items():
        if kind not in ("total", "hbm") and size:
            table.add_row(f"bytes of {kind}", gib(size))
    used = memory["total"] / memory["hbm"]
    table.add_row(f"in all, {unit}", f"{gib(memory['total'])} of {gib(memory['hbm'])} ({used:.0%})")
    table.add_section()
    for kind, own in figures.get("collectives", {}).items():
        table.add_row(kind, f"{own['times']:,.0f} a step, {gib(own['sent_bytes'])} sent by each device")
    if "tile_loop" in figures:
        loop = figures["tile_loop"]
        largest = f"{loop['largest_collective_bytes'] / 2**20:,.2f} MiB"
        tile = f"a tile of hidden states is {loop['tile_bytes'] / 2**20:,.2f} MiB"
        table.add_row("in the head's tile loop", f"{loop['tiles']} tiles; largest collective {largest}; {tile}")
    if "sent_bytes" in figures and "collectives" not in figures:
        table.add_row("sent by each device", gib(figures["sent_bytes"]))
    table.add_section()
    for row in speed_rows(figures, topology):
        table.add_row(*row)
    return table


def speed_rows(figures: dict[str, Any], topology: Topology) -> Iterator[tuple[str, str]]:
    """Operations and times. A range runs from the floor to work done in turn, or the reverse."""
    flops, seconds = figures["flops"], figures["seconds"]
    yield "model FLOPs a step", f"{flops['model']:.3e} (with what is computed again {flops['hardware']:.3e})"
    limits = ", ".join(f"{name} {seconds[name]:.3f} s" for name in ("compute", "memory", "network"))
    yield "roofline", limits
    yield "step time, all at once to in turn", "{:.3f} to {:.3f} s".format(*seconds["step"])
    if seconds["compiler"] is not None:
        yield "the compiler's own estimate", f"{seconds['compiler']:.3f} s, without communication and kernels"
    low, high = figures["mfu"]
    yield "MFU", f"{low:.1%} to {high:.1%} of {topology.chip.flops / 1e12:.0f} TFLOP/s a chip"
    low, high = figures["tokens_per_second"]
    yield "tokens a second", f"{low:,.0f} to {high:,.0f}"
    if "compile_seconds" in figures:
        yield "compiled in", f"{figures['compile_seconds']:.0f} s"


def student_line(figures: dict[str, Any]) -> str:
    """Name, size, types and optimizer."""
    student = figures["student"]
    name = student["path"] or "from scratch"
    size = (
        f"{student['parameters'] / 1e6:,.1f} M parameters in {student['param_dtype']}, computed in {student['dtype']}"
    )
    lora = f", LoRA of rank {figures['lora_rank']}" if figures["lora_rank"] else ""
    return f"{name}: {size}; {figures['optimizer']}{lora}"


def mesh_line(mesh: dict[str, int]) -> str:
    """`data 2 x fsdp 4`."""
    return " x ".join(f"{axis} {size}" for axis, size in mesh.items())


def way_line(figures: dict[str, Any]) -> str:
    """What a search changes: mesh, remat policy and micro-batches."""
    mesh = mesh_line({axis: size for axis, size in figures["mesh"].items() if size > 1})
    parts = figures["batch"]["micro_batches"]
    return f"{mesh or 'one device'}, remat {figures['student']['remat']}, {parts} part{'s' if parts > 1 else ''}"


def gib(size: int | float) -> str:
    """Bytes to read."""
    return f"{size / GIB:,.3f} GiB"


def ranked(planned: Planned, console: Console) -> list[dict[str, Any]]:
    """The most promising ways by arithmetic, compiled: those that fit, fastest first by the middle of their roofline, then the others.

    Raises:
        ConfigError: nothing comes near to fitting.
    """
    middle = lambda figures: (not figures["fits"], sum(figures["seconds"]["step"]))
    estimates = [(way, way.figures(by_arithmetic=True)) for way in ways(planned)]
    near = [pair for pair in estimates if pair[1]["bytes_per_device"]["total"] <= NEAR * planned.topology.hbm_bytes]
    if not near:
        least = min(figures["bytes_per_device"]["total"] for _, figures in estimates) if estimates else 0
        raise ConfigError(
            f"No way to run this on {planned.topology.name} comes near to fitting: the least is {gib(least)} a device. "
            "Take more chips, bfloat16 parameters, adafactor, LoRA or a shorter seq_len."
        )
    near.sort(key=lambda pair: sum(pair[1]["seconds"]["step"]))
    if planned.topology.chip.platform != "tpu":
        return sorted((figures for _, figures in near[:RANKED]), key=middle)
    say = functools.partial(console.print, highlight=False, soft_wrap=True)
    say(
        f"{len(estimates)} ways by arithmetic, of which {len(near)} may fit. The {len(near[:COMPILED])} fastest of these are compiled."
    )
    found = []
    for number, (way, estimate) in enumerate(near[:COMPILED], start=1):
        what = f"{number} of {len(near[:COMPILED])}: {way_line(estimate)}"
        with console.status(f"compiling {what}"):
            figures = way.figures()
        verdict = "fits" if figures["fits"] else "does not fit"
        say(f"{what}: {verdict}, compiled in {figures['compile_seconds']:.0f} s")
        found.append(figures)
    return sorted(found, key=middle)


SEARCHED = ("none", "dots", "full")
"""Policies of recomputation that a search tries. What `offload` costs depends on the way to the host's memory, which no estimate here knows."""


def ways(planned: Planned) -> Iterator[Planned]:
    """Meshes that the batch and the heads divide over, remat policies, and micro-batches."""
    devices, batch, seq_len = planned.topology.num_devices, planned.settings.batch_size, planned.config.data.seq_len
    contexts = [n for n in divisors(devices) if n == 1 or seq_len // n >= SHARE]
    for tensor, context in itertools.product(divisors(devices), contexts):
        left, rest = divmod(devices, tensor * context)
        for fsdp in () if rest else divisors(left):
            mesh = {"data": left // fsdp, "fsdp": fsdp, "tensor": tensor, "context": context}
            for remat, parts in itertools.product(SEARCHED, divisors(max(batch // left, 1))):
                try:
                    way = changed(planned, mesh, remat, parts)
                except ConfigError:  # something does not divide
                    continue
                yield way


def changed(planned: Planned, mesh: dict[str, int], remat: Any, micro_batches: int) -> Planned:
    """The same plan with another mesh, remat policy and number of micro-batches."""
    config = planned.config
    settings: Any = dataclasses.replace(planned.settings, micro_batches=micro_batches)
    student = dataclasses.replace(config.student, remat=remat)
    stage: dict[str, Any] = {planned.stage: settings}
    return Planned(dataclasses.replace(config, student=student, **stage), planned.stage, planned.topology, mesh)


def divisors(number: int) -> list[int]:
    """All, in order."""
    return [n for n in range(1, number + 1) if number % n == 0]


def search_table(found: list[dict[str, Any]], topology: Topology, stage: str) -> Table:
    """The ranking."""
    table = Table(title=f"{stage} on {topology.name}: {len(found)} ways", title_justify="left", width=WIDTH)
    for name in ("mesh", "remat", "parts", "fits", "GiB a device", "step time", "MFU"):
        table.add_column(name)
    for figures in found:
        memory = figures["bytes_per_device"]
        table.add_row(
            mesh_line({axis: size for axis, size in figures["mesh"].items() if size > 1}),
            figures["student"]["remat"],
            str(figures["batch"]["micro_batches"]),
            "yes" if figures["fits"] else "no",
            f"{memory['total'] / GIB:.2f}",
            "{:.2f} to {:.2f} s".format(*figures["seconds"]["step"]),
            "{:.0%} to {:.0%}".format(*figures["mfu"]),
        )
    return table
