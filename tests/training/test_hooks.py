"""The schedule of a run, and the order in which hooks see it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from helpers.training_run import run

from cotgrpo.config import CheckpointConfig
from cotgrpo.logs.metrics_log import read_metrics
from cotgrpo.training.hooks import Hook, Pause, Schedule, TrainingStopped
from cotgrpo.training.loop import LoopSettings


@pytest.mark.parametrize(
    ("schedule", "logs", "evaluates", "saves"),
    [
        (Schedule(7, 3, 0, 4), [3, 6, 7], [7], [4, 7]),
        (Schedule(7, 3, 2, 4), [3, 6, 7], [2, 4, 6, 7], [4, 7]),
        (Schedule(7, 1, 3, 5, save_evaluations=True), [1, 2, 3, 4, 5, 6, 7], [3, 6, 7], [3, 5, 6, 7]),
    ],
)
def test_a_schedule(schedule: Schedule, logs: list[int], evaluates: list[int], saves: list[int]) -> None:
    steps = range(1, 8)
    assert [step for step in steps if schedule.logs(step)] == logs
    assert [step for step in steps if schedule.evaluates(step)] == evaluates
    assert [step for step in steps if schedule.saves(step)] == saves


class Recorder(Hook):
    """Notes every call, waits for the device after step 5, and stops the run at a row of step 8."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.calls = folder, list[Any]()

    def is_due(self, step: int) -> bool:
        return step == 5

    def on_pause(self, pause: Pause) -> None:
        self.calls.append(("pause", pause.step, int(pause.state.step)))

    def on_row(self, step: int, row: dict[str, Any]) -> None:
        assert read_metrics(self.folder)[-1]["step"] == step  # the log has it already
        self.calls.append(("row", step, "eval" if "eval/loss" in row else "train"))
        if step == 8:
            raise TrainingStopped("at step 8")

    def on_step(self, step: int) -> None:
        self.calls.append(("step", step))


def test_hooks_of_a_user(tmp_path: Path) -> None:
    """Rows come one step after their window, unless a pause needs them; a hook may stop the run."""
    recorder = Recorder(tmp_path)
    checkpoint = CheckpointConfig(every=100)
    settings = LoopSettings("hooks", total_steps=12, log_every=4, eval_every=6, checkpoint=checkpoint)
    with pytest.raises(TrainingStopped, match="at step 8"):
        run(tmp_path, settings=settings, hooks=[recorder])
    first = [("step", n) for n in range(1, 5)]
    second = [("row", 4, "train"), ("pause", 5, 5), ("step", 5), ("row", 6, "eval"), ("step", 6), ("step", 7)]
    assert recorder.calls == [*first, *second, ("step", 8), ("row", 8, "train")]
