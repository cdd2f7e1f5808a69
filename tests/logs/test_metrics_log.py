"""The log of a run: whole rows only, on disk at once, none twice; the same numbers in TensorBoard's files."""

from __future__ import annotations

import json
import math
import struct
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from helpers.checkpoint_states import small_file_system

from cotgrpo.checkpoints.manager import CheckpointError
from cotgrpo.logs.metrics_log import MetricsLog, read_metrics


def write_rows(folder: Path, steps: range, resume_after: int = 0) -> None:
    log = MetricsLog(folder, resume_after)
    for step in steps:
        log.write(step, {"train/loss": step / 2, "train/skipped": 0})
    log.close()


def test_reopening_drops_later_rows(tmp_path: Path) -> None:
    write_rows(tmp_path, range(1, 9))
    write_rows(tmp_path, range(6, 8), resume_after=5)
    assert [row["step"] for row in read_metrics(tmp_path)] == [1, 2, 3, 4, 5, 6, 7]
    write_rows(tmp_path, range(1, 3))  # killed before its first checkpoint, a run starts again
    assert read_metrics(tmp_path) == [{"step": s, "train/loss": s / 2, "train/skipped": 0} for s in (1, 2)]


@pytest.mark.parametrize("tail", [b'{"step": 4, "train/lo', b'{"step": 4}', b"\x00\x00\x00\xff\n", b"[4]\n", b"\n"])
def test_a_cut_off_last_line_is_dropped(tmp_path: Path, tail: bytes) -> None:
    write_rows(tmp_path, range(1, 4))
    path = tmp_path / "metrics.jsonl"
    whole = path.read_bytes()
    path.write_bytes(whole + tail)
    assert [row["step"] for row in read_metrics(tmp_path)][:3] == [1, 2, 3]
    log = MetricsLog(tmp_path, 9)
    assert path.read_bytes() == whole
    log.write(10, {"train/loss": 1.5})
    log.close()
    assert path.read_bytes() == whole + b'{"step": 10, "train/loss": 1.5}\n'


def test_numbers_that_are_not_finite_are_null(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path)
    log.write(1, {"a": math.nan, "b": math.inf, "c": -math.inf, "d": None, "e": 0.1, "f": 3})
    log.close()

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    (line,) = (tmp_path / "metrics.jsonl").read_text().splitlines()
    row = json.loads(line, parse_constant=refuse)
    assert row == {"step": 1, "a": None, "b": None, "c": None, "d": None, "e": 0.1, "f": 3}
    assert scalars(tmp_path) == [(1, "e", pytest.approx(0.1)), (1, "f", 3.0)]


def test_a_row_is_on_disk_when_write_returns(tmp_path: Path) -> None:
    """A process that dies the next moment, with no chance to flush, has left the row in both files."""
    program = """
import os, pathlib, sys
from cotgrpo.logs.metrics_log import MetricsLog
log = MetricsLog(pathlib.Path(sys.argv[1]))
log.write(1, {"train/loss": 0.5})
os._exit(9)
"""
    done = subprocess.run([sys.executable, "-W", "error", "-c", program, str(tmp_path)], timeout=60)
    assert done.returncode == 9
    assert read_metrics(tmp_path) == [{"step": 1, "train/loss": 0.5}]
    assert scalars(tmp_path) == [(1, "train/loss", 0.5)]


def test_tensorboard_shows_each_step_once(tmp_path: Path) -> None:
    """Read as TensorBoard does: a start event at step k takes back what earlier files said of step k and later."""
    write_rows(tmp_path, range(1, 9))
    write_rows(tmp_path, range(6, 8), resume_after=5)
    assert len(list((tmp_path / "tensorboard").iterdir())) == 2  # also within one second
    shown = [(step, value) for step, tag, value in scalars(tmp_path) if tag == "train/loss"]
    assert shown == [(step, step / 2) for step in range(1, 8)]


def test_a_folder_without_a_log_has_no_rows(tmp_path: Path) -> None:
    assert read_metrics(tmp_path) == []


def test_a_full_disk_is_explained(small_disk: Callable[[str], Path]) -> None:
    """The row that does not fit raises; with room again, the log goes on after the last whole row."""
    folder = small_disk("64k") / "run"
    log = MetricsLog(folder)
    step = 0
    with pytest.raises(CheckpointError, match=r"The disk is full: .*run/(metrics.jsonl|tensorboard) could not be writ"):
        while step < 1000:
            step += 1
            log.write(step, {"train/loss": 0.5, "a long name" * 20: 1.0})
    with pytest.raises(CheckpointError, match="The disk is full"):
        while step < 2000:
            step += 1
            log.write(step, {"train/loss": 0.5})
    log.close()
    rows = read_metrics(folder)
    assert len(rows) > 10
    small_disk("1m")
    write_rows(folder, range(11, 13), resume_after=10)
    assert [row["step"] for row in read_metrics(folder)] == list(range(1, 13))
    assert len({step for step, *_ in scalars(folder)}) == 12


def scalars(folder: Path) -> list[tuple[int, str, float]]:
    """(step, tag, value) of a run's event files, by TensorBoard's rules, checksums checked."""
    from tensorboardX.proto import event_pb2

    shown: list[tuple[int, str, float]] = []
    for path in sorted((folder / "tensorboard").iterdir()):
        for number, record in enumerate(records(path.read_bytes())):
            event = event_pb2.Event.FromString(record)
            assert (event.file_version == "brain.Event:2") == (number == 0)
            if event.session_log.status == event_pb2.SessionLog.START:
                shown = [row for row in shown if row[0] < event.step]
            shown += [(event.step, value.tag, value.simple_value) for value in event.summary.value]
    return shown


def records(data: bytes) -> Iterator[bytes]:
    """TFRecord framing: length, its checksum, data, its checksum. A record that is cut off ends the file."""
    while data:
        if len(data) < 16 or len(data) < 16 + struct.unpack("<Q", data[:8])[0]:
            return
        length, check = struct.unpack("<QI", data[:12])
        assert check == masked_crc32c(data[:8])
        record = data[12 : 12 + length]
        assert struct.unpack("<I", data[12 + length : 16 + length])[0] == masked_crc32c(record)
        yield record
        data = data[16 + length :]


def masked_crc32c(data: bytes) -> int:
    """CRC-32C (Castagnoli) bit by bit, rotated and shifted as TensorFlow does."""
    crc = 0xFFFFFFFF
    for byte in data:
        crc ^= byte
        for _ in range(8):
            crc = crc >> 1 ^ (0x82F63B78 if crc & 1 else 0)
    crc ^= 0xFFFFFFFF
    return ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF


@pytest.fixture
def small_disk(tmp_path: Path) -> Any:
    yield from small_file_system(tmp_path / "disk")


@pytest.mark.parametrize(
    "bad", [b"", b"{", b"\0\0\0", b"[1]", b'{"step": "x"}', b'{"train/loss": 1}', b"\xff", b"null"]
)
def test_a_bad_row_takes_no_other_with_it(tmp_path: Path, bad: bytes) -> None:
    """A disk error in the middle of the file, say."""
    path = tmp_path / "metrics.jsonl"
    rows = [json.dumps({"step": step}).encode() for step in (1, 2, 3, 4)]
    path.write_bytes(b"\n".join([rows[0], bad, rows[1], rows[2], rows[3]]) + b"\n" + b'{"step": 2, "cut')
    log = MetricsLog(tmp_path, 3)
    log.write(4, {"train/loss": 0.5})
    log.close()
    assert [row["step"] for row in read_metrics(tmp_path)] == [1, 2, 3, 4]
    assert path.read_bytes().count(b"\n") == 4
