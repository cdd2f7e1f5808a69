"""`metrics.jsonl` and TensorBoard events of a run, which go on after a crash as if there had been none."""

from __future__ import annotations

import json
import math
import os
import time
from pathlib import Path
from typing import Any

from cotgrpo.run.checkpoint import explaining_disk_errors


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
            # Unbuffered: after a failed write nothing is left to be written by a later close.
            self.file = open(self.path, "ab", buffering=0)  # noqa: SIM115  closed by close()
            self.file.truncate(length_up_to(self.path, step))
            self.events = EventFile(folder / "tensorboard", step + 1)

    def write(self, step: int, values: dict[str, Any]) -> None:
        """One row. Numbers that are not finite are written as null, which JSON has."""
        row = {k: v if not isinstance(v, float) or math.isfinite(v) else None for k, v in values.items()}
        rest = memoryview((json.dumps({"step": step} | row) + "\n").encode())
        with explaining_disk_errors(self.path):
            while rest:
                rest = rest[self.file.write(rest) :]
            os.fsync(self.file.fileno())
        with explaining_disk_errors(self.events.folder):
            self.events.write(step, {k: v for k, v in row.items() if isinstance(v, int | float)})

    def close(self) -> None:
        self.file.close()
        with explaining_disk_errors(self.events.folder):
            self.events.close()


class EventFile:
    """A TensorBoard event file, written at once and in this thread.

    tensorboardX's `SummaryWriter` writes in a thread of its own: when that one dies (the disk is full), it says nothing, and `add_scalar` blocks for ever.

    Args:
        folder: of this and earlier processes' files; made if need be.
        first_step: TensorBoard drops what earlier files hold for this step and later ones.
    """

    def __init__(self, folder: Path, first_step: int) -> None:
        from tensorboardX.event_file_writer import EventsWriter
        from tensorboardX.proto import event_pb2, summary_pb2

        self.folder, self.protos = folder, (event_pb2, summary_pb2)
        folder.mkdir(parents=True, exist_ok=True)
        # TensorBoard reads the files in the order of their names, which begin with the second; the rest keeps two in one second apart.
        self.writer = EventsWriter(str(folder / "events"), f".{time.time_ns()}")
        start = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
        self.writer.write_event(event_pb2.Event(step=first_step, session_log=start, wall_time=time.time()))
        self.writer.flush()

    def write(self, step: int, values: dict[str, float]) -> None:
        event_pb2, summary_pb2 = self.protos
        scalars = [summary_pb2.Summary.Value(tag=tag, simple_value=value) for tag, value in values.items()]
        summary = summary_pb2.Summary(value=scalars)
        self.writer.write_event(event_pb2.Event(step=step, summary=summary, wall_time=time.time()))
        self.writer.flush()

    def close(self) -> None:
        self.writer.close()


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
