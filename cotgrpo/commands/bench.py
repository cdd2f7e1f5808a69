"""Measure how fast steps, generation, the input pipeline and checkpoints are on this machine."""

from __future__ import annotations

from collections.abc import Sequence

from cotgrpo.bench.command import run_bench
from cotgrpo.data.sources import DataError
from cotgrpo.disk_errors import CheckpointError, explain_disk_errors
from cotgrpo.terminal import complain


def main(arguments: Sequence[str]) -> int:
    """Run the benchmark and return the exit code. Compiled programs are not cached, since compiling is measured."""
    try:
        with explain_disk_errors():
            run_bench(arguments)
    except (DataError, CheckpointError) as error:
        complain(str(error))
        return 2
    return 0
