"""The command line: `cotgrpo quickstart | generate | gold | sft | grpo | eval | plan | export | bench`. GRPO is GhostRespond Policy Optimization, not Group Relative.

Every command but gold, export and bench takes `--config FILE.yaml` and a dotted option for every setting. Errors that a user can mend are one line on stderr; the exit code is 2 for
those, 3 when training stopped itself, 4 when another process of the run ended, and 128 + the signal's number when a signal ended a run that was saved.
"""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from cotgrpo.huge_pages import use_huge_pages

if TYPE_CHECKING:
    from rich.console import Console

USAGE = """usage: cotgrpo COMMAND [--config FILE.yaml] [--section.setting VALUE ...]

Teach small language models to reason. GRPO here is GhostRespond Policy Optimization, not Group Relative.

commands:
  quickstart   the whole method on a made-up task, on a CPU in minutes: teacher, SFT, GRPO, a report   (--out DIR)
  generate     questions in, verified triples out, from a teacher behind an OpenAI-compatible endpoint or in a folder
  gold         ghosts corrected by people: student's reply and ghost side by side in a file to edit, and back to triples
  sft          chain-of-thought distillation: fine-tune a student on (question, rationale, answer) triples
  grpo         GhostRespond Policy Optimization, from the student that sft left in the same run folder
  eval         exact match and loss on held-out rows, of the newest student of a run folder, or of any model   (--model FOLDER_OR_ID)
  plan         whether a run fits on TPUs or GPUs that are not here, and how fast it can be   (--topology v5p:4x4x4)
  export       the newest student of a run folder as a folder that transformers loads   (--run_dir DIR --out FOLDER)
  bench        how fast steps, generation, input pipeline and checkpoints are on this machine   (bench step --shape 16m)

cotgrpo COMMAND --help lists every setting; cotgrpo --version prints the version.

On several machines the same command runs on each (docs/hosts.md). Cloud TPU, SLURM, Open MPI and Kubernetes are recognised; elsewhere add
--distributed.coordinator HOST:PORT --distributed.num_processes N --distributed.process_id I."""


def main(arguments: Sequence[str] | None = None) -> int:
    """The console script. Returns the exit code. Without `arguments` it is the process's own, which it may start anew (`cotgrpo.huge_pages`)."""
    own = arguments is None
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    command, rest = (arguments[0], arguments[1:]) if arguments else ("--help", [])
    if command in ("-h", "--help", "help"):
        print(USAGE)
        return 0
    if command == "--version":
        print(f"cotgrpo {version('cotgrpo')}")
        return 0
    if own and command in COMPUTING:
        use_huge_pages()
    if command == "bench":
        return bench(rest)
    if command not in COMMANDS:
        import difflib

        near = difflib.get_close_matches(command, [*COMMANDS, "bench"], n=1)
        hint = f" Did you mean {near[0]}?" if near else ""
        print(f"cotgrpo: unknown command {command!r}.{hint}\n\n{USAGE}", file=sys.stderr)
        return 2
    return run(COMMANDS[command], rest)


def run(command: Callable[[Sequence[str], Console], None], arguments: Sequence[str]) -> int:
    """Runs one command, on this process or on several together, and turns the errors that a user can mend into a line and an exit code."""
    import jax

    from cotgrpo.checkpoints.manager import CheckpointError
    from cotgrpo.config.settings import ConfigError
    from cotgrpo.data.triples import DataError
    from cotgrpo.distributed.peer_monitor import watching
    from cotgrpo.distributed.processes import process_console
    from cotgrpo.models.huggingface.families import ModelError
    from cotgrpo.storage import without_tracebacks
    from cotgrpo.teachers.endpoint import TeacherError
    from cotgrpo.training.loop import Interrupted, TrainingStopped

    mendable = (ConfigError, DataError, CheckpointError, ModelError)
    try:
        rest = join_processes(arguments)
        with watching(together=(TrainingStopped, Interrupted), alone=mendable), without_tracebacks():
            use_compilation_cache()
            command(rest, process_console())
        return 0
    except TeacherError as error:
        print(f"cotgrpo: {error}", file=sys.stderr)
        return 2
    except TrainingStopped as error:
        print(f"cotgrpo: {error}", file=sys.stderr)
        return 3
    except Interrupted as error:
        print(f"cotgrpo: {error}", file=sys.stderr)
        return 128 + error.signal_number
    except mendable as error:
        print(f"cotgrpo: {' '.join(str(error).split())}", file=sys.stderr)  # a library's words may be several lines
        code = 2
    except Exception:
        if not jax.distributed.is_initialized():
            raise
        traceback.print_exc()
        code = 1
    if jax.distributed.is_initialized():  # the others have ended, and at the exit JAX would wait for them
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    return code


def join_processes(arguments: Sequence[str]) -> list[str]:
    """Starts what makes several processes one run, and returns the arguments without those that say where they are."""
    from cotgrpo.config.settings import ConfigError
    from cotgrpo.distributed.processes import start

    coordinator, rest = taken("--distributed.coordinator", arguments)
    numbers: list[int | None] = []
    for name in ("num_processes", "process_id"):
        value, rest = taken(f"--distributed.{name}", rest)
        if value is not None and not value.isdigit():
            raise ConfigError(f"distributed.{name} must be a number, got {value!r}.")
        numbers.append(None if value is None else int(value))
    start(coordinator, *numbers)
    return rest


def use_compilation_cache() -> None:
    """Keeps compiled programs for the next run, in `JAX_COMPILATION_CACHE_DIR` or the user's cache folder; an empty value turns it off."""
    import jax

    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        jax.config.update("jax_compilation_cache_dir", str(cache / "cotgrpo" / "jax"))


GENERATE_HELP = """Questions in, verified triples out: --questions ROWS --out DIR, and a teacher: --teacher.base_url URL --teacher.model NAME
with the key in the environment, or --teacher.path FOLDER. Run again, it asks only for what is missing."""


def generate(arguments: Sequence[str], console: Console) -> None:
    """`cotgrpo generate`."""
    from cotgrpo.config.files import parse_settings
    from cotgrpo.config.generate import GenerateConfig
    from cotgrpo.generation.generate import run_generate

    config = parse_settings(arguments, GenerateConfig(), prog="cotgrpo generate", description=GENERATE_HELP)
    run_generate(config, console)


GOLD_HELP = """usage: cotgrpo gold --student FILE --ghosts TRIPLES --out EDIT.jsonl [--rows all|wrong]
       cotgrpo gold --edited EDIT.jsonl --out GOLD.jsonl [--rows all|edited]

The first writes the student's reply and the ghost side by side, one question a line. Edit rationale and answer there, or empty both to
throw a row away. The second writes the rows as triples to train on.

  --student FILE      eval.json of `cotgrpo eval`, or replies.jsonl of `cotgrpo generate --teacher.path STUDENT`
  --ghosts TRIPLES    the teacher's triples, .jsonl or .parquet, for the same questions
  --edited FILE       the file that was edited
  --out FILE          a new file
  --rows WHICH        wrong: only where the student's answer is; edited: only rows that differ from the ghost; without it, all"""


def gold(arguments: Sequence[str], console: Console) -> None:
    """`cotgrpo gold`, both ways."""
    from cotgrpo.config.settings import ConfigError
    from cotgrpo.data.triples import read_triples, write_triples
    from cotgrpo.teachers.editing import read_edited, read_student_replies, write_pairs

    if {"-h", "--help"} & set(arguments):
        print(GOLD_HELP)
        return
    options = options_of(("student", "ghosts", "edited", "out", "rows"), arguments)
    student, ghosts, edited, out, rows = options.values()
    importing = edited is not None
    if out is None or importing == (student is not None) or (student is None) != (ghosts is None):
        raise ConfigError("gold needs --student, --ghosts and --out, or --edited and --out. See cotgrpo gold --help.")
    choices = ("all", "edited" if importing else "wrong")
    if rows not in (None, *choices):
        raise ConfigError(f"--rows must be {' or '.join(choices)}, got {rows!r}.")
    if edited is not None:
        triples, report = read_edited(Path(edited), rows="edited" if rows == "edited" else "all")
        write_triples(out, triples)
    else:
        assert student is not None and ghosts is not None
        replies = read_student_replies(Path(student))
        triples, _ = read_triples(ghosts)
        report = write_pairs(Path(out), triples, replies, rows="wrong" if rows == "wrong" else "all")
    console.print(f"{report}\nwritten: {out}", highlight=False, markup=False, soft_wrap=True)


def sft(arguments: Sequence[str], console: Console) -> None:
    """`cotgrpo sft`."""
    from cotgrpo.config.files import parse_config
    from cotgrpo.training.stages import run_sft

    run_sft(parse_config(arguments, prog="cotgrpo sft"), console)


def grpo(arguments: Sequence[str], console: Console) -> None:
    """`cotgrpo grpo`."""
    from cotgrpo.config.files import parse_config
    from cotgrpo.training.stages import run_grpo

    run_grpo(parse_config(arguments, prog="cotgrpo grpo"), console)


EVAL_HELP = """Exact match and loss on held-out rows. Of a run: --run_dir DIR, with the run's own settings and those given here on top.
Of any model: --model FOLDER_OR_ID --data.test ROWS, and --out DIR to keep eval.json there; no run is needed, and data.train neither."""


def evaluate(arguments: Sequence[str], console: Console) -> None:
    """`cotgrpo eval`."""
    from cotgrpo.config.files import parse_config
    from cotgrpo.config.settings import Config, ConfigError
    from cotgrpo.training.stages import newest_stage, run_eval, run_eval_pretrained

    model, rest = taken("--model", arguments)
    if model is not None:
        out, rest = taken("--out", rest)
        if taken("--run_dir", rest)[0] is not None:
            raise ConfigError(
                "--model and --run_dir name two students: give one of them, and --out DIR to keep eval.json."
            )
        # A config file may be that of a student from scratch: its shape does not count here.
        shape = [f"--student.{name}={getattr(Config().student, name)}" for name in Config().student.shape()]
        config = parse_config([*rest, *shape, f"--student.path={model}"], prog="cotgrpo eval")
        run_eval_pretrained(config, None if out is None else Path(out), console)
        return
    config = parse_config(arguments, prog="cotgrpo eval", description=EVAL_HELP)
    # The run's own settings, with what was given on top.
    stage = newest_stage(Path(config.run_dir))
    saved = Path(config.run_dir) / stage / "config.yaml"
    run_eval(parse_config(["--config", str(saved), *arguments], prog="cotgrpo eval"), console)


def taken(option: str, arguments: Sequence[str]) -> tuple[str | None, list[str]]:
    """The last value of an option that is no setting (None: it is not there), and the other arguments."""
    from cotgrpo.config.settings import ConfigError

    value, rest, given = None, [], iter(arguments)
    for argument in given:
        name, has_value, after = argument.partition("=")
        if name != option:
            rest.append(argument)
            continue
        value = after if has_value else next(given, "")
        if not value or value.startswith("--"):
            raise ConfigError(f"{option} needs a value.")
    return value, rest


def options_of(names: Sequence[str], arguments: Sequence[str], flags: Sequence[str] = ()) -> dict[str, str | None]:
    """The value of each option, None where it is not given. Raises ConfigError for any other argument, and names the nearest, `flags` among them."""
    from cotgrpo.config.files import nearest
    from cotgrpo.config.settings import ConfigError

    options: dict[str, str | None] = {}
    rest = list(arguments)
    for name in names:
        options[name], rest = taken(f"--{name}", rest)
    if rest:
        name = rest[0].partition("=")[0]
        raise ConfigError(f"Unknown option {name}.{nearest(name.removeprefix('--'), [*options, *flags], '--')}")
    return options


EXPORT_HELP = """usage: cotgrpo export --run_dir DIR --out FOLDER [--dtype float32|bfloat16|float16] [--adapter]

Writes the newest student of a run as a folder that transformers loads: safetensors, config.json, tokenizer, chat template,
generation_config.json, and a model card with the data, the objective, the settings and the measured accuracy.

  --run_dir DIR    the folder of the run
  --out FOLDER     new or empty
  --dtype TYPE     how weights are stored; without it, as in the run
  --adapter        of a run with LoRA: the adapters alone, as peft loads them; without it, they are merged into the weights"""


def export(arguments: Sequence[str], console: Console) -> None:
    """`cotgrpo export`."""
    from cotgrpo.config.settings import ConfigError
    from cotgrpo.training.export import run_export

    if {"-h", "--help"} & set(arguments):
        print(EXPORT_HELP)
        return
    rest = [argument for argument in arguments if argument != "--adapter"]
    adapter = len(rest) < len(arguments)
    run_dir, out, dtype = options_of(("run_dir", "out", "dtype"), rest, flags=("adapter",)).values()
    if run_dir is None or out is None:
        raise ConfigError("export needs --run_dir DIR, the folder of the run, and --out FOLDER, where the model goes.")
    run_export(Path(run_dir), Path(out), dtype, console, adapter=adapter)


PLAN_HELP = """Compiles the train step of a config for a TPU slice, on a machine without one: memory, collectives and the time to expect. GPUs by arithmetic.
--topology v5p:4x4x4|v5e:4x4|v4:...|v6e:...|tpu7x:...|h100:8|a100:8|h200:8, --stage sft|grpo (grpo), --search to rank meshes, remat policies
and micro-batches, --out FILE.json (run_dir/plans/...; the printed table goes beside it). No data and no weights are read."""


def plan(arguments: Sequence[str], console: Console) -> None:
    """`cotgrpo plan`."""
    import jax

    from cotgrpo.config.files import parse_config
    from cotgrpo.config.settings import ConfigError
    from cotgrpo.planning.page import run_plan

    topology, rest = taken("--topology", arguments)
    stage, rest = taken("--stage", rest)
    out, rest = taken("--out", rest)
    search = "--search" in rest
    config = parse_config([a for a in rest if a != "--search"], prog="cotgrpo plan", description=PLAN_HELP)
    if topology is None:
        raise ConfigError("plan needs --topology, such as v5p:4x4x4 (a TPU slice) or h100:8 (GPUs).")
    names: dict[str | None, Literal["sft", "grpo"]] = {None: "grpo", "grpo": "grpo", "sft": "sft"}
    if stage not in names:
        raise ConfigError(f"--stage must be sft or grpo, got {stage}.")
    jax.config.update("jax_platforms", "cpu")  # the machine's own accelerator, if there is one, is not wanted
    run_plan(config, names[stage], topology, None if out is None else Path(out), console, search=search)


def bench(arguments: Sequence[str]) -> int:
    """`cotgrpo bench`, which needs what a train step needs and nothing else, and no compilation cache: compiling is measured. Returns the exit code."""
    from cotgrpo.bench.command import run_bench
    from cotgrpo.data.triples import DataError

    try:
        run_bench(arguments)
    except DataError as error:
        print(f"cotgrpo: {error}", file=sys.stderr)
        return 2
    return 0


def quickstart(arguments: Sequence[str], console: Console) -> None:
    """`cotgrpo quickstart [--out DIR]`: `--out` is a short name of `--run_dir`."""
    from cotgrpo.config.files import parse_config
    from cotgrpo.quickstart.quickstart import QUICKSTART, run_quickstart

    renamed = ["--run_dir" + a[len("--out") :] if a.partition("=")[0] == "--out" else a for a in arguments]
    run_quickstart(parse_config(renamed, prog="cotgrpo quickstart", defaults=QUICKSTART), console)


COMMANDS: dict[str, Callable[[Sequence[str], Console], None]] = {
    "quickstart": quickstart,
    "generate": generate,
    "gold": gold,
    "sft": sft,
    "grpo": grpo,
    "eval": evaluate,
    "plan": plan,
    "export": export,
}

COMPUTING = {"quickstart", "generate", "sft", "grpo", "eval", "bench"}
"""The commands that train, or write replies."""

if __name__ == "__main__":
    sys.exit(main())
