"""`cotgrpo bench PART`: one table on the terminal, and the same as JSON. Random weights and tokens, no network.

At module level, and in all parts but `data` and `checkpoint`, only jax, flax, optax and numpy are needed: where nothing else is installed,
`python -m cotgrpo.bench.command PART` is the same command.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax

from cotgrpo.accelerators.mfu import matrix_rate
from cotgrpo.bench import parts, pipeline, steps
from cotgrpo.bench.measure import machine
from cotgrpo.bench.workload import SHAPES
from cotgrpo.huge_pages import use_huge_pages
from cotgrpo.models.config import REMAT_POLICIES, DecoderConfig

Option = tuple[str, dict[str, Any]]
FORMATS: dict[str, Callable[[Any], str]] = {
    "text": str,
    "count": lambda value: f"{value:,.0f}",
    "seconds": lambda value: f"{value:.4f}",
    "ratio": lambda value: f"{value:.3f}",
    "percent": lambda value: f"{value:.1%}",
    "MB": lambda value: f"{value / 1e6:,.0f}",
    "GB/s": lambda value: f"{value / 1e9:.2f}",
}
TIMES = (("median s", "median_s", "seconds"), ("min", "min_s", "seconds"), ("max", "max_s", "seconds"))
SPEED = (("tokens/s", "tokens_per_sec", "count"), ("MFU", "mfu", "percent"))


@dataclasses.dataclass(frozen=True)
class Part:
    """One thing to measure.

    Attributes:
        about: one line of help.
        measure: from the decoder and the options to a dict with `rows`.
        columns: (title, key of a row, format) of the table.
        options: its own, beside those of all parts.
        defaults: of the options of all parts, where this one has others.
        lines: what stands below the table.
    """

    about: str
    measure: Callable[[DecoderConfig, argparse.Namespace], dict[str, Any]]
    columns: tuple[tuple[str, str, str], ...]
    options: tuple[Option, ...] = ()
    defaults: dict[str, Any] = dataclasses.field(default_factory=dict)
    lines: Callable[[dict[str, Any]], list[str]] = lambda _: []


def numbers(*default: Any, kind: type = int) -> dict[str, Any]:
    """An option that takes several."""
    return {"type": kind, "nargs": "+", "default": list(default)}


NEW_TOKENS: Option = ("--new-tokens", {"type": int, "default": 64, "help": "tokens of a reply"})
PARTS: dict[str, Part] = {
    "step": Part(
        "one SFT step and one GRPO (GhostRespond) step, teacher-forced, on the same batch in turn",
        steps.measure_step,
        (
            ("step", "step", "text"),
            *TIMES,
            *SPEED,
            ("compile s", "compile_s", "seconds"),
            ("temp MB", "temp_bytes", "MB"),
            ("peak MB", "peak_bytes_so_far", "MB"),
        ),
        (
            ("--supervised", {"type": float, "default": 1.0, "help": "share of tokens with a loss"}),
            ("--micro-batches", {"type": int, "default": 1}),
        ),
        lines=steps.step_lines,
    ),
    "supervised": Part(
        "the time of a GRPO step against the share of supervised tokens",
        steps.measure_supervised,
        (
            ("supervised", "supervised", "percent"),
            *TIMES,
            *SPEED,
            ("time", "time_share", "ratio"),
            ("FLOPs", "flops_share", "ratio"),
        ),
        (("--shares", numbers(1.0, 0.5, 0.25, 0.1, kind=float)),),
    ),
    "remat": Part(
        "the GRPO step with each policy of recomputation, in turn on the same batch",
        steps.measure_remat,
        (
            ("remat", "policy", "text"),
            *TIMES,
            *SPEED,
            ("time", "time_share", "ratio"),
            ("compile s", "compile_s", "seconds"),
            ("temp MB", "temp_bytes", "MB"),
        ),
        (("--policies", {"nargs": "+", "choices": REMAT_POLICIES, "default": ["dots", "none", "full"]}),),
    ),
    "on_policy": Part(
        "a GRPO update on the student's own replies: rollout, live ghost, step",
        pipeline.measure_on_policy,
        (("part", "part", "text"), *TIMES, ("share", "share", "percent"), SPEED[0]),
        (NEW_TOKENS,),
    ),
    "memory": Part(
        "memory of the compiled GRPO step by vocabulary and batch; nothing runs",
        steps.measure_memory,
        (
            ("V", "vocab", "count"),
            ("tokens", "tokens", "count"),
            ("state MB", "state_bytes", "MB"),
            ("gradient MB", "gradient_bytes", "MB"),
            ("temp MB", "temp_bytes", "MB"),
            ("logits alone MB", "logits_bytes", "MB"),
        ),
        (("--vocab", numbers(32_768, 131_072, 262_144)),),
        lines=steps.memory_lines,
    ),
    "compile": Part(
        "compile time of a GRPO step by depth, in fresh processes",
        steps.measure_compile,
        (
            ("layers", "layers", "count"),
            ("lower s", "lower_s", "seconds"),
            ("compile s", "compile_s", "seconds"),
            ("total s", "total_s", "seconds"),
            ("text", "text_chars", "count"),
        ),
        (("--layers", numbers(4, 32)), ("--here", {"action": "store_true", "help": argparse.SUPPRESS})),
        {"shape": "tiny", "batch": 2, "seq": 128, "repeats": 3},
        lines=steps.compile_lines,
    ),
    "engine": Part(
        "the head, its loss and gradients: time against three matrix products, memory against all logits at once",
        parts.measure_engine,
        (
            ("V", "vocab", "count"),
            ("objective", "objective", "text"),
            ("tile", "tile_size", "count"),
            *TIMES,
            *SPEED,
            ("temp MB", "temp_bytes", "MB"),
            ("naive MB", "naive_bytes", "MB"),
            ("naive / engine", "naive_over_engine", "ratio"),
        ),
        (
            ("--vocab", numbers(32_768, 131_072)),
            ("--objectives", {"nargs": "+", "choices": list(parts.OBJECTIVES), "default": list(parts.OBJECTIVES)}),
        ),
        {"repeats": 3},
    ),
    "attention": Part(
        "one layer's causal attention, forward and backward, by length",
        parts.measure_attention,
        (
            ("T", "seq", "count"),
            ("B", "batch", "count"),
            ("attention", "attention", "text"),
            *TIMES,
            *SPEED,
            ("temp MB", "temp_bytes", "MB"),
        ),
        (("--lengths", numbers(256, 512, 1_024, 2_048)),),
        {"repeats": 5},
    ),
    "generate": Part(
        "greedy replies with a key/value cache",
        parts.measure_generate,
        (
            ("B", "batch", "count"),
            *TIMES,
            SPEED[0],
            ("first token s", "first_token_s", "seconds"),
            ("further token s", "further_token_s", "seconds"),
            ("bandwidth", "bandwidth", "percent"),
            ("compile s", "compile_s", "seconds"),
        ),
        (NEW_TOKENS, ("--batches", numbers(1, 8))),
        {"seq": 64, "repeats": 5},
    ),
    "data": Part(
        "steps on packed text from the input pipeline beside the same step on a constant batch, and packing efficiency",
        pipeline.measure_data,
        (("batches", "batches", "text"), *TIMES, SPEED[0], ("padded tokens/s", "padded_tokens_per_sec", "count")),
        (
            ("--rows", {"help": "triples, .jsonl or .parquet; without it, made-up sums"}),
            ("--steps", {"type": int, "default": 5, "help": "steps of a block"}),
        ),
        lines=pipeline.data_lines,
    ),
    "checkpoint": Part(
        "saving and restoring the train state",
        pipeline.measure_checkpoint,
        (("part", "part", "text"), *TIMES, ("GB/s", "bytes_per_sec", "GB/s")),
        (("--folder", {"help": "where to write; without it, the system's temporary folder"}),),
        {"repeats": 3},
    ),
}


def make_parser() -> argparse.ArgumentParser:
    """A subcommand for each part."""
    on_cpu = jax.default_backend() == "cpu"
    parser = argparse.ArgumentParser(prog="cotgrpo bench", description=__doc__)
    commands = parser.add_subparsers(dest="part", required=True, metavar="PART")
    for name, part in PARTS.items():
        command = commands.add_parser(name, help=part.about, description=part.about)
        command.add_argument("--shape", choices=list(SHAPES), default="16m", help="sizes of the model (%(default)s)")
        command.add_argument("--batch", type=int, default=8, help="sequences (%(default)s)")
        command.add_argument("--seq", type=int, default=256, help="tokens of one, or of a prompt (%(default)s)")
        command.add_argument(
            "--dtype",
            choices=["float32", "bfloat16"],
            default="float32" if on_cpu else "bfloat16",
            help="compute type (%(default)s)",
        )
        command.add_argument("--remat", choices=REMAT_POLICIES, default="dots", help="(%(default)s)")
        command.add_argument("--repeats", type=int, default=9, help="times that count (%(default)s)")
        command.add_argument("--warmup", type=int, default=2, help="times before them (%(default)s)")
        command.add_argument("--json", type=Path, help="also write the result here")
        for option, settings in part.options:
            command.add_argument(option, **settings)
        command.set_defaults(**part.defaults)
    return parser


def table(columns: tuple[tuple[str, str, str], ...], rows: list[dict[str, Any]]) -> list[str]:
    """The rows as lines of aligned columns; text to the left, numbers to the right."""
    cells = [[title for title, _, _ in columns]]
    cells += [[FORMATS[kind](row[key]) for _, key, kind in columns] for row in rows]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    pad = [str.ljust if kind == "text" else str.rjust for _, _, kind in columns]
    return ["  ".join(p(cell, w) for p, cell, w in zip(pad, line, widths, strict=True)).rstrip() for line in cells]


def run_bench(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Measures one part, prints it, and returns what `--json` writes."""
    args = make_parser().parse_args(arguments)
    part = PARTS[args.part]
    config = dataclasses.replace(SHAPES[args.shape], dtype=args.dtype, remat=args.remat)
    found = part.measure(config, args)
    if getattr(args, "here", False):  # of `compile`, a child process
        print(json.dumps(found))
        return found
    settings = {
        name: value for name, value in vars(args).items() if name not in ("part", "json", "here", "folder", "rows")
    }
    rate = matrix_rate(args.dtype)
    result = {"part": args.part} | machine() | {"settings": settings, "params": config.num_params()}
    result |= {"matrix_flops_per_sec": rate} | found
    print(
        f"{args.part}: {args.shape} ({config.num_params() / 1e6:.1f} M parameters), {args.batch} x {args.seq}, {args.dtype}, remat {args.remat}; "
        f"{result['device']}, jax {jax.__version__}, matrix products {rate / 1e9:,.0f} GFLOP/s"
    )
    print("\n".join([*table(part.columns, found["rows"]), *part.lines(result)]), flush=True)
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(result, indent=1) + "\n")
    return result


if __name__ == "__main__":
    use_huge_pages()
    run_bench()
    sys.exit(0)
