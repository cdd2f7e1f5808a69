"""Train on with GhostRespond Policy Optimization (not Group Relative), from the student of `cotgrpo sft` or another."""

from __future__ import annotations

from typing import TYPE_CHECKING

from cotgrpo.config import Config
from cotgrpo.config.files import Options, add_settings

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser
    from rich.console import Console


def add_options(parser: ArgumentParser) -> None:
    """Add the settings of a run. Those of the other stage are accepted, for files and scripts that hold both."""
    add_settings(parser, Config(), hidden=("sft",))


def run(options: Options, console: Console) -> None:
    """Train, in `run_dir/grpo`."""
    from cotgrpo.runs import Run

    Run.of(options.given(Config()), console).grpo()
