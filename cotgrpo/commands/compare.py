"""Compare runs in one page: the settings that differ, the accuracies with intervals, and the curves over each other.

cotgrpo compare RUN RUN... [--out FILE.html]. Runs may be unfinished, of other stages, or damaged.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from cotgrpo.config.files import Options
from cotgrpo.terminal import say

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser
    from rich.console import Console


def add_options(parser: ArgumentParser) -> None:
    """Add the runs, and the page."""
    parser.add_argument("runs", nargs="*", type=str, metavar="RUN", help="folders of runs, or of stages")
    parser.add_argument(
        "--out", type=str, default="compare.html", metavar="FILE.html", help="the page (default: compare.html)"
    )


def run(options: Options, console: Console) -> None:
    """Write the page."""
    from cotgrpo.reports.compare import compare_runs

    page = compare_runs(options.values.runs or [], Path(options.values.out))
    say(console, f"written: {page}")
