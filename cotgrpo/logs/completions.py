"""`completions.jsonl`: some of the student's own replies during training, with a ghost and a reward for each token."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from cotgrpo.data.tokenizer import Piece, decode_text, joined_pieces
from cotgrpo.disk_errors import explain_disk_errors
from cotgrpo.evaluation.accuracy import Reply
from cotgrpo.logs.metrics_log import append, keep_rows, open_to_append, step_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

DIGITS = 5
"""Decimals of a reward in the file."""


class CompletionsLog:
    """Appends replies, each on disk before the call returns.

    A row is `{"step", "question", "gold", "text", "correct", "tokens", "counts", "ghosts", "rewards"}`. The last four
    are lists with an entry for each token, or for tokens that are parts of one character, which are joined:

    - `tokens`: the text.
    - `counts`: how many tokens it has.
    - `ghosts`: null if the ghost's tokens are the same. Otherwise, the text up to the ghost's first other token.
    - `rewards`: the sum of `log p(ghost) - log p(token)`, in nats.

    Replies of an engine have its weights' version too, as `"version"`.

    Without a ghost (`group_relative`) the list of ghosts is null, and a reward is the advantage of the whole reply.

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
        *,
        version: int | None = None,
    ) -> None:
        """Log the first replies of a step. `ghosts` and `rewards` are `[rows, N]`, with a column for each token.

        `version` is that of the engine's weights that wrote them; None: this process did.
        """
        lines = []
        for row_number, (reply, own, reward_N) in enumerate(zip(replies, ids, rewards, strict=False)):
            pieces = joined_pieces(tokenizer, own)
            ghost_N = None if ghosts is None else ghosts[row_number]
            row = {
                "step": step,
                "question": reply.question,
                "gold": reply.gold,
                "text": reply.text,
                "correct": reply.correct,
                "tokens": [piece.text for piece in pieces],
                "counts": [piece.end - piece.start for piece in pieces],
                "ghosts": None if ghost_N is None else [ghost_of(tokenizer, own, ghost_N, piece) for piece in pieces],
                "rewards": [reward_of(reward_N, piece, summed=ghosts is not None) for piece in pieces],
            }
            row |= {} if version is None else {"version": version}
            lines.append(json.dumps(row, ensure_ascii=False) + "\n")
        with explain_disk_errors(self.path):
            if not self.started:
                self.started = True
                keep_rows(self.path, step - 1)
            with open_to_append(self.path) as file:
                append(file, "".join(lines).encode())


def ghost_of(tokenizer: PreTrainedTokenizerBase, own: np.ndarray, ghosts: np.ndarray, piece: Piece) -> str | None:
    """Return what the ghost proposes for a piece of a reply, None for the same tokens.

    The ghost has read the student's tokens. So its first other token follows those of the piece before it.
    """
    for place in range(piece.start, piece.end):
        if ghosts[place] != own[place]:
            return decode_text(tokenizer, np.append(own[piece.start : place], ghosts[place]))
    return None


def reward_of(rewards: np.ndarray, piece: Piece, *, summed: bool) -> float:
    """Return the reward of a piece: the sum over its tokens, or that of the first, if all have the reply's."""
    end = piece.end if summed else piece.start + 1
    return round(float(np.sum(rewards[piece.start : end], dtype=np.float64)), DIGITS)


def read_completions(folder: Path, last: int) -> list[dict[str, Any]]:
    """Return the `last` newest whole rows of a stage's `completions.jsonl`, in order; empty without a file."""
    path = folder / "completions.jsonl"
    lines = path.read_bytes().splitlines() if path.is_file() else []
    return [json.loads(line) for line in lines[-last:] if step_of(line) < float("inf")]
