"""Held-out questions: each has the right answer, for exact match, and a reference reply, for the loss, only where there is a correct one.

A teacher's mistake is no reason to ask fewer questions: without its hard ones, a test set shows a student as better than it is.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Literal

from cotgrpo.data.batches import encode_fitting, fits
from cotgrpo.data.sources import DataError, as_list, rows_of
from cotgrpo.data.template import AnyTemplate, Example
from cotgrpo.data.triples import (
    BadRows,
    DropReport,
    Triple,
    check_usable,
    collect,
    correct_flag,
    is_blank,
    is_incorrect,
    parse_fields,
    require_text,
    system_of,
    triple_of,
)


@dataclasses.dataclass(frozen=True)
class Question:
    """One held-out row.

    Attributes:
        question: what is asked.
        gold: the right answer, as text.
        reference: the row's reply, which answers `gold`; None where it has none, or a wrong one.
        source: where it came from, as "file:line".
        system: the row's own system message; empty: none.
    """

    question: str
    gold: str
    reference: Triple | None = None
    source: str = ""
    system: str = ""


def read_questions(
    sources: str | Path | Sequence[str | Path], *, split: str | None = None, bad_rows: BadRows = "error"
) -> tuple[list[Question], DropReport]:
    """Reads held-out questions from the files and data sets that `read_triples` reads, and from rows of a question and an answer alone.

    The right answer is the row's `gold`; without one its `answer`, if `correct` is not false. A row with the text of an earlier one is left out.

    Args:
        sources, split: as in `read_triples`.
        bad_rows: what to do with a row that has no question, no right answer, or fields that cannot be read: as in `read_triples`.

    Returns:
        The questions in order, and the report of what was left out.

    Raises:
        DataError: a file that is not there or not readable, a bad row, or nothing left.
    """
    names = as_list(sources)
    questions, report = questions_in(rows_of(names, split), split=split, bad_rows=bad_rows)
    check_usable(questions, names, report)
    return questions, report


def questions_in(
    rows: Iterable[tuple[str, Any]], *, split: str | None = None, bad_rows: BadRows = "error"
) -> tuple[list[Question], DropReport]:
    """`read_questions` for rows that are read already, as `rows_of` gives them. There may be no question in them."""
    return collect(rows, question_of, split=split, bad_rows=bad_rows, deduplicate=True)


def question_of(row: Any, place: str) -> tuple[Question, Sequence[str]]:
    """The question in one row, and the texts that tell it from another. Raises DataError naming the place, the field and the fix."""
    fields, _ = parse_fields(row, place)
    question = require_text(fields["question"], "question", row, place)
    known_wrong = correct_flag(row, place) is False
    gold = row.get("gold")
    gold = fields["answer"] if gold is None and not known_wrong else gold
    if is_blank(gold):
        raise DataError(f"{place}: no right answer: expected a field gold, or an answer that is correct. Add it.")
    gold = require_text(gold, "gold", row, place)
    rationale, answer = fields["rationale"], fields["answer"]
    reference = None
    if not (known_wrong or is_blank(rationale) or is_blank(answer)):
        triple = triple_of(row, place)
        reference = None if is_incorrect(row, triple) else triple
    system = system_of(fields, row, place)
    return Question(question, gold, reference, place, system), (system, question, gold, str(rationale), str(answer))


def make_held_out(
    questions: Sequence[Question],
    template: AnyTemplate,
    seq_len: int,
    *,
    too_long: Literal["error", "drop"] = "error",
) -> tuple[list[Question], list[Example], dict[str, DropReport]]:
    """What is asked and what the loss is taken of, of the rows that fit into the window.

    A reply that does not fit does not take its question along; a prompt that does not fit has no reply that does.

    Args:
        questions: held-out rows.
        template: renders and masks them.
        seq_len: the window.
        too_long: "error" stops at the first prompt or reference reply that does not fit; "drop" counts it in its report.

    Returns:
        The questions for exact match, the tokenized reference replies for the loss (maybe none), and what was left out of either, as
        "held-out questions" and "held-out replies".

    Raises:
        DataError: a prompt or a reply that does not fit, or no prompt that does.
    """
    asked = DropReport(read=len(questions))
    positions = lambda question: len(template.prompt(question.question, question.system))
    fitting = [q for q in questions if fits(q.source, positions(q), seq_len, too_long, asked, "prompt")]
    if not fitting:
        raise DataError(f"No held-out question fits into {seq_len} positions. {asked}")
    references = [question.reference for question in fitting if question.reference is not None]
    examples, replies = encode_fitting(references, template, seq_len, too_long=too_long)
    replies.read = len(fitting)
    for question in fitting:
        if question.reference is None:
            replies.drop("no correct reply", question.source)
    return fitting, examples, {"held-out questions": asked, "held-out replies": replies}
