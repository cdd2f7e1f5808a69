"""Plan a training stage: print its table, and write it as JSON and text."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.console import Console

from cotgrpo.accelerators.chips import TopologyError, parse_topology
from cotgrpo.atomic_files import write_json, write_text
from cotgrpo.config import Config, ConfigError
from cotgrpo.planning.search import rank_candidates
from cotgrpo.planning.stage_plan import StagePlan
from cotgrpo.planning.tables import WIDTH, gib, plan_table, search_table
from cotgrpo.terminal import say
from cotgrpo.training.steps import StageName

ADVICE = (
    "Take more chips, more micro_batches, student.remat full, bfloat16 parameters, adafactor, LoRA or shorter rows."
)


def run_plan(
    config: Config, stage: StageName, topology: str, out: Path | None, console: Console, *, search: bool = False
) -> dict[str, Any]:
    """Plan a stage, print it, and write `out` (JSON) and the printed text (the same name with `.txt`).

    Args:
        config: the settings. Neither data nor weights are read.
        stage: "sft" or "grpo".
        topology: a name that `cotgrpo.accelerators.chips.parse_topology` reads.
        out: path of the JSON; None for `run_dir/plans/STAGE-TOPOLOGY.json`.
        console: where to print.
        search: whether to try other meshes, remat policies and micro-batches, and to rank them.

    Returns:
        What the JSON holds. `check_fits(figures)` raises if the run does not fit.

    Raises:
        ConfigError: the topology is unknown, the mesh does not fit it, or libtpu is missing.
    """
    try:
        chips = parse_topology(topology)
    except TopologyError as error:
        raise ConfigError(str(error)) from None
    out = out or Path(config.run_dir) / "plans" / f"{stage}-{topology.replace(':', '-')}.json"
    width = min(WIDTH, console.width)
    page = Console(record=True, width=width, file=console.file, highlight=False)
    plan = StagePlan(config, stage, chips)
    if search:
        found = rank_candidates(plan, console)
        page.print(search_table(found, chips, stage, width))
        figures: dict[str, Any] = {"search": found}
    else:
        figures = plan.figures()
        page.print(plan_table(figures, chips, width))
    out.parent.mkdir(parents=True, exist_ok=True)
    write_json(out, figures)
    text = "\n".join(line.rstrip() for line in page.export_text().splitlines())
    write_text(out.with_suffix(".txt"), text + "\n")
    say(console, f"written: {out}")
    return figures


def check_fits(figures: dict[str, Any]) -> None:
    """Check that what was planned fits the memory; of a search, that one of its ways does.

    Raises:
        ConfigError: it does not. The message says what is missing, and what to change.
    """
    ways = figures.get("search", [figures])
    if any(way["fits"] for way in ways):
        return
    least = min(ways, key=lambda way: way["bytes_per_device"]["total"])
    memory = least["bytes_per_device"]
    what = f"{least['stage']} does not fit on {least['topology']}"
    raise ConfigError(
        f"{what}{' in any way that was tried' if len(ways) > 1 else ''}: it takes {gib(memory['total'])} of "
        f"{gib(memory['hbm'])} a device. {ADVICE}"
    )
