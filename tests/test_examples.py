"""Every file of examples/ runs as it is, on one device and on eight, and its loss falls."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = sorted((Path(__file__).parents[1] / "examples").glob("*.py"))
LINES = 62
LINES_OF_THE_WHOLE_METHOD = 80


@pytest.mark.slow
@pytest.mark.parametrize("devices", [1, 8])
@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_example(path: Path, devices: int, tmp_path: Path) -> None:
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={devices}"
    done = subprocess.run(
        [sys.executable, "-W", "error", path],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        # XLA's CPU devices share a pool of this many threads. With one for each, collectives can wait for each other.
        env=os.environ | {"XLA_FLAGS": flags, "NPROC": "32"},
        check=False,
    )
    assert done.returncode == 0, done.stderr
    losses = re.search(r"loss\D*(\d+\.\d+) -> (\d+\.\d+)", done.stdout)
    assert losses is not None, f"an example prints its first and its last loss, got {done.stdout!r}"
    assert float(losses[2]) < float(losses[1])


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_an_example_is_short(path: Path) -> None:
    most = LINES_OF_THE_WHOLE_METHOD if path.stem == "train_steps_in_your_loop" else LINES
    assert len(path.read_text(encoding="utf-8").splitlines()) <= most


def test_there_are_examples() -> None:
    assert len(EXAMPLES) >= 10
