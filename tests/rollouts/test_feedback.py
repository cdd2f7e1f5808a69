"""What a self-teacher reads of the verdict on a reply: the words, and a prompt that fits."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from cotgrpo.data.questions import Question
from cotgrpo.evaluation.accuracy import Reply
from cotgrpo.rollouts.feedback import feedback_on, fitted_prompt
from cotgrpo.rollouts.rollouts import RolloutPrompt

QUESTION = RolloutPrompt(Question("2 + 2?", "4"), np.array([1, 2], np.int32))


@pytest.mark.parametrize(
    ("answer", "correct", "finished", "message", "want"),
    [
        ("5", False, True, "", "The answer 5 is wrong."),
        ("4", True, True, "", "The answer 4 is right."),
        (None, False, True, "", "The reply has no answer."),
        (None, False, False, "", "The reply was cut off before its answer."),
        ("5", False, True, "2 + 2 is even.", "2 + 2 is even."),
    ],
)
def test_the_verdict_in_words(answer: Any, correct: bool, finished: bool, message: str, want: str) -> None:
    reply = Reply("2 + 2?", "4", f"so <sep> {answer}", answer, correct, finished, message=message)
    assert feedback_on(reply) == want


@pytest.mark.parametrize(("reply", "message"), [("r" * 200, "m" * 5), ("r" * 5, "m" * 200), ("r" * 90, "m" * 90)])
def test_a_prompt_that_is_too_long_loses_the_ends_of_its_texts(reply: str, message: str) -> None:
    seen: list[tuple[str, str]] = []

    def prompt_with(question: RolloutPrompt, reply: str, message: str) -> np.ndarray:
        seen.append((reply, message))
        return np.frombuffer(f"{question.question.question}{reply}{message}".encode(), np.uint8).astype(np.int32)

    assert len(prompt_with(QUESTION, "", "")) == 6
    tokens = fitted_prompt(prompt_with, QUESTION, reply, message, 100)
    last_reply, last_message = seen[-1]
    assert 60 < len(tokens) <= 100 and reply.startswith(last_reply) and message.startswith(last_message)
    assert min(len(last_reply), len(last_message)) == min(len(reply), len(message), 50) or len(reply) == len(message)
    whole = fitted_prompt(prompt_with, QUESTION, reply, message, 500)
    assert len(whole) == 6 + len(reply) + len(message)
