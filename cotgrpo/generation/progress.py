"""Progress of a teacher's replies: a bar with the time left in a terminal, a line now and then in a log."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import TracebackType

from rich.console import Console

from cotgrpo.logs.progress import CountProgress, compact
from cotgrpo.teachers.endpoint import TeacherReply
from cotgrpo.teachers.journal import Record


class ReplyProgress(CountProgress):
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
        self.accepted = sum(record.accepted for record in there)
        self.cost, self.failed, self.tokens = cost, 0, [0, 0]
        for record in there:
            self.count_tokens(record)
        # The speed over a minute, since replies come in bursts.
        super().__init__("replies", console, total, len(there), speed_seconds=60)
        self.progress.update(self.task, status=self.status())

    def __enter__(self) -> ReplyProgress:
        super().__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        super().__exit__(kind, error, traceback)
        if not self.console.is_terminal:
            self.line()

    def add(self, record: Record) -> None:
        """Count one more request that has ended."""
        self.accepted += record.accepted
        self.failed += not isinstance(record.outcome, TeacherReply)
        self.count_tokens(record)
        self.update(self.done + 1)

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
