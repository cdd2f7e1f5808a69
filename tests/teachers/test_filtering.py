"""Verdicts on a teacher's replies, and the filters that choose among right ones."""

from __future__ import annotations

import json

import pytest

from cotgrpo.data.questions import Question
from cotgrpo.data.sources import DataError
from cotgrpo.teachers.decontamination import TestQuestions
from cotgrpo.teachers.endpoint import TeacherReply
from cotgrpo.teachers.filtering import (
    Candidate,
    Judge,
    commonest,
    distinct,
    load_check,
    majority,
    most_diverse,
    parts_of,
    shortest,
)

QUESTION = Question("What is 3 + 4?", "7", source="rows:1", id="q", row={"gold": "7", "level": 2})


@pytest.mark.parametrize(
    ("text", "reasoning", "parts"),
    [
        ("3 + 4 = 7\n#### 7", "", ("3 + 4 = 7", "7")),
        ("3 + 4 = 7, so it is 7.", "", ("3 + 4 = 7, so it is 7.", "7")),
        ("Add.\n#### Sum\nIt is \\boxed{7}", "", ("Add.\n#### Sum\nIt is \\boxed{7}", "7")),
        ("#### 7", "", ("", "7")),
        ("Who knows", "", ("Who knows", None)),
        ("It is \\boxed{7}.", "Let me add 3.", ("Let me add 3.", "7")),
        ("Paris", "A city.", ("A city.", "Paris")),
        ("", "I think.", ("I think.", None)),
        ("<think>3 and 4</think>\nThe answer is 7.", "", ("3 and 4", "7")),
        ("Well.\n\nIt could be", "Hm.", ("Hm.", None)),
    ],
)
def test_parts_of_a_reply(text: str, reasoning: str, parts: tuple[str, str | None]) -> None:
    assert parts_of(TeacherReply(text, reasoning)) == parts


@pytest.mark.parametrize(
    ("reply", "reason"),
    [
        (TeacherReply("Add: 7"), "correct"),
        (TeacherReply("Add: 7.0", finish_reason="stop"), "correct"),
        (TeacherReply("Add: 8"), "wrong answer"),
        (TeacherReply("Add: 7", finish_reason="length"), "truncated"),
        (TeacherReply("", "I thought and thought", finish_reason="length"), "truncated"),
        (TeacherReply("I\u2019m sorry, I cannot."), "refused"),
        (TeacherReply("I can't add, but it is 7"), "correct"),
        (TeacherReply("", refusal="No."), "refused"),
        (TeacherReply("7", finish_reason="content_filter"), "refused"),
        (TeacherReply("No idea"), "unparsable"),
        (TeacherReply("#### 7"), "unparsable"),
        (TeacherReply("Take three apples and add four apples: 7"), "contaminated"),
    ],
)
def test_verdicts(reply: TeacherReply, reason: str) -> None:
    verdict = Judge(test=TestQuestions(["Now take three apples and add"], n=5))(QUESTION, reply)
    assert verdict.reason == reason and verdict.accepted == (reason == "correct")


def test_checks_and_questions_without_gold() -> None:
    judge = Judge()
    other = Question(QUESTION.question, "")
    assert judge(other, TeacherReply("Add: 7")).reason == "unverified"
    judge = Judge(lambda row, rationale, answer: len(rationale) > 1 / (row["level"] - 2 + len(answer) - 1))
    assert judge(QUESTION, TeacherReply("Sum: 70")).reason == "correct"
    assert judge(QUESTION, TeacherReply("7 + 0 =\n#### 7")).reason == "check failed"
    assert judge(QUESTION, TeacherReply("7 + 0 =\n#### 7")).detail == "ZeroDivisionError: division by zero"


def test_load_check() -> None:
    assert load_check("json:dumps") is json.dumps
    for name, message in (
        ("no_such_module:f", "no_such_module"),
        ("json:no", "no attribute"),
        ("json:__doc__", "must be a function"),
    ):
        with pytest.raises(DataError, match=message):
            load_check(name)


def test_distinct() -> None:
    candidates = [Candidate(0, "Add:  it", "7"), Candidate(1, "Add: it", "7"), Candidate(2, "Add: it", "8")]
    assert [c.number for c in distinct(candidates)] == [0, 2]


def test_majority() -> None:
    for answers, chosen in (
        (["5", "7", "5.0", "6"], [0, 2]),
        ([], []),
        (["5"], []),
        (["5", "5", "7", "7.0"], []),
        (["1", "1", "1"], [0, 1, 2]),
    ):
        candidates = [Candidate(number, "so", answer) for number, answer in enumerate(answers)]
        assert [c.number for c in majority(candidates)] == chosen


def test_shortest_and_most_diverse() -> None:
    texts = ["a b c d e f g", "a b c d e f", "a b c d e h", "x y z u v w q p"]
    candidates = [Candidate(number, text, "1") for number, text in enumerate(texts)]
    assert [c.number for c in shortest(candidates, 2)] == [1, 2]
    # Trigrams in common with the shortest (1): of 0, 4 of 5; of 2, 3 of 5; of 3, none.
    assert [c.number for c in most_diverse(candidates, 4)] == [1, 3, 2, 0]
    assert most_diverse(candidates[:1], 3) == candidates[:1] and most_diverse([], 2) == []


def test_commonest() -> None:
    pairs = [("a", ""), ("b", "x"), ("b", "y"), ("c", ""), ("a", "late"), ("a", "")]
    assert commonest(pairs, 2) == ["3 x a (late)", "2 x b (x)"]
