"""`metrics.jsonl` and TensorBoard events of a run, which go on after a crash as if there had been none."""

from __future__ import annotations

import io
import json
import math
import os
import socket
import struct
import time
from pathlib import Path
from typing import Any

from cotgrpo.storage import explaining_disk_errors


class MetricsLog:
    """Appends rows of numbers, `{"step": 10, "train/loss": ...}`, each on disk before the call returns.

    Opening it at step k removes rows of later steps, and a last line that a crash cut off: the run will write them again.

    Args:
        folder: the run folder.
        step: the step that the run resumes after; 0 for a new run.

    Raises:
        CheckpointError: from here and from `write`, when the disk is full.
    """

    def __init__(self, folder: Path, step: int = 0) -> None:
        self.path = folder / "metrics.jsonl"
        with explaining_disk_errors(self.path):
            folder.mkdir(parents=True, exist_ok=True)
            self.file = open_to_append(self.path)
            self.file.truncate(length_up_to(self.path, step))
            self.events = EventFile(folder / "tensorboard", step + 1)

    def write(self, step: int, values: dict[str, Any]) -> None:
        """One row. Numbers that are not finite are written as null, which JSON has."""
        row = {k: v if not isinstance(v, float) or math.isfinite(v) else None for k, v in values.items()}
        with explaining_disk_errors(self.path):
            append(self.file, (json.dumps({"step": step} | row) + "\n").encode())
        with explaining_disk_errors(self.events.folder):
            self.events.write(step, {k: v for k, v in row.items() if isinstance(v, int | float)})

    def close(self) -> None:
        self.file.close()
        self.events.file.close()


class EventFile:
    """A TensorBoard event file, written at once and in this thread.

    tensorboardX's `SummaryWriter` writes in a thread of its own: when that one dies (the disk is full), it says nothing, and `add_scalar` blocks for ever.

    Args:
        folder: of this and earlier processes' files; made if need be.
        first_step: TensorBoard drops what earlier files hold for this step and later ones.
    """

    def __init__(self, folder: Path, first_step: int) -> None:
        from tensorboardX.proto import event_pb2, summary_pb2
        from tensorboardX.record_writer import masked_crc32c

        self.folder, self.events, self.summaries, self.checksum = folder, event_pb2, summary_pb2, masked_crc32c
        folder.mkdir(parents=True, exist_ok=True)
        # TensorBoard reads the files in the order of their names: first the second, of ten digits; then what keeps two in one second apart.
        now = time.time_ns()
        self.file = open_to_append(folder / f"events.out.tfevents.{now // 10**9}.{socket.gethostname()}.{now}")
        self.append(file_version="brain.Event:2")
        self.append(step=first_step, session_log=event_pb2.SessionLog(status=event_pb2.SessionLog.START))

    def write(self, step: int, values: dict[str, float]) -> None:
        """One value for each tag."""
        scalars = [self.summaries.Summary.Value(tag=tag, simple_value=value) for tag, value in values.items()]
        self.append(step=step, summary=self.summaries.Summary(value=scalars))

    def append(self, **fields: Any) -> None:
        """A record: length, its checksum, the event, its checksum."""
        event = self.events.Event(wall_time=time.time(), **fields).SerializeToString()
        length = struct.pack("<Q", len(event))
        checksums = [struct.pack("<I", self.checksum(part)) for part in (length, event)]
        append(self.file, length + checksums[0] + event + checksums[1])


def open_to_append(path: Path) -> io.FileIO:
    """Without a buffer: after a failed write nothing is left for a later close to write."""
    return open(path, "ab", buffering=0)


def append(file: io.FileIO, data: bytes) -> None:
    """Writes all of `data`; it is on disk when this returns."""
    while data:
        data = data[file.write(data) :]
    os.fsync(file.fileno())


def length_up_to(path: Path, step: int) -> int:
    """The bytes of the whole rows at the start of `path` that are not later than `step`."""
    length = 0
    with open(path, "rb") as file:
        for line in file:
            if not line.endswith(b"\n") or step_of(line) > step:
                break
            length += len(line)
    return length


def step_of(line: str | bytes) -> int | float:
    """The step of a row; infinite for a line that is no whole row."""
    try:
        return int(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return math.inf


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """All whole rows of a run folder's `metrics.jsonl`, in order; empty if there is none."""
    path = folder / "metrics.jsonl"
    lines = path.read_bytes().splitlines() if path.is_file() else []
    return [json.loads(line) for line in lines if step_of(line) < math.inf]
