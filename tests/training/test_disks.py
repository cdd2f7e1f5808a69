"""Commands on a disk that fails at one file after the other: one line each time, and then the same run."""

from __future__ import annotations

import contextlib
import io
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from helpers.checkpoint_states import ORBAX_LEAVES_ERRORS
from helpers.commands import SETTINGS, options, read
from helpers.faulty_disk import ERRORS, FaultyDisk
from helpers.faulty_server import KEY, completion, worked
from helpers.loopback_server import Answer, LoopbackServer

from cotgrpo.cli import main
from cotgrpo.disk_errors import REASONS
from cotgrpo.logs.metrics_log import read_metrics
from cotgrpo.teachers.procedural import ProceduralTeacher, write_triples
from cotgrpo.training.loop import TIME_KEYS

pytestmark = [pytest.mark.slow, ORBAX_LEAVES_ERRORS]

TIMES = re.compile(r"(tfevents|orbax-checkpoint-tmp)[^/]*")
CHECKPOINTED = ("checkpoints/4", "checkpoints/6")
"""Of the files of a checkpoint, all are alike: those of step 2 are enough."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Rows, a config, and a run of `sft` and `eval`."""
    folder = tmp_path_factory.mktemp("disks")
    write_triples(folder / "rows.jsonl", ProceduralTeacher(seed=1).draw(120))
    (folder / "c.yaml").write_text(f"run_dir: {folder / 'run'}\n{SETTINGS}", encoding="utf-8")
    assert main(["sft", *options(folder)]) == 0
    assert main(["eval", "--run_dir", str(folder / "run")]) == 0
    questions = [{"question": f"What is {n} + 1?", "gold": str(n + 1)} for n in range(5)]
    (folder / "q.jsonl").write_text("".join(json.dumps(row) + "\n" for row in questions), encoding="utf-8")
    return folder


def copy_of_sft(folder: Path, root: Path) -> None:
    shutil.copytree(folder / "run", root)
    (root / "sft" / "eval.json").unlink()


COMMANDS: dict[str, Callable[[Path, Path, str], list[str]]] = {
    "sft": lambda folder, root, url: ["sft", *options(folder, "--run_dir", str(root))],
    "grpo": lambda folder, root, url: ["grpo", *options(folder, "--run_dir", str(root))],
    "eval": lambda folder, root, url: ["eval", "--run_dir", str(root), "--eval.rows", "4"],
    "export": lambda folder, root, url: ["export", "--run_dir", str(folder / "run"), "--out", str(root / "student")],
    "gold": lambda folder, root, url: [
        *("gold", "--student", str(folder / "run" / "sft" / "eval.json")),
        *("--ghosts", str(folder / "rows.jsonl"), "--out", str(root / "edit.jsonl")),
    ],
    "generate": lambda folder, root, url: [
        *("generate", "--questions", str(folder / "q.jsonl"), "--out", str(root), "--teacher.base_url", url),
        *("--teacher.model", "m", "--prompt.question", "{question}"),
    ],
}


def place(root: Path, what: str, path: Path) -> str:
    """An operation and its file, without the times in its name."""
    name = TIMES.sub(r"\1", str(path.relative_to(root)))
    return f"{what} {name}"


def run(command: list[str], disk: FaultyDisk) -> tuple[int, list[str]]:
    """The exit code, and the lines of the command on stderr."""
    errors = io.StringIO()
    with contextlib.redirect_stderr(errors), disk:
        code = main(command)
    return code, [line for line in errors.getvalue().splitlines() if line.startswith("cotgrpo: ")]


def results(root: Path) -> list[Any]:
    """What is left, without times."""
    found: list[Any] = []
    for stage in ("sft", "grpo"):
        found += [{k: v for k, v in row.items() if k not in TIME_KEYS} for row in read_metrics(root / stage)]
        if (root / stage / "report.json").exists():
            report = read(root / stage / "report.json")
            found.append([report[name] for name in ("accuracy", "held_out_loss", "samples", "data")])
    return found


@pytest.mark.parametrize("name", COMMANDS)
def test_a_command_on_a_disk_that_fails(
    folder: Path, tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first operation on each file fails in turn; the next call meets the next file, and the last one none."""
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    roots = [tmp_path / "whole", tmp_path / "failing"]
    for root in roots:
        copy_of_sft(folder, root) if name in ("grpo", "eval") else root.mkdir()
    with LoopbackServer(lambda asked: Answer(completion(worked(asked.json()["messages"][-1]["content"])))) as server:
        whole = FaultyDisk(roots[0])
        assert run(COMMANDS[name](folder, roots[0], server.url), whole)[0] == 0
        root, command = roots[1], COMMANDS[name](folder, roots[1], server.url)
        places = dict.fromkeys(place(roots[0], what, path) for what, path in whole.seen)
        firsts = {each.partition(" ")[2]: each for each in reversed(places) if not any(c in each for c in CHECKPOINTED)}
        failures = 0
        for number, target in zip(ERRORS * len(firsts), reversed(firsts.values()), strict=False):
            disk = FaultyDisk(root, lambda i, what, path, target=target: place(root, what, path) == target, number)
            code, said = run(command, disk)
            failures += bool(disk.failed)
            assert code == (2 if disk.failed else 0), (target, said)
            assert len(said) == bool(disk.failed), (target, said)
            assert all(REASONS[number][0] in line or "cannot be" in line for line in said), (target, said)
            assert all(str(root) in line for line in said), (target, said)
        assert failures >= min(len(firsts), 3)
        if not (root / "student").exists() and not (root / "edit.jsonl").exists():  # those are never overwritten
            assert run(command, FaultyDisk(root))[0] == 0
    assert results(roots[0]) == results(root)
    for path in root.rglob("*.json"):
        read(path)


def test_a_limit_on_the_size_of_files(folder: Path, tmp_path: Path) -> None:
    """A real error (EFBIG), in the libraries that write tokenizers, checkpoints and safetensors too."""

    def limited(blocks: int | str, *command: str) -> subprocess.CompletedProcess[str]:
        program = [sys.executable, "-m", "cotgrpo.cli", *command]
        return subprocess.run(
            ["bash", "-c", f'ulimit -f {blocks}; exec "$@"', "limited", *program], capture_output=True, text=True
        )

    sft = ["sft", *options(folder, "--run_dir", str(tmp_path / "run"))]
    export = ["export", "--run_dir", str(folder / "run"), "--out", str(tmp_path / "student")]
    for blocks, command in ((4, sft), (40, sft), (24, export)):
        failed = limited(blocks, *command)
        last = failed.stderr.strip().splitlines()[-1]
        assert failed.returncode == 2, failed.stderr
        assert last.startswith("cotgrpo: A file would pass the limit on its size (ulimit -f): "), failed.stderr
        assert str(tmp_path) in last and "Traceback" not in failed.stderr
    assert not (tmp_path / "student").exists() and not (tmp_path / "student.partial").exists()
    for command in (sft, export):
        done = limited("unlimited", *command)
        assert done.returncode == 0, done.stderr
