"""Questions: with the right answer for exact match, and a reference reply for the loss if there is a correct one.

A row with a wrong reply still gives a question: a test set without its hard questions overstates the student.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

from cotgrpo.data.answers import gold_answer, split_thought
from cotgrpo.data.batches import REFUSED, Progress, encode_fitting, fits, no_progress
from cotgrpo.data.layouts.golds import prose_note
from cotgrpo.data.layouts.values import Note, squeeze
from cotgrpo.data.rows import BadRows, DropReport, Row, RowResult, check_usable, collect, counted, read_rows
from cotgrpo.data.sources import DataError, as_list
from cotgrpo.data.template import AnyTemplate, Example
from cotgrpo.data.triples import Triple, triple_of

NOT_ASKED = ("rationale", "completion", "answer", "correct", "id", "system", "tools")
"""Columns that rows of questions need not have, even if `data.columns` names them."""


@dataclasses.dataclass(frozen=True)
class Question:
    """One question.

    Attributes:
        question: the question's text.
        gold: the right answer, as text; empty: not known.
        reference: the row's reply if it is correct, else None.
        source: its place, as "file:line".
        system: the row's own system message; empty: none.
        id: the row's own id, if it has one.
        row: the row as it was read.
        prompt: int32 tokens that the student reads, once a template has made them.
        context, tools: as in `Triple`.
        no_gold: why the row's right answer cannot be used; empty if it can, or if the row has none.
    """

    question: str
    gold: str
    reference: Triple | None = None
    source: str = ""
    system: str = ""
    id: str | None = None
    row: Mapping[str, Any] = dataclasses.field(default_factory=dict, repr=False, compare=False)
    prompt: np.ndarray | None = dataclasses.field(default=None, repr=False, compare=False)
    context: tuple[Mapping[str, Any], ...] = ()
    tools: tuple[Mapping[str, Any], ...] = ()
    no_gold: str = ""

    @property
    def asked(self) -> str:
        """What is asked, as one text: the whole chat before the reply, or the question."""
        return str(self.context) if self.context else self.question

    def prompt_tokens(self, template: AnyTemplate) -> np.ndarray:
        """Return `prompt`, or make it."""
        return template.prompt_of(self) if self.prompt is None else self.prompt


def place_of(row: Question | Triple) -> str:
    """Return the place of a row, and the beginning of its question, for errors."""
    asked = f"the question {squeeze(row.question)!r:.60}"
    return f"{row.source} ({asked})" if row.source else asked


def question_text(row: Question | Triple | Row) -> str:
    """Return what a row asks, as one text. White space and Unicode's form of a letter do not count.

    Two rows with the same text ask the same question. One of them must not be trained on if the other is held out.
    """
    if not row.context:
        return plain(row.question)
    return json.dumps(plain_values(row.context), ensure_ascii=False, sort_keys=True, default=str)


def plain(text: str) -> str:
    """Return a text in Unicode's form NFC, with single spaces."""
    return squeeze(unicodedata.normalize("NFC", text))


def plain_values(value: object) -> object:
    """Return a JSON value with `plain` texts."""
    if isinstance(value, str):
        return plain(value)
    if isinstance(value, Mapping):
        return {key: plain_values(inner) for key, inner in value.items()}
    return [plain_values(inner) for inner in value] if isinstance(value, list | tuple) else value


def read_questions(
    sources: str | Path | Sequence[str | Path],
    *,
    split: str | None = None,
    bad_rows: BadRows = "error",
    need_gold: bool = True,
    columns: Mapping[str, str] | None = None,
    row_function: str = "",
    require_columns: bool = True,
    folder_split: str = "train",
    progress: Progress = no_progress,
) -> tuple[list[Question], DropReport]:
    """Read questions from the sources of `read_triples`, and from rows without a reply.

    The right answer is the row's `gold`, else its `answer` unless `correct` is false. If that is a whole solution, the
    answer in it counts; the report notes answers that were found in prose. A row with the text of an earlier one is
    left out.

    Args:
        sources, split: as in `read_triples`.
        bad_rows: what happens to a row without a question or right answer, or with an unreadable field, as in
            `read_triples`.
        need_gold: False also accepts rows without a right answer.
        columns, row_function: as in `read_triples`. No row needs to have the columns of the reply.
        require_columns: False: no row needs to have any of `columns`, as in test sets of another layout.
        folder_split: split of a folder whose files name splits, if `split` is None.
        progress: called with the number of rows that were read.

    Returns:
        The questions in order, and the report of the rows left out.

    Raises:
        DataError: a file that is missing or cannot be read, a bad row, or no question.
    """
    names = as_list(sources)
    optional = NOT_ASKED if require_columns else tuple(columns or ())
    rows = read_rows(
        names, split, columns=columns, row_function=row_function, optional=optional, folder_split=folder_split
    )
    questions, report = questions_in(counted(rows, progress), bad_rows=bad_rows, need_gold=need_gold)
    check_usable(questions, names, report)
    return questions, report


def questions_in(
    rows: Iterable[RowResult], *, bad_rows: BadRows = "error", need_gold: bool = True
) -> tuple[list[Question], DropReport]:
    """Return the questions of rows that `read_rows` has read, maybe none, and the report."""

    def make(row: Row) -> tuple[Question, Sequence[str]]:
        question = question_of(row)
        if need_gold and is_whole(row):
            question = dataclasses.replace(question, gold=split_thought(row.answer).text)
        if need_gold and not question.gold:
            raise DataError(
                row.no_gold
                or f"{row.source}: no right answer: expected a field gold, or an answer that is correct. Add it."
            )
        return question, (question.system, question.asked, question.gold, row.rationale, row.answer)

    return collect(rows, make, bad_rows=bad_rows, notes=functools.partial(notes_of, need_gold=need_gold))


def is_whole(row: Row) -> bool:
    """Return whether the row has a right reply without a final answer, so that only the whole reply is right."""
    own = not (row.gold or row.no_gold or row.not_a_triple or row.marked_correct is False)
    return own and gold_answer(row.answer) is None


def notes_of(row: Row, need_gold: bool) -> tuple[Note, ...]:
    """Return the row's notes, and how the right answer was found if that is not plain."""
    if row.prose and not row.gold and row.marked_correct is not False:
        return (*row.notes, prose_note("gold", row.source, row.answer, row.prose))
    if need_gold and is_whole(row):
        return (*row.notes, ("a reply without a final answer is compared as a whole", row.source))
    return row.notes


def note_rows(rows: Iterable[Row]) -> DropReport:
    """Return the report of rows that are asked, all of them kept."""
    report = DropReport()
    for row in rows:
        report.read += 1
        for note in notes_of(row, need_gold=True):
            report.note(*note)
    return report


def question_of(row: Row) -> Question:
    """Return the question in a row."""
    own = "" if row.marked_correct is False or row.no_gold else (gold_answer(row.answer) or "")
    reference = triple_of(row) if row.grade.correct and not row.not_a_triple else None
    return Question(
        row.question,
        row.gold or own,
        reference,
        row.source,
        row.system,
        row.id,
        row.fields,
        context=row.context,
        tools=row.tools,
        no_gold=row.no_gold,
    )


def make_held_out(
    questions: Sequence[Question],
    template: AnyTemplate,
    seq_len: int,
    *,
    too_long: Literal["error", "drop"] = "error",
    bad_rows: BadRows = "error",
    progress: Progress = no_progress,
) -> tuple[list[Question], list[Example], dict[str, DropReport]]:
    """Return the questions for exact match and the examples for the held-out loss that fit into the window.

    A question stays if its reference reply does not fit, or if the template refuses that reply.

    Args:
        questions: held-out rows.
        template: renders and masks them.
        seq_len: the window, in positions.
        too_long: "error" stops at the first prompt or reference reply that does not fit; "drop" counts it.
        bad_rows: "error" stops at the first prompt or reference reply that the template refuses; "drop" counts it.
        progress: called with the number of reference replies that are done.

    Returns:
        The questions with their `prompt`, the tokenized reference replies (maybe none), and the reports of either, as
        "held-out questions" and "held-out replies".

    Raises:
        DataError: a prompt or a reply that does not fit or is refused, or no prompt that can be used.
    """
    asked = DropReport(read=len(questions))
    unknown = iter(template.prompts_of([question for question in questions if question.prompt is None]))
    fitting = []
    for question in questions:
        prompt = next(unknown) if question.prompt is None else question.prompt
        if isinstance(prompt, DataError):
            if bad_rows == "error":
                raise prompt
            asked.drop(REFUSED, str(prompt))
        elif fits(question.source, len(prompt), seq_len, too_long, asked, "prompt"):
            fitting.append(dataclasses.replace(question, prompt=prompt))
    if not fitting:
        raise DataError(f"No held-out question fits into {seq_len} positions. {asked}")
    answered = [question for question in fitting if question.reference is not None]
    examples, replies = encode_fitting(
        [question.reference for question in answered if question.reference is not None],
        template,
        seq_len,
        too_long=too_long,
        prompts=[question.prompt for question in answered],
        bad_rows=bad_rows,
        progress=progress,
    )
    replies.read = len(fitting)
    for question in fitting:
        if question.reference is None:
            replies.drop("no correct reply", question.source)
    return fitting, examples, {"held-out questions": asked, "held-out replies": replies}
