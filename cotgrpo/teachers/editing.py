"""Gold ghosts: a teacher's replies as people have corrected them, by way of a file that any editor opens.

`write_pairs` puts the student's reply and the ghost side by side, one question a line; a person edits `rationale` and `answer` there, and
`read_edited` gives the triples back. The ghost as it was stays in the line, so that what was edited can be told.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

from cotgrpo.atomic_files import write_text
from cotgrpo.data.answers import answers_match, extract_answer
from cotgrpo.data.triples import DataError, DropReport, Triple, rows_of, squeeze


def read_student_replies(path: Path) -> dict[str, str]:
    """{question: reply} of a student, from what `cotgrpo eval` leaves (eval.json) or what `cotgrpo generate --teacher.path STUDENT` does (replies.jsonl).

    Questions are squeezed to single blanks; of several replies to one, the first counts.

    Raises:
        DataError: a file that is neither.
    """
    if path.suffix == ".json":
        try:
            rows: Any = json.loads(path.read_text(encoding="utf-8"))["replies"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise DataError(
                f"{path}: expected the eval.json of `cotgrpo eval` ({type(error).__name__}: {error})."
            ) from error
        found = [(str(path), row) for row in rows]
    else:
        found = list(rows_of([path], None))
    replies: dict[str, str] = {}
    for place, row in found:
        if isinstance(row, DataError):
            raise row
        row = row if isinstance(row, Mapping) else {}
        # A record of `generate` holds the reply's text one level down, and a failure has none.
        text = row["reply"].get("text") if isinstance(row.get("reply"), Mapping) else row.get("text")
        if "failure" in row:
            continue
        if not isinstance(text, str) or not isinstance(row.get("question"), str):
            raise DataError(
                f"{place}: expected a question and the student's reply as text: the eval.json of `cotgrpo eval`, or the replies.jsonl of "
                "`cotgrpo generate --teacher.path STUDENT`."
            )
        replies.setdefault(squeeze(row["question"]), text)
    return replies


def write_pairs(
    path: Path, ghosts: Iterable[Triple], replies: Mapping[str, str], *, rows: Literal["all", "wrong"] = "all"
) -> DropReport:
    """Writes the file to edit: `id, question, student, ghost, rationale, answer` a line, the last two as the ghost has them.

    Args:
        path: a new file; what a person has edited is never written over.
        ghosts: the teacher's triples.
        replies: of the student, as `read_student_replies` gives them.
        rows: "wrong" leaves out questions whose answer the student has right, as `extract_answer` finds it.

    Returns:
        What was left out, and why.

    Raises:
        DataError: the file is there, or not one ghost has a reply beside it.
    """
    if path.exists():
        raise DataError(f"{path} is there already, and may hold edits. Choose another --out, or remove it.")
    report, lines = DropReport(), []
    for ghost in ghosts:
        report.read += 1
        student = replies.get(squeeze(ghost.question))
        if student is None:
            report.drop("no reply of the student", ghost.source)
        elif rows == "wrong" and answers_match(extract_answer(student), ghost.answer):
            report.drop("the student is right", ghost.source)
        else:
            pair = {"id": ghost.id, "question": ghost.question, "student": student}
            reply = {"rationale": ghost.rationale, "answer": ghost.answer}
            lines.append(json.dumps(pair | {"ghost": reply} | reply, ensure_ascii=False) + "\n")
    if not lines:
        raise DataError(f"Nothing to edit. {report}")
    write_text(path, "".join(lines))
    return report


def read_edited(path: Path, *, rows: Literal["all", "edited"] = "all") -> tuple[list[Triple], DropReport]:
    """The triples of a file that was edited, and what was left out.

    A row with `rationale` and `answer` both emptied was thrown away by its editor.

    Args:
        path: what `write_pairs` wrote.
        rows: "edited" leaves out rows that are still the ghost's.

    Raises:
        DataError: a line that is no JSON, a row that lacks one of the two, one whose answer is no text, or nothing left; names the line.
    """
    report, triples = DropReport(), []
    for place, row in rows_of([path], None):
        report.read += 1
        if isinstance(row, DataError):
            raise row
        row = row if isinstance(row, Mapping) else {}
        ghost = row.get("ghost")
        texts = [row.get(field) for field in ("question", "rationale", "answer")]
        if not isinstance(ghost, Mapping) or not all(isinstance(text, str) for text in texts):
            raise DataError(
                f"{place}: expected question, ghost, rationale and answer, as `cotgrpo gold` writes them, the answer in quotes. Mend the row."
            )
        question, rationale, answer = (str(text).strip() for text in texts)
        if not rationale and not answer:
            report.drop("emptied", place)
        elif not (question and rationale and answer):
            raise DataError(f"{place}: rationale or answer is empty. Fill it in, or empty both to throw the row away.")
        elif rows == "edited" and (rationale, answer) == (ghost.get("rationale"), ghost.get("answer")):
            report.drop("not edited", place)
        else:
            row_id = None if row.get("id") is None else str(row["id"])
            triples.append(Triple(question, rationale, answer, id=row_id, source=place))
    if not triples:
        raise DataError(f"{path}: no triple. {report}")
    return triples, report
