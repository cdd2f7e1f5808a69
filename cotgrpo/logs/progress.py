"""Show the progress of long work: one moving line in a terminal, plain lines in a log."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from types import TracebackType
from typing import Any, TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.table import Column
from rich.text import Text

from cotgrpo.data.rows import counted
from cotgrpo.terminal import clean, say

SECONDS_BETWEEN_LINES = 15.0
"""In a log."""
SECONDS_BEFORE_A_LINE = 2.0
"""A phase that takes less prints no line."""
SECONDS_BETWEEN_UPDATES = 0.1
"""Of a bar. Work on a row may take less than an update."""

T = TypeVar("T")


class CountProgress:
    """Counts what is done of some work: a bar in a terminal, a line now and then in a log. Use as a context manager.

    Args:
        title: name of the work.
        console: where to write.
        total: when the work is done; None: not known.
        done: what earlier work has done.
        transient: remove the bar at the end.
        speed_seconds: the time left is estimated from the speed over this time.
    """

    def __init__(
        self,
        title: str,
        console: Console,
        total: int | None = None,
        done: int = 0,
        *,
        transient: bool = False,
        speed_seconds: float = 30,
    ) -> None:
        self.title, self.console, self.total = clean(title), console, total
        self.done = self.done_before = done
        self.printed: int | None = None  # what the newest line says
        self.started = self.last_line = self.last_update = time.monotonic()
        self.progress = Progress(
            TextColumn("{task.description}", markup=False, table_column=Column(no_wrap=True, overflow="ellipsis")),
            BarColumn(bar_width=None),
            MofNCompleteColumn(),
            TextColumn("{task.fields[status]}", markup=False, table_column=Column(no_wrap=True)),
            TimeRemainingColumn(elapsed_when_finished=True),
            console=console,
            disable=not console.is_terminal,
            expand=True,
            transient=transient,
            speed_estimate_period=speed_seconds,
        )
        self.task = self.progress.add_task(self.title, total=total, completed=done, status="")

    def __enter__(self) -> CountProgress:
        self.progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.progress.update(self.task, completed=self.done, status=self.status())
        self.progress.stop()

    def status(self) -> str:
        """Return what is shown next to the count."""
        return ""

    def update(self, done: int) -> None:
        """Show that so much is done."""
        self.done, now = done, time.monotonic()
        if self.console.is_terminal:
            if now - self.last_update > SECONDS_BETWEEN_UPDATES:
                self.last_update = now
                self.progress.update(self.task, completed=done, status=self.status())
        elif now - self.last_line > SECONDS_BETWEEN_LINES:
            self.line()

    def line(self) -> None:
        """Print the counts as a line."""
        self.last_line, self.printed = time.monotonic(), self.done
        spent, new = self.last_line - self.started, self.done - self.done_before
        left = ""
        if self.total is not None and new and self.done < self.total:
            minutes, seconds = divmod(round(spent / new * (self.total - self.done)), 60)
            left = f"  {minutes}:{seconds:02d} left"
        of_total = "" if self.total is None else f"/{self.total}"
        say(self.console, f"{self.title} {self.done}{of_total}  {self.status()}{left}")


class PhaseProgress(CountProgress):
    """Shows the rows and rows/s of one phase of a command, such as reading. A short one prints nothing in a log.

    Call it with the number of rows that are done, or iterate `over` them.

    Args:
        title: name of the phase.
        console: where to write.
        total: number of rows; None: not known.
    """

    def __init__(self, title: str, console: Console, total: int | None = None) -> None:
        super().__init__(title, console, total, transient=True)
        self.last_line += SECONDS_BEFORE_A_LINE - SECONDS_BETWEEN_LINES

    def __enter__(self) -> PhaseProgress:
        super().__enter__()
        return self

    def __call__(self, done: int) -> None:
        """Show that so many rows are done."""
        self.update(done)

    def over(self, rows: Iterable[T]) -> Iterator[T]:
        """Yield the rows, and count those that were used."""
        return counted(rows, self)

    def __exit__(self, *exception: Any) -> None:
        """Remove the bar. After a long phase, print a line."""
        super().__exit__(*exception)
        if time.monotonic() - self.started > SECONDS_BEFORE_A_LINE and self.printed != self.done:
            self.line()

    def status(self) -> str:
        """Return the rows/s, and in the last line the seconds."""
        seconds = max(time.monotonic() - self.started, 1e-3)
        return f"{compact(self.done / seconds)} rows/s"


class ProgressLine:
    """A `rich` progress bar: step, loss, reward, tokens/s, time left.

    If the output is not a terminal, it prints a line at each update. Use as a context manager.

    Args:
        title: name of what is running.
        total: number of steps.
        done: steps that are done already.
        console: where to write.
    """

    def __init__(self, title: str, total: int, done: int, console: Console) -> None:
        self.title, self.console = title, console
        self.progress = Progress(
            StatusColumn(console),
            BarColumn(bar_width=None),
            console=console,
            disable=not console.is_terminal,
            expand=True,
            refresh_per_second=4,
        )
        self.task = self.progress.add_task(title, total=total, completed=done, row=None)

    def __enter__(self) -> ProgressLine:
        self.progress.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self.progress.stop()

    def advance(self, step: int) -> None:
        """Show that `step` steps are done."""
        self.progress.update(self.task, completed=step)

    def show(self, step: int, row: dict[str, Any]) -> None:
        """Show the newest row, that of `step`."""
        self.progress.update(self.task, completed=step, row=row)
        if not self.console.is_terminal:
            self.say("  ".join(pieces(self.progress.tasks[0]).values()))

    def say(self, message: str) -> None:
        """Print one line, above the bar if there is one."""
        say(self.console, message)


class StatusColumn(ProgressColumn):
    """The text next to the bar. The bar gets the width that is left.

    If the console is too narrow, the least needed parts are left out. Nothing is cut or wrapped.
    """

    LEAST_NEEDED_FIRST = ("title", "reward", "speed", "left", "loss")

    def __init__(self, console: Console) -> None:
        super().__init__(table_column=Column(no_wrap=True))
        self.console = console

    def render(self, task: Task) -> Text:
        """Return the parts that fit."""
        shown = pieces(task)
        for name in self.LEAST_NEEDED_FIRST:
            if len("  ".join(shown.values())) < self.console.width:
                break
            shown.pop(name, None)
        return Text("  ".join(shown.values()))


def pieces(task: Task) -> dict[str, str]:
    """Return the parts of the line that are known, in order."""
    row = task.fields["row"]
    shown = {"title": task.description, "step": f"{task.completed:.0f}/{task.total:.0f}"}
    if row is None:
        return shown if task.speed else shown | {"loss": "compiling"}
    for name, form in (("loss", "loss {:.3f}"), ("reward", "reward {:.2f}")):
        if row.get(f"train/{name}") is not None:
            shown[name] = form.format(row[f"train/{name}"])
    shown["speed"] = f"{compact(row['train/tokens_per_sec'])} tok/s"
    if not task.finished:
        # `rich` counts updates, and many come at once, when steps are handed to the device. So this uses the step
        # time of the newest row. Pauses for evaluation and checkpoints are not included.
        minutes, seconds = divmod(int((task.remaining or 0) * row["train/step_time"]), 60)
        hours, minutes = divmod(minutes, 60)
        shown["left"] = f"{hours}:{minutes:02d}:{seconds:02d} left" if hours else f"{minutes}:{seconds:02d} left"
    return shown


def compact(number: float) -> str:
    """Return about three digits: 812, 43.9k, 1.2M."""
    if number >= 1e6:
        return f"{number / 1e6:.1f}M"
    return f"{number / 1e3:.1f}k" if number >= 1e4 else f"{number:.0f}"
