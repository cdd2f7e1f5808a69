"""Parsed rows: every field once, and the reply of a known mistake may be unusable."""

from __future__ import annotations

from typing import Any

import pytest

from cotgrpo.data.questions import question_of
from cotgrpo.data.rows import Row, parse_row
from cotgrpo.data.sources import DataError
from cotgrpo.data.triples import triple_of, triples_in

REPLY = {"question": "q", "rationale": "r", "answer": "42"}


@pytest.mark.parametrize(
    ("row", "gold", "correct"),
    [
        (REPLY, "", True),
        (REPLY | {"gold": 42.0}, "42.0", True),
        (REPLY | {"gold": "So\n#### 42"}, "42", True),
        (REPLY | {"gold": "41"}, "41", False),
        (REPLY | {"gold": "41", "correct": True}, "41", True),
        (REPLY | {"correct": False}, "", False),
        ({"question": "q", "rationale": "r", "final_answer": 42}, "", True),
        ({"prompt": "q", "response": "r\n#### 42", "gold": "42"}, "42", True),
        ({"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "r</think>42"}]}, "", True),
    ],
)
def test_fields_and_grade(row: dict[str, Any], gold: str, correct: bool) -> None:
    parsed = parse_row(row, "f:1")
    assert (parsed.question, parsed.rationale, parsed.answer, parsed.gold) == ("q", "r", "42", gold)
    assert parsed.grade.correct == correct and parsed.fields == row and not parsed.not_a_triple
    question = question_of(parsed)
    assert question.gold == (gold or ("" if row.get("correct") is False else "42")) and question.row == row
    assert question.reference == (triple_of(parsed) if correct else None)


@pytest.mark.parametrize("answer", [None, float("nan"), ["42"], " ", "\ud800"])
def test_a_known_mistake_may_have_any_answer(answer: Any) -> None:
    row = parse_row(REPLY | {"answer": answer, "gold": "42", "correct": False}, "f:1")
    triples, report = triples_in([row])
    assert triples == [] and report.dropped == {"wrong answer": 1} and question_of(row).gold == "42"
    with pytest.raises(DataError, match=r"f:1: .*'answer'"):
        triples_in([row], keep_incorrect=True)


def test_a_row_without_a_reply_is_a_question() -> None:
    row = parse_row({"question": "q", "answer": "42"}, "f:1")
    assert isinstance(row, Row) and question_of(row).gold == "42" and question_of(row).reference is None
    with pytest.raises(DataError, match="f:1: no rationale: expected a field rationale or reasoning"):
        triple_of(row)
