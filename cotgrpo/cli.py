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
import difflib
import importlib
import os
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from cotgrpo.commands.parsers import COMMANDS, PROCESSES, add_processes, make_parser
from cotgrpo.distributed.interrupts import STOPS, catch_signals
from cotgrpo.help.pages import HELP_FLAGS, SHELLS, completion, find_unknown_option, help_text, overview
from cotgrpo.huge_pages import use_huge_pages
from cotgrpo.terminal import complain, lost_output, make_streams_last

if TYPE_CHECKING:
    from rich.console import Console

COMPUTING = {"quickstart", "generate", "sft", "grpo", "eval", "bench"}
"""Commands that train, or write replies."""


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
    """Run the command that arguments name, or print a help, and return the exit code."""
    command, rest = (arguments[0] if arguments else "help"), arguments[1:]
    if command == "help" and rest[:1] and rest[0] in COMMANDS:  # `cotgrpo help sft`
        command, rest = rest[0], ["--help"]
    if command in COMMANDS:
        return show_or_run(command, rest)
    if command in ("help", *HELP_FLAGS):
        print(overview(), end="")
        return 0
    if command == "--version":
        from importlib.metadata import version

        print(f"cotgrpo {version('cotgrpo')}")
        return 0
    if command.partition("=")[0] == "--print-completion":
        return print_completion(command.partition("=")[2] or "".join(rest[:1]))
    if command.startswith("-"):
        complain(f"expected a command before {command!r}: one of {', '.join(COMMANDS)}.")
        return 2
    near = difflib.get_close_matches(command, COMMANDS, n=1)
    hint = f"Did you mean {near[0]}?" if near else f"Choose one of {', '.join(COMMANDS)}."
    complain(f"unknown command {command!r}. {hint}")
    return 2


def show_or_run(command: str, arguments: list[str]) -> int:
    """Print the help of a command, say which of its options is unknown, or run it. Only the last imports JAX."""
    if {*HELP_FLAGS} & {*arguments}:
        print(help_text(command, arguments), end="")
        return 0
    if (problem := find_unknown_option(command, arguments)) is not None:
        complain(problem)
        if command == "bench":  # as its own parser ends
            raise SystemExit(2)
        return 2
    if command == "bench":
        return importlib.import_module("cotgrpo.commands.bench").main(arguments)
    return run(lambda rest, console: run_command(command, rest, console), arguments)


def print_completion(shell: str) -> int:
    """Print the script that completes the command line in a shell, and return the exit code."""
    if shell not in SHELLS:
        complain(f"--print-completion needs one of {', '.join(SHELLS)}, got {shell!r}.")
        return 2
    try:
        print(completion(shell))
    except ModuleNotFoundError:
        complain("--print-completion needs the package shtab: pip install shtab.")
        return 2
    return 0


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
