"""Gold ghosts: a teacher's replies corrected by people in a text editor.

`write_pairs` writes the student's reply and the ghost side by side, one question a line. A person edits `rationale` and
`answer` there, and `read_edited` returns the triples. The line keeps the original ghost, so edits can be recognized.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

from cotgrpo.atomic_files import write_text
from cotgrpo.data.answers import grade
from cotgrpo.data.rows import DropReport, squeeze
from cotgrpo.data.sources import DataError, raw_rows
from cotgrpo.data.triples import Triple
from cotgrpo.disk_errors import first_line
from cotgrpo.teachers.completions import TeacherReply

VERDICTS = {"correct": True, "wrong answer": False, "truncated": False, "refused": False}
"""Verdict of `cotgrpo generate` -> whether the reply is right. The others do not say it."""


@dataclasses.dataclass(frozen=True)
class StudentReply:
    """A student's reply.

    Attributes:
        text: the whole reply.
        correct: the verdict of `cotgrpo eval`, which knows the template, or of `cotgrpo generate`; None: not known.
    """

    text: str
    correct: bool | None = None


def read_student_replies(path: Path) -> dict[str, StudentReply]:
    """Return {question: reply} of a student, with white space in questions squeezed; a question's first reply counts.

    Args:
        path: eval.json of `cotgrpo eval`, or replies.jsonl of `cotgrpo generate --teacher.path STUDENT`.

    Raises:
        DataError: the file is neither.
    """
    if path.suffix == ".json":
        try:
            rows: Any = list(json.loads(path.read_text(encoding="utf-8"))["replies"])
        except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
            raise DataError(
                f"{path}: expected the eval.json of `cotgrpo eval` ({first_line(error)}). Run that again: it writes "
                "the file again."
            ) from error
        found = [(str(path), row) for row in rows]
    else:
        found = list(raw_rows([path], None))
    replies: dict[str, StudentReply] = {}
    for place, row in found:
        if isinstance(row, DataError):
            raise row
        row = row if isinstance(row, Mapping) else {}
        if "failure" in row:
            continue
        text = reply_text(row)
        if not isinstance(text, str) or not isinstance(row.get("question"), str):
            raise DataError(
                f"{place}: expected a question and the student's reply as text: the eval.json of `cotgrpo eval`, or "
                "the replies.jsonl of `cotgrpo generate --teacher.path STUDENT`."
            )
        correct = row.get("correct", VERDICTS.get(str(row.get("reason"))))
        reply = StudentReply(text, correct if isinstance(correct, bool) else None)
        replies.setdefault(squeeze(row["question"]), reply)
    return replies


def reply_text(row: Mapping[str, Any]) -> object:
    """Return the text of a student's reply; a record of `generate` nests it in `reply`, maybe next to its thought."""
    reply = row.get("reply")
    if not isinstance(reply, Mapping):
        return row.get("text")
    text, reasoning = reply.get("text"), reply.get("reasoning", "")
    if not isinstance(text, str) or not isinstance(reasoning, str):
        return text
    return TeacherReply(text, reasoning).whole_text


def write_pairs(
    path: Path,
    ghosts: Iterable[Triple],
    replies: Mapping[str, StudentReply | str],
    *,
    rows: Literal["all", "wrong"] = "all",
) -> DropReport:
    """Write the file to edit: `id, question, student, ghost, rationale, answer` a line, the last two from the ghost.

    A row's own system message is in `system`. Chats of several turns are left out.

    Args:
        path: a new file; an existing one may hold edits and is never overwritten.
        ghosts: the teacher's triples.
        replies: the student's, as `read_student_replies` returns them, or as text.
        rows: "wrong" leaves out questions that the student answers correctly: by the verdict of `cotgrpo eval`, or else
            by the ghost's answer.

    Returns:
        The report of the ghosts left out.

    Raises:
        DataError: the file exists, or no ghost has a student's reply.
    """
    if path.exists():
        raise DataError(f"{path} exists and may hold edits. Choose another --out, or remove it.")
    report, lines = DropReport(), []
    for ghost in ghosts:
        report.read += 1
        if ghost.verbatim or ghost.context:
            report.drop("several turns", ghost.source)
            continue
        student = replies.get(squeeze(ghost.question))
        student = StudentReply(student) if isinstance(student, str) else student
        if student is None:
            report.drop("no reply of the student", ghost.source)
        elif rows == "wrong" and is_right(student, ghost):
            report.drop("the student is right", ghost.source)
        else:
            pair = {"id": ghost.id, "question": ghost.question, "student": student.text}
            reply = {"rationale": ghost.rationale, "answer": ghost.answer}
            system = {"system": ghost.system} if ghost.system else {}
            lines.append(json.dumps(pair | system | {"ghost": reply} | reply, ensure_ascii=False) + "\n")
    if not lines:
        raise DataError(f"Nothing to edit. {report}")
    write_text(path, "".join(lines))
    return report


def holds_triples(path: Path) -> bool:
    """Return whether a file holds nothing but triples as this command writes them, so that it can be made again."""
    try:
        rows = [row for _, row in raw_rows([path], None)]
    except DataError:
        return False
    names = {"id", "question", "rationale", "answer", "system"}
    return all(isinstance(row, Mapping) and row.keys() <= names for row in rows)


def is_right(student: StudentReply, ghost: Triple) -> bool:
    """Return whether a student's reply is right."""
    return grade(student.text, ghost.answer).correct if student.correct is None else student.correct


def read_edited(path: Path, *, rows: Literal["all", "edited"] = "all") -> tuple[list[Triple], DropReport]:
    """Return the triples of an edited file, and the report of the rows left out.

    A row with both `rationale` and `answer` emptied is discarded.

    Args:
        path: the file that `write_pairs` wrote.
        rows: "edited" leaves out rows that still equal the ghost.

    Raises:
        DataError: a line that is not JSON, a row without a rationale or with an answer that is not text, or no triple;
            names the line.
    """
    report, triples = DropReport(), []
    for place, row in raw_rows([path], None):
        report.read += 1
        if isinstance(row, DataError):
            raise row
        row = row if isinstance(row, Mapping) else {}
        ghost = row.get("ghost")
        texts = [row.get(field) for field in ("question", "rationale", "answer")]
        if not isinstance(ghost, Mapping) or not all(isinstance(text, str) for text in texts):
            raise DataError(
                f"{place}: expected question, ghost, rationale and answer, as `cotgrpo gold` writes them, the answer "
                "in quotes. Fix the row."
            )
        question, rationale, answer = (str(text).strip() for text in texts)
        if not rationale and not answer:
            report.drop("emptied", place)
        elif not (question and rationale and answer):
            raise DataError(f"{place}: rationale or answer is empty. Fill it in, or empty both to discard the row.")
        elif rows == "edited" and (rationale, answer) == (ghost.get("rationale"), ghost.get("answer")):
            report.drop("not edited", place)
        else:
            row_id = None if row.get("id") is None else str(row["id"])
            system = row.get("system", "")
            if not isinstance(system, str):
                raise DataError(f"{place}: system must be text, got {type(system).__name__}. Fix the row.")
            triples.append(Triple(question, rationale, answer, id=row_id, source=place, system=system))
    if not triples:
        raise DataError(f"{path}: no triple. {report}")
    return triples, report
