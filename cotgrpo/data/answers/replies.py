"""Whole replies and whole solutions: the steps, and the final answer in them."""

from __future__ import annotations

from cotgrpo.data.answers.extraction import extract_answer, last_box
from cotgrpo.data.answers.thoughts import split_thought

LONGEST_BARE_ANSWER = 200
"""Characters of a text in one line that may be an answer as a whole."""


def split_reply(text: str) -> tuple[str, str | None]:
    """Split a whole reply into its steps and its answer.

    Args:
        text: a reply, with or without a thought in marks.

    Returns:
        (rationale, answer). The answer is None if the reply has none. The rationale is empty if the reply is nothing
        but an answer.
    """
    reply = split_thought(text)
    if reply.unclosed:
        return reply.thought, None
    bare = reply.text if reply.text and "\n" not in reply.text and len(reply.text) <= LONGEST_BARE_ANSWER else None
    if reply.marked:
        return reply.thought, extract_answer(reply.text) or bare
    if last_box(reply.text) is None:
        steps, found, answer = reply.text.rpartition("####")
        if found and answer.strip() and "\n" not in answer.strip():  # `#### Step 1` may be a heading
            return steps.strip(), answer.strip()
    return reply.text, extract_answer(reply.text)


def gold_answer(text: str) -> str | None:
    """Return the final answer in a right answer, which may be a whole solution; None for prose without an answer."""
    reply = split_thought(text).text
    if len(reply) <= LONGEST_BARE_ANSWER and "\n" not in reply and "####" not in reply and last_box(reply) is None:
        return reply or None
    return extract_answer(reply)
