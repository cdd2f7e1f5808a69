"""The right answer of a row, which may be a whole solution."""

from __future__ import annotations

from collections.abc import Sequence

from cotgrpo.data.answers import extract_answer, gold_answer, grade, last_box
from cotgrpo.data.layouts.columns import Named
from cotgrpo.data.layouts.values import Note, parse_text, squeeze
from cotgrpo.data.sources import DataError

LEAST_WORDS = 3
"""Words of a sentence."""


def read_gold(golds: Sequence[Named], place: str, notes: list[Note]) -> tuple[str, str]:
    """Return the right answer, and why there is none; either may be empty.

    Raises:
        DataError: a column that is not text, or two right answers that disagree.
    """
    texts = [(name, parse_text(value, name, place, numbers=True)) for name, value in golds]
    read = [(name, text, answer) for name, text in texts if (answer := read_answer(text)) is not None]
    if not read:
        return "", not_an_answer(*texts[0], place) if texts else ""
    name, text, gold = read[0]
    for other, other_text, answer in read[1:]:
        if not (squeeze(answer) == squeeze(gold) or grade(other_text, gold).correct or grade(text, answer).correct):
            raise DataError(
                f"{place}: two right answers disagree: {name!r} has {gold!r:.40}, {other!r} has {answer!r:.40}. "
                f"Remove one, or name the right one: --data.columns '{{gold: {name}}}'."
            )
    if gold != text and not is_marked(text):
        notes.append(prose_note("gold", place, gold, text))
    return gold, ""


def read_answer(text: str) -> str | None:
    """Return the answer in a right answer: as `gold_answer`; of a sentence such as `Tom has 7 apples.`, the number."""
    answer = gold_answer(text)
    words = sum(any(map(str.isalpha, word)) for word in text.split())
    is_sentence = (text.endswith(".") and words >= LEAST_WORDS) or text.endswith("。")
    return extract_answer(text) or answer if answer == text and is_sentence else answer


def is_marked(text: str) -> bool:
    r"""Return whether a text marks its answer, in a box or after `####`."""
    return "####" in text or last_box(text) is not None


def states_answer(text: str) -> bool:
    """Return whether a text marks its answer or is nothing but an answer."""
    return is_marked(text) or gold_answer(text) == text.strip()


def not_an_answer(name: str, text: str, place: str) -> str:
    """Return the error for a right answer that is prose without an answer."""
    return (
        f"{place}: field {name!r} is the right answer, but no answer is found in it: {text!r:.60}. Write the answer "
        "alone, or after '####' or in \\boxed{} at its end."
    )


def prose_note(what: str, place: str, answer: str, text: str) -> Note:
    """Return the note of an answer, or of a gold, that was found in prose."""
    return f"{what} read from prose", f"{place}: {answer!r} of {text[:60]!r}"
