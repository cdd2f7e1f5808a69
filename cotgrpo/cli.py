"""The command line: `cotgrpo quickstart | sft | grpo | eval`. GRPO is GhostRespond Policy Optimization, not Group Relative.

Every command takes `--config FILE.yaml` and a dotted option for every setting. Errors that a user can mend are one line on stderr; the exit code is 2 for
those, 3 when training stopped itself, and 128 + the signal's number when a signal ended a run that was saved.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path

from rich.console import Console

USAGE = """usage: cotgrpo COMMAND [--config FILE.yaml] [--section.setting VALUE ...]

Teach small language models to reason. GRPO here is GhostRespond Policy Optimization, not Group Relative.

commands:
  quickstart   the whole method on a made-up task, on a CPU in minutes: teacher, SFT, GRPO, a report   (--out DIR)
  sft          chain-of-thought distillation: fine-tune a student on (question, rationale, answer) triples
  grpo         GhostRespond Policy Optimization, from the student that sft left in the same run folder
  eval         exact match and loss on held-out rows, of the newest student of a run folder

cotgrpo COMMAND --help lists every setting; cotgrpo --version prints the version."""


def main(arguments: Sequence[str] | None = None) -> int:
    """The console script. Returns the exit code."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    command, rest = (arguments[0], arguments[1:]) if arguments else ("--help", [])
    if command in ("-h", "--help", "help"):
        print(USAGE)
        return 0
    if command == "--version":
        print(f"cotgrpo {version('cotgrpo')}")
        return 0
    if command not in COMMANDS:
        import difflib

        near = difflib.get_close_matches(command, COMMANDS, n=1)
        hint = f" Did you mean {near[0]}?" if near else ""
        print(f"cotgrpo: unknown command {command!r}.{hint}\n\n{USAGE}", file=sys.stderr)
        return 2
    return run(COMMANDS[command], rest)


def run(command: Callable[[Sequence[str], Console], None], arguments: Sequence[str]) -> int:
    """Runs one command, and turns the errors that a user can mend into a line and an exit code."""
    from cotgrpo.config import ConfigError
    from cotgrpo.data.triples import DataError
    from cotgrpo.run.checkpoint import CheckpointError
    from cotgrpo.run.train import Interrupted, TrainingStopped

    console = Console()
    try:
        use_compilation_cache()
        command(arguments, console)
    except (ConfigError, DataError, CheckpointError) as error:
        print(f"cotgrpo: {error}", file=sys.stderr)
        return 2
    except TrainingStopped as error:
        print(f"cotgrpo: {error}", file=sys.stderr)
        return 3
    except Interrupted as error:
        print(f"cotgrpo: {error}", file=sys.stderr)
        return 128 + error.signal_number
    return 0


def use_compilation_cache() -> None:
    """Keeps compiled programs for the next run, in `JAX_COMPILATION_CACHE_DIR` or the user's cache folder; an empty value turns it off."""
    import jax

    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        jax.config.update("jax_compilation_cache_dir", str(cache / "cotgrpo" / "jax"))


def sft(arguments: Sequence[str], console: Console) -> None:
    """`cotgrpo sft`."""
    from cotgrpo.config import parse_config
    from cotgrpo.run.stages import run_sft

    run_sft(parse_config(arguments, prog="cotgrpo sft"), console)


def grpo(arguments: Sequence[str], console: Console) -> None:
    """`cotgrpo grpo`."""
    from cotgrpo.config import parse_config
    from cotgrpo.run.stages import run_grpo

    run_grpo(parse_config(arguments, prog="cotgrpo grpo"), console)


def evaluate(arguments: Sequence[str], console: Console) -> None:
    """`cotgrpo eval`."""
    from cotgrpo.config import parse_config
    from cotgrpo.run.stages import newest_stage, run_eval

    config = parse_config(arguments, prog="cotgrpo eval")
    # The run's own settings, with what was given on top.
    stage = newest_stage(Path(config.run_dir))
    saved = Path(config.run_dir) / stage / "config.yaml"
    run_eval(parse_config(["--config", str(saved), *arguments], prog="cotgrpo eval"), console)


def quickstart(arguments: Sequence[str], console: Console) -> None:
    """`cotgrpo quickstart [--out DIR]`: `--out` is a short name of `--run_dir`."""
    from cotgrpo.config import parse_config
    from cotgrpo.run.quickstart import QUICKSTART, run_quickstart

    renamed = ["--run_dir" + a[len("--out") :] if a.partition("=")[0] == "--out" else a for a in arguments]
    run_quickstart(parse_config(renamed, prog="cotgrpo quickstart", defaults=QUICKSTART), console)


COMMANDS: dict[str, Callable[[Sequence[str], Console], None]] = {
    "quickstart": quickstart,
    "sft": sft,
    "grpo": grpo,
    "eval": evaluate,
}

if __name__ == "__main__":
    sys.exit(main())
