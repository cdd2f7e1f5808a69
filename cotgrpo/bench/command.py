"""The command `cotgrpo bench PART`: a table on the terminal, and the same as JSON.

Weights are random, and no network is used.
All parts but `data` and `checkpoint` need only jax, flax, optax and numpy. If nothing else is installed,
`python -m cotgrpo.bench.command PART` is the same command.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

import jax

from cotgrpo.accelerators.mfu import matrix_rate
from cotgrpo.atomic_files import is_special, write_json
from cotgrpo.bench.measure import machine
from cotgrpo.bench.parts import PARTS
from cotgrpo.bench.workload import SHAPES
from cotgrpo.data.sources import DataError
from cotgrpo.huge_pages import use_huge_pages
from cotgrpo.models.config import REMAT_POLICIES
from cotgrpo.terminal import complain

FORMATS: dict[str, Callable[[Any], str]] = {
    "text": str,
    "count": lambda value: f"{value:,.0f}",
    "seconds": lambda value: f"{value:.4f}",
    "ratio": lambda value: f"{value:.3f}",
    "percent": lambda value: f"{value:.1%}",
    "MB": lambda value: f"{value / 1e6:,.0f}",
    "GB/s": lambda value: f"{value / 1e9:.2f}",
}


DESCRIPTION = "Measure one part of the library on this machine. The result is a table, and a file with --json."
LEAST = {"batch": 1, "seq": 1, "repeats": 1, "warmup": 0}


class Parser(argparse.ArgumentParser):
    """A parser whose errors are one line."""

    def error(self, message: str) -> NoReturn:
        complain(f"{message}. See {self.prog} --help.")
        raise SystemExit(2)


def make_parser() -> Parser:
    """Return the parser, with a subcommand for each part."""
    parser = Parser(prog="cotgrpo bench", description=DESCRIPTION)
    commands = parser.add_subparsers(title="parts", dest="part", required=True, metavar="PART")
    for name, part in PARTS.items():
        command = commands.add_parser(name, help=part.about, description=part.about)
        command.add_argument("--shape", choices=list(SHAPES), default="16m", help="sizes of the model (%(default)s)")
        command.add_argument("--batch", type=int, default=8, help="sequences (%(default)s)")
        command.add_argument("--seq", type=int, default=256, help="tokens of a sequence or prompt (%(default)s)")
        types = ["float32", "bfloat16"]
        command.add_argument("--dtype", choices=types, help="compute type (float32 on a CPU, else bfloat16)")
        command.add_argument("--remat", choices=REMAT_POLICIES, default="dots", help="remat policy (%(default)s)")
        command.add_argument("--repeats", type=int, default=9, help="repetitions that count (%(default)s)")
        command.add_argument("--warmup", type=int, default=2, help="repetitions before them (%(default)s)")
        command.add_argument("--json", type=Path, help="also write the result to this file")
        for option, settings in part.options:
            command.add_argument(option, **settings)
        command.set_defaults(**part.defaults)
    return parser


def table(columns: tuple[tuple[str, str, str], ...], rows: list[dict[str, Any]]) -> list[str]:
    """Return the rows as lines of aligned columns: text to the left, numbers to the right."""
    cells = [[title for title, _, _ in columns]]
    cells += [[FORMATS[kind](row[key]) for _, key, kind in columns] for row in rows]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    pad = [str.ljust if kind == "text" else str.rjust for _, _, kind in columns]
    return ["  ".join(p(cell, w) for p, cell, w in zip(pad, line, widths, strict=True)).rstrip() for line in cells]


def run_bench(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Measure one part, print it, and return what `--json` writes. None reads the arguments of the process.

    Raises:
        DataError: arguments that cannot be used.
    """
    args = make_parser().parse_args(arguments)
    args.dtype = args.dtype or ("float32" if jax.default_backend() == "cpu" else "bfloat16")
    for name, least in LEAST.items():
        if getattr(args, name) < least:
            raise DataError(f"--{name} must be at least {least}, got {getattr(args, name)}.")
    if args.json and (args.json.is_dir() or is_special(args.json)):
        raise DataError(f"--json {args.json} is not a file. Choose another.")
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
    part = PARTS[args.part]
    config = dataclasses.replace(SHAPES[args.shape], dtype=args.dtype, remat=args.remat)
    found = part.measure(config, args)
    if getattr(args, "here", False):  # a child process of `compile`
        print(json.dumps(found))
        return found
    settings = {
        name: value for name, value in vars(args).items() if name not in ("part", "json", "here", "folder", "rows")
    }
    rate = matrix_rate(args.dtype)
    result = {"part": args.part} | machine() | {"settings": settings, "params": config.num_params()}
    result |= {"matrix_flops_per_sec": rate} | found
    print(
        f"{args.part}: {args.shape} ({config.num_params() / 1e6:.1f} M parameters), {args.batch} x {args.seq}, "
        f"{args.dtype}, remat {args.remat}; {result['device']}, jax {jax.__version__}, "
        f"matrix products {rate / 1e9:,.0f} GFLOP/s"
    )
    print("\n".join([*table(part.columns, found["rows"]), *part.lines(result)]), flush=True)
    if args.json:
        write_json(args.json, result)
    return result


if __name__ == "__main__":
    use_huge_pages()
    run_bench()
    sys.exit(0)
