"""Questions for a teacher, with the right answer where it is known."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from cotgrpo.data.triples import ALIASES, DataError, DropReport, rows_of, split_reply, squeeze

GOLD_KEYS = ("gold", "answer", "final_answer")
"""Row keys that may hold the right answer; the first one present counts. A `gold` stands before an `answer`, which may be another teacher's."""


@dataclasses.dataclass(frozen=True)
class Question:
    """One row.

    Attributes:
        id: the row's own, or its number.
        text: what is asked.
        gold: the right answer, or None.
        row: as it was read.
        source: "file:line".
    """

    id: str
    text: str
    gold: str | None
    row: dict[str, Any]
    source: str


def read_questions(
    sources: str | Path | Sequence[str | Path], *, split: str | None = None
) -> tuple[list[Question], DropReport]:
    """Reads questions from JSONL or Parquet files or hub data sets.

    A row holds the question in `question`, `prompt` or `problem`, and the right answer, if it is known, in `gold`, `answer` or `final_answer`; where
    that is a whole solution with `#### 42` at its end, what follows the mark.

    Returns:
        The questions in order, and the report of those left out: another split, or the text of an earlier one.

    Raises:
        DataError: a file that is not there or not readable, a row without a question, two questions of one id, or no question at all.
    """
    names = [sources] if isinstance(sources, str | Path) else list(sources)
    report = DropReport()
    questions: list[Question] = []
    texts: set[str] = set()
    ids: dict[str, str] = {}
    for place, row in rows_of(names, split):
        report.read += 1
        if isinstance(row, DataError):
            raise row
        if not isinstance(row, Mapping):
            raise DataError(f"{place}: expected a JSON object with a question, got {type(row).__name__}.")
        if split is not None and row.get("split") not in (None, split):
            report.drop("other split", f"{place}: {row['split']!r}")
            continue
        question = question_of(dict(row), place, len(questions))
        if squeeze(question.text) in texts:
            report.drop("duplicate", place)
            continue
        if question.id in ids:
            raise DataError(
                f"{place}: the id {question.id!r} is that of {ids[question.id]} too. Give each row its own."
            )
        ids[question.id] = place
        texts.add(squeeze(question.text))
        questions.append(question)
    if not questions:
        raise DataError(f"No question in {', '.join(map(str, names))}. {report}")
    return questions, report


def question_of(row: dict[str, Any], place: str, number: int) -> Question:
    """The question in a row. Raises DataError where it is missing or no text."""
    text = next((row[key] for key in ALIASES["question"] if row.get(key) is not None), None)
    if not isinstance(text, str) or not text.strip():
        keys = ", ".join(map(str, row)) or "nothing"
        raise DataError(
            f"{place}: expected a question as text in one of {', '.join(ALIASES['question'])}; the row has {keys}. Add it."
        )
    gold = next((row[key] for key in GOLD_KEYS if row.get(key) is not None), None)
    if isinstance(gold, str):
        parts = split_reply(gold)
        gold = (parts[1] if parts is not None else gold).strip() or None
    elif gold is not None and (type(gold) is bool or not isinstance(gold, int | float)):
        raise DataError(f"{place}: the right answer must be text or a number, got {type(gold).__name__} {gold!r:.40}.")
    return Question(
        id=str(row["id"]) if row.get("id") is not None else str(number),
        text=text.strip(),
        gold=None if gold is None else str(gold),
        row=row,
        source=place,
    )
