"""The command line: `cotgrpo quickstart | generate | gold | sft | grpo | eval | compare | plan | export | bench`.

GRPO here is GhostRespond Policy Optimization, not Group Relative. An error of the user is one line on stderr.
The exit codes are

    0                 done
    2                 an error of the user
    3                 training stopped itself
    4                 another process of the run ended
    128 + a signal    the signal ended a run that was saved
"""

from __future__ import annotations

import argparse
import importlib
import os
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from cotgrpo.distributed.interrupts import STOPS, catch_signals
from cotgrpo.huge_pages import use_huge_pages
from cotgrpo.terminal import complain, lost_output, make_streams_last

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser
    from rich.console import Console

COMMANDS = {
    "quickstart": "the whole method on a made-up task, on a CPU in minutes (--out DIR)",
    "generate": "questions in, verified triples out, from a teacher behind an endpoint or in a folder",
    "gold": "ghosts corrected by hand: to a file to edit, and back to triples",
    "sft": "chain-of-thought distillation: fine-tune a student on triples",
    "grpo": "GhostRespond Policy Optimization, from the student of sft",
    "eval": "exact match and loss on held-out rows, of a run or of any model",
    "compare": "several runs in one page: settings, accuracies and curves",
    "plan": "whether a run fits on TPUs or GPUs that are not here, and how fast it can be",
    "export": "the newest student of a run as a folder that transformers loads",
    "bench": "how fast steps, generation, input pipeline and checkpoints are on this machine",
}
COMPUTING = {"quickstart", "generate", "sft", "grpo", "eval", "bench"}
"""Commands that train, or write replies."""

DESCRIPTION = """Teach small language models to reason.

GRPO here is GhostRespond Policy Optimization, not Group Relative.

cotgrpo COMMAND --help lists every option of a command. On several machines the same command runs on each
(docs/hosts.md)."""
PROCESSES: tuple[tuple[str, type, str, str], ...] = (
    ("coordinator", str, "HOST:PORT", "a free port of process 0's host"),
    ("num_processes", int, "INT", "number of processes; 1: this is the only one"),
    ("process_id", int, "INT", "number of this process, from 0"),
)
PROCESSES_HELP = "Processes of one run. Cloud TPU, SLURM, Open MPI and Kubernetes are recognised without these options."


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command and return the exit code: the console script.

    Without `arguments` they are the process's own, which may restart itself (`cotgrpo.huge_pages`). Its signals and
    its standard streams are then looked after.
    """
    if arguments is not None:
        return call(list(arguments))
    make_streams_last()
    catch_signals()
    if sys.argv[1:2] and sys.argv[1] in COMPUTING:
        use_huge_pages()
    code = call(sys.argv[1:])
    if (why := lost_output()) and set(sys.argv[1:2]) <= COMMANDS.keys():
        complain(f"standard output could not be written ({why}). The command went on without it.")
    STOPS.end_if_received(code)
    return code


def call(arguments: list[str]) -> int:
    """Run the command that arguments name, and return the exit code. A signal that stops it is one line on stderr."""
    try:
        return choose(arguments)
    except BaseException as error:
        if STOPS.received is None and not isinstance(error, KeyboardInterrupt):
            raise
        return STOPS.say(STOPS.received or signal.SIGINT)


def choose(arguments: list[str]) -> int:
    """Run the command that arguments name, or print its help, and return the exit code."""
    command = arguments[0] if arguments and arguments[0] != "help" else "--help"
    if command == "bench":
        return importlib.import_module("cotgrpo.commands.bench").main(arguments[1:])
    if command in COMMANDS and not {"-h", "--help"} & set(arguments):
        return run(lambda rest, console: run_command(command, rest, console), arguments[1:])
    if command.startswith("-") and command not in ("-h", "--help", "--version"):
        complain(f"expected a command before {command!r}: one of {', '.join(COMMANDS)}.")
        return 2
    try:
        make_parser(command if command in COMMANDS else None).parse_args([command, "--help"])
    except SystemExit:  # the help was printed, or the version
        return 0
    except argparse.ArgumentError:
        import difflib

        near = difflib.get_close_matches(command, COMMANDS, n=1)
        hint = f"Did you mean {near[0]}?" if near else f"Choose one of {', '.join(COMMANDS)}."
        complain(f"unknown command {command!r}. {hint}")
    return 2


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


def run_command(command: str, arguments: Sequence[str], console: Console) -> None:
    """Read the arguments of a command and run it."""
    from cotgrpo.config import ConfigError
    from cotgrpo.config.files import Options, parse_options

    for argument in arguments:
        if "\0" in argument:
            raise ConfigError(f"The argument {argument!r:.80} has a NUL character, which no name can have.")
    parser = make_parser(command)
    options = parse_options(parser, [command, *arguments])
    module = importlib.import_module(f"cotgrpo.commands.{command}")
    module.run(Options(options.values[command], arguments), console)


def run(command: Callable[[Sequence[str], Console], None], arguments: Sequence[str]) -> int:
    """Run a function of (arguments, console), on this process or on several together, and return the exit code.

    Errors of the user end as one line on stderr.
    """
    try:
        import jax
    except ValueError as error:  # a variable that it reads
        complain(f"JAX does not start ({error}). Check the variables whose names begin with JAX_.")
        return 2

    from cotgrpo.checkpoints.manager import CheckpointError
    from cotgrpo.checkpoints.object_stores import shorten_logs
    from cotgrpo.config import ConfigError
    from cotgrpo.data.sources import DataError
    from cotgrpo.disk_errors import explain_disk_errors
    from cotgrpo.distributed.peer_monitor import watch_peers
    from cotgrpo.distributed.processes import process_console
    from cotgrpo.models.huggingface.families import ModelError
    from cotgrpo.teachers.endpoint import TeacherError
    from cotgrpo.training.loop import Interrupted, TrainingStopped

    of_user = (ConfigError, DataError, CheckpointError, ModelError)
    os.environ.setdefault("HF_HUB_VERBOSITY", "error")  # it announces each retry of a request
    try:
        if jax.config.read("jax_enable_x64"):
            raise ConfigError("JAX_ENABLE_X64 is set, but every command computes in 32 bits or fewer. Unset it.")
        join_processes(arguments)
        watched = watch_peers(together=(TrainingStopped, Interrupted), alone=of_user)
        shorten_logs()
        with watched, explain_disk_errors():
            use_compilation_cache()
            command(arguments, process_console())
        return 0
    except TeacherError as error:
        return fail(error, 2)
    except TrainingStopped as error:
        return fail(error, 3)
    except Interrupted as error:
        return fail(error, 128 + (STOPS.received or error.signal_number))
    except of_user as error:
        code = fail(error, 2)
    except Exception as error:
        if "Unable to initialize backend" in str(error):
            return fail(error, 2)
        if not jax.distributed.is_initialized():
            raise
        import traceback

        traceback.print_exc()
        code = 1
    if jax.distributed.is_initialized():  # the others have ended, and JAX would wait for them at the exit
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    return code


def fail(error: Exception, code: int) -> int:
    """Print an error as one line, and return the exit code."""
    complain(str(error))
    return code


def join_processes(arguments: Sequence[str]) -> None:
    """Join the other processes of the run, if there are any, as the environment or the arguments describe them."""
    from cotgrpo.config import ConfigError
    from cotgrpo.distributed.processes import start

    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    add_processes(parser)
    try:
        known = vars(parser.parse_known_args(list(arguments))[0])
    except argparse.ArgumentError as error:
        raise ConfigError(str(error)) from error
    start(*(known[f"distributed.{name}"] for name, *_ in PROCESSES))


def use_compilation_cache() -> None:
    """Keep compiled programs for the next run, in `JAX_COMPILATION_CACHE_DIR` or the user's cache folder.

    An empty `JAX_COMPILATION_CACHE_DIR` turns the cache off.
    """
    import tempfile

    import jax

    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        home = os.path.expanduser("~")  # stays "~" for a user without a home
        cache = Path(
            os.environ.get("XDG_CACHE_HOME") or Path(tempfile.gettempdir() if home == "~" else home) / ".cache"
        )
        jax.config.update("jax_compilation_cache_dir", str(cache / "cotgrpo" / "jax"))


if __name__ == "__main__":
    sys.exit(main())
