"""What a person sees while a run goes on: one moving line in a terminal, plain lines in a log."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

SHOWN = (("train/loss", "loss {:.3f}"), ("train/reward", "reward {:.2f}"), ("train/tokens_per_sec", "{:,.0f} tok/s"))
"""Metrics in the line, where the stage has them, and how they look."""


class ProgressLine:
    """A `rich` progress bar (step, loss, reward, tokens/s, time left), or a line at each update where the output is no terminal.

    Use as a context manager.

    Args:
        title: what is running.
        total: steps in all.
        done: steps done before.
        console: where to write.
    """

    def __init__(self, title: str, total: int, done: int, console: Console) -> None:
        self.title, self.total, self.console = title, total, console
        self.progress = Progress(
            TextColumn("[bold]{task.description}"),
            BarColumn(bar_width=None),
            MofNCompleteColumn(),
            TextColumn("{task.fields[numbers]}"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=console,
            disable=not console.is_terminal,
        )
        self.task = self.progress.add_task(title, total=total, completed=done, numbers="compiling")

    def __enter__(self) -> ProgressLine:
        self.progress.start()
        return self

    def __exit__(self, *exception: Any) -> None:
        self.progress.stop()

    def advance(self, step: int) -> None:
        """`step` steps are done."""
        self.progress.update(self.task, completed=step)

    def show(self, step: int, row: dict[str, Any]) -> None:
        """The newest numbers, those of `step`."""
        numbers = "  ".join(form.format(row[name]) for name, form in SHOWN if row.get(name) is not None)
        self.progress.update(self.task, numbers=numbers)
        if not self.console.is_terminal:
            self.console.print(f"{self.title} {step}/{self.total}  {numbers}")
