"""Compile our train step and MaxText's for the same TPU slices, and write one table of what the compiler says of both.

    python benchmarks/compiled_peers.py --maxtext mt/bin/python              all rows that are missing
    python benchmarks/compiled_peers.py --maxtext mt/bin/python ROW ...      these rows
    python benchmarks/compiled_peers.py --table                              the table of the results that are kept

No TPU is needed. `--maxtext` is the Python of an environment with MaxText (`pip install 'maxtext[tpu]==0.2.5'
jsonargparse jaxtyping beartype`, Python 3.12). Our step is compiled there too, so both have the same jax and libtpu.
Every program is compiled in a process of its own, for one to three minutes on two idle cores and in up to 10 GB. Its
figures are kept as JSON in benchmarks/results/compiled_peers, and an interrupted run goes on with the next one.

Both steps train with AdamW on whole sequences, with full recomputation, in bfloat16. Each row is compiled with XLA's
default options, and without the loops that XLA makes of a matrix product and the gather of its weights ("no-loops").
Tunix's step is not in the table: its trainer builds it from a model with real weights and shards them by loading, so
there is nothing to lower from shapes alone. MaxText trains LoRA through Tunix, so LoRA rows have our figures only.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.metadata
import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from cotgrpo.planning.stage_plan import StagePlan

ROOT = Path(__file__).parents[1]
KEPT = ROOT / "benchmarks" / "results" / "compiled_peers"
GIB = 2**30
SIDES = ("cotgrpo", "maxtext")
FLAGS: dict[str, dict[str, int]] = {
    "default": {},
    "no-loops": {"xla_jf_spmd_threshold_for_windowed_einsum_mib": 1_000_000},
}
"""XLA's options of a row, the same for both sides."""
ENVIRONMENT = {
    "JAX_PLATFORMS": "cpu",
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-16",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}
"""Without these, libtpu looks for TPUs."""


@dataclasses.dataclass(frozen=True)
class Row:
    """One model on one slice.

    Attributes:
        model: folder in configs/models.
        slice: as `cotgrpo plan --topology` names it.
        sequences: of a batch, over all devices.
        seq_len: tokens of a sequence.
        param_dtype: of parameters and AdamW's moments.
        maxtext: MaxText's settings of the model and the slice; empty if MaxText has no such step.
        devices: of the slice.
        lora_rank: 0 trains all parameters.
    """

    model: str
    slice: str
    sequences: int
    seq_len: int
    param_dtype: Literal["float32", "bfloat16"]
    maxtext: tuple[str, ...]
    devices: int
    lora_rank: int = 0


GEMMA = (
    "model_name=gemma3-4b",
    "override_model_config=true",
    "base_num_decoder_layers=26",
    "base_emb_dim=1152",
    "base_num_query_heads=4",
    "base_num_kv_heads=1",
    "base_mlp_dim=6912",
    "sliding_window_size=512",
)
"""MaxText has no file for Gemma-3-1B: the sizes of its config.json."""
LLAMA = "model_name=llama3-8b"
ROWS = {
    "llama3-8b-v5p-2x2x4": Row(
        "llama-3-8b", "v5p:2x2x4", 64, 2048, "float32", (LLAMA, "compile_topology=v5p-32"), devices=16
    ),
    "llama3-8b-v5e-4x4": Row(
        "llama-3-8b", "v5e:4x4", 16, 2048, "bfloat16", (LLAMA, "compile_topology=v5e-16"), devices=16
    ),
    "llama3-8b-lora-v5e-4x4": Row("llama-3-8b", "v5e:4x4", 32, 2048, "bfloat16", (), devices=16, lora_rank=16),
    "gemma3-1b-v5e-2x4": Row(
        "gemma-3-1b", "v5e:2x4", 32, 1024, "float32", (*GEMMA, "compile_topology=v5e-8"), devices=8
    ),
    "qwen3-0.6b-v5e-2x4": Row(
        "qwen3-0.6b", "v5e:2x4", 32, 1024, "float32", ("model_name=qwen3-0.6b", "compile_topology=v5e-8"), devices=8
    ),
}


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rows", nargs="*", metavar="ROW", help=f"rows to compile (default: all): {', '.join(ROWS)}")
    parser.add_argument("--maxtext", metavar="PYTHON", help="the Python of an environment with MaxText")
    parser.add_argument("--flags", choices=FLAGS, help="only with these options of XLA (default: with each)")
    parser.add_argument("--side", choices=SIDES, help="only this library's step (default: both)")
    parser.add_argument("--again", action="store_true", help="compile again what is kept")
    parser.add_argument("--table", action="store_true", help="compile nothing")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows of the table here too")
    parser.add_argument("--kept", type=Path, default=KEPT, help=argparse.SUPPRESS)
    parser.add_argument("--compile", nargs=4, metavar=("ROW", "FLAGS", "SIDE", "OUT"), help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if options.compile:
        row, flags, side, out = options.compile
        write(Path(out), COMPILE[side](ROWS[row], FLAGS[flags]))
        return 0
    if unknown := sorted({*options.rows} - {*ROWS}):
        parser.error(f"There is no row {unknown[0]}. There are: {', '.join(ROWS)}.")
    failed = 0
    if not options.table:
        if options.maxtext is None:
            parser.error("--maxtext is missing: the Python of an environment with MaxText and libtpu (or --table).")
        for name in options.rows or ROWS:
            for flags in [options.flags] if options.flags else FLAGS:
                for side in [options.side] if options.side else SIDES:
                    failed += not compiled(name, flags, side, options)
    found = table_rows(options.kept)
    if options.json:
        write(options.json, {"rows": found})
    print(markdown(found), end="")
    return 1 if failed else 0


def compiled(name: str, flags: str, side: str, options: argparse.Namespace) -> bool:
    """Compile one program in a process of its own, unless its figures are kept. Return whether they are kept now."""
    out = options.kept / f"{name}-{flags}-{side}.json"
    if (out.exists() and not options.again) or (side == "maxtext" and not ROWS[name].maxtext):
        return True
    command = [options.maxtext, str(Path(__file__).resolve()), "--compile", name, flags, side, str(out)]
    print(f"{name}, {flags}, {side} ...", flush=True, file=sys.stderr)
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    done = subprocess.run(command, env=os.environ | ENVIRONMENT | {"PYTHONPATH": path}, stdout=subprocess.DEVNULL)
    if done.returncode:
        print(f"{name}, {flags}, {side} did not compile (exit code {done.returncode}).", file=sys.stderr)
    return done.returncode == 0


def write(path: Path, figures: dict[str, Any]) -> None:
    from cotgrpo.atomic_files import write_json

    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, figures)


def plan_of(row: Row, flags: dict[str, int]) -> StagePlan:
    """Return the plan of `cotgrpo sft` on a row's slice, with these options of XLA and no others."""
    from cotgrpo.accelerators.chips import parse_topology
    from cotgrpo.compiler_options.measured import CompilerConfig
    from cotgrpo.config import Config, DataConfig, LoraConfig, OptimizerConfig, StudentConfig
    from cotgrpo.planning.stage_plan import StagePlan
    from cotgrpo.sharding import MeshConfig

    optimizer = OptimizerConfig("adamw")
    config = Config(
        student=StudentConfig(
            path=str(ROOT / "configs" / "models" / row.model),
            dtype="bfloat16",
            param_dtype=row.param_dtype,
            remat="full",
        ),
        data=DataConfig(seq_len=row.seq_len),
        sft=dataclasses.replace(Config().sft, batch_size=row.sequences, optimizer=optimizer),
        lora=LoraConfig(rank=row.lora_rank) if row.lora_rank else None,
        mesh=MeshConfig(data=1, fsdp=-1),
        compiler=CompilerConfig(measured=False, options=dict(flags)),
    )
    return StagePlan(config, "sft", parse_topology(row.slice))


def compile_cotgrpo(row: Row, flags: dict[str, int]) -> dict[str, Any]:
    """Compile the step of `cotgrpo sft`."""
    from cotgrpo.planning.tpu_compile import compile_step, tpu_devices
    from cotgrpo.sharding import make_mesh

    plan = plan_of(row, flags)
    step, arguments = plan.step()
    mesh = make_mesh(devices=tpu_devices(plan.topology), **plan.mesh_sizes)
    program = compile_step(step, mesh, arguments, plan.config.compiler.given("tpu"))
    return figures_of(program, plan.topology.chip.clock, lambda in_loss: plan.num_tiles if in_loss else None)


def compile_maxtext(row: Row, flags: dict[str, int]) -> dict[str, Any]:
    """Compile the step of MaxText's pre-training, as its own ahead-of-time compiler does."""
    import maxtext
    from maxtext.trainers.pre_train import train_compile

    from cotgrpo.accelerators.chips import parse_topology

    programs: list[Any] = []
    jit_and_compile = train_compile.jit_and_compile

    def keep(*arguments: Any, **options: Any) -> Any:
        programs.append(jit_and_compile(*arguments, **options))
        return programs[-1]

    train_compile.jit_and_compile = keep
    settings = {
        "run_name": "compiled_peers",
        "enable_checkpointing": "false",
        "dataset_type": "synthetic",
        "compile_topology_num_slices": 1,
        "per_device_batch_size": row.sequences // row.devices,
        "max_target_length": row.seq_len,
        "remat_policy": "full",
        "attention": "flash",
        "dtype": "bfloat16",
        "weight_dtype": row.param_dtype,
        "compile_xla_flags": " ".join(f"--{name}={value}" for name, value in flags.items()),
    }
    base = Path(maxtext.__file__).parent / "configs" / "base.yml"
    given = [f"{name}={value}" for name, value in settings.items()]
    train_compile.main(["train_compile", str(base), *row.maxtext, *given])
    return figures_of(programs[0], parse_topology(row.slice).chip.clock, lambda in_loss: None)


COMPILE: dict[str, Callable[[Row, dict[str, int]], dict[str, Any]]] = {
    "cotgrpo": compile_cotgrpo,
    "maxtext": compile_maxtext,
}


def figures_of(program: Any, clock: float, tiles: Callable[[bool], int | None]) -> dict[str, Any]:
    """Return what the compiler says of a program.

    Args:
        program: compiled by JAX.
        clock: cycles a second.
        tiles: how often a loop whose end depends on the data runs, from whether it is the loss's loop over tiles; None:
            once per device of the collective in it.
    """
    from cotgrpo.planning.hlo import collectives, estimated_cycles
    from cotgrpo.planning.stage_plan import in_tile_loop

    memory, text = program.memory_analysis(), program.as_text()
    sent: dict[str, float] = {}
    for one in collectives(text):
        times = one.times(tiles(in_tile_loop(one)) or one.group)
        sent[one.kind] = sent.get(one.kind, 0.0) + one.sent * times
    return {
        "compute_seconds": estimated_cycles(text, tiles(True) or 1) / clock,
        "sent_bytes": sum(sent.values()),
        "sent_bytes_by_kind": sent,
        "temporary_bytes": memory.temp_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes,
        "argument_bytes": memory.argument_size_in_bytes,
        "versions": versions(),
    }


def versions() -> dict[str, str]:
    """Return the versions of what a program was compiled with."""
    found = {}
    for name in ("jax", "libtpu", "maxtext"):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def table_rows(kept: Path) -> list[dict[str, Any]]:
    """Return a dict for each row and options of XLA with figures: both sides' and ours over MaxText's."""
    rows = []
    for name in ROWS:
        for flags in FLAGS:
            paths = {side: kept / f"{name}-{flags}-{side}.json" for side in SIDES}
            sides = {side: json.loads(path.read_text()) for side, path in paths.items() if path.exists()}
            if not sides:
                continue
            ours, theirs = (sides.get(side) for side in SIDES)
            ratios = {
                key: ours[key] / theirs[key]
                for key in ("compute_seconds", "sent_bytes", "temporary_bytes")
                if ours and theirs and theirs[key]
            }
            same = len({json.dumps(libraries(side)) for side in sides.values()}) == 1
            rows.append({"row": name, "flags": flags, "remat": "full", **sides, "ratios": ratios, "same_libtpu": same})
    return rows


def libraries(figures: dict[str, Any]) -> dict[str, str]:
    """Return the versions that must agree for two programs to be compared."""
    return {name: figures["versions"].get(name, "") for name in ("jax", "libtpu")}


def markdown(rows: Sequence[dict[str, Any]]) -> str:
    """Return the table. Each cell has our figure, MaxText's, and ours over MaxText's."""
    titles = ("model and slice", "XLA's options", "compute, s", "sent, GiB", "temporaries, GiB", "jax, libtpu, MaxText")
    cells = []
    for row in rows:
        columns = (("compute_seconds", 1.0), ("sent_bytes", GIB), ("temporary_bytes", GIB))
        numbers = [" / ".join(shown(row, key, unit)) for key, unit in columns]
        seen = {name: version for side in SIDES for name, version in row.get(side, {}).get("versions", {}).items()}
        used = ", ".join(seen.get(name, "-") for name in ("jax", "libtpu", "maxtext"))
        cells.append([row["row"], row["flags"], *numbers, used if row["same_libtpu"] else "differ: compile again"])
    lines = [titles, ["---"] * len(titles), *cells]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def shown(row: dict[str, Any], key: str, unit: float) -> list[str]:
    """Return our figure, MaxText's and the ratio as text, "-" for one that is missing."""
    figures = [f"{row[side][key] / unit:.2f}" if side in row else "-" for side in SIDES]
    return [*figures, f"**{row['ratios'][key]:.2f}**" if key in row["ratios"] else "-"]


if __name__ == "__main__":
    sys.exit(main())
