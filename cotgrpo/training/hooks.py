"""What happens between the steps of a run: the schedule, and the hooks that log, evaluate, save and show progress."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax

from cotgrpo.checkpoints.manager import Checkpoints
from cotgrpo.distributed.processes import Signals
from cotgrpo.logs.metrics_log import MetricsLog
from cotgrpo.logs.progress import ProgressLine
from cotgrpo.types import Params, TrainState

Row = dict[str, Any]
"""Numbers of one step in the log, such as `{"train/loss": 1.2}`."""


class TrainingStopped(RuntimeError):
    """Raised when training cannot usefully continue. The message names the reason and what to try."""


class Interrupted(RuntimeError):
    """Raised when a signal ended the run after it was saved. `signal_number` is SIGINT or SIGTERM."""

    def __init__(self, signal_number: int, message: str) -> None:
        super().__init__(message)
        self.signal_number = signal_number


@dataclasses.dataclass(frozen=True)
class Schedule:
    """Which steps write a row, evaluate and save. The last step does all three.

    Attributes:
        total_steps: the number of the last step.
        log_every: steps per row of training metrics.
        eval_every: steps between evaluations; 0: only after the last.
        save_every: steps between checkpoints.
        save_evaluations: save after every evaluation too.
    """

    total_steps: int
    log_every: int
    eval_every: int
    save_every: int
    save_evaluations: bool = False

    def is_last(self, step: int) -> bool:
        return step == self.total_steps

    def logs(self, step: int) -> bool:
        return self.is_last(step) or step % self.log_every == 0

    def evaluates(self, step: int) -> bool:
        return self.is_last(step) or (self.eval_every > 0 and step % self.eval_every == 0)

    def saves(self, step: int) -> bool:
        if self.is_last(step) or step % self.save_every == 0:
            return True
        return self.save_evaluations and self.evaluates(step)


@dataclasses.dataclass
class Pause:
    """A step after which the device has finished its work, as hooks see it.

    Attributes:
        step: its number.
        state: the train state after it.
        position: what a checkpoint stores besides the state.
        write_row: adds a row to the log.
        loss: the held-out loss, once the evaluation hook has measured it.
    """

    step: int
    state: TrainState
    position: dict[str, Any]
    write_row: Callable[[int, Row], None]
    loss: float | None = None


class Hook:
    """Something that a run does between its steps. `train` calls the methods of every hook in order.

    All methods do nothing by default. `on_row` is called on process 0 only, the others on every process.
    """

    def is_due(self, step: int) -> bool:
        """Return whether `on_pause` must run after this step. Called once per step; if true, the device waits."""
        return False

    def on_pause(self, pause: Pause) -> None:
        """Run while the device waits. Called only if `is_due`."""

    def on_row(self, step: int, row: Row) -> None:
        """Take a new row of the log. It may raise TrainingStopped."""

    def on_step(self, step: int) -> None:
        """Take note that the step was handed to the device."""


@dataclasses.dataclass
class LogHook(Hook):
    """Appends each row to `metrics.jsonl` and to TensorBoard's events."""

    log: MetricsLog

    def on_row(self, step: int, row: Row) -> None:
        self.log.write(step, row)


@dataclasses.dataclass
class ProgressHook(Hook):
    """Shows the step and the newest training metrics."""

    line: ProgressLine

    def on_row(self, step: int, row: Row) -> None:
        if "train/step_time" in row:
            self.line.show(step, row)

    def on_step(self, step: int) -> None:
        self.line.advance(step)


@dataclasses.dataclass
class EvaluationHook(Hook):
    """Measures the student on the schedule, and logs the numbers as `eval/...`."""

    evaluate: Callable[[Params], dict[str, float]]
    schedule: Schedule

    def is_due(self, step: int) -> bool:
        return self.schedule.evaluates(step)

    def on_pause(self, pause: Pause) -> None:
        found = self.evaluate(pause.state.params)
        pause.loss = found.get("loss")
        if found:
            pause.write_row(pause.step, {f"eval/{name}": value for name, value in found.items()})


@dataclasses.dataclass
class CheckpointHook(Hook):
    """Saves the run on the schedule, and when a signal arrives, which then ends the run."""

    checkpoints: Checkpoints
    schedule: Schedule
    signals: Signals
    say: Callable[[str], None]
    received: int | None = None

    def is_due(self, step: int) -> bool:
        self.received = self.signals.stop_after(step)  # every process has to ask after every step
        return self.received is not None or self.schedule.saves(step)

    def on_pause(self, pause: Pause) -> None:
        if self.received is not None:
            hint = " Once more stops at once." if jax.process_count() == 1 else ""
            self.say(f"Stopping: saving first.{hint}")
        # The rows up to here are on disk before the checkpoint is, so none is missing after a resume.
        self.checkpoints.save(pause.step, pause.state, pause.position, pause.loss)
        if self.received is not None and not self.schedule.is_last(pause.step):
            self.checkpoints.wait()
            raise Interrupted(
                self.received,
                f"Stopped by a signal after step {pause.step}, and saved: run the same command to resume.",
            )
