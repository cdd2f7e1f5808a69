"""Reasoning data as (question, rationale, answer) triples, read from JSONL, Parquet or a hub, with nothing lost in silence.

A bad row is an error that names the file, the line and the fix; rows that are left out on purpose are counted, with the reason, in a `DropReport`.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar

from cotgrpo.data.answers import answers_match
from cotgrpo.data.sources import DataError as DataError
from cotgrpo.data.sources import as_list, rows_of

ALIASES: dict[str, tuple[str, ...]] = {
    "question": ("question", "prompt", "problem"),
    "rationale": ("rationale", "reasoning", "solution", "reasoning_content"),
    "answer": ("answer",),
}
"""Field of a triple -> the row keys that may hold it, the first one present counts."""

COMPLETION_KEYS = ("completion", "response")
EXAMPLES_KEPT = 3
"""Places that a `DropReport` remembers for each reason."""
BadRows = Literal["error", "drop"]
T = TypeVar("T")


class LeftOut(Exception):
    """A row that is left out on purpose: the reason, and what is in it."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(reason, detail)
        self.reason, self.detail = reason, detail


@dataclasses.dataclass(frozen=True)
class Triple:
    """One row of reasoning data.

    Attributes:
        question: what is asked.
        rationale: the teacher's steps.
        answer: the final answer, as text.
        id: the row's own id, if it has one.
        source: where it came from, as "file:line"; named in errors.
        system: the row's own system message; empty: none.
    """

    question: str
    rationale: str
    answer: str
    id: str | None = None
    source: str = ""
    system: str = ""


@dataclasses.dataclass
class DropReport:
    """How many rows were read, kept, and left out for which reason.

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
        """Counts one row left out."""
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


def read_triples(
    sources: str | Path | Sequence[str | Path],
    *,
    split: str | None = None,
    bad_rows: BadRows = "error",
    keep_incorrect: bool = False,
    deduplicate: bool = True,
) -> tuple[list[Triple], DropReport]:
    """Reads triples from files (`.jsonl`, `.json` with one object a line, `.parquet`) or hub data sets ("org/name" or "org/name:config").

    Rows hold `question / rationale / answer` (or `reasoning`, `solution`, ...), `prompt / completion`, or `messages`. Where rationale and answer stand in
    one text they are told apart by `####` or `</think>`. Numbers are accepted as answers. A system message comes from `messages` or from a
    field `system`.

    Args:
        sources: one or several files or hub ids.
        split: keep only rows whose `split` field is this, where they have one; for a hub id, the split to load ("train" if None).
        bad_rows: "error" stops at the first row that cannot be used; "drop" counts it in the report.
        keep_incorrect: keep rows with `correct: false`, or, where they do not say, whose `gold` is another answer: the teacher's mistakes.
        deduplicate: leave out rows with the text of an earlier one.

    Returns:
        The triples in order, and the report of what was left out.

    Raises:
        DataError: a file that is not there or not readable, a bad row, or nothing left.
    """
    names = as_list(sources)
    triples, report = triples_in(
        rows_of(names, split),
        split=split,
        bad_rows=bad_rows,
        keep_incorrect=keep_incorrect,
        deduplicate=deduplicate,
    )
    check_usable(triples, names, report)
    return triples, report


def triples_in(
    rows: Iterable[tuple[str, Any]],
    *,
    split: str | None = None,
    bad_rows: BadRows = "error",
    keep_incorrect: bool = False,
    deduplicate: bool = True,
) -> tuple[list[Triple], DropReport]:
    """`read_triples` for rows that are read already, as `rows_of` gives them. There may be no triple in them."""

    def make(row: Any, place: str) -> tuple[Triple, Sequence[str]]:
        # A teacher's known mistake may well lack an answer.
        if isinstance(row, Mapping) and not keep_incorrect and row.get("correct") is False:
            raise LeftOut("wrong answer", f"{row.get('answer')!r}, gold {row.get('gold')!r}")
        triple = triple_of(row, place)
        if not keep_incorrect and is_incorrect(row, triple):
            raise LeftOut("wrong answer", f"{triple.answer!r}, gold {row['gold']!r}")
        return triple, (triple.system, triple.question, triple.rationale, triple.answer)

    return collect(rows, make, split=split, bad_rows=bad_rows, deduplicate=deduplicate)


def collect(
    rows: Iterable[tuple[str, Any]],
    make: Callable[[Any, str], tuple[T, Sequence[str]]],
    *,
    split: str | None,
    bad_rows: BadRows,
    deduplicate: bool,
) -> tuple[list[T], DropReport]:
    """What `make(row, place)` gives for each row, and the report of the others.

    Args:
        rows: as `rows_of` gives them.
        make: returns a thing and the texts that tell it from another; raises `LeftOut` for a row to leave out, `DataError` for a bad one.
        split, bad_rows, deduplicate: as in `read_triples`.

    Raises:
        DataError: a bad row.
    """
    if bad_rows not in ("error", "drop"):
        raise ValueError(f'bad_rows must be "error" or "drop", got {bad_rows!r}.')
    report = DropReport()
    made: list[T] = []
    seen: set[tuple[str, ...]] = set()
    for place, row in rows:
        report.read += 1
        if isinstance(row, Mapping) and split is not None and row.get("split") not in (None, split):
            report.drop("other split", f"{place}: {row['split']!r}")
            continue
        try:
            if isinstance(row, DataError):
                raise row
            one, texts = make(row, place)
        except LeftOut as left:
            report.drop(left.reason, f"{place}: {left.detail}")
            continue
        except DataError as error:
            if bad_rows == "error":
                raise
            report.drop("bad row", str(error))
            continue
        key = tuple(squeeze(text) for text in texts)
        if deduplicate and key in seen:
            report.drop("duplicate", place)
        else:
            seen.add(key)
            made.append(one)
    return made, report


def check_usable(found: Sequence[Any], names: Sequence[str | Path], report: DropReport) -> None:
    """Raises DataError where nothing was found in these sources."""
    if not found:
        raise DataError(f"No usable row in {', '.join(map(str, names))}. {report}")


def write_triples(path: str | Path, triples: Iterable[Triple]) -> None:
    """Writes triples as JSONL, one object `{id, question, rationale, answer}` a line, and `system` where there is one, UTF-8."""
    with open(path, "w", encoding="utf-8") as file:
        for t in triples:
            row = {"id": t.id, "question": t.question, "rationale": t.rationale, "answer": t.answer}
            row |= {"system": t.system} if t.system else {}
            file.write(json.dumps(row, ensure_ascii=False) + "\n")


def triple_of(row: Any, place: str) -> Triple:
    """The triple in one row. Raises DataError naming the place, the field, what was expected and what came."""
    fields, whole = parse_fields(row, place)
    if fields["rationale"] is None and whole is not None and fields["question"] is not None:
        raise DataError(
            f"{place}: no rationale: expected a field {' or '.join(ALIASES['rationale'])}, "
            "or a reply with '#### answer' or '</think>' in it. Add the field."
        )
    texts = {field: require_text(fields[field], field, row, place) for field in ALIASES}
    system = system_of(fields, row, place)
    return Triple(**texts, id=None if row.get("id") is None else str(row["id"]), source=place, system=system)


def system_of(fields: Mapping[str, Any], row: Mapping[str, Any], place: str) -> str:
    """The row's own system message, stripped; empty where it has none. Raises DataError where it is no text."""
    return "" if is_blank(fields["system"]) else require_text(fields["system"], "system", row, place)


def is_blank(value: Any) -> bool:
    """Whether a row has nothing here: None, or text of white space."""
    return value is None or (isinstance(value, str) and not value.strip())


def parse_fields(row: Any, place: str) -> tuple[dict[str, Any], Any]:
    """(the row's values for question, rationale, answer and system, the reply in one text), each None where it has none.

    A reply in one text is taken apart into rationale and answer where they can be told apart.

    Raises:
        DataError: the row is no object, or its messages are no chat of one turn.
    """
    if not isinstance(row, Mapping):
        raise DataError(
            f"{place}: expected a JSON object with question, rationale and answer, got {type(row).__name__}."
        )
    if row.get("messages") is not None:
        row = dict(row) | fields_of_messages(row["messages"], place)
    fields = {field: next((row[k] for k in keys if row.get(k) is not None), None) for field, keys in ALIASES.items()}
    whole = next((row[k] for k in COMPLETION_KEYS if row.get(k) is not None), None)
    if fields["rationale"] is None:
        # The whole reply in one text: a completion, or GSM8K's own `answer`.
        whole = fields["answer"] if whole is None else whole
        parts = split_reply(whole) if isinstance(whole, str) else None
        if parts is not None:
            fields["rationale"], fields["answer"] = parts
    return fields | {"system": row.get("system")}, whole


def require_text(value: Any, field: str, row: Mapping[str, Any], place: str) -> str:
    """The field as stripped text. Raises DataError where it is missing, empty or no text."""
    if value is None:
        keys = ", ".join(map(str, row)) or "nothing"
        raise DataError(
            f"{place}: missing field {field!r} (or {', '.join(ALIASES[field][1:]) or 'none'}); the row has {keys}. Add it."
        )
    is_number = (isinstance(value, float) and math.isfinite(value)) or type(value) is int
    if field in ("answer", "gold") and is_number:
        value = str(value)
    if not isinstance(value, str):
        raise DataError(
            f"{place}: field {field!r} must be text, got {type(value).__name__} {value!r:.40}. Make it a string."
        )
    if not value.strip():
        raise DataError(f"{place}: field {field!r} is empty. Fill it in or remove the row.")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        raise DataError(f"{place}: field {field!r} holds half a surrogate pair, which is no text. Remove it.") from None
    return value.strip()


def fields_of_messages(messages: Any, place: str) -> dict[str, Any]:
    """System message, where there is one, question and reply of a chat of one turn: `reasoning_content` is the rationale."""
    valid = isinstance(messages, Sequence) and all(
        isinstance(m, Mapping) and "role" in m and isinstance(m.get("content"), str | None) for m in messages
    )
    if not valid or isinstance(messages, str):
        raise DataError(f"{place}: 'messages' must be a list of objects with role and content, as text. Mend the row.")
    roles = [m["role"] for m in messages]
    if roles not in (["user", "assistant"], ["system", "user", "assistant"]):
        raise DataError(
            f"{place}: expected one user and one assistant message, after a system message at most, got "
            f"{', '.join(map(str, roles)) or 'none'}. Split longer chats into rows."
        )
    asked, reply = {"question": messages[-2].get("content")}, messages[-1]
    if len(messages) == 3:
        asked["system"] = messages[0].get("content")
    if reply.get("reasoning_content") is None:
        return asked | {"completion": reply.get("content")}
    return asked | {"rationale": reply["reasoning_content"], "answer": reply.get("content")}


def split_reply(text: str) -> tuple[str, str] | None:
    """(rationale, answer) of a reply that holds both, or None: `<think>...</think> answer`, or `... #### answer` in the last line."""
    for mark in ("</think>", "####"):
        rationale, found, answer = text.strip().rpartition(mark)
        if found and (mark == "</think>" or "\n" not in answer.strip()):  # `#### Step 1` may be a heading
            return rationale.replace("<think>", "").strip(), answer.strip()
    return None


def is_incorrect(row: Mapping[str, Any], triple: Triple) -> bool:
    """Whether `gold` is another answer than the triple's, in a row whose `correct` does not say. Raises DataError where `correct` is no bool."""
    correct = correct_flag(row, triple.source)
    if correct is not None:
        return not correct
    return row.get("gold") is not None and not answers_match(triple.answer, str(row["gold"]))


def correct_flag(row: Mapping[str, Any], place: str) -> bool | None:
    """The row's `correct`, or None where it does not say. Raises DataError where it is no bool."""
    correct = row.get("correct")
    if correct is not None and not isinstance(correct, bool):
        raise DataError(f"{place}: field 'correct' must be true or false, got {correct!r:.40}. Mend the row.")
    return correct


def squeeze(text: str) -> str:
    """The text with every run of white space as one blank."""
    return " ".join(text.split())
