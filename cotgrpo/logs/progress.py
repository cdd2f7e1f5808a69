"""Show the progress of a run: one moving line in a terminal, plain lines in a log."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, Task
from rich.table import Column
from rich.text import Text


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
        self.console = console
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
        self.console.print(message, highlight=False, markup=False, soft_wrap=True)


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
