"""A reply of the student as a picture: its tokens coloured by reward, and the ghost's tokens next to them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from markupsafe import Markup

from cotgrpo.reports.charts import LETTER, WIDTH, svg
from cotgrpo.reports.completions import colour_of
from cotgrpo.reports.formats import escape_text

LEFT, TOP, LINE, MONO = 4.0, 26.0, 26.0, 10.0
"""The first token's place, the height of a line, and the width of a letter of a token, in pixels."""


def reply_chart(row: Mapping[str, Any]) -> Markup:
    """Draw a row of `completions.jsonl` that has ghosts as an SVG.

    Each token has the colour of its reward. A line in which the ghost proposes other tokens ends with them, each with
    its reward in nats, as far as there is room.
    """
    parts = [f'<text x="{LEFT}" y="14">{escape_text(row["question"])}</text>']
    x, y, corrections = LEFT, TOP, list[str]()
    for text, ghost, reward in zip(row["tokens"], row["ghosts"], row["rewards"], strict=True):
        shown = text.rstrip("\n")
        size = MONO * max(len(shown), 1)
        if x > LEFT and x + size > WIDTH - LEFT:
            parts += corrected(x, y, corrections)
            x, y, corrections = LEFT, y + LINE, []
        if shown:
            parts += token(x, y, size, shown, ghost, reward)
            x += size
        if ghost is not None:
            corrections.append(f"{ghost.strip() or repr(ghost)} (R = {reward:+.1f})".replace("-", "\u2212"))
        if text != shown:
            parts += corrected(x, y, corrections)
            x, y, corrections = LEFT, y + LINE, []
    parts += corrected(x, y, corrections)
    about = "A reply of the student, each token coloured by its reward, and the ghost's token where it is another one."
    return svg(round(y + (LINE if x > LEFT else 0)), about, parts)


def token(x: float, y: float, size: float, text: str, ghost: str | None, reward: float) -> list[str]:
    """Return a token's box and text. It is underlined if the ghost proposes another one."""
    box = f'x="{x:.1f}" y="{y:.1f}" width="{size:.1f}" height="20" rx="3"'
    place = f'x="{x + size / 2:.1f}" y="{y + 15:.1f}" text-anchor="middle" class="strong"'
    look = "font-family: monospace; font-size: 15px; stroke: none" + ("; text-decoration: underline" if ghost else "")
    fill = f'<rect {box} fill="{colour_of(reward)}"/>' if reward else ""
    return [fill, f'<text {place} style="{look}">{escape_text(text)}</text>']


def corrected(x: float, y: float, corrections: Sequence[str]) -> list[str]:
    """Return the ghost's tokens of a line, behind it."""
    text = f"ghost: {', '.join(corrections)}"
    if not corrections or x + 14 + LETTER * len(text) > WIDTH:
        return []
    return [f'<text x="{x + 14:.1f}" y="{y + 14:.1f}">{escape_text(text)}</text>']
