"""Reasoning data as (question, rationale, answer) triples, read from JSONL, Parquet or a hub."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from cotgrpo.data.layouts.golds import prose_note
from cotgrpo.data.layouts.values import Note
from cotgrpo.data.rows import BadRows, DropReport, LeftOut, Row, RowResult, check_usable, collect, read_rows
from cotgrpo.data.sources import DataError, as_list


@dataclasses.dataclass(frozen=True)
class Triple:
    """One row of reasoning data.

    Attributes:
        question: the question.
        rationale: the teacher's steps.
        answer: the final answer, as text.
        id: the row's own id, if it has one.
        source: its place, as "file:line"; named in errors.
        system: the row's own system message; empty: none.
        context: of a chat with several turns or with tools: every message before the last reply, without the system
            message, as the row has them. Empty: the question is the only message.
        tools: the tools of the chat, as JSON schemas for the chat template.
        verbatim: whether `answer` is the whole reply, to be trained as it is. Then `rationale` is empty.
        row: the row as it was read, if rows are kept for a verifier of the user's own.
    """

    question: str
    rationale: str
    answer: str
    id: str | None = None
    source: str = ""
    system: str = ""
    context: tuple[Mapping[str, Any], ...] = ()
    tools: tuple[Mapping[str, Any], ...] = ()
    verbatim: bool = False
    row: Mapping[str, Any] = dataclasses.field(default_factory=dict, repr=False, compare=False)

    @property
    def asked(self) -> str:
        """What is asked, as one text: the whole chat before the reply, or the question."""
        return str(self.context) if self.context else self.question


def read_triples(
    sources: str | Path | Sequence[str | Path],
    *,
    split: str | None = None,
    bad_rows: BadRows = "error",
    keep_incorrect: bool = False,
    deduplicate: bool = True,
    columns: Mapping[str, str] | None = None,
    row_function: str = "",
) -> tuple[list[Triple], DropReport]:
    """Read triples from files, folders or hub data sets. docs/data.md lists the layouts and the kinds of files.

    A row holds `question / rationale / answer` (or `reasoning`, `solution`, ...), `prompt / completion`, or `messages`.
    Rationale and answer in one text are split at `####`, at the end of a thought, or at the answer that is found. An
    answer may be a number. A system message comes from `messages` or from a field `system`.

    Args:
        sources: one or several files, folders, patterns or hub ids ("org/name" or "org/name:config").
        split: keep only rows whose `split` field is this, if they have one; for a hub id, the split to load ("train" if
            None).
        bad_rows: "error" stops at the first row that cannot be used; "drop" counts it in the report.
        keep_incorrect: keep the teacher's mistakes: rows with `correct: false`, or without that flag and with another
            answer than their `gold`.
        deduplicate: leave out rows with the text of an earlier one.
        columns: our names of fields -> the rows' columns, as `{"question": "q"}`; a dot leads into an object.
        row_function: "package.module:function", which takes a row and returns one of a known layout, or None.

    Returns:
        The triples in order, and the report of the rows left out.

    Raises:
        DataError: a file that is missing or cannot be read, a bad row, or no triple.
    """
    names = as_list(sources)
    rows = read_rows(names, split, columns=columns, row_function=row_function)
    triples, report = triples_in(rows, bad_rows=bad_rows, keep_incorrect=keep_incorrect, deduplicate=deduplicate)
    check_usable(triples, names, report)
    return triples, report


def triples_in(
    rows: Iterable[RowResult],
    *,
    bad_rows: BadRows = "error",
    keep_incorrect: bool = False,
    deduplicate: bool = True,
    keep_rows: bool = False,
) -> tuple[list[Triple], DropReport]:
    """Return the triples of rows that `read_rows` has read, maybe none, and the report.

    With `keep_rows` each holds its row as it was read.
    """

    def make(row: Row) -> tuple[Triple, Sequence[str]]:
        gold = row.fields.get("gold", row.gold or None)
        wrong = LeftOut("wrong answer", f"{row.source}: {row.answer or None!r:.80}, gold {gold!r:.80}")
        if not keep_incorrect and row.marked_correct is False:  # a known mistake may lack an answer
            raise wrong
        triple = triple_of(row)
        if keep_rows:
            triple = dataclasses.replace(triple, row=row.fields)
        if row.no_gold and row.marked_correct is None and not keep_incorrect:
            raise DataError(row.no_gold)
        if not keep_incorrect and not row.grade.correct:
            raise wrong
        return triple, (triple.system, triple.asked, triple.rationale, triple.answer)

    def notes(row: Row) -> tuple[Note, ...]:
        prose = prose_note("answer", row.source, row.answer, row.prose)
        return (*row.notes, prose) if row.prose else row.notes

    return collect(rows, make, bad_rows=bad_rows, deduplicate=deduplicate, notes=notes)


def triple_of(row: Row) -> Triple:
    """Return the triple in a row. Raises DataError if the row lacks a rationale or an answer."""
    if row.not_a_triple:
        raise DataError(row.not_a_triple)
    return Triple(
        row.question,
        row.rationale,
        row.answer,
        row.id,
        row.source,
        row.system,
        row.context,
        row.tools,
        row.verbatim,
    )


def write_triples(path: str | Path, triples: Iterable[Triple]) -> None:
    """Write triples as JSONL in UTF-8: `{id, question, rationale, answer}` a line, and `system` if there is one.

    A chat of several turns is written as `messages`, and its `tools` if it has any.
    """
    with open(path, "w", encoding="utf-8") as file:
        for t in triples:
            file.write(json.dumps(row_of(t), ensure_ascii=False) + "\n")


def row_of(triple: Triple) -> dict[str, Any]:
    """Return a triple as a row that `read_triples` reads."""
    if not triple.context:
        row = {"id": triple.id, "question": triple.question, "rationale": triple.rationale, "answer": triple.answer}
        return row | ({"system": triple.system} if triple.system else {})
    system = [{"role": "system", "content": triple.system}] if triple.system else []
    reply = {"role": "assistant", "content": triple.answer}
    reply |= {"reasoning_content": triple.rationale} if triple.rationale else {}
    chat: dict[str, Any] = {"id": triple.id, "messages": [*system, *triple.context, reply]}
    return chat | ({"tools": list(triple.tools)} if triple.tools else {})


def with_question(triple: Triple, question: str) -> Triple:
    """Return the triple with another question; in a chat of several turns, another last message of the user."""
    context = list(triple.context)
    asked = [i for i, message in enumerate(context) if message.get("role") == "user"]
    if asked:
        context[asked[-1]] = {**context[asked[-1]], "content": question}
    return dataclasses.replace(triple, question=question, context=tuple(context))
