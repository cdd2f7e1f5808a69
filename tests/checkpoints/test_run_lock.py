"""The lock of a run's folder: one holder, which is named, and none after a kill."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from cotgrpo.checkpoints import run_lock
from cotgrpo.checkpoints.run_lock import locked
from cotgrpo.disk_errors import CheckpointError

HOLD = """
import sys, time
from pathlib import Path
from cotgrpo.checkpoints.run_lock import locked
with locked(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(600)
"""


def hold(folder: Path) -> subprocess.Popen[str]:
    """Start a process that holds the lock."""
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(folder)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline() == "held\n"
    return process


def test_a_second_process_is_told_who_holds_it(tmp_path: Path) -> None:
    folder = tmp_path / "runs" / "a[1]"
    holder = hold(folder)
    try:
        with pytest.raises(CheckpointError, match=rf"is in use by process {holder.pid} on .*since 20"), locked(folder):
            pass
    finally:
        holder.send_signal(signal.SIGKILL)
        holder.communicate()
    with locked(folder):
        pass


def test_it_is_given_back(tmp_path: Path) -> None:
    for _ in range(2):
        with locked(tmp_path), pytest.raises(CheckpointError, match="is in use"), locked(tmp_path):
            pass
    with pytest.raises(ZeroDivisionError), locked(tmp_path):
        raise ZeroDivisionError
    with locked(tmp_path):
        assert json.loads((tmp_path / ".lock").read_text())["pid"] == os.getpid()
    assert (tmp_path / ".lock").read_text() == ""


def test_a_run_that_writes_nothing_leaves_no_folder(tmp_path: Path) -> None:
    with locked(tmp_path / "run"):
        pass
    assert not (tmp_path / "run").exists()
    with locked(tmp_path / "run"):
        (tmp_path / "run" / "config.yaml").write_text("")
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == [".lock", "config.yaml"]


def test_a_record_of_another_host_counts_while_it_is_renewed(tmp_path: Path) -> None:
    """Where locks do not reach the other host."""
    record = tmp_path / ".lock"
    record.write_text(json.dumps({"host": "elsewhere", "pid": 1, "command": "cotgrpo sft", "since": "today"}))
    with pytest.raises(CheckpointError, match=r"process 1 on elsewhere"), locked(tmp_path):
        pass
    long_ago = time.time() - 2 * run_lock.STALE_SECONDS
    os.utime(record, (long_ago, long_ago))
    with locked(tmp_path):
        pass


@pytest.mark.parametrize("broken", ["", "{", "[1]", "null", "\0" * 100])
def test_a_broken_record_does_not_matter(tmp_path: Path, broken: str) -> None:
    (tmp_path / ".lock").write_text(broken)
    with locked(tmp_path):
        pass


def test_folders_that_cannot_be(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for folder in (tmp_path / "file", tmp_path / "file" / "run"):
        with pytest.raises(CheckpointError, match=r"is a file|cannot be written"), locked(folder):
            pass


def test_the_record_is_renewed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_lock, "HEARTBEAT_SECONDS", 0.01)
    with locked(tmp_path):
        os.utime(tmp_path / ".lock", (1.0, 1.0))
        deadline = time.monotonic() + 60
        while (tmp_path / ".lock").stat().st_mtime < 2:
            assert time.monotonic() < deadline
            time.sleep(0.01)
