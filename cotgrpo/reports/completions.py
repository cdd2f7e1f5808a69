"""The student's own replies in training, each token coloured by its reward."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

FULL_COLOUR = 4.0
"""Nats of reward at which the colour is strongest."""
TOKENS_SHOWN = 600
"""Tokens of a reply that are shown."""


@dataclasses.dataclass(frozen=True)
class Token:
    """A token of a reply, or the tokens of one character.

    Attributes:
        text: the text.
        title: tooltip with the ghost's token, if that is another one, and the reward.
        style: CSS of the background, "" for a reward of 0.
        corrected: whether the ghost proposes another token.
    """

    text: str
    title: str
    style: str
    corrected: bool


@dataclasses.dataclass(frozen=True)
class Completion:
    """One reply.

    `left_out` counts its tokens beyond `TOKENS_SHOWN`. `has_ghosts` is false for group-relative runs.
    """

    step: int
    question: str
    gold: str
    correct: bool
    tokens: list[Token]
    left_out: int
    has_ghosts: bool


def read_completion(row: Mapping[str, Any]) -> Completion:
    """Return a row of `completions.jsonl` as the page shows it."""
    ghosts = row["ghosts"] or [None] * len(row["tokens"])
    alone = "advantage" if row["ghosts"] is None else "the ghost agrees; reward"
    counts = row.get("counts") or [1] * len(row["tokens"])  # logs of older versions have none
    tokens = list(zip(row["tokens"], counts, ghosts, row["rewards"], strict=True))
    return Completion(
        step=row["step"],
        question=row["question"],
        gold=row["gold"],
        correct=row["correct"],
        tokens=[coloured_token(*token, alone) for token in tokens[:TOKENS_SHOWN]],
        left_out=sum(counts[TOKENS_SHOWN:]),
        has_ghosts=row["ghosts"] is not None,
    )


def coloured_token(text: str, count: int, ghost: str | None, reward: int | float, alone: str) -> Token:
    """Return a piece of `count` tokens with its tooltip and colour; `alone` starts the tooltip if the ghost agrees."""
    style = f"background: {colour_of(reward)}" if reward else ""
    label = alone if ghost is None else f"ghost: {ghost}; reward"
    joined = f" ({count} tokens)" if count > 1 else ""
    return Token(text, f"{label} {reward:+.2f}{joined}", style, corrected=ghost is not None)


def colour_of(reward: int | float) -> str:
    """Return the CSS colour of a reward: green if the ghost's token is the likelier one, red if the student's is."""
    strength = min(abs(reward) / FULL_COLOUR, 1.0)
    # Both hues are dark enough to be told apart, and pale enough for the text to be read, in light and dark.
    hue = "46, 160, 90" if reward > 0 else "214, 60, 50"
    return f"rgba({hue}, {0.1 + 0.5 * strength:.2f})"
