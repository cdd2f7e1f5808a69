"""The tables that `cotgrpo plan` prints."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from rich.table import Table

from cotgrpo.accelerators.chips import GIB, Topology
from cotgrpo.compiler_options.measured import options_line

WIDTH = 110


def plan_table(figures: dict[str, Any], topology: Topology) -> Table:
    """Return the table of one plan: memory, collectives, operations and time."""
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
    if figures["compiler_options"]:
        table.add_row("XLA's options", options_line(figures["compiler_options"]))
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
    """Yield rows of operations and times. A range ends where everything overlaps, and where nothing does."""
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
    """Return the student's name, size, types and optimizer."""
    student = figures["student"]
    name = student["path"] or "from scratch"
    size = (
        f"{student['parameters'] / 1e6:,.1f} M parameters in {student['param_dtype']}, computed in {student['dtype']}"
    )
    lora = f", LoRA of rank {figures['lora_rank']}" if figures["lora_rank"] else ""
    return f"{name}: {size}; {figures['optimizer']}{lora}"


def mesh_line(mesh: dict[str, int]) -> str:
    """Return a mesh as `data 2 x fsdp 4`."""
    return " x ".join(f"{axis} {size}" for axis, size in mesh.items())


def gib(size: int | float) -> str:
    """Return bytes as GiB."""
    return f"{size / GIB:,.3f} GiB"


def search_table(found: list[dict[str, Any]], topology: Topology, stage: str) -> Table:
    """Return the table of a search's ranking."""
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
