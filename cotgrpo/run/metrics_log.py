"""`metrics.jsonl` and TensorBoard events of a run, which go on after a crash as if there had been none."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

from cotgrpo.run.checkpoint import explaining_disk_errors


class MetricsLog:
    """Appends rows of numbers, `{"step": 10, "train/loss": ...}`, each on disk before the call returns.

    Opening it at step k removes rows of later steps, and a last line that a crash cut off: the run will write them again.

    Args:
        folder: the run folder.
        step: the step that the run resumes after; 0 for a new run.
    """

    def __init__(self, folder: Path, step: int = 0) -> None:
        from tensorboardX import SummaryWriter

        self.path = folder / "metrics.jsonl"
        with explaining_disk_errors(self.path):
            self.truncate(step)
            self.file = open(self.path, "a", encoding="utf-8")  # noqa: SIM115  closed by close()
            # TensorBoard drops what an earlier, killed process wrote for these steps and later ones.
            self.events = SummaryWriter(str(folder / "tensorboard"), purge_step=step + 1 if step else None)

    def truncate(self, step: int) -> None:
        if not self.path.is_file():
            return
        kept = [line for line in self.path.read_text(encoding="utf-8").splitlines() if step_of(line) <= step]
        replacement = self.path.with_suffix(".tmp")
        replacement.write_text("".join(line + "\n" for line in kept), encoding="utf-8")
        os.replace(replacement, self.path)

    def write(self, step: int, values: dict[str, Any]) -> None:
        """One row. Numbers that are not finite are written as null, which JSON has."""
        row = {"step": step} | {
            k: v if not isinstance(v, float) or math.isfinite(v) else None for k, v in values.items()
        }
        with explaining_disk_errors(self.path):
            self.file.write(json.dumps(row) + "\n")
            self.file.flush()
            os.fsync(self.file.fileno())
            for name, value in row.items():
                if isinstance(value, int | float) and name != "step":
                    self.events.add_scalar(name, value, step)

    def close(self) -> None:
        self.events.close()
        self.file.close()


def step_of(line: str) -> float:
    """The step of a row; infinite for a line that is no whole row."""
    try:
        return int(json.loads(line)["step"])
    except (json.JSONDecodeError, KeyError, TypeError):
        return math.inf


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """All whole rows of a run folder's `metrics.jsonl`, in order; empty if there is none."""
    path = folder / "metrics.jsonl"
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    return [json.loads(line) for line in lines if step_of(line) < math.inf]
