"""What happens between the steps of a run: the schedule, and the hooks that log, evaluate, save and show progress.

`Callback` is the class to write callbacks of your own. `hooks_of_settings` makes the hooks that the settings name.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax

from cotgrpo.checkpoints.manager import Checkpoints
from cotgrpo.config import Config, ConfigError, tree_of
from cotgrpo.config.own_code import names_in
from cotgrpo.data.own.loading import OwnCodeError, call, check_signature, describe, load_object, name_of
from cotgrpo.distributed.processes import Signals, is_process_0
from cotgrpo.logs.metrics_log import MetricsLog, read_metrics
from cotgrpo.logs.progress import ProgressLine
from cotgrpo.logs.trackers import TrackedRun, Tracker, TrackerFeed, make_tracker
from cotgrpo.terminal import complain
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
        saved: whether a checkpoint was saved.
        saved_unconfirmed: whether its parameters have not given a finite loss yet.
    """

    step: int
    state: TrainState
    position: dict[str, Any]
    write_row: Callable[[int, Row], None]
    trained_step: int
    good_until: Callable[[], int]
    try_again: Callable[[], bool]
    loss: float | None = None
    saved: bool = False
    saved_unconfirmed: bool = False


class Hook:
    """Something that a run does between its steps. `train` calls the methods of every hook in order.

    All methods do nothing by default. `on_row` and `good_until` are called on process 0 only, the others on every
    process.
    """

    def on_start(self, step: int) -> None:
        """Run before the first step, and after the log was opened. The run has done `step` steps already."""

    def on_end(self) -> None:
        """Run after the last step, or when an error has ended the run."""

    def is_due(self, step: int) -> bool:
        """Return whether `on_pause` must run after this step. Called once per step; if true, the device waits."""
        return False

    def on_pause(self, pause: Pause) -> None:
        """Run while the device waits. Called only if `is_due`."""

    def on_row(self, step: int, row: Row) -> None:
        """Take a new row of the log. It may raise TrainingStopped."""

    def on_step(self, step: int) -> None:
        """Take note that the step was handed to the device."""

    def on_checkpoint(self, step: int) -> None:
        """Take note that the run was saved after this step. The files may still be written."""

    def good_until(self) -> int | None:
        """Return the step after which the student may have become bad, or None if there is no sign of it."""
        return None


@dataclasses.dataclass
class LogHook(Hook):
    """Appends each row to `metrics.jsonl` and to TensorBoard's events."""

    log: MetricsLog

    def on_row(self, step: int, row: Row) -> None:
        self.log.write(step, row)


def estimate_text(steps: int, seconds: float) -> str:
    """Return how long so many more steps take, at so many seconds a step."""
    minutes, rest = divmod(round(steps * seconds), 60)
    hours, minutes = divmod(minutes, 60)
    left = f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"
    speed = f"{seconds:.2f} s" if seconds >= 1 else f"{1000 * seconds:.3g} ms"
    return f"about {left} of training left, {steps:,} steps of {speed}"


@dataclasses.dataclass
class ProgressHook(Hook):
    """Shows the step and the newest training metrics. After the first steps, it prints how long the others take."""

    line: ProgressLine
    total_steps: int
    estimated: bool = False

    def on_row(self, step: int, row: Row) -> None:
        if "train/step_time" not in row:
            return
        self.line.show(step, row)
        if not self.estimated and step < self.total_steps:
            self.estimated = True
            self.line.say(f"{self.line.title}: {estimate_text(self.total_steps - step, row['train/step_time'])}")

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
        pause.saved, pause.saved_unconfirmed = True, not good
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


class Callback:
    """What a run calls between its steps: write a subclass, or any class with some of these methods.

    They are called on process 0, in the thread of the training, which waits for them. An error in one ends the run,
    with a message that names the method and the step. `cotgrpo.training.hooks.TrainingStopped` ends it too, as a
    decision of yours.
    """

    def on_start(self, folder: Path, step: int) -> None:
        """Run before the first step. `folder` is the stage's, and `step` counts the steps that are done already."""

    def on_step(self, step: int) -> None:
        """Run after a step was handed to the device, which may still be busy with it."""

    def on_row(self, step: int, row: dict[str, Any]) -> None:
        """Take a row of metrics.jsonl, which is on disk already, such as `{"train/loss": 1.2}`."""

    def on_evaluation(self, step: int, metrics: dict[str, Any]) -> None:
        """Take the held-out numbers, such as `{"loss": 1.1}`, after `on_row` took them as `eval/loss`."""

    def on_checkpoint(self, step: int, folder: Path) -> None:
        """Run after the step was saved. The files in the stage's `folder` may still be written."""

    def on_end(self, step: int) -> None:
        """Run after the last step, or when the run stops early: `step` is the newest one."""


CALLBACK_METHODS = {
    "on_start": ("folder", "step"),
    "on_step": ("step",),
    "on_row": ("step", "row"),
    "on_evaluation": ("step", "metrics"),
    "on_checkpoint": ("step", "folder"),
    "on_end": ("step",),
}
"""The methods of a callback, and their arguments."""


def make_callback(given: object) -> tuple[str, object]:
    """Return a callback and its name.

    Args:
        given: an object or a class with some of the methods of `Callback`, or its path "package.module:name".

    Raises:
        OwnCodeError: it cannot be loaded, or has other methods.
    """
    name = given if isinstance(given, str) else name_of(given)
    found = load_object(given, "callbacks") if isinstance(given, str) else given
    if isinstance(found, type):
        found = call(found, name, "callbacks", "The class without arguments")
    methods = [method for method in dir(found) if method.startswith("on_") and callable(getattr(found, method))]
    for method in methods:
        if method not in CALLBACK_METHODS:
            near = difflib.get_close_matches(method, CALLBACK_METHODS, n=1)
            hint = f" Did you mean {near[0]}?" if near else ""
            raise OwnCodeError(f"callbacks: {name} has a method {method}, which is never called.{hint}")
        check_signature(getattr(found, method), f"{name}.{method}", "callbacks", CALLBACK_METHODS[method])
    if not methods:
        raise OwnCodeError(
            f"callbacks: {name} must be a class with some of the methods {', '.join(CALLBACK_METHODS)}, got a "
            f"{type(found).__name__}."
        )
    return name, found


class CallbackHook(Hook):
    """Calls a callback of the user's own, on process 0. An error names its method and the step.

    Args:
        given: as in `make_callback`.
        folder: of the stage.
    """

    def __init__(self, given: object, folder: Path) -> None:
        self.name, self.callback = make_callback(given)
        self.folder, self.step = folder, 0

    def call(self, method: str, *arguments: Any) -> None:
        """Call a method, if the callback has it."""
        own = getattr(self.callback, method, None)
        if own is not None and is_process_0():
            try:
                own(*arguments)
            except TrainingStopped:
                raise
            except (Exception, SystemExit) as error:
                raise OwnCodeError(
                    f"Step {self.step}: callbacks {self.name}.{method} failed {describe(error)}. Fix it, and run the "
                    "same command to go on from the last checkpoint."
                ) from error

    def on_start(self, step: int) -> None:
        self.step = step
        self.call("on_start", self.folder, step)

    def on_step(self, step: int) -> None:
        self.step = step
        self.call("on_step", step)

    def on_row(self, step: int, row: Row) -> None:
        self.step = step
        self.call("on_row", step, dict(row))
        if found := {name.removeprefix("eval/"): value for name, value in row.items() if name.startswith("eval/")}:
            self.call("on_evaluation", step, found)

    def on_checkpoint(self, step: int) -> None:
        self.call("on_checkpoint", step, self.folder)

    def on_end(self) -> None:
        ending_with = sys.exc_info()[1]
        try:
            self.call("on_end", self.step)
        except OwnCodeError as error:
            if ending_with is None:
                raise
            complain(str(error))  # the error that ended the run counts


class TrackerHook(Hook):
    """Passes each row to the trackers, on process 0. They never end or slow the run.

    Args:
        trackers: each with its name.
        run: what they need to know.
    """

    def __init__(self, trackers: Sequence[tuple[str, Tracker]], run: TrackedRun) -> None:
        self.trackers, self.run = list(trackers), run
        self.feeds: list[TrackerFeed] = []

    def on_start(self, step: int) -> None:
        if is_process_0():
            rows = read_metrics(self.run.folder)
            self.feeds = [TrackerFeed(name, tracker, self.run, rows, complain) for name, tracker in self.trackers]

    def on_row(self, step: int, row: Row) -> None:
        for feed in self.feeds:
            feed.put(step, row)
            if any(name.startswith("eval/") for name in row) and (self.run.folder / "report.html").is_file():
                feed.put_file(self.run.folder / "report.html")

    def on_end(self) -> None:
        for feed in self.feeds:
            feed.end()
        for feed in self.feeds:
            feed.close()


class ProfileHook(Hook):
    """Traces some steps with JAX's profiler into a folder.

    Args:
        first, last: the steps. Of a resumed run, those that are left.
        folder: of the trace. Every process writes its own files.
    """

    def __init__(self, first: int, last: int, folder: Path) -> None:
        self.first, self.last, self.folder, self.tracing = first, last, folder, False

    def is_due(self, step: int) -> bool:
        return step == self.first - 1 or (self.tracing and step == self.last)

    def on_start(self, step: int) -> None:
        if self.first - 1 <= step < self.last:
            self.trace()

    def on_pause(self, pause: Pause) -> None:
        if pause.step == self.last:
            self.on_end()
        else:
            self.trace()

    def trace(self) -> None:
        """Start to trace what devices and XLA do.

        Not Python's calls: to trace them, XLA changes every thread of the process at once, and may never end while the
        threads of a run are awake.
        """
        options = jax.profiler.ProfileOptions()
        options.python_tracer_level = 0
        jax.profiler.start_trace(self.folder, profiler_options=options)
        self.tracing = True

    def on_end(self) -> None:
        if self.tracing:
            self.tracing = False
            jax.profiler.stop_trace()


@dataclasses.dataclass
class ReportHook(Hook):
    """Writes the report of a run that is not finished, after each evaluation; `write` takes the step."""

    write: Callable[[int], None]

    def on_row(self, step: int, row: Row) -> None:
        if any(name.startswith("eval/") for name in row):
            self.write(step)


def hooks_of_settings(stage: str, config: Config) -> list[Hook]:
    """Return the hooks that the settings of a stage name: callbacks, trackers and the profiler.

    Raises:
        OwnCodeError: a callback or a tracker that cannot be used.
        ConfigError: steps to profile that the stage does not make.
    """
    folder, hooks = Path(config.run_dir) / stage, list[Hook]()
    steps, profiled = getattr(config, stage).steps, config.profile.range
    if profiled is not None:
        if getattr(config, stage).epochs is None and profiled[1] > steps:
            raise ConfigError(f"profile.steps is {config.profile.steps}, but {stage}.steps is {steps}.")
        hooks.append(ProfileHook(*profiled, folder / "profile"))
    hooks += [CallbackHook(name, folder) for name in names_in(config.callbacks)]
    if names := names_in(config.trackers):
        hooks.append(
            TrackerHook(
                [make_tracker(name, offline=config.tracker.offline) for name in names], tracked_run(stage, config)
            )
        )
    return hooks


def tracked_run(stage: str, config: Config) -> TrackedRun:
    """Return what the trackers of a stage need to know."""
    folder, settings = Path(config.run_dir) / stage, config.tracker
    name = f"{settings.name or Path(config.run_dir).resolve().name}-{stage}"
    return TrackedRun(settings.project, name, folder, tree_of(config), offline=settings.offline, uri=settings.uri)


def send_missing_rows(hooks: Sequence[Hook]) -> None:
    """Send the rows of a finished stage that its trackers lack."""
    for hook in hooks:
        if isinstance(hook, TrackerHook):
            hook.on_start(0)
            hook.on_end()
