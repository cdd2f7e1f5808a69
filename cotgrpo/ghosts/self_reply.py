"""The student as its own ghost: of several replies to a question, drawn at other temperatures, the best of those that are right.

GRPO here is GhostRespond Policy Optimization, not Group Relative. The replies are text, and serve as a teacher's text does.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from cotgrpo.data.answers import answers_match, extract_answer
from cotgrpo.data.sources import DataError
from cotgrpo.data.template import AnyTemplate
from cotgrpo.data.triples import Triple

if TYPE_CHECKING:
    import numpy as np


@dataclasses.dataclass(frozen=True)
class Candidate:
    """One reply of the student to a question.

    Attributes:
        ids: its tokens, the end included.
        log_prob: the mean log-probability of its tokens, in nats.
        finished: whether it ended by itself.
    """

    ids: np.ndarray
    log_prob: float
    finished: bool


def best_reply(template: AnyTemplate, question: Triple, candidates: Iterable[Candidate]) -> Triple | None:
    """The likeliest reply that ends by itself, answers what the row answers, and can be rendered as training text; None where there is none.

    Args:
        template: takes replies apart, and must give the text back as it was read.
        question: the row: its question, and its answer as the gold one.
        candidates: replies to it.
    """
    right = []
    for candidate in candidates:
        rationale, answer = template.split_reply(candidate.ids)
        if not candidate.finished or answer is None:
            continue
        if not (answers_match(answer, question.answer) or answers_match(extract_answer(answer), question.answer)):
            continue
        reply = dataclasses.replace(question, rationale=rationale, answer=answer)
        if renders(template, reply):
            right.append((candidate.log_prob, reply))
    return max(right, key=lambda found: found[0])[1] if right else None


def renders(template: AnyTemplate, triple: Triple) -> bool:
    """Whether the template can write the triple: a reply may hold its marks, or nothing."""
    try:
        template.encode(triple)
    except DataError:
        return False
    return True


def best_replies(
    template: AnyTemplate, questions: Sequence[Triple], candidates: Sequence[Sequence[Candidate]]
) -> list[Triple]:
    """`best_reply` of each question that has one, in the order of the questions."""
    found = [best_reply(template, *both) for both in zip(questions, candidates, strict=True)]
    return [reply for reply in found if reply is not None]
