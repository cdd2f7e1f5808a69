"""Filters of a teacher's replies: which are right, and which right ones become triples."""

from __future__ import annotations

import collections
import dataclasses
import importlib
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

from cotgrpo.data.answers import answers_match, extract_answer, grade, last_box
from cotgrpo.data.questions import Question
from cotgrpo.data.rows import split_reply, squeeze
from cotgrpo.data.sources import DataError
from cotgrpo.teachers.decontamination import TestQuestions, ngrams, words
from cotgrpo.teachers.endpoint import TeacherReply

Check = Callable[[Mapping[str, Any], str, str], bool]
"""`check(row, rationale, answer)` returns whether a reply is right."""

REJECTED = (
    "wrong answer",
    "unparsable",
    "truncated",
    "refused",
    "duplicate",
    "contaminated",
    "check failed",
    "no majority",
)
"""Every reason to reject a reply."""
REFUSAL = re.compile(
    "\\W*(?:(?:i['\u2019]?m|i am) (?:very |really )?(?:sorry|afraid|unable|not able)|sorry\\b|"
    "i (?:can['\u2019]?t|cannot|won['\u2019]?t) |as an ai\\b)",
    re.IGNORECASE,
)
MAX_BARE_ANSWER = 200
"""Characters of a reply after a reasoning field that may be the answer as a whole."""
T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class Verdict:
    """The judgement of a reply.

    Attributes:
        accepted: whether it may become a triple.
        reason: "correct" or "unverified", or one of `REJECTED`.
        detail: details of this reply.
    """

    accepted: bool
    reason: str
    detail: str = ""


@dataclasses.dataclass(frozen=True)
class Candidate:
    """A reply that may become a triple.

    Attributes:
        number: its number among the replies to a question, from 0.
        rationale, answer: its parts.
    """

    number: int
    rationale: str
    answer: str


class Judge:
    """Judges each reply on its own: the order of replies does not matter.

    Args:
        check: decides instead of the row's right answer; None: answers are compared, if the row has one.
        test: questions that must not be learned from, or None.
    """

    def __init__(self, check: Check | None = None, test: TestQuestions | None = None) -> None:
        self.check, self.test = check, test

    def __call__(self, question: Question, reply: TeacherReply) -> Verdict:
        """Return the first verdict that holds: truncated, refused, unparsable, contaminated, wrong, or accepted."""
        if reply.finish_reason == "length":
            return Verdict(False, "truncated")
        rationale, answer = parts_of(reply)
        refuses = answer is None and REFUSAL.match(reply.text) is not None
        if reply.finish_reason == "content_filter" or reply.refusal or refuses:
            return Verdict(False, "refused", f"{reply.refusal or reply.text:.80}")
        if answer is None or not rationale:
            return Verdict(False, "unparsable", "no answer found" if answer is None else "no rationale")
        overlap = None if self.test is None else self.test.overlap(f"{rationale} {answer}")
        if overlap is not None:
            return Verdict(False, "contaminated", overlap)
        return self.correctness(question, rationale, answer)

    def correctness(self, question: Question, rationale: str, answer: str) -> Verdict:
        """Return whether the answer is right, by the check or the row's right answer."""
        if self.check is not None:
            try:
                right = self.check(question.row, rationale, answer)
            except Exception as error:  # of the user's code, which a bad reply may trip
                return Verdict(False, "check failed", f"{type(error).__name__}: {error}"[:200])
            return Verdict(True, "correct") if right else Verdict(False, "wrong answer", repr(answer)[:80])
        if not question.gold:
            return Verdict(True, "unverified")
        graded = grade(answer, question.gold)
        return Verdict(True, "correct") if graded.correct else Verdict(False, "wrong answer", graded.why)


def parts_of(reply: TeacherReply) -> tuple[str, str | None]:
    r"""Return rationale and answer of a reply; the answer is None if there is none.

    The rationale is a reasoning field or `<think>...</think>`, if there is one. The answer is then extracted from the
    text after it, or is that text as a whole. Otherwise the rationale is the text before `####` in the last line; of a
    reply with its answer in a box or a sentence, it is the whole text.
    """
    rationale, thought, text = reply.text.rpartition("</think>")
    if reply.reasoning or thought:
        text = text.strip()
        bare = text if text and "\n" not in text and len(text) <= MAX_BARE_ANSWER else None
        rationale = reply.reasoning or rationale.replace("<think>", "")
        return rationale.strip(), extract_answer(text) or bare
    if last_box(reply.text) is None:
        marked = split_reply(reply.text)
        if marked is not None and marked[1]:
            return marked
    return reply.text, extract_answer(reply.text)


def load_check(name: str) -> Check:
    """Import the function "package.module:function".

    Raises:
        DataError: the module or the function is missing, or it is not a function.
    """
    module, _, function = name.partition(":")
    try:
        found: object = importlib.import_module(module)
        for part in function.split("."):
            found = getattr(found, part)
    except (ImportError, AttributeError) as error:
        raise DataError(
            f"verify.check: {name} cannot be loaded ({error}). Expected a module that Python finds from here, and a "
            "function in it."
        ) from error
    if not callable(found):
        raise DataError(f"verify.check: {name} must be a function, got a {type(found).__name__}.")
    return found


def majority(candidates: Sequence[Candidate]) -> list[Candidate]:
    """Return the largest group of candidates with matching answers, if it has two or more and no equal.

    Wang et al. 2022, "Self-consistency improves chain of thought reasoning in language models", arXiv:2203.11171.
    """
    groups: list[list[Candidate]] = []
    for candidate in candidates:
        group = next((group for group in groups if answers_match(candidate.answer, group[0].answer)), None)
        if group is None:
            groups.append([candidate])
        else:
            group.append(candidate)
    groups.sort(key=len, reverse=True)
    is_majority = bool(groups) and len(groups[0]) > 1 and (len(groups) == 1 or len(groups[0]) > len(groups[1]))
    return groups[0] if is_majority else []


def distinct(candidates: Sequence[Candidate]) -> list[Candidate]:
    """Return the candidates without those that repeat an earlier one, white space aside."""
    first: dict[str, Candidate] = {}
    for candidate in candidates:
        first.setdefault(squeeze(f"{candidate.rationale} {candidate.answer}"), candidate)
    return list(first.values())


def shortest(candidates: Sequence[Candidate], count: int) -> list[Candidate]:
    """Return the `count` candidates with the fewest characters; the earlier one wins a tie."""
    return sorted(candidates, key=lambda candidate: (len(candidate.rationale), candidate.number))[:count]


def most_diverse(candidates: Sequence[Candidate], count: int) -> list[Candidate]:
    """Return the shortest candidate, then repeatedly the one least similar to those chosen, up to `count`.

    Similarity is the Jaccard index of word trigrams, |A and B| / |A or B|, to the most similar of those chosen. The
    shorter candidate wins a tie.
    """
    left = shortest(candidates, len(candidates))
    grams = {c.number: trigrams(c.rationale) for c in left}
    chosen = left[:1]
    left = left[1:]
    while left and len(chosen) < count:
        similarity = [max(jaccard(grams[c.number], grams[other.number]) for other in chosen) for c in left]
        chosen.append(left.pop(similarity.index(min(similarity))))
    return chosen


def trigrams(text: str) -> set[tuple[str, ...]]:
    """Return the runs of three words; a shorter text is one run."""
    tokens = words(text)
    return set(ngrams(tokens, 3)) or {tuple(tokens)}


def jaccard(left: set[T], right: set[T]) -> float:
    """Return the Jaccard index of two sets that are not empty."""
    return len(left & right) / len(left | right)


def commonest(reasons: Sequence[tuple[str, str]], count: int = 10) -> list[str]:
    """Return a line for each of the `count` commonest reasons, with its number and an example.

    Args:
        reasons: (reason, detail) pairs.
        count: most lines.
    """
    examples: dict[str, str] = {}
    for reason, detail in reasons:
        examples[reason] = examples.get(reason) or detail
    tally = collections.Counter(reason for reason, _ in reasons)
    return [
        f"{n} x {reason}" + (f" ({examples[reason]})" if examples[reason] else "")
        for reason, n in tally.most_common(count)
    ]
