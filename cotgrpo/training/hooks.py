"""What happens between the steps of a run: the schedule, and the hooks that log, evaluate, save and show progress."""

from __future__ import annotations

import dataclasses
import math
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
    """Raised when training cannot usefully continue. The message names the reason and what to try.

    Attributes:
        good_until: checkpoints of later steps are not good. None: this is not known.
    """

    def __init__(self, message: str, good_until: int | None = None) -> None:
        super().__init__(message)
        self.good_until = good_until


class UpdatesSkipped(TrainingStopped):
    """Raised when too many updates in a row were skipped, on every process after the same step."""


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
        trained_step: the newest step that was not skipped. The parameters before it gave a finite loss.
        good_until: returns the last step whose parameters are known to be good.
        try_again: makes the step once more with the newest parameters and returns whether it is not skipped. The state
            stays as it is.
        loss: the held-out loss, once the evaluation hook has measured it.
        saved_unconfirmed: whether a checkpoint was saved whose parameters have not given a finite loss yet.
    """

    step: int
    state: TrainState
    position: dict[str, Any]
    write_row: Callable[[int, Row], None]
    trained_step: int
    good_until: Callable[[], int]
    try_again: Callable[[], bool]
    loss: float | None = None
    saved_unconfirmed: bool = False


class Hook:
    """Something that a run does between its steps. `train` calls the methods of every hook in order.

    All methods do nothing by default. `on_row` and `good_until` are called on process 0 only, the others on every
    process.
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

    def good_until(self) -> int | None:
        """Return the step after which the student may have become bad, or None if there is no sign of it."""
        return None


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
    """Saves the run on the schedule, and when a signal arrives, which then ends the run.

    Nothing is saved after a skipped update: what the steps before it left may be what made it fail. The save is made up
    for after the next update that succeeds. Parameters are good once they have given a finite loss, which the next step
    shows. After the last step, the held-out loss shows it, or one more step whose result is thrown away.
    """

    checkpoints: Checkpoints
    schedule: Schedule
    signals: Signals
    say: Callable[[str], None]
    on_save: Callable[[], None] = lambda: None
    received: int | None = None
    postponed: bool = False

    def is_due(self, step: int) -> bool:
        self.received = self.signals.stop_after(step)  # every process has to ask after every step
        return self.received is not None or self.postponed or self.schedule.saves(step)

    def on_pause(self, pause: Pause) -> None:
        if self.received is not None:
            hint = " Once more stops at once." if jax.process_count() == 1 else ""
            self.say(f"Stopping: saving first.{hint}")
        good = pause.loss is not None and math.isfinite(pause.loss)
        if self.schedule.is_last(pause.step):
            if not good and not pause.try_again():
                raise UpdatesSkipped(
                    f"The parameters after the last step, {pause.step}, give no finite loss. Lower the learning rate "
                    "or clip harder, and check the data."
                )
            good = True
        elif pause.trained_step < pause.step:
            self.postpone(pause)
            return
        else:
            until = pause.good_until()
            good = good and until >= pause.trained_step - 1
            self.checkpoints.confirm(until)
        self.postponed = False
        # The rows up to here are on disk before the checkpoint is, so none is missing after a resume.
        self.checkpoints.save(pause.step, pause.state, pause.position, pause.loss, confirmed=good)
        pause.saved_unconfirmed = not good
        self.on_save()
        if self.received is not None and not self.schedule.is_last(pause.step):
            self.checkpoints.wait()
            raise Interrupted(
                self.received,
                f"Stopped by a signal after step {pause.step}, and saved: run the same command to resume.",
            )

    def postpone(self, pause: Pause) -> None:
        """Save nothing now, and after every step look whether its update succeeded."""
        if self.received is not None:
            self.checkpoints.wait()
            raise Interrupted(
                self.received,
                f"Stopped by a signal after step {pause.step}. Its update was skipped, so nothing was saved: run the "
                "same command to resume from the last checkpoint.",
            )
        if not self.postponed:
            self.say(f"The update of step {pause.step} was skipped: the next that succeeds is saved.")
        self.postponed = True
