"""The student as its own ghost: the best correct reply among several to a question, sampled at other temperatures.

GRPO here is GhostRespond Policy Optimization, not Group Relative. The replies are text, used as a teacher's text is.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from cotgrpo.data.questions import place_of
from cotgrpo.data.sources import DataError
from cotgrpo.data.template import AnyTemplate
from cotgrpo.data.triples import Triple, row_of

if TYPE_CHECKING:
    import numpy as np


@dataclasses.dataclass(frozen=True)
class SampledReply:
    """One reply of the student to a question.

    Attributes:
        ids: its tokens, the end included.
        log_prob: the mean log-probability of its tokens, in nats.
        finished: whether it ended with a stop token.
    """

    ids: np.ndarray
    log_prob: float
    finished: bool


def best_reply(template: AnyTemplate, question: Triple, replies: Iterable[SampledReply]) -> Triple | None:
    """Return the likeliest correct reply that has finished and can be rendered as training text, or None.

    With a reward of the user's own it is the one with the highest reward. The likeliest wins a tie.

    Args:
        template: splits replies, and must give the text back unchanged.
        question: the row; its answer is the right one.
        replies: the student's replies.
    """
    correct = []
    for reply in replies:
        rationale, answer = template.split_reply(reply.ids)
        if not reply.finished or answer is None:
            continue
        row = question.row or row_of(question)
        verdict = template.verifier(template.decode(reply.ids), answer, question.answer, row, place_of(question))
        if not verdict.correct:
            continue
        if question.context:  # rows of several turns are whole replies
            rationale, answer = "", template.decode(reply.ids).strip()
        triple = dataclasses.replace(question, rationale=rationale, answer=answer)
        if can_render(template, triple):
            correct.append((verdict.reward or 0.0, reply.log_prob, triple))
    return max(correct, key=lambda found: found[:2])[2] if correct else None


def can_render(template: AnyTemplate, triple: Triple) -> bool:
    """Return whether the template can write the triple: a reply may hold its marks, or be empty."""
    try:
        template.encode(triple)
    except DataError:
        return False
    return True


def best_replies(
    template: AnyTemplate, questions: Sequence[Triple], replies: Sequence[Sequence[SampledReply]]
) -> list[Triple]:
    """Return `best_reply` of each question that has one, in the order of the questions."""
    found = [best_reply(template, *both) for both in zip(questions, replies, strict=True)]
    return [triple for triple in found if triple is not None]
