"""Ask a teacher questions, and keep its verified replies as triples.

Give --questions ROWS, --out DIR and a teacher: --teacher.base_url URL and --teacher.model NAME with the key in the
environment, or --teacher.path FOLDER. Run again, the command asks only for what is missing.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from cotgrpo.config import GenerateConfig
from cotgrpo.config.files import Options, add_settings

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser
    from rich.console import Console


def add_options(parser: ArgumentParser) -> None:
    """Add the settings of a generation."""
    add_settings(parser, GenerateConfig())


def run(options: Options, console: Console) -> None:
    """Generate, in `out`."""
    from cotgrpo.generation.generate import run_generate

    run_generate(options.settings(GenerateConfig()), console)
