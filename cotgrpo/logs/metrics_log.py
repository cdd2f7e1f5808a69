"""`metrics.jsonl` and TensorBoard events of a run. After a crash both continue without a gap or a repetition."""

from __future__ import annotations

import contextlib
import io
import json
import math
import os
import socket
import struct
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cotgrpo.atomic_files import whole_file
from cotgrpo.disk_errors import explain_disk_errors


class MetricsLog:
    """Appends rows of numbers, `{"step": 10, "train/loss": ...}`, each on disk before the call returns.

    Opening it at step k removes the rows of later steps, which the run will write again. It also removes lines that are
    no rows, such as a last one that a crash cut off.

    Args:
        folder: the run folder.
        step: the step that the run resumes after; 0 for a new run.

    Raises:
        CheckpointError: the disk is full, here or in `write`.
    """

    def __init__(self, folder: Path, step: int = 0) -> None:
        self.path = folder / "metrics.jsonl"
        with explain_disk_errors(self.path), contextlib.ExitStack() as stack:
            folder.mkdir(parents=True, exist_ok=True)
            keep_rows(self.path, step)
            self.file = stack.enter_context(open_to_append(self.path))
            self.events = EventFile(folder / "tensorboard", step + 1)
            stack.pop_all()

    def write(self, step: int, values: Mapping[str, float | int | None]) -> None:
        """Write one row. Numbers that are not finite become null, since JSON has no NaN."""
        row = {k: v if not isinstance(v, float) or math.isfinite(v) else None for k, v in values.items()}
        with explain_disk_errors(self.path):
            append(self.file, (json.dumps({"step": step} | row) + "\n").encode())
        with explain_disk_errors(self.events.folder):
            self.events.write(step, {k: v for k, v in row.items() if isinstance(v, int | float)})

    def close(self) -> None:
        """Close both files."""
        self.file.close()
        self.events.file.close()


class EventFile:
    """A TensorBoard event file, written immediately and in this thread.

    tensorboardX's `SummaryWriter` writes in a thread of its own. If that thread dies because the disk is full, no error
    is raised, and `add_scalar` blocks forever.

    Args:
        folder: of the event files of this and earlier processes. It is created if needed.
        first_step: TensorBoard drops the values of this and later steps in earlier files.
    """

    def __init__(self, folder: Path, first_step: int) -> None:
        from tensorboardX.proto import event_pb2, summary_pb2
        from tensorboardX.record_writer import masked_crc32c

        self.folder, self.events, self.summaries, self.checksum = folder, event_pb2, summary_pb2, masked_crc32c
        folder.mkdir(parents=True, exist_ok=True)
        # TensorBoard reads the files in the order of their names. The time in seconds comes first. The nanoseconds at
        # the end tell two files of one second apart.
        now = time.time_ns()
        with contextlib.ExitStack() as stack:
            path = folder / f"events.out.tfevents.{now // 10**9}.{socket.gethostname()}.{now}"
            self.file = stack.enter_context(open_to_append(path))
            self.append(file_version="brain.Event:2")
            self.append(step=first_step, session_log=event_pb2.SessionLog(status=event_pb2.SessionLog.START))
            stack.pop_all()

    def write(self, step: int, values: dict[str, float]) -> None:
        """Write one value for each tag."""
        scalars = [self.summaries.Summary.Value(tag=tag, simple_value=value) for tag, value in values.items()]
        self.append(step=step, summary=self.summaries.Summary(value=scalars))

    def append(self, **fields: Any) -> None:
        """Write a record: length, its checksum, the event, its checksum."""
        event = self.events.Event(wall_time=time.time(), **fields).SerializeToString()
        length = struct.pack("<Q", len(event))
        checksums = [struct.pack("<I", self.checksum(part)) for part in (length, event)]
        append(self.file, length + checksums[0] + event + checksums[1])


def open_to_append(path: Path) -> io.FileIO:
    """Open a file without a buffer, so that nothing is left for `close` to write after a failed write."""
    return open(path, "ab", buffering=0)


def append(file: io.FileIO, data: bytes) -> None:
    """Write all of `data`. It is on disk when this returns."""
    while data:
        data = data[file.write(data) :]
    os.fsync(file.fileno())


def keep_rows(path: Path, step: int) -> None:
    """Leave only the whole rows of a log that are not later than `step`. A bad row does not take others with it."""
    lines = path.read_bytes().splitlines(keepends=True) if path.is_file() else []
    kept = [line for line in lines if line.endswith(b"\n") and step_of(line) <= step]
    if kept != lines:
        with whole_file(path) as temporary:
            temporary.write_bytes(b"".join(kept))


def step_of(line: str | bytes) -> int | float:
    """Return the step of a row; infinity for a line that is not a whole row."""
    try:
        return int(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError, OverflowError, RecursionError):
        return math.inf


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """Return all whole rows of a run folder's `metrics.jsonl`, in order; empty without a file."""
    path = folder / "metrics.jsonl"
    lines = path.read_bytes().splitlines() if path.is_file() else []
    return [json.loads(line) for line in lines if step_of(line) < math.inf]
