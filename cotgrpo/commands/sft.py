"""Fine-tune a student on (question, rationale, answer) triples: chain-of-thought distillation."""

from __future__ import annotations

from typing import TYPE_CHECKING

from cotgrpo.config import Config
from cotgrpo.config.files import Options, add_settings

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser
    from rich.console import Console


def add_options(parser: ArgumentParser) -> None:
    """Add the settings of a run. Those of the other stage are accepted, for files and scripts that hold both."""
    add_settings(parser, Config(), hidden=("grpo",))


def run(options: Options, console: Console) -> None:
    """Train, in `run_dir/sft`."""
    from cotgrpo.runs import Run

    Run.of(options.given(Config()), console).sft()
