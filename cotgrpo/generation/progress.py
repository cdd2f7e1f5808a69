"""Progress of a teacher's replies: a bar with the time left in a terminal, a line now and then in a log."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from cotgrpo.logs.progress import compact
from cotgrpo.teachers.endpoint import TeacherReply
from cotgrpo.teachers.journal import Record

SECONDS_BETWEEN_LINES = 15.0


class ReplyProgress:
    """Shows replies, how many are right, tokens, cost and time left. Use as a context manager.

    Args:
        total: number of all requests.
        there: records of earlier replies.
        cost: returns the price of (prompt tokens, reply tokens).
        console: the console to write to.
    """

    def __init__(
        self, total: int, there: Sequence[Record], cost: Callable[[int, int], float], console: Console
    ) -> None:
        self.console, self.cost, self.total = console, cost, total
        self.done = len(there)
        self.accepted = sum(record.accepted for record in there)
        self.failed = 0
        self.tokens = [0, 0]
        for record in there:
            self.count_tokens(record)
        self.started, self.done_before, self.last_line = time.monotonic(), self.done, time.monotonic()
        self.progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[status]}"),
            TimeRemainingColumn(elapsed_when_finished=True),
            console=console,
            disable=not console.is_terminal,
            # Over a minute, since replies come in bursts.
            speed_estimate_period=60,
        )
        self.task = self.progress.add_task("replies", total=total, completed=self.done, status=self.status())

    def __enter__(self) -> ReplyProgress:
        self.progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.progress.stop()
        if not self.console.is_terminal:
            self.line()

    def add(self, record: Record) -> None:
        """Count one more request that has ended."""
        self.done += 1
        self.accepted += record.accepted
        self.failed += not isinstance(record.outcome, TeacherReply)
        self.count_tokens(record)
        self.progress.update(self.task, completed=self.done, status=self.status())
        if not self.console.is_terminal and time.monotonic() - self.last_line > SECONDS_BETWEEN_LINES:
            self.line()

    def count_tokens(self, record: Record) -> None:
        if isinstance(record.outcome, TeacherReply):
            self.tokens[0] += record.outcome.prompt_tokens or 0
            self.tokens[1] += record.outcome.completion_tokens or 0

    def status(self) -> str:
        """Return the counts in a few words."""
        parts = [f"{self.accepted} right", f"{compact(float(sum(self.tokens)))} tokens"]
        if cost := self.cost(*self.tokens):
            parts.append(f"cost {cost:.2f}")
        if self.failed:
            parts.append(f"{self.failed} failed")
        return "  ".join(parts)

    def line(self) -> None:
        """Print the counts as a line."""
        self.last_line = time.monotonic()
        spent, new = self.last_line - self.started, self.done - self.done_before
        left = ""
        if new and self.done < self.total:
            minutes, seconds = divmod(round(spent / new * (self.total - self.done)), 60)
            left = f"  {minutes}:{seconds:02d} left"
        self.console.print(
            f"replies {self.done}/{self.total}  {self.status()}{left}", highlight=False, markup=False, soft_wrap=True
        )
