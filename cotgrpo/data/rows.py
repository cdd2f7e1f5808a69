"""Rows of reasoning data, parsed once: which columns may hold each field, and the count of rows that are left out.

A row that cannot be parsed is an error that names the file, the line and the fix. Rows left out on purpose are counted
with their reason in a `DropReport`.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar

from cotgrpo.data.answers import Grade, grade
from cotgrpo.data.sources import DataError, raw_rows

COLUMNS: dict[str, tuple[str, ...]] = {
    "question": ("question", "prompt", "problem"),
    "rationale": ("rationale", "reasoning", "solution", "reasoning_content"),
    "answer": ("answer", "final_answer"),
    "completion": ("completion", "response"),
    "gold": ("gold",),
    "system": ("system",),
}
"""Field -> the columns that may hold it; the first one present counts. `completion` is a whole reply in one text."""
EXAMPLES_KEPT = 3
"""Places that a `DropReport` keeps for each reason."""
BadRows = Literal["error", "drop"]
T = TypeVar("T")


class LeftOut(Exception):
    """A row left out on purpose: the reason, and its place with details."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(reason, detail)
        self.reason, self.detail = reason, detail


@dataclasses.dataclass(frozen=True)
class Row:
    """One parsed row. A text that is missing is empty.

    Attributes:
        question: the question.
        rationale, answer: the row's reply.
        gold: the right answer.
        system: the row's own system message.
        marked_correct: the row's `correct` flag, or None without one.
        source: its place, as "file:line".
        fields: the row as it was read.
        not_a_triple: why no triple can be made of it; empty if one can.
    """

    question: str
    rationale: str
    answer: str
    gold: str
    system: str
    marked_correct: bool | None
    source: str
    fields: Mapping[str, Any]
    not_a_triple: str = ""

    @property
    def id(self) -> str | None:
        """The row's own id."""
        return None if self.fields.get("id") is None else str(self.fields["id"])

    @functools.cached_property
    def grade(self) -> Grade:
        """The row's flag, or else its answer compared with `gold`. Without either, it counts as correct."""
        if self.marked_correct is not None or not (self.answer and self.gold):
            return Grade(self.marked_correct is not False, self.answer or None, "the row's own flag")
        return grade(self.answer, self.gold)


RowResult = Row | DataError | LeftOut
"""A parsed row, or the reason why it could not be parsed or is left out."""


@dataclasses.dataclass
class DropReport:
    """Counts rows that were read, kept, and left out for each reason.

    Attributes:
        read: rows seen.
        dropped: reason -> count.
        examples: reason -> the first few places, as "file:line: detail".
    """

    read: int = 0
    dropped: dict[str, int] = dataclasses.field(default_factory=dict)
    examples: dict[str, list[str]] = dataclasses.field(default_factory=dict)

    @property
    def kept(self) -> int:
        return self.read - sum(self.dropped.values())

    def drop(self, reason: str, place: str) -> None:
        """Count one row left out."""
        self.dropped[reason] = self.dropped.get(reason, 0) + 1
        seen = self.examples.setdefault(reason, [])
        if len(seen) < EXAMPLES_KEPT:
            seen.append(place)

    def to_dict(self) -> dict[str, Any]:
        return {"read": self.read, "kept": self.kept, "dropped": self.dropped, "examples": self.examples}

    def __str__(self) -> str:
        lines = [f"{self.kept} of {self.read} rows kept"]
        for reason, count in sorted(self.dropped.items(), key=lambda item: -item[1]):
            lines.append(f"  {count} dropped, {reason}: {'; '.join(self.examples[reason])}")
        return "\n".join(lines)


def read_rows(names: Sequence[str | Path], split: str | None = None) -> Iterator[RowResult]:
    """Yield every row of these files and hub data sets, parsed; in place of a bad row, the error.

    Args:
        names: `.jsonl`, `.json` (one object a line) or `.parquet` files, or hub ids ("org/name" or "org/name:config").
        split: rows with another `split` field come as `LeftOut`. For a hub id it is the split to load; None: "train".

    Raises:
        DataError: a file that is missing or cannot be read.
    """
    yield from parse_rows(raw_rows(names, split), split)


def parse_rows(raw: Iterable[tuple[str, Any]], split: str | None = None) -> Iterator[RowResult]:
    """Yield raw rows, as `raw_rows` yields them, parsed; in place of a bad row, the error."""
    for place, row in raw:
        if isinstance(row, Mapping) and split is not None and row.get("split") not in (None, split):
            yield LeftOut("other split", f"{place}: {row['split']!r}")
            continue
        try:
            yield row if isinstance(row, DataError) else parse_row(row, place)
        except DataError as error:
            yield error


def collect(
    rows: Iterable[RowResult],
    make: Callable[[Row], tuple[T, Sequence[str]]],
    *,
    bad_rows: BadRows,
    deduplicate: bool = True,
) -> tuple[list[T], DropReport]:
    """Return what `make` returns for each row, and the report of the others.

    Args:
        rows: as `read_rows` yields them.
        make: returns an object and the texts that identify it; raises `LeftOut` or `DataError`.
        bad_rows: "error" raises at the first row that cannot be used; "drop" counts it.
        deduplicate: leave out rows whose texts equal those of an earlier one.

    Raises:
        DataError: a bad row.
    """
    if bad_rows not in ("error", "drop"):
        raise ValueError(f'bad_rows must be "error" or "drop", got {bad_rows!r}.')
    report = DropReport()
    made: list[T] = []
    seen: set[tuple[str, ...]] = set()
    for row in rows:
        report.read += 1
        try:
            if not isinstance(row, Row):
                raise row
            one, texts = make(row)
        except LeftOut as left:
            report.drop(left.reason, left.detail)
            continue
        except DataError as error:
            if bad_rows == "error":
                raise
            report.drop("bad row", str(error))
            continue
        key = tuple(squeeze(text) for text in texts)
        if deduplicate and key in seen:
            report.drop("duplicate", row.source)
        else:
            seen.add(key)
            made.append(one)
    return made, report


def check_usable(found: Sequence[T], names: Sequence[str | Path], report: DropReport) -> None:
    """Raise DataError if nothing was found in these sources."""
    if not found:
        raise DataError(f"No usable row in {', '.join(map(str, names))}. {report}")


def parse_row(row: object, place: str) -> Row:
    """Parse one row. A reply in one text is split into rationale and answer if its form allows it.

    Args:
        row: a JSON object: question, rationale and answer, or prompt and completion, or `messages` of one turn.
        place: its place, for errors.

    Raises:
        DataError: the row has no question, or a value has the wrong type; names the place, the field and the fix.
    """
    if not isinstance(row, Mapping):
        raise DataError(
            f"{place}: expected a JSON object with question, rationale and answer, got {type(row).__name__}."
        )
    columns = dict(row)
    if columns.get("messages") is not None:
        columns |= parse_messages(columns["messages"], place)
    values = {
        field: next((columns[key] for key in keys if columns.get(key) is not None), None)
        for field, keys in COLUMNS.items()
    }
    whole = values["answer"] if values["completion"] is None else values["completion"]
    in_one_text = values["rationale"] is None and whole is not None
    if in_one_text and isinstance(whole, str) and (parts := split_reply(whole)) is not None:
        values["rationale"], values["answer"] = parts
    missing = [missing_text(values[name], name, columns, place) for name in ("question", "rationale", "answer")]
    if missing[0]:
        raise DataError(missing[0])
    if in_one_text and values["rationale"] is None:
        missing[1] = (
            f"{place}: no rationale: expected a field {' or '.join(COLUMNS['rationale'])}, "
            "or a reply with '#### answer' or '</think>' in it. Add the field."
        )
    correct = columns.get("correct")
    if correct is not None and not isinstance(correct, bool):
        raise DataError(f"{place}: field 'correct' must be true or false, got {correct!r:.40}. Fix the row.")
    texts = {}
    for field in ("question", "rationale", "answer", "gold", "system"):
        try:
            texts[field] = parse_text(values[field], field, place)
        except DataError as error:
            if correct is not False or field not in ("rationale", "answer"):
                raise
            texts[field], missing[1] = "", str(error)  # a known mistake may lack a reply
    texts["gold"] = final_part(texts["gold"])
    return Row(**texts, marked_correct=correct, source=place, fields=row, not_a_triple=missing[1] or missing[2])


def is_blank(value: object) -> bool:
    """Return whether a row has nothing here: None, or white space."""
    return value is None or (isinstance(value, str) and not value.strip())


def missing_text(value: object, field: str, row: Mapping[str, Any], place: str) -> str:
    """Return an error message for a field that is missing or empty, or an empty text."""
    if value is None:
        names = f"{field!r} (or {', '.join(COLUMNS[field][1:])})"
        return f"{place}: missing field {names}; the row has {', '.join(map(str, row)) or 'nothing'}. Add it."
    return f"{place}: field {field!r} is empty. Fill it in or remove the row." if is_blank(value) else ""


def parse_text(value: object, field: str, place: str) -> str:
    """Return a field as stripped text, empty if it is missing. Raises DataError if it is not text."""
    if is_blank(value):
        return ""
    is_number = (isinstance(value, float) and math.isfinite(value)) or type(value) is int
    if field in ("answer", "gold") and is_number:
        value = str(value)
    if not isinstance(value, str):
        raise DataError(
            f"{place}: field {field!r} must be text, got {type(value).__name__} {value!r:.40}. Make it a string."
        )
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        raise DataError(f"{place}: field {field!r} holds half a surrogate pair. Remove it.") from None
    return value.strip()


def parse_messages(messages: object, place: str) -> dict[str, Any]:
    """Return the columns in a chat of one turn: system, question and reply; `reasoning_content` is the rationale."""
    valid = isinstance(messages, Sequence) and all(
        isinstance(m, Mapping) and "role" in m and isinstance(m.get("content"), str | None) for m in messages
    )
    if not valid or not isinstance(messages, Sequence) or isinstance(messages, str):
        raise DataError(f"{place}: 'messages' must be a list of objects with role and content, as text. Fix the row.")
    roles = [m["role"] for m in messages]
    if roles not in (["user", "assistant"], ["system", "user", "assistant"]):
        raise DataError(
            f"{place}: expected one user and one assistant message, after at most one system message, got "
            f"{', '.join(map(str, roles)) or 'none'}. Split longer chats into rows."
        )
    prompt, reply = {"question": messages[-2].get("content")}, messages[-1]
    if len(messages) == 3:
        prompt["system"] = messages[0].get("content")
    if reply.get("reasoning_content") is None:
        return prompt | {"completion": reply.get("content")}
    return prompt | {"rationale": reply["reasoning_content"], "answer": reply.get("content")}


def split_reply(text: str) -> tuple[str, str] | None:
    """Split `<think>...</think> answer`, or `... #### answer` in the last line; None for a text of neither form."""
    for mark in ("</think>", "####"):
        rationale, found, answer = text.strip().rpartition(mark)
        if found and (mark == "</think>" or "\n" not in answer.strip()):  # `#### Step 1` may be a heading
            return rationale.replace("<think>", "").strip(), answer.strip()
    return None


def final_part(text: str) -> str:
    """Return the answer of a right answer that is given as a whole solution; any other text as it is."""
    parts = split_reply(text)
    return text if parts is None else parts[1]


def squeeze(text: str) -> str:
    """Return the text with every run of white space as one blank."""
    return " ".join(text.split())
