"""Run the whole method on a made-up task, on a CPU in minutes: teacher, SFT, GRPO (GhostRespond), a report."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from cotgrpo.config.files import Options, add_settings
from cotgrpo.quickstart.quickstart import QUICKSTART, QUICKSTARTS, run_quickstart

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser
    from rich.console import Console


def add_options(parser: ArgumentParser) -> None:
    """Add the settings of a run, with the quick start's defaults. `--out` is another name of `--run_dir`."""
    parser.add_argument(
        "--language",
        type=Literal["en", "zh"],
        default="en",
        metavar="{en,zh}",
        help="language of the task: en for English, zh for Chinese with a chat student. In zh, these defaults differ: "
        "data.format chat, data.answer_format, data.seq_len 208, eval.max_new_tokens 96 (default: en)",
    )
    add_settings(parser, QUICKSTART, aliases={"run_dir": "--out"})


def run(options: Options, console: Console) -> None:
    """Run the quick start in `run_dir`."""
    language = options.values.language
    run_quickstart(options.settings(QUICKSTARTS[language]), console, language)
