"""The thought in a reply: the marks that reasoning models write around it."""

from __future__ import annotations

import dataclasses
import re

MARKS = (
    ("<think>", "</think>"),  # DeepSeek-R1, Qwen3, GLM, SmolLM3
    ("<thinking>", "</thinking>"),
    ("<thought>", "</thought>"),
    ("<reasoning>", "</reasoning>"),
    ("<seed:think>", "</seed:think>"),  # Seed-OSS
    ("[THINK]", "[/THINK]"),  # Magistral
    ("\u25c1think\u25b7", "\u25c1/think\u25b7"),  # Kimi
    ("<|begin_of_thought|>", "<|end_of_thought|>"),  # OpenThoughts
    ("<|START_THINKING|>", "<|END_THINKING|>"),  # Command A
    ("<|channel|>analysis<|message|>", "<|end|>"),  # gpt-oss
)
"""(opening, closing) marks. The opening one may be missing: many templates write it into the prompt."""
AROUND_ANSWER = re.compile(
    r"^\s*(?:<answer>(?!.*</answer>)|<\|begin_of_solution\|>|<\|START_RESPONSE\|>|<\|start\|>assistant)?"
    r"\s*(?:<\|channel\|>final<\|message\|>)?"
    r"|(?:<\|end_of_solution\|>|<\|END_RESPONSE\|>|<\|return\|>)\s*$",
    re.DOTALL,
)
"""Marks around the text after the thought."""


@dataclasses.dataclass(frozen=True)
class Thought:
    """A reply in two parts.

    Attributes:
        thought: the text between the marks; empty without marks.
        text: the text after the thought; the whole reply without marks; empty if the thought never ends.
        marked: whether the reply has marks.
        unclosed: whether the thought never ends.
    """

    thought: str
    text: str
    marked: bool = False
    unclosed: bool = False


def split_thought(text: str) -> Thought:
    """Split a reply into its thought and the text after it.

    The last closing mark ends the thought. A reply that opens a thought and never closes it has no text.

    Example:
        >>> split_thought("<think>2 + 3 is 5.</think>The sum is 5.")
        Thought(thought='2 + 3 is 5.', text='The sum is 5.', marked=True, unclosed=False)
        >>> split_thought("<think>2 + 3 is").unclosed, split_thought("5").marked
        (True, False)
    """
    for opening, closing in MARKS:
        before, closed, after = text.rpartition(closing)
        if closed and (opening in before or opening == MARKS[0][0]) and opening not in after:
            return Thought(before.replace(opening, "").strip(), bare_reply(after), marked=True)
        if opening in (after if closed else text):
            return Thought(text.replace(opening, "").strip(), "", marked=True, unclosed=True)
    return Thought("", bare_reply(text))


def bare_reply(text: str) -> str:
    """Return the text without the marks around it."""
    return AROUND_ANSWER.sub("", text).strip()
