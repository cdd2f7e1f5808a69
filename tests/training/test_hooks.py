"""The schedule of a run, and the order in which hooks see it."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any, ClassVar

import jax
import pytest
from helpers.training_run import SETTINGS, run

from cotgrpo.config import CheckpointConfig
from cotgrpo.data.own.loading import OwnCodeError
from cotgrpo.logs.metrics_log import read_metrics
from cotgrpo.logs.trackers import TrackedRun, Tracker
from cotgrpo.training.hooks import (
    Callback,
    CallbackHook,
    Hook,
    Pause,
    ProfileHook,
    ReportHook,
    Row,
    Schedule,
    TrackerHook,
    TrainingStopped,
    send_missing_rows,
)
from cotgrpo.training.loop import TIME_KEYS, LoopSettings


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


class Seen(Callback):
    """Notes every call."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, int]] = []
        self.rows: list[Row] = []

    def on_start(self, folder: Path, step: int) -> None:
        self.calls.append(("start", step))

    def on_step(self, step: int) -> None:
        self.calls.append(("step", step))

    def on_row(self, step: int, row: Row) -> None:
        self.calls.append(("row", step))
        self.rows.append({"step": step} | row)
        row.clear()  # a copy

    def on_evaluation(self, step: int, metrics: Row) -> None:
        assert metrics.keys() == {"loss"}
        self.calls.append(("evaluation", step))

    def on_checkpoint(self, step: int, folder: Path) -> None:
        self.calls.append(("checkpoint", step))

    def on_end(self, step: int) -> None:
        self.calls.append(("end", step))


SHORT = dataclasses.replace(SETTINGS, total_steps=8, log_every=3, eval_every=4)
ALL_CALLS = [
    *(("start", 0), ("step", 1), ("step", 2), ("row", 3), ("step", 3)),
    *(("row", 4), ("evaluation", 4), ("checkpoint", 4), ("step", 4), ("step", 5)),
    *(("row", 6), ("step", 6), ("step", 7), ("row", 8), ("row", 8), ("evaluation", 8), ("checkpoint", 8)),
    *(("step", 8), ("end", 8)),
]


def in_time(calls: list[tuple[str, int]]) -> list[tuple[str, int]]:
    """Calls by step: a row of training is written while the next step runs."""
    order = ["start", "row", "evaluation", "checkpoint", "step", "end"]
    return sorted(calls, key=lambda call: (call[1], order.index(call[0])))


def test_a_callback_sees_everything_once(tmp_path: Path) -> None:
    seen = Seen()
    run(tmp_path, settings=SHORT, hooks=[CallbackHook(seen, tmp_path)])
    assert in_time(seen.calls) == in_time(ALL_CALLS)
    assert seen.calls[0] == ("start", 0) and seen.calls[-1] == ("end", 8)
    assert seen.rows == read_metrics(tmp_path)


@pytest.mark.parametrize("method", [name for name in vars(Seen) if name.startswith("on_")])
def test_an_error_in_a_callback_names_it_and_loses_nothing(tmp_path: Path, method: str) -> None:
    """The run goes on from its last checkpoint, and ends as one without the callback."""

    class Fails(Seen):
        pass

    def fail(self: Seen, step: int, *rest: Any) -> None:
        if method != "on_start" and step < 5:
            return
        raise ValueError("two\nlines")

    if method in ("on_start",):
        setattr(Fails, method, lambda self, folder, step: fail(self, step))
    elif method in ("on_row", "on_evaluation"):
        setattr(Fails, method, lambda self, step, row: fail(self, step))
    elif method == "on_checkpoint":
        setattr(Fails, method, lambda self, step, folder: fail(self, step))
    else:
        setattr(Fails, method, fail)
    message = (
        rf"^Step \d: callbacks \S+Fails.{method} failed \(ValueError: two lines\) at \S+test_hooks.py:\d+\. Fix it"
    )
    with pytest.raises(OwnCodeError, match=message):
        run(tmp_path / "run", settings=SHORT, hooks=[CallbackHook(Fails, tmp_path / "run")])
    run(tmp_path / "run", settings=SHORT)
    run(tmp_path / "whole", settings=SHORT)
    learned = lambda folder: [{k: v for k, v in r.items() if k not in TIME_KEYS} for r in read_metrics(folder)]
    assert learned(tmp_path / "run") == learned(tmp_path / "whole")


def test_a_callback_may_stop_the_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    class Stops(Seen):
        def on_evaluation(self, step: int, metrics: Row) -> None:
            raise TrainingStopped("Good enough.")

        def on_end(self, step: int) -> None:
            raise ValueError("late")

    with pytest.raises(TrainingStopped, match=r"^Good enough\."):
        run(tmp_path, settings=SHORT, hooks=[CallbackHook(Stops, tmp_path)])
    assert "Stops.on_end failed (ValueError: late)" in capsys.readouterr().err, "the first error counts"


def test_a_tracker_that_is_down_changes_no_row(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    class Down(Tracker):
        def start(self, run: TrackedRun) -> str:
            raise ConnectionError("refused")

    class Works(Tracker):
        rows: ClassVar[list[tuple[int, dict[str, float]]]] = []

        def log(self, step: int, row: dict[str, float]) -> None:
            self.rows.append((step, row))

    place = TrackedRun("p", "n", tmp_path)
    run(tmp_path, settings=SHORT, hooks=[TrackerHook([("down", Down()), ("works", Works())], place)])
    log = read_metrics(tmp_path)
    assert [(row["step"], {k: v for k, v in row.items() if k != "step"}) for row in log] == Works.rows
    error = capsys.readouterr().err
    assert "the tracker down failed (ConnectionError: refused)" in error and f"lacks {len(log)} rows" in error
    send_missing_rows([TrackerHook([("down", again := Works())], place)])
    assert len(again.rows) == 2 * len(log)


@pytest.mark.parametrize(("first", "last"), [(1, 1), (1, 8), (3, 5), (8, 8)])
def test_steps_are_profiled(tmp_path: Path, first: int, last: int, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Any] = []
    seen = Seen()

    def start(folder: Path, profiler_options: jax.profiler.ProfileOptions) -> None:
        assert profiler_options.python_tracer_level == 0, "it may hang a process with threads"
        calls.append(("start", len(steps())))

    monkeypatch.setattr(jax.profiler, "start_trace", start)
    monkeypatch.setattr(jax.profiler, "stop_trace", lambda: calls.append(("stop", len(steps()))))
    steps = lambda: [call for call in seen.calls if call[0] == "step"]
    run(tmp_path, settings=SHORT, hooks=[CallbackHook(seen, tmp_path), ProfileHook(first, last, tmp_path / "profile")])
    # A step is counted after the hooks of its pause.
    assert calls == [("start", max(first - 2, 0)), ("stop", last - 1)]


def test_the_report_is_written_at_every_evaluation(tmp_path: Path) -> None:
    written: list[tuple[int, int]] = []
    write = lambda step: written.append((step, len(read_metrics(tmp_path))))
    run(tmp_path, settings=SHORT, hooks=[ReportHook(write)])
    assert written == [(4, 2), (8, 5)], "after its row is in the log"
