"""Compare `cotgrpo plan` with published runs: the table of docs/plan.md, and what its constants are fitted to.

    python benchmarks/plan_calibration.py                 print the table from what is stored
    python benchmarks/plan_calibration.py --compile       compile the TPU runs that are not stored yet, one by one
    python benchmarks/plan_calibration.py --compile NAME  these runs, such as "MaxText 16B, v5e-256"
    python benchmarks/plan_calibration.py --write         put the table into docs/plan.md
    python benchmarks/plan_calibration.py --check         exit with 1 if docs/plan.md has another table

`published_throughput.jsonl` holds the runs with their sources. A run that is not `fitted` is kept back: no constant of
`cotgrpo.accelerators.step_estimate` was chosen by it. What a device does in each step is stored as one JSON file a run
in `results/plan_calibration/`, so compiling resumes where it was stopped. Compiling needs the `tpu` extra and no TPU.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import re
import statistics
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from cotgrpo.accelerators.chips import parse_topology
from cotgrpo.accelerators.roofline import DTYPE_BYTES
from cotgrpo.accelerators.step_estimate import StepLoad, expected_seconds
from cotgrpo.atomic_files import write_json, write_text
from cotgrpo.config import Config, DataConfig, StageConfig, StudentConfig, TokenizerConfig
from cotgrpo.planning.stage_plan import StagePlan
from cotgrpo.terminal import complain

HERE = Path(__file__).parent
RUNS = HERE / "published_throughput.jsonl"
STORED = HERE / "results" / "plan_calibration"
PAGE = HERE.parent / "docs" / "plan.md"
BEGIN, END = "<!-- calibration: begin -->", "<!-- calibration: end -->"
SHAPE = {
    "hidden_size": "width",
    "intermediate_size": "mlp_width",
    "num_hidden_layers": "num_layers",
    "num_attention_heads": "num_heads",
    "num_key_value_heads": "num_kv_heads",
    "head_dim": "head_dim",
}


@dataclasses.dataclass(frozen=True)
class Comparison:
    """A published run and what the plan expects.

    Attributes:
        run: the row of the data.
        compiled: whether the step was compiled.
        seconds: the plan's time of a step.
    """

    run: dict[str, Any]
    compiled: bool
    seconds: float

    @property
    def published_seconds(self) -> float:
        """The published time of a step."""
        tokens = self.run["sequences"] * self.run["seq_len"]
        return tokens / (self.run["tokens_per_second_per_chip"] * parse_topology(self.run["topology"]).num_chips)

    @property
    def error(self) -> float:
        """The plan's time over the published one, less one."""
        return self.seconds / self.published_seconds - 1


def read_runs() -> list[dict[str, Any]]:
    """Return the published runs."""
    return [json.loads(line) for line in RUNS.read_text().splitlines()]


def plan_of(run: dict[str, Any]) -> StagePlan:
    """Return our plan of a published run, with the nearest settings."""
    shape: dict[str, Any] = {ours: run["shape"][theirs] for theirs, ours in SHAPE.items()}
    types = {"dtype": "bfloat16", "param_dtype": run["param_dtype"], "remat": run["remat"]}
    config = Config(
        student=StudentConfig(**shape, **types, tied_head=False),
        tokenizer=TokenizerConfig(vocab_size=run["shape"]["vocab_size"]),
        data=DataConfig(seq_len=run["seq_len"]),
        sft=StageConfig(batch_size=run["sequences"]),
    )
    mesh = {"data": 1, "fsdp": 1, "tensor": 1, "context": 1} | run["mesh"]
    return StagePlan(config, "sft", parse_topology(run["topology"]), mesh)


def stored_path(run: dict[str, Any]) -> Path:
    """Return the file of a run's stored load."""
    return STORED / (re.sub(r"\W+", "-", run["run"].lower()).strip("-") + ".json")


def load_of(run: dict[str, Any], *, by_arithmetic: bool = False) -> tuple[StepLoad, bool]:
    """Return what a device does in a step, and whether that was compiled. Not stored: by arithmetic."""
    if stored_path(run).exists() and not by_arithmetic:
        return StepLoad(**json.loads(stored_path(run).read_text())["load"]), True
    plan = plan_of(run)
    parts = plan.mesh_sizes["fsdp"] * plan.mesh_sizes["tensor"]
    state_bytes = 3 * DTYPE_BYTES[run["param_dtype"]] * plan.decoder.num_params() // parts  # with AdamW's moments
    return plan.load_by_arithmetic(state_bytes), False


def compare(run: dict[str, Any], *, by_arithmetic: bool = False) -> Comparison:
    """Return the plan's time of a published run."""
    load, compiled = load_of(run, by_arithmetic=by_arithmetic)
    chip = parse_topology(run["topology"]).chip
    return Comparison(run, compiled, expected_seconds(load, chip, run["shape"]["head_dim"], compiled=compiled))


def compile_run(run: dict[str, Any]) -> None:
    """Compile our step with a run's settings, and store what a device does in it.

    Raises:
        ConfigError: libtpu is missing.
    """
    figures = plan_of(run).figures()
    if "compiler_seconds" not in figures:
        complain(f"{run['run']}: does not fit ({figures['bytes_per_device']['total'] / 2**30:.1f} GiB a device)")
        return
    kept = ("versions", "bytes_per_device", "collectives", "compile_seconds")
    STORED.mkdir(parents=True, exist_ok=True)
    load = {"run": run["run"], "load": figures["seconds"]["load"]}
    write_json(stored_path(run), load | {key: figures[key] for key in kept})


def table(found: Sequence[Comparison]) -> Iterator[str]:
    """Yield the lines of the Markdown table: fitted and kept-back runs apart."""
    for fitted, title in ((True, "Fitted"), (False, "Kept back")):
        rows = [row for row in found if row.run["fitted"] == fitted]
        yield f"**{title}**"
        yield ""
        yield "| run | remat | published tokens/s a chip | plan | error of the time | how | source |"
        yield "|---|---|---|---|---|---|---|"
        for row in rows:
            run, ratio = row.run, row.published_seconds / row.seconds
            remat = run["remat"].replace("offload:", "off:").replace(",", ", ")
            how = "compiled" if row.compiled else "arithmetic"
            speed = run["tokens_per_second_per_chip"]
            error = f"{100 * row.error:+.0f} %"
            speeds = f"{speed:,.0f} | {speed * ratio:,.0f}"
            yield f"| {run['run']} | {remat} | {speeds} | {error} | {how} | {run['source']} |"
        yield ""
        yield f"{title}: {summary(rows)}"
        yield ""


def summary(rows: Sequence[Comparison]) -> str:
    """Return the median and the largest error."""
    errors = [abs(row.error) for row in rows]
    return f"{len(rows)} runs, median error {statistics.median(errors):.1%}, largest {max(errors):.1%}."


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help="runs to compile (default: all of TPUs)")
    parser.add_argument("--compile", action="store_true", help="compile the TPU runs that are not stored")
    parser.add_argument("--arithmetic", action="store_true", help="the table without compiled steps")
    parser.add_argument("--write", action="store_true", help="put the table into docs/plan.md")
    parser.add_argument("--check", action="store_true", help="exit with 1 if docs/plan.md has another table")
    args = parser.parse_args(argv)
    runs = read_runs()
    if unknown := sorted({*args.names} - {run["run"] for run in runs}):
        parser.error(f"There is no run {unknown[0]!r}. There are: {'; '.join(run['run'] for run in runs)}.")
    for run in runs:
        wanted = run["run"] in args.names or (not args.names and not stored_path(run).exists())
        if args.compile and wanted and parse_topology(run["topology"]).chip.platform == "tpu":
            print(f"compiling {run['run']}", flush=True)
            compile_run(run)
    text = "\n".join(table([compare(run, by_arithmetic=args.arithmetic) for run in runs]))
    print(text)
    page = PAGE.read_text() if args.write or args.check else ""
    whole = f"{page.partition(BEGIN)[0]}{BEGIN}\n{text}{END}{page.partition(END)[2]}"
    if args.write:
        write_text(PAGE, whole)
    return int(args.check and page != whole)


if __name__ == "__main__":
    sys.exit(main())
