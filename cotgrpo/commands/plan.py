"""Plan a run on TPUs or GPUs that are not here: whether it fits, its collectives, and the time to expect.

The train step is compiled for the TPU slice on this machine. GPUs are planned by arithmetic. No data and no weights are
read.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Literal

from cotgrpo.config import Config, ConfigError
from cotgrpo.config.files import Options, add_settings

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser
    from rich.console import Console


NOT_PLANNED = ("eval", "checkpoint", "max_skipped", "verify", "callbacks", "trackers", "tracker", "profile")
"""Settings of a run that a plan does not read."""


def add_options(parser: ArgumentParser) -> None:
    """Add the chips, the stage, whether to search, and the settings of a run."""
    add = parser.add_argument
    add(
        "--topology",
        type=str,
        metavar="CHIPS",
        help="a slice such as v5e-8, v5p-32 or v5p:4x4x4 (v4, v5e, v5p, v6e, tpu7x), several as 2xv5e-16, or GPUs "
        "such as h100:8 (a100, h100, h200, b200, gb200, mi300x)",
    )
    add("--stage", type=Literal["sft", "grpo"], default="grpo", metavar="{sft,grpo}", help="the stage (default: grpo)")
    add("--search", action="store_true", help="rank meshes, remat policies and micro-batches")
    add("--out", type=str, metavar="FILE.json", help="the plan; its table goes next to it (default: in run_dir/plans)")
    add_settings(parser, Config(), hidden=NOT_PLANNED)


def run(options: Options, console: Console) -> None:
    """Plan the stage.

    Raises:
        ConfigError: the run does not fit, or nothing that was searched. The plan is printed and written all the same.
    """
    import jax

    from cotgrpo.planning.plan import check_fits, run_plan

    given, config = options.values, options.settings(Config())
    if given.topology is None:
        raise ConfigError("plan needs --topology, such as v5p-128 or v5p:4x4x4 (a TPU slice), or h100:8 (GPUs).")
    jax.config.update("jax_platforms", "cpu")  # the machine's own accelerator is not needed
    out = None if given.out is None else Path(given.out)
    figures = run_plan(config, given.stage, given.topology, out, console, search=given.search)
    check_fits(figures)
