"""`completions.jsonl`: some of the student's own replies during training, with a ghost and a reward for each token."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from cotgrpo.disk_errors import explain_disk_errors
from cotgrpo.evaluation.accuracy import Reply
from cotgrpo.logs.metrics_log import append, length_up_to, open_to_append, step_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

DIGITS = 5
"""Decimals of a reward in the file."""


class CompletionsLog:
    """Appends replies, each on disk before the call returns.

    A row is `{"step", "question", "gold", "text", "correct", "tokens", "ghosts", "rewards"}`. The last three are lists
    with an entry
    for each token: the student's token, the ghost's (null if it is the same), and `log p(ghost) - log p(token)` in
        nats. Without a
    ghost (`group_relative`) the list of ghosts is null, and a reward is the advantage of the whole reply.

    Like `MetricsLog`, it first removes the rows of steps that the run will repeat.

    Args:
        folder: the stage's folder.
        every: steps between replies that are logged.
        rows: replies logged at a time.
    """

    def __init__(self, folder: Path, every: int, rows: int) -> None:
        self.path, self.every, self.rows = folder / "completions.jsonl", every, rows
        self.started = False

    def due(self, step: int) -> bool:
        """Return whether replies of this step are logged: of the first step, and of every `every` steps."""
        return step % self.every == 0 or step == 1

    def write(
        self,
        step: int,
        tokenizer: PreTrainedTokenizerBase,
        replies: Sequence[Reply],
        ids: Sequence[np.ndarray],
        ghosts: np.ndarray | None,
        rewards: np.ndarray,
    ) -> None:
        """Log the first replies of a step. `ghosts` and `rewards` are `[rows, N]`, with a column for each token."""
        piece = lambda token: tokenizer.decode([int(token)])
        against = lambda ghost_N, own: [None if g == t else piece(g) for g, t in zip(ghost_N, own, strict=False)]
        lines = []
        for row_number, (reply, own, reward_N) in enumerate(zip(replies, ids, rewards, strict=False)):
            row = {
                "step": step,
                "question": reply.question,
                "gold": reply.gold,
                "text": reply.text,
                "correct": reply.correct,
                "tokens": [piece(token) for token in own],
                "ghosts": None if ghosts is None else against(ghosts[row_number], own),
                "rewards": [round(float(reward), DIGITS) for reward in reward_N[: len(own)]],
            }
            lines.append(json.dumps(row, ensure_ascii=False) + "\n")
        with explain_disk_errors(self.path), open_to_append(self.path) as file:
            if not self.started:
                self.started = True
                file.truncate(length_up_to(self.path, step - 1))
            append(file, "".join(lines).encode())


def read_completions(folder: Path, last: int) -> list[dict[str, Any]]:
    """Return the `last` newest whole rows of a stage's `completions.jsonl`, in order; empty without a file."""
    path = folder / "completions.jsonl"
    lines = path.read_bytes().splitlines() if path.is_file() else []
    return [json.loads(line) for line in lines[-last:] if step_of(line) < float("inf")]
