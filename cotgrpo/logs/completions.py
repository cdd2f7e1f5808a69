"""`completions.jsonl`: some of the student's own replies as training goes on, each token with its ghost and its reward, or with its reply's advantage."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from cotgrpo.evaluation.accuracy import Reply
from cotgrpo.logs.metrics_log import append, length_up_to, open_to_append, step_of
from cotgrpo.storage import explaining_disk_errors

DIGITS = 5
"""Of a reward, in the file."""


class CompletionsLog:
    """Appends replies, each on disk before the call returns.

    A row is `{"step", "question", "gold", "text", "correct", "tokens", "ghosts", "rewards"}`, the last three a list each, an entry a token:
    what the student wrote, what the ghost would have (null: the same), and `log p(ghost) - log p(token)` in nats. Without a ghost (`group_relative`) the list of
    ghosts is null, and a reward is the advantage of the whole reply. As `MetricsLog`, it begins by removing what was written for
    the steps that are to come.

    Args:
        folder: the stage's folder.
        every: steps between replies that are logged.
        rows: replies logged at a time.
    """

    def __init__(self, folder: Path, every: int, rows: int) -> None:
        self.path, self.every, self.rows = folder / "completions.jsonl", every, rows
        self.started = False

    def due(self, step: int) -> bool:
        """Whether replies of this step are logged: the first step's, and then every so many steps."""
        return step % self.every == 0 or step == 1

    def write(
        self,
        step: int,
        tokenizer: Any,
        replies: Sequence[Reply],
        ids: Sequence[np.ndarray],
        ghosts: np.ndarray | None,
        rewards: np.ndarray,
    ) -> None:
        """Logs the first replies of a step; `ghosts`, if there are any, and `rewards` are `[rows, N]`, a column for each token of a reply."""
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
        with explaining_disk_errors(self.path), open_to_append(self.path) as file:
            if not self.started:
                self.started = True
                file.truncate(length_up_to(self.path, step - 1))
            append(file, "".join(lines).encode())


def read_completions(folder: Path, last: int) -> list[dict[str, Any]]:
    """The newest whole rows of a stage's `completions.jsonl`, at most so many, in order; empty if there is none."""
    path = folder / "completions.jsonl"
    lines = path.read_bytes().splitlines() if path.is_file() else []
    return [json.loads(line) for line in lines[-last:] if step_of(line) < float("inf")]
