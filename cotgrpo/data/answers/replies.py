"""Whole replies and whole solutions: the steps, and the final answer in them."""

from __future__ import annotations

import functools
import re

from cotgrpo.data.answers.characters import same_length
from cotgrpo.data.answers.extraction import PHRASE, SENTENCE_END, Found, find_answer, without_note
from cotgrpo.data.answers.numerals import NUMBER_IN_TEXT, WORDS_IN_TEXT
from cotgrpo.data.answers.thoughts import split_thought

LONGEST_BARE_ANSWER = 200
"""Characters of a text in one line that may be an answer as a whole."""
MOST_WORDS, MOST_IDEOGRAPHS = 12, 30
"""A longer text without a mark of its answer is prose."""
MOST_MARK_WORDS = 6
"""Words before the answer in a line that says nothing else: `So, the final answer is`."""
REMEMBERED_GOLDS = 1024
"""Right answers that are kept: several replies to a question are graded by one."""
IDEOGRAPH = re.compile("[\u2e80-\u9fff\u3040-\u30ff\uac00-\ud7af]")


def split_reply(text: str) -> tuple[str, str | None]:
    r"""Split a whole reply into its steps and its answer.

    The steps are the thought in marks, if there is one; else the text before `####`; else the whole text. The answer is
    the one that `extract_answer` finds. After a thought, it may also be a text of one line as a whole.

    Args:
        text: a reply, with or without a thought in marks.

    Returns:
        (rationale, answer). The answer is None if the reply has none, or a thought that never ends. The rationale is
        empty if the reply is nothing but an answer.

    Example:
        >>> split_reply("2 + 3 = 5\n#### 5"), split_reply("<think>2 + 3 = 5</think>Five."), split_reply("5")
        (('2 + 3 = 5', '5'), ('2 + 3 = 5', 'Five'), ('', '5'))
    """
    reply = split_thought(text)
    if reply.unclosed:
        return reply.thought, None
    found = find_answer(reply.text)
    answer = None if found is None else found.answer
    if reply.marked:
        bare = reply.text if "\n" not in reply.text and len(reply.text) <= LONGEST_BARE_ANSWER else ""
        return reply.thought, answer or bare or None
    if found is not None and found.kind == "hashes":
        return reply.text[: found.start].strip(), answer
    if found is not None and found.kind in ("box", "tag", "phrase"):
        steps, _, last = reply.text.rstrip().rpartition("\n")
        if steps.strip() and found.start > len(steps) and is_bare_line(last, found):
            return steps.strip(), answer
    return ("" if answer == reply.text.strip(" .*$\n") else reply.text), answer


def is_bare_line(line: str, found: Found) -> bool:
    r"""Return whether a line is nothing but an answer and its mark: `The answer is 7.`, `\boxed{7}`."""
    before, _, after = same_length(line).rpartition(same_length(found.answer))
    words = re.findall(r"\w+", before.replace("\\boxed", ""))
    announced = not words or (PHRASE.search(before) is not None and len(words) <= MOST_MARK_WORDS)
    return announced and not re.search(r"\w", after) and not re.search("[0-9]", before)


@functools.lru_cache(REMEMBERED_GOLDS)
def gold_answer(text: str) -> str | None:
    """Return the final answer in a right answer that may be a whole solution; None for prose without an answer.

    A short text is the answer as it is. In prose, the answer stands after a mark that `extract_answer` knows, or it is
    the last number of the last sentence.

    Example:
        >>> gold_answer("10 apples"), gold_answer("The sum is 31. Therefore the answer is 31.")
        ('10 apples', '31')
        >>> gold_answer("It depends on many things. We cannot know them.") is None
        True
    """
    reply = split_thought(text)
    if reply.unclosed:
        return None
    found = find_answer(reply.text)
    if found is not None and found.kind != "number":
        return found.answer
    if not is_prose(reply.text):
        return reply.text or None
    sentences = [part for part in SENTENCE_END.split(without_note(same_length(reply.text))) if re.search(r"\w", part)]
    last = sentences[-1] if sentences else ""
    has_number = NUMBER_IN_TEXT.search(last) is not None or WORDS_IN_TEXT.search(last) is not None
    return found.answer if found is not None and has_number else None


def is_prose(text: str) -> bool:
    """Return whether a text is longer than an answer: several lines or sentences, or many words."""
    sentences = [part for part in SENTENCE_END.split(same_length(text)) if part.strip()]
    long = len(text.split()) > MOST_WORDS or len(IDEOGRAPH.findall(text)) > MOST_IDEOGRAPHS
    return long or "\n" in text.strip() or (len(sentences) > 1 and len(text.split()) > 4)
