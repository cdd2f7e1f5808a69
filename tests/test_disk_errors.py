"""An error of the disk is one line that names the file and what to do; any other error stays as it is."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path, PurePosixPath

import pytest
from helpers.faulty_disk import ERRORS, FaultyDisk

from cotgrpo.atomic_files import read_json, whole_folder, write_json, write_text
from cotgrpo.config import ConfigError
from cotgrpo.disk_errors import REASONS, CheckpointError, explain_disk_errors
from cotgrpo.logs.metrics_log import MetricsLog
from cotgrpo.teachers.completions import TeacherReply
from cotgrpo.teachers.journal import Journal, Record


@pytest.mark.parametrize("number", REASONS)
def test_every_error_says_what_to_do(tmp_path: Path, number: int) -> None:
    path = tmp_path / "metrics.jsonl"
    with pytest.raises(CheckpointError) as caught, explain_disk_errors(path):
        raise OSError(number, os.strerror(number), str(path))
    reason, fix = REASONS[number]
    assert str(caught.value).startswith(f"{reason}: {path} could not be written")
    assert str(caught.value).endswith(f"Earlier files are intact: {fix} and run the same command again.")
    with pytest.raises(CheckpointError, match=f"{path.name} could not be read or written"), explain_disk_errors():
        raise OSError(number, os.strerror(number), str(path))


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO])
def test_libraries_keep_only_the_text(tmp_path: Path, number: int) -> None:
    """Orbax and tokenizers raise errors of their own, with the system's words in them."""
    with pytest.raises(CheckpointError, match=REASONS[number][0][:12]), explain_disk_errors(tmp_path / "state"):
        raise ValueError(f"UNKNOWN: error writing: [OS error {number}: {os.strerror(number)}]")


@pytest.mark.parametrize("error", [ValueError("sft.steps"), ConnectionResetError(104, "reset"), KeyError("a")])
def test_other_errors_pass(tmp_path: Path, error: Exception) -> None:
    with pytest.raises(type(error)) as caught, explain_disk_errors(tmp_path):
        raise error
    assert caught.value is error


def test_errors_that_explain_themselves_pass(tmp_path: Path) -> None:
    def read() -> None:
        try:
            raise OSError(errno.EACCES, "Permission denied", "rows.jsonl")
        except OSError as error:
            raise ConfigError("rows.jsonl cannot be read.") from error

    with pytest.raises(ConfigError, match=r"rows\.jsonl cannot"), explain_disk_errors(tmp_path / "run"):
        read()
    with pytest.raises(OSError, match="No space"), explain_disk_errors(PurePosixPath("gs://bucket/run")):
        raise OSError(errno.ENOSPC, "No space left on device")


def append_row(folder: Path) -> None:
    log = MetricsLog(folder)
    try:
        log.write(1, {"train/loss": 1.0})
    finally:
        log.close()


def append_record(folder: Path) -> None:
    with Journal(folder / "replies.jsonl") as journal:
        journal.append(Record(f"{len(journal.records)}", 0, "q", "1 + 1?", TeacherReply("2"), True, "correct"))


def write_folder(folder: Path) -> None:
    if not (folder / "out").exists():
        with whole_folder(folder / "out") as partial:
            (partial / "a.txt").write_text("a")


WRITERS: dict[str, Callable[[Path], None]] = {
    "json": lambda folder: write_json(folder / "a.json", {"b": 1}),
    "text": lambda folder: write_text(folder / "a.txt", "b"),
    "folder": write_folder,
    "log": append_row,
    "journal": append_record,
}


@pytest.mark.parametrize("name", WRITERS)
def test_each_operation_may_fail(tmp_path: Path, name: str) -> None:
    """At every operation in turn, with every error: one explained error, the old file, and the next call works."""
    write_json(tmp_path / "a.json", {"old": 1})
    with FaultyDisk(tmp_path) as disk:
        WRITERS[name](tmp_path)
    assert disk.seen
    for failing in range(len(disk.seen)):
        for number in ERRORS:
            if (tmp_path / "out").exists():
                (tmp_path / "out" / "a.txt").unlink()
                (tmp_path / "out").rmdir()
            write_json(tmp_path / "a.json", {"old": 1})
            said = ""
            with FaultyDisk(tmp_path, lambda i, what, path, failing=failing: i == failing, number) as disk:
                try:
                    WRITERS[name](tmp_path)
                except CheckpointError as error:
                    said = str(error)
            assert len(disk.failed) == bool(said), (disk.failed, said)
            assert said.startswith(REASONS[number][0] if disk.failed else "")
            assert read_json(tmp_path / "a.json") in ({"old": 1}, {"b": 1})
            assert not [path for path in tmp_path.iterdir() if path.name.endswith((".tmp", ".partial"))]
            WRITERS[name](tmp_path)


@pytest.mark.parametrize("name", ["a.json", "a.json.tmp"])
def test_a_folder_in_the_way(tmp_path: Path, name: str) -> None:
    (tmp_path / name / "inside").mkdir(parents=True)
    with pytest.raises(CheckpointError, match=rf"A folder is in the place of a file: .*{name} could not be written"):
        write_json(tmp_path / "a.json", {})
    assert (tmp_path / name / "inside").is_dir()
