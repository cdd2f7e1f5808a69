"""Run the whole method on a made-up task, on a CPU in minutes: teacher, SFT, GRPO (GhostRespond), a report."""

from __future__ import annotations

from typing import TYPE_CHECKING

from cotgrpo.config.files import Options, add_settings
from cotgrpo.quickstart.quickstart import QUICKSTART, run_quickstart

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser
    from rich.console import Console


def add_options(parser: ArgumentParser) -> None:
    """Add the settings of a run, with the quick start's defaults. `--out` is another name of `--run_dir`."""
    add_settings(parser, QUICKSTART, aliases={"run_dir": "--out"})


def run(options: Options, console: Console) -> None:
    """Run the quick start in `run_dir`."""
    run_quickstart(options.settings(QUICKSTART), console)
