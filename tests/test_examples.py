"""Every file of examples/ runs as it is, on one device and on eight. Its loss falls, or its reward rises."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = sorted((Path(__file__).parents[1] / "examples").rglob("*.py"))
RUNS = "runs"
"""The folder of those that call `cotgrpo.runs.Run`, whose meshes tests/commands has."""
LINES = 62
LONGER = {"train_steps_in_your_loop": 80, "server_teacher": 80}
"""The first is the whole method, and the second has a server."""
PROGRAM = """
import contextlib, io, json, runpy, sys, traceback

for path in sys.argv[1:]:
    out, error = io.StringIO(), ""
    sys.argv = [path]
    with contextlib.redirect_stdout(out):
        try:
            runpy.run_path(path, run_name="__main__")
        except BaseException:
            error = traceback.format_exc()
    print(json.dumps({"path": path, "out": out.getvalue(), "error": error}))
"""


@pytest.mark.slow
@pytest.mark.parametrize("devices", [1, 8])
def test_examples(devices: int, tmp_path: Path) -> None:
    """All in one process, one after the other, each as a script. Warnings are errors."""
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={devices}"
    paths = [path for path in EXAMPLES if devices == 1 or path.parent.name != RUNS]
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", PROGRAM, *map(str, paths)],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        # XLA's CPU devices share a pool of this many threads. With one for each, collectives can wait for each other.
        env=os.environ | {"XLA_FLAGS": flags, "NPROC": "32", "OPENAI_API_KEY": "none"},
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found = [json.loads(line) for line in done.stdout.splitlines() if line.startswith('{"path"')]
    assert [row["path"] for row in found] == list(map(str, paths))
    for row in found:
        assert not row["error"], f"{row['path']}: {row['error']}"
        told = re.search(r"(loss|reward)[^\d\n]*(-?\d+\.\d+) -> (-?\d+\.\d+)", row["out"])
        assert told is not None, f"an example prints what falls or rises, got {row['out']!r}"
        first, last = float(told[2]), float(told[3])
        assert last < first if told[1] == "loss" else last > first, row["path"]


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_an_example_is_short(path: Path) -> None:
    assert len(path.read_text(encoding="utf-8").splitlines()) <= LONGER.get(path.stem, LINES)


def test_there_are_examples() -> None:
    assert len(EXAMPLES) >= 15
