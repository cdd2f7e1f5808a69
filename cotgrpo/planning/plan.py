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
from cotgrpo.planning.tables import WIDTH, plan_table, search_table
from cotgrpo.terminal import say
from cotgrpo.training.steps import StageName


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
        What the JSON holds.

    Raises:
        ConfigError: the topology is unknown, the mesh does not fit it, or libtpu is missing.
    """
    try:
        chips = parse_topology(topology)
    except TopologyError as error:
        raise ConfigError(str(error)) from None
    out = out or Path(config.run_dir) / "plans" / f"{stage}-{topology.replace(':', '-')}.json"
    page = Console(record=True, width=WIDTH, file=console.file, highlight=False)
    plan = StagePlan(config, stage, chips)
    if search:
        found = rank_candidates(plan, console)
        page.print(search_table(found, chips, stage))
        figures: dict[str, Any] = {"search": found}
    else:
        figures = plan.figures()
        page.print(plan_table(figures, chips))
    out.parent.mkdir(parents=True, exist_ok=True)
    write_json(out, figures)
    text = "\n".join(line.rstrip() for line in page.export_text().splitlines())
    write_text(out.with_suffix(".txt"), text + "\n")
    say(console, f"written: {out}")
    return figures
