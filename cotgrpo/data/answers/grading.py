"""The verdict on a reply: whether it gives the right answer."""

from __future__ import annotations

import dataclasses
import re

from cotgrpo.data.answers.comparison import answers_match, bare_text, equation_sides
from cotgrpo.data.answers.extraction import find_answer
from cotgrpo.data.answers.formulas import may_be_formula
from cotgrpo.data.answers.quantities import parse_quantity
from cotgrpo.data.answers.replies import gold_answer
from cotgrpo.data.answers.thoughts import split_thought

LONGEST_ANSWER = 1000
"""Characters of a reply that may be an answer as a whole."""
SHORT_WORD = re.compile(r"(?<![\\\w])(?!(?:sin|cos|tan|log|ln|exp)\b)[^\W\d_]{2,}\s+[\w$]")
"""A word before another one, or before a number: prose, however short: `it is 2`."""
DEEPEST_MARKS = 3
"""An answer may hold a mark of its own: `#### The answer is \\boxed{42}`."""


@dataclasses.dataclass(frozen=True)
class Grade:
    """The result of comparing a reply with the right answer.

    Attributes:
        correct: whether the reply's answer is the right one.
        answer: the answer that was compared last, or None if the reply has none.
        why: the reason in a few words, for reports.
    """

    correct: bool
    answer: str | None
    why: str


def grade(reply: str | None, gold: str) -> Grade:
    """Compare a reply with the right answer. Everything in the package that asks whether a reply is right asks here.

    A reply is right if the text after its thought matches `gold` as it is, or if the answer extracted from it does. The
    verdict on a whole reply, on the part after its thought and on its answer is the same.

    Args:
        reply: a whole reply, or the part that a template takes for the answer; None: the reply has no answer.
        gold: the right answer, or a whole solution that ends in it.

    Example:
        >>> grade("The answer is 42.", "42")
        Grade(correct=True, answer='42', why='the extracted answer matches')
        >>> grade("41", "42").why, grade(None, "42").why
        ("'41', expected '42'", 'no answer')
        >>> grade("<think>2 + 3 is 5.", "5").why
        'the thought never ends'
    """
    if reply is None:
        return Grade(False, None, "no answer")
    thought = split_thought(reply)
    if thought.unclosed:
        return Grade(False, None, "the thought never ends")
    right, text = gold_answer(gold) or gold, thought.text
    if len(text) <= LONGEST_ANSWER and answers_match(text, right):
        return Grade(True, text, "the answer matches")
    answer = None
    for _ in range(DEEPEST_MARKS):
        found = find_answer(text)
        if found is None or found.answer == text or (found.kind == "number" and is_bare_answer(text)):
            break
        answer = found.answer
        if answers_match(answer, right) or (found.whole and answers_match(found.whole, right)):
            return Grade(True, answer, "the extracted answer matches")
        text = answer
    if answer is None and len(text) <= LONGEST_ANSWER and is_bare_answer(text):
        answer = text
    return Grade(False, answer, f"{answer or reply!r:.80}, expected {gold!r:.80}")


def is_bare_answer(text: str) -> bool:
    """Return whether a text is an answer as a whole, so that its last number alone is not: `2x + 42`, `10 oranges`."""
    bare = bare_text(text)
    sides = equation_sides(bare)
    if parse_quantity(bare) is not None or (sides is not None and parse_quantity(sides[1]) is not None):
        return True
    return "=" not in bare and may_be_formula(bare) and SHORT_WORD.search(bare) is None
