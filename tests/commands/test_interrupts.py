"""Signals and standard streams of a command: one line and an exit code, and a run that goes on without its output."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from helpers.commands import SETTINGS, options, read

from cotgrpo.cli import main
from cotgrpo.teachers.procedural import ProceduralTeacher, write_triples

COMMAND = (sys.executable, "-m", "cotgrpo.cli")
STOPPED = """
import os, sys, time
module, signals = os.environ["PHASE"], [int(n) for n in os.environ["SIGNALS"].split()]

def tell(frame, event, argument):
    if event == "call" and frame.f_globals.get("__name__") == module:
        sys.setprofile(None)
        for number in signals:
            os.kill(os.getpid(), number)
        time.sleep(60)  # a long computation

sys.setprofile(tell)
from cotgrpo.cli import main
sys.exit(main())
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("stopped")
    write_triples(folder / "rows.jsonl", ProceduralTeacher(seed=1).draw(60))
    (folder / "c.yaml").write_text(SETTINGS, encoding="utf-8")
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("numbers", [(signal.SIGINT,), (signal.SIGTERM,), (signal.SIGINT, signal.SIGINT)], ids=str)
@pytest.mark.parametrize(
    "module",
    [
        "jax._src.config",
        "cotgrpo.config.settings",
        "cotgrpo.data.sources",
        "cotgrpo.data.tokenizer",
        "cotgrpo.data.batches",
        "cotgrpo.training.batch_sources",
        "cotgrpo.evaluation.accuracy",
    ],
)
def test_a_signal_in_any_phase(module: str, numbers: tuple[signal.Signals, ...], folder: Path, tmp_path: Path) -> None:
    """The first function of a module that is called gets the signal, and would compute for a minute."""
    environment = {**os.environ, "PHASE": module, "SIGNALS": " ".join(str(int(n)) for n in numbers)}
    environment["GLIBC_TUNABLES"] = ""  # else the process starts itself again
    started = [sys.executable, "-c", STOPPED, "sft", *options(folder, "--run_dir", str(tmp_path / "run"))]
    done = subprocess.run(started, env=environment, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 128 + numbers[0], done.stderr
    assert done.stderr.count("\n") == 1 and f"stopped by {numbers[0].name}" in done.stderr


def test_ctrl_c_inside_another_program(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """There the handlers are the program's own, and KeyboardInterrupt is one line too."""

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("cotgrpo.cli.run", stop)
    assert main(["sft"]) == 130
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "stopped by SIGINT" in error


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["a reader that ends", "no stdout", "no stderr", "neither", "a full disk"])
def test_training_goes_on_without_its_output(kind: str, folder: Path, tmp_path: Path) -> None:
    arguments = [*COMMAND, "sft", *options(folder, "--run_dir", str(tmp_path / "run"))]
    closed = {"no stdout": ">&-", "no stderr": "2>&-", "neither": ">&- 2>&-", "a full disk": ">/dev/full"}
    shell = f'"$@" {closed.get(kind, "| head -1")}; exit ${{PIPESTATUS[0]}}'
    done = subprocess.run(["bash", "-c", shell, "-", *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0 and "Traceback" not in done.stderr and "Exception" not in done.stderr, done.stderr
    assert (tmp_path / "run" / "sft" / "checkpoints" / "6").is_dir()
    assert read(tmp_path / "run" / "sft" / "report.json")["accuracy"]
    assert ("standard output could not be written" in done.stderr) == (kind in ("a reader that ends", "a full disk"))
