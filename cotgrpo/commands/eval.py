"""Measure exact match and loss on held-out rows.

--run_dir DIR measures the newest student of a run, with the run's own settings and those given here on top.
--model FOLDER_OR_ID measures any model on the rows of --data.test. It needs neither a run nor data.train.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from cotgrpo.config import Config, ConfigError
from cotgrpo.config.files import Options, add_settings
from cotgrpo.config.sections import build

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser
    from rich.console import Console

TRAINING = (
    *("sft", "grpo", "max_skipped", "checkpoint.every", "checkpoint.keep", "checkpoint.keep_best"),
    *("callbacks", "trackers", "tracker", "profile"),
)
"""Settings that measuring does not read, accepted for files and scripts that hold them."""


def add_options(parser: ArgumentParser) -> None:
    """Add the model, the folder for its `eval.json`, and the settings."""
    parser.add_argument("--model", type=str, metavar="FOLDER_OR_ID", help="the model to measure, instead of a run")
    parser.add_argument("--out", type=str, metavar="DIR", help="with --model, the folder for eval.json")
    add_settings(parser, Config(), hidden=TRAINING)


def run(options: Options, console: Console) -> None:
    """Measure the student of a run, or a model."""
    from cotgrpo.runs import Run
    from cotgrpo.training.stages import run_eval_pretrained

    given, model, out = options.given(Config()), options.values.model, options.values.out
    if model is not None:
        if "--run_dir" in (argument.partition("=")[0] for argument in options.arguments):
            raise ConfigError(
                "--model and --run_dir name two students: give one of them, and --out DIR to keep eval.json."
            )
        # The last source: it replaces a student from scratch that a config file may hold.
        latest = max(given.sources.values(), default=0)
        given.values["student.path"], given.sources["student.path"] = model, latest + 1
        run_eval_pretrained(build(Config(), given), None if out is None else Path(out), console)
        return
    Run.of(given, console).evaluate()
