"""Measure how fast steps, generation, the input pipeline and checkpoints are on this machine."""

from __future__ import annotations

from collections.abc import Sequence

from cotgrpo.bench.command import run_bench
from cotgrpo.data.sources import DataError
from cotgrpo.terminal import complain


def main(arguments: Sequence[str]) -> int:
    """Run the benchmark and return the exit code. Compiled programs are not cached, since compiling is measured."""
    try:
        run_bench(arguments)
    except DataError as error:
        complain(str(error))
        return 2
    return 0
