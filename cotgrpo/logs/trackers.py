"""Trackers of experiments: a small interface, and a thread for each that sends the rows of `metrics.jsonl`.

`metrics.jsonl` holds every row. A tracker that is slow, down or broken neither ends nor slows the run. What it has
received is in `trackers/` of the stage's folder, so a resumed run, or the same command after the end, sends the rest.
"""

from __future__ import annotations

import dataclasses
import inspect
import re
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from cotgrpo.atomic_files import find_json_object, write_json
from cotgrpo.data.own.loading import OwnCodeError, check_signature, describe, load_object, name_of

RETRY_SECONDS = 30.0
"""Time after which a tracker that failed is tried again."""
CLOSE_SECONDS = 20.0
"""How long the end of a run waits for its trackers."""
METHODS = {"start": ("run",), "log": ("step", "row"), "log_file": ("path",), "close": ()}
"""The methods of a tracker, and their arguments."""


@dataclasses.dataclass(frozen=True)
class TrackedRun:
    """What a tracker needs to know of a run.

    Attributes:
        project: the project, or experiment.
        name: of the run.
        folder: of the stage, for files of the tracker.
        config: the settings, nested.
        id: what `start` returned when the run began; empty for a new run.
        offline: whether everything is to stay on this disk.
        uri: address of the tracker's server; empty: its own default.
    """

    project: str
    name: str
    folder: Path
    config: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    id: str = ""
    offline: bool = False
    uri: str = ""


class Tracker:
    """Logs a run somewhere else. Your own tracker is a subclass, or any object with a method `log`.

    All methods are called in one thread, which is not that of the training. They may wait for a server, and raise any
    error: it is printed once, and the same rows are sent again later.
    """

    def start(self, run: TrackedRun) -> str:
        """Open the run, or go on with `run.id`. Return its id."""
        return run.id

    def log(self, step: int, row: dict[str, float]) -> None:
        """Log the numbers of a step. Two rows may have the same step."""

    def log_file(self, path: Path) -> None:
        """Keep a file, such as the report."""

    def close(self) -> None:
        """End the run."""


class TrackerFeed:
    """Sends the rows of a run to one tracker, in a thread of its own.

    Args:
        name: of the tracker, for messages and for the file of what it has received.
        tracker: what is fed.
        run: the run.
        rows: those that were logged already, each with its `step`.
        say: prints a message.
    """

    def __init__(
        self,
        name: str,
        tracker: Tracker,
        run: TrackedRun,
        rows: Sequence[Mapping[str, Any]],
        say: Callable[[str], None],
    ) -> None:
        self.name, self.tracker, self.say = name, tracker, say
        self.path = run.folder / "trackers" / f"{re.sub(r'[^A-Za-z0-9]+', '_', name)}.json"
        known = find_json_object(self.path) or {}
        id, step, at_step = known.get("id"), known.get("step"), known.get("rows_of_step")
        self.run = dataclasses.replace(run, id=id if isinstance(id, str) else "")
        # The rows that it has: all of earlier steps, and so many of this one.
        self.step = step if isinstance(step, int) else -1
        self.at_step = at_step if isinstance(at_step, int) else 0
        self.seen: tuple[int, int] = (-1, 0)  # the step of the newest row that was put, and its number in the step
        self.pending: list[tuple[int, int, dict[str, float]]] = []
        self.file: Path | None = None
        self.lock, self.wake, self.closing = threading.Lock(), threading.Event(), threading.Event()
        self.started = self.failing = False
        for row in rows:
            self.put(row["step"], row)
        self.thread = threading.Thread(target=self.work, name=f"tracker {name}", daemon=True)
        self.thread.start()

    def put(self, step: int, row: Mapping[str, Any]) -> None:
        """Take a row of the log. Rows that the tracker has already are left out."""
        number = self.seen[1] + 1 if step == self.seen[0] else 1
        self.seen = (step, number)
        if step > self.step or (step == self.step and number > self.at_step):
            values = {k: v for k, v in row.items() if isinstance(v, int | float) and k != "step"}
            with self.lock:
                self.pending.append((step, number, values))
            self.wake.set()

    def put_file(self, path: Path) -> None:
        """Take a file. Only the newest is sent."""
        self.file = path
        self.wake.set()

    def work(self) -> None:
        """Send what is there, until `close`. Runs in the thread."""
        while True:
            ending = self.closing.is_set()
            try:
                self.send()
                self.failing = False
            except (Exception, SystemExit) as error:
                if not self.failing:
                    self.say(
                        f"warning: the tracker {self.name} failed {describe(error)}. The run goes on, metrics.jsonl "
                        "has every row, and what is missing is sent again later."
                    )
                self.failing = True
            if ending:
                break
            if self.failing:
                self.closing.wait(RETRY_SECONDS)
            else:
                self.wake.wait()
                self.wake.clear()
        try:
            if self.started:
                self.tracker.close()
        except (Exception, SystemExit) as error:
            self.say(f"warning: the tracker {self.name} could not be closed {describe(error)}.")

    def send(self) -> None:
        """Send the rows that wait, in order, and the newest file."""
        if not self.started:
            id = self.tracker.start(self.run)
            self.run = dataclasses.replace(self.run, id=str(id or ""))
            self.started = True
            self.keep()
        try:
            while self.pending:
                step, number, values = self.pending[0]
                self.tracker.log(step, values)
                self.step, self.at_step = step, number
                with self.lock:
                    del self.pending[0]
        finally:
            self.keep()
        if self.file is not None:
            path, self.file = self.file, None
            self.tracker.log_file(path)

    def keep(self) -> None:
        """Write down what the tracker has."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        write_json(self.path, {"id": self.run.id, "step": self.step, "rows_of_step": self.at_step})

    def end(self) -> None:
        """Let the thread send what is left, and end."""
        self.closing.set()
        self.wake.set()

    def close(self, seconds: float = CLOSE_SECONDS) -> None:
        """End, and wait for at most so many seconds. Print how many rows the tracker lacks then."""
        self.end()
        self.thread.join(seconds)
        if left := len(self.pending):
            self.say(
                f"warning: the tracker {self.name} lacks {left} rows, which metrics.jsonl has. The same command sends "
                "them."
            )
        elif self.thread.is_alive():
            self.say(f"warning: the tracker {self.name} has every row, but has not ended after {seconds:g} seconds.")


def make_tracker(given: object, *, offline: bool = False) -> tuple[str, Tracker]:
    """Return a tracker and its name.

    Args:
        given: wandb, mlflow or trackio; or the path "package.module:name" of a class or an object; or an object.
        offline: whether the tracker needs no account.

    Raises:
        OwnCodeError: it cannot be loaded, its package is missing, or it lacks `log`.
    """
    from cotgrpo.logs.tracker_kinds import KINDS, check_installed

    if isinstance(given, str) and given in KINDS:
        check_installed(given)
        kind = KINDS[given]
        kind.check_ready(offline)
        return given, kind()
    name = given if isinstance(given, str) else name_of(given)
    found = load_object(given, "trackers") if isinstance(given, str) else given
    if isinstance(found, type):
        try:
            found = found()
        except (Exception, SystemExit) as error:
            raise OwnCodeError(f"trackers: {name}() failed {describe(error)}. Fix it.") from error
    if not callable(getattr(found, "log", None)):
        raise OwnCodeError(
            f"trackers: {name} must be a tracker, with a method log(step, row), got a {type(found).__name__}. "
            "cotgrpo.logs.trackers.Tracker says more."
        )
    for method, arguments in METHODS.items():
        if callable(own := getattr(found, method, None)):
            check_signature(own, f"{name}.{method}", "trackers", arguments)
    return name, found if isinstance(found, Tracker) else PartialTracker(found)


class PartialTracker(Tracker):
    """A tracker with the methods that another object has."""

    def __init__(self, inner: object) -> None:
        for method in METHODS:
            if inspect.isroutine(own := getattr(inner, method, None)):
                setattr(self, method, own)
