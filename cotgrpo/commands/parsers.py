"""The parsers of the command line: the commands, and the options of each."""

from __future__ import annotations

import argparse
import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser

COMMANDS = {
    "quickstart": "the whole method on a made-up task, on a CPU in minutes",
    "generate": "ask a teacher questions, and keep its verified replies",
    "gold": "correct ghosts by hand: to a file to edit, and back",
    "sft": "fine-tune a student on a teacher's step-by-step answers",
    "grpo": "GhostRespond Policy Optimization, from the student of sft",
    "eval": "accuracy and loss on held-out rows, of a run or any model",
    "compare": "several runs in one page: settings, accuracies, curves",
    "plan": "whether a run fits on TPUs or GPUs, and how fast it can be",
    "export": "write the student of a run as transformers loads it",
    "bench": "how fast training, replies and input are on this machine",
}
"""One line on each command, of less than 60 letters."""
DESCRIPTION = """Teach small language models to reason.

GRPO here is GhostRespond Policy Optimization, not Group Relative.

cotgrpo COMMAND --help shows what matters most, and --help-all every option."""
PROCESSES: tuple[tuple[str, type, str, str], ...] = (
    ("coordinator", str, "HOST:PORT", "a free port of process 0's host"),
    ("num_processes", int, "INT", "number of processes; 1: this is the only one"),
    ("process_id", int, "INT", "number of this process, from 0"),
)
PROCESSES_HELP = "Processes of one run. Cloud TPU, SLURM, Open MPI and Kubernetes are recognised without these options."


def make_parser(command: str | None = None) -> ArgumentParser:
    """Return the parser of the command line, with the options of `command` alone: only its module is imported."""
    from importlib.metadata import version

    parser = new_parser("cotgrpo COMMAND [--config FILE.yaml] [--section.setting VALUE ...]", DESCRIPTION)
    parser.add_argument(
        "--version", action="version", version=f"cotgrpo {version('cotgrpo')}", help="print the version"
    )
    commands = parser.add_subcommands(title="commands", description=None, metavar="COMMAND", required=False)
    for name, help in COMMANDS.items():
        module = importlib.import_module(f"cotgrpo.commands.{name}") if name == command else None
        own = new_parser(f"cotgrpo {name} [--option VALUE ...]", str(module.__doc__) if module else "")
        if module is not None:
            module.add_options(own)
            add_processes(own)
        commands.add_subcommand(name, own, help=help)
    return parser


def new_parser(usage: str, description: str) -> ArgumentParser:
    """Return a parser that raises its errors and knows no abbreviations."""
    from jsonargparse import ArgumentParser

    return ArgumentParser(
        usage=usage, description=description, formatter_class=HelpFormatter, allow_abbrev=False, exit_on_error=False
    )


class HelpFormatter(argparse.HelpFormatter):
    """The formatter of argparse, with a wider column of options, and descriptions wrapped by paragraph."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=32)

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        return "\n\n".join(super(HelpFormatter, self)._fill_text(part, width, indent) for part in text.split("\n\n"))


def add_processes(parser: argparse.ArgumentParser) -> None:
    """Add the options that say how the processes of a run find each other."""
    group = parser.add_argument_group("distributed", PROCESSES_HELP)
    for name, kind, metavar, help in PROCESSES:
        group.add_argument(f"--distributed.{name}", type=kind, metavar=metavar, help=help)
