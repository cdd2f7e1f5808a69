"""Which of a teacher's replies are right, and which of the right ones become triples."""

from __future__ import annotations

import collections
import dataclasses
import importlib
import re
from collections.abc import Callable, Sequence
from typing import Any

from cotgrpo.data.answers import answers_match, extract_answer, last_box
from cotgrpo.data.triples import DataError, split_reply, squeeze
from cotgrpo.teachers.decontamination import TestQuestions, ngrams, words
from cotgrpo.teachers.endpoint import TeacherReply
from cotgrpo.teachers.questions import Question

Check = Callable[[dict[str, Any], str, str], bool]
"""`check(row, rationale, answer)`: whether a reply is right."""

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
"""Every reason for which a reply is left out."""
REFUSAL = re.compile(
    "\\W*(?:(?:i['\u2019]?m|i am) (?:very |really )?(?:sorry|afraid|unable|not able)|sorry\\b|i (?:can['\u2019]?t|cannot|won['\u2019]?t) |as an ai\\b)",
    re.IGNORECASE,
)
LONGEST_BARE_ANSWER = 200
"""Characters of a reply behind a reasoning field that may be the answer as a whole."""


@dataclasses.dataclass(frozen=True)
class Verdict:
    """What a reply is worth.

    Attributes:
        accepted: whether it may become a triple.
        reason: "correct" or "unverified", or one of `REJECTED`.
        detail: of this reply.
    """

    accepted: bool
    reason: str
    detail: str = ""


@dataclasses.dataclass(frozen=True)
class Candidate:
    """A reply that may become a triple.

    Attributes:
        number: of the candidate, from 0.
        rationale, answer: its parts.
    """

    number: int
    rationale: str
    answer: str


class Judge:
    """Judges replies one by one, each on its own: in whatever order they come, the verdicts are the same.

    Args:
        check: decides instead of the row's right answer; None: the answers are compared, where the row has one.
        test: questions that must not be learned from, or None.
    """

    def __init__(self, check: Check | None = None, test: TestQuestions | None = None) -> None:
        self.check, self.test = check, test

    def __call__(self, question: Question, reply: TeacherReply) -> Verdict:
        """The first that holds: truncated, refused, unparsable, contaminated, wrong; else it is accepted."""
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
        """Whether the answer is right, by the check or the row's own."""
        if self.check is not None:
            try:
                right = self.check(question.row, rationale, answer)
            except Exception as error:  # of somebody else's code, which bad replies may well trip
                return Verdict(False, "check failed", f"{type(error).__name__}: {error}"[:200])
            return Verdict(True, "correct") if right else Verdict(False, "wrong answer", repr(answer)[:80])
        if question.gold is None:
            return Verdict(True, "unverified")
        if answers_match(answer, question.gold):
            return Verdict(True, "correct")
        return Verdict(False, "wrong answer", f"{answer!r:.80}, expected {question.gold!r:.80}")


def parts_of(reply: TeacherReply) -> tuple[str, str | None]:
    r"""(rationale, answer) of a reply; the answer is None where there is none.

    A reasoning model's own field, or `<think>...</think>`, is the rationale, and the answer is looked for in the text behind it, which may be the answer
    as a whole. Else the rationale is what precedes `####` in the last line, and where the answer stands in a box or in a sentence, the whole text.
    """
    rationale, thought, said = reply.text.rpartition("</think>")
    if reply.reasoning or thought:
        said = said.strip()
        bare = said if said and "\n" not in said and len(said) <= LONGEST_BARE_ANSWER else None
        rationale = reply.reasoning or rationale.replace("<think>", "")
        return rationale.strip(), extract_answer(said) or bare
    if last_box(reply.text) is None:
        marked = split_reply(reply.text)
        if marked is not None and marked[1]:
            return marked
    return reply.text, extract_answer(reply.text)


def load_check(name: str) -> Check:
    """The function that "package.module:function" names.

    Raises:
        DataError: there is no such module, or no such function in it.
    """
    module, _, function = name.partition(":")
    try:
        check = importlib.import_module(module)
        for part in function.split("."):
            check = getattr(check, part)
    except (ImportError, AttributeError) as error:
        raise DataError(
            f"verify.check: {name} cannot be loaded ({error}). Expected a module that Python finds from here, and a function in it."
        ) from error
    if not callable(check):
        raise DataError(f"verify.check: {name} is no function, but a {type(check).__name__}.")
    return check


def majority(answers: Sequence[str]) -> list[int]:
    """Which answers are that of the majority: the largest group of answers that match, if it has two or more and no equal.

    Wang et al. 2022, "Self-consistency improves chain of thought reasoning in language models", arXiv:2203.11171.

    Example:
        >>> majority(["5", "7", "5.0"]), majority(["5", "7"])
        ([0, 2], [])
    """
    groups: list[list[int]] = []
    for place, answer in enumerate(answers):
        group = next((group for group in groups if answers_match(answer, answers[group[0]])), None)
        if group is None:
            groups.append([place])
        else:
            group.append(place)
    groups.sort(key=len, reverse=True)
    is_majority = bool(groups) and len(groups[0]) > 1 and (len(groups) == 1 or len(groups[0]) > len(groups[1]))
    return groups[0] if is_majority else []


def distinct(candidates: Sequence[Candidate]) -> list[Candidate]:
    """The candidates without those that say what an earlier one says, white space aside."""
    first: dict[str, Candidate] = {}
    for candidate in candidates:
        first.setdefault(squeeze(f"{candidate.rationale} {candidate.answer}"), candidate)
    return list(first.values())


def shortest(candidates: Sequence[Candidate], count: int) -> list[Candidate]:
    """The `count` candidates of the fewest characters, the earlier of equals."""
    return sorted(candidates, key=lambda candidate: (len(candidate.rationale), candidate.number))[:count]


def most_diverse(candidates: Sequence[Candidate], count: int) -> list[Candidate]:
    """The shortest candidate, and then each time the one that is least like those chosen.

    Two are alike by the Jaccard index of their word trigrams, what both have over what either has, the most alike of those chosen counts, and the shorter of equals wins.
    """
    left = shortest(candidates, len(candidates))
    grams = {c.number: trigrams(c.rationale) for c in left}
    chosen = left[:1]
    left = left[1:]
    while left and len(chosen) < count:
        likeness = [max(jaccard(grams[c.number], grams[other.number]) for other in chosen) for c in left]
        chosen.append(left.pop(likeness.index(min(likeness))))
    return chosen


def trigrams(text: str) -> set[tuple[str, ...]]:
    """Runs of three words; of a shorter text, the whole."""
    tokens = words(text)
    return set(ngrams(tokens, 3)) or {tuple(tokens)}


def jaccard(left: set[Any], right: set[Any]) -> float:
    """The share of what both have in what either has; neither is empty."""
    return len(left & right) / len(left | right)


def commonest(reasons: Sequence[tuple[str, str]], count: int = 10) -> list[str]:
    """The `count` commonest (reason, detail) pairs by reason, each as one line with its number and an example."""
    examples: dict[str, str] = {}
    for reason, detail in reasons:
        examples[reason] = examples.get(reason) or detail
    tally = collections.Counter(reason for reason, _ in reasons)
    return [
        f"{n} x {reason}" + (f" ({examples[reason]})" if examples[reason] else "")
        for reason, n in tally.most_common(count)
    ]
