"""The part of the report that shows the student's own replies in training, each token coloured by its reward."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from cotgrpo.reports.charts import clean

STRONGEST = 4.0
"""Nats of reward at which the colour is full."""
LONGEST_REPLY = 600
"""Tokens of a reply that are shown."""

COMPLETIONS_STYLE = """
.completion h3 { display: flex; justify-content: space-between; gap: .6rem; }
.tokens { white-space: pre-wrap; overflow-wrap: anywhere; font: .86rem/1.9 ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; margin: .6rem 0 0; }
.tokens span { border-radius: 3px; border-bottom: 2px solid transparent; }
.tokens .other { border-bottom-color: currentColor; }
"""

WRITTEN = "What the student wrote by itself in training, a few replies at a time, the newest first. "

EXPLAINED = (
    WRITTEN
    + "Those in which the ghost says another token come before the others, so this is no random choice. A token is underlined where the ghost says another one there; the colour is the reward "
    "<em>log p(ghost) \N{MINUS SIGN} log p(token)</em>: red where the student preferred its own token, green where it already found the ghost's likelier. "
    "Point at a token to read the ghost's and the reward."
)

EXPLAINED_WITHOUT_GHOSTS = (
    WRITTEN
    + "The colour is the advantage of the whole reply, green where it is right more often than the others to its question, red where less often, "
    "and none where all of them are right or all wrong: nothing is learned from those."
)


def completions(rows: Sequence[Mapping[str, Any]]) -> str:
    """The section, of rows as `completions.jsonl` holds them; the last comes first."""
    cards = "".join(card(row) for row in reversed(rows))
    explained = EXPLAINED_WITHOUT_GHOSTS if rows[0]["ghosts"] is None else EXPLAINED
    return f'<h2>Completions</h2><p class="quiet">{explained}</p><div class="cards">{cards}</div>'


def card(row: Mapping[str, Any]) -> str:
    """One reply."""
    ghosts = row["ghosts"] or [None] * len(row["tokens"])
    triples = list(zip(row["tokens"], ghosts, row["rewards"], strict=True))
    alone = "advantage" if row["ghosts"] is None else "the ghost agrees; reward"
    spans = "".join(token(*triple, alone) for triple in triples[:LONGEST_REPLY])
    rest = len(triples) - LONGEST_REPLY
    more = f'<p class="quiet">{rest:,} more tokens are in completions.jsonl</p>' if rest > 0 else ""
    return (
        f'<article class="card completion"><h3><span>Step {row["step"]:,}: {clean(row["question"])}</span>{mark(row["correct"])}</h3>'
        f'<div class="quiet">Right answer: {clean(row["gold"])}</div><div class="tokens" dir="auto">{spans}</div>{more}</article>'
    )


def mark(correct: bool) -> str:
    """Whether a reply is right, in a word and a sign."""
    word, sign = ("right", "\N{CHECK MARK}") if correct else ("wrong", "\N{BALLOT X}")
    return f'<span class="mark {word}">{sign} {word}</span>'


def token(text: str, ghost: str | None, reward: float, alone: str) -> str:
    """A token with its ghost and reward behind it; `alone` is said of one without another ghost's token."""
    strength = min(abs(reward) / STRONGEST, 1.0)
    # Both hues are dark enough to be told apart, and pale enough for the text to be read, in light and dark.
    hue = "46, 160, 90" if reward > 0 else "214, 60, 50"
    style = f' style="background: rgba({hue}, {0.1 + 0.5 * strength:.2f})"' if reward else ""
    kind = "" if ghost is None else ' class="other"'
    said = alone if ghost is None else f"ghost: {ghost}; reward"
    return f'<span{kind}{style} title="{clean(f"{said} {reward:+.2f}")}">{clean(text)}</span>'
