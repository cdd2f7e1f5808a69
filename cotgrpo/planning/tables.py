"""The tables that `cotgrpo plan` prints."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from rich.table import Table

from cotgrpo.accelerators.chips import GIB, Topology
from cotgrpo.compiler_options.measured import options_line

WIDTH = 110
"""Columns of a table at most; a narrower terminal has its own."""


def plan_table(figures: dict[str, Any], topology: Topology, width: int = WIDTH) -> Table:
    """Return the table of one plan: memory, collectives, operations and time."""
    verdict = "fits" if figures["fits"] else "does not fit"
    how = "estimate by arithmetic" if figures["estimate"] else "compiled"
    title = f"{figures['stage']} on {topology.name}: {verdict} ({how})"
    table = Table(title=title, title_justify="left", width=min(width, WIDTH))
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
    for row in memory_rows(figures, topology):
        table.add_row(*row)
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


def memory_rows(figures: dict[str, Any], topology: Topology) -> Iterator[tuple[str, str]]:
    """Yield rows of what takes memory, for the train step and for rollouts."""
    memory, decoding = figures["bytes_per_device"], figures.get("decoding")
    unit = "a chip" if topology.chip.devices == 1 else "a device (half a chip)"
    for kind, size in memory.items():
        if kind not in ("total", "hbm") and size:
            yield f"bytes of {kind}", gib(size)
    if decoding is not None:
        parts = ", ".join(f"{kind} {gib(size)}" for kind, size in decoding["bytes_per_device"].items())
        yield "bytes of decoding", f"{parts} (weights {decoding['layout']})"
        yield "in all, during rollouts", gib(decoding["total"])
    used = memory["total"] / memory["hbm"]
    yield f"in all, {unit}", f"{gib(memory['total'])} of {gib(memory['hbm'])} ({used:.0%})"


def speed_rows(figures: dict[str, Any], topology: Topology) -> Iterator[tuple[str, str]]:
    """Yield rows of operations and times: the time to expect, and in parentheses the range that holds it."""
    flops, seconds, expected = figures["flops"], figures["seconds"], figures["expected"]
    yield "model FLOPs a step", f"{flops['model']:.3e} (with what is computed again {flops['hardware']:.3e})"
    load = seconds["load"]
    parts = [f"compute {load['compute']:.3f} s", f"kernels {load['kernels']:.3f} s"]
    if seconds["compiler"] is None:
        parts.append(f"memory {load['memory']:.3f} s")
    yield ("at published rates" if seconds["compiler"] is None else "by the compiler"), ", ".join(parts)
    yield "network", f"{load['waited']:.3f} s waited for, {load['hidden']:.3f} s while computing"
    yield "step time", "{:.3f} s ({:.3f} to {:.3f})".format(expected["seconds"], *seconds["step"])
    peak = f"{topology.chip.flops / 1e12:.0f} TFLOP/s a chip"
    yield "MFU", "{:.1%} ({:.1%} to {:.1%}) of ".format(expected["mfu"], *figures["mfu"]) + peak
    speed = "{:,.0f} ({:,.0f} to {:,.0f})".format(expected["tokens_per_second"], *figures["tokens_per_second"])
    yield "tokens a second", f"{speed}; {expected['tokens_per_second_per_chip']:,.0f} a chip"
    for name, phase in figures.get("phases", {}).items():
        yield f"phase: {name}", f"{phase['seconds']:.2f} s ({phase['share']:.0%} of an update)"
    for note in figures.get("notes", ()):
        yield "note", note
    if seconds["compiler"] is None:
        why = "nothing was compiled" if figures["estimate"] else "it did not compile, for it does not fit"
        yield "note", f"{why}: times are by arithmetic, at the share of the peak that other runs reach"
    if "compile_seconds" in figures:
        yield "compiled in", f"{figures['compile_seconds']:.0f} s"
    yield "versions", ", ".join(f"{name} {version}" for name, version in figures["versions"].items())


def student_line(figures: dict[str, Any]) -> str:
    """Return the student's name, size, types and optimizer."""
    student = figures["student"]
    name = student["path"] or "from scratch"
    size = (
        f"{student['parameters'] / 1e6:,.1f} M parameters in {student['param_dtype']}, computed in {student['dtype']}"
    )
    lora = f", LoRA of rank {figures['lora_rank']}" if figures["lora_rank"] else ""
    if figures["quantized_base"] != "none":
        lora += f" on kernels in {figures['quantized_base']}"
    return f"{name}: {size}; {figures['optimizer']}{lora}"


def mesh_line(mesh: dict[str, int]) -> str:
    """Return a mesh as `data 2 x fsdp 4`."""
    return " x ".join(f"{axis} {size}" for axis, size in mesh.items())


def gib(size: int | float) -> str:
    """Return bytes as GiB."""
    return f"{size / GIB:,.3f} GiB"


def search_table(found: list[dict[str, Any]], topology: Topology, stage: str, width: int = WIDTH) -> Table:
    """Return the table of a search's ranking."""
    title = f"{stage} on {topology.name}: {len(found)} ways"
    table = Table(title=title, title_justify="left", width=min(width, WIDTH))
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
            f"{figures['expected']['seconds']:.2f} s",
            f"{figures['expected']['mfu']:.0%}",
        )
    return table
