"""Reasoning data as (question, rationale, answer) triples, read from JSONL, Parquet or a hub, with nothing lost in silence.

A bad row is an error that names the file, the line and the fix; rows that are left out on purpose are counted, with the reason, in a `DropReport`.
"""

from __future__ import annotations

import dataclasses
import difflib
import glob
import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from cotgrpo.ghosts.verify import answers_match

ALIASES: dict[str, tuple[str, ...]] = {
    "question": ("question", "prompt", "problem"),
    "rationale": ("rationale", "reasoning", "solution", "reasoning_content"),
    "answer": ("answer",),
}
"""Field of a triple -> the row keys that may hold it, the first one present counts."""

SUFFIXES = (".jsonl", ".json", ".parquet")
COMPLETION_KEYS = ("completion", "response")
EXAMPLES_KEPT = 3
"""Places that a `DropReport` remembers for each reason."""


class DataError(ValueError):
    """Data that cannot be used as it is; the message names the place, what was expected and the fix."""


@dataclasses.dataclass(frozen=True)
class Triple:
    """One row of reasoning data.

    Attributes:
        question: what is asked.
        rationale: the teacher's steps.
        answer: the final answer, as text.
        id: the row's own id, if it has one.
        source: where it came from, as "file:line"; named in errors.
    """

    question: str
    rationale: str
    answer: str
    id: str | None = None
    source: str = ""


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
    bad_rows: Literal["error", "drop"] = "error",
    keep_incorrect: bool = False,
    deduplicate: bool = True,
) -> tuple[list[Triple], DropReport]:
    """Reads triples from files (`.jsonl`, `.json` with one object a line, `.parquet`) or hub data sets ("org/name" or "org/name:config").

    Rows hold `question / rationale / answer` (or `reasoning`, `solution`, ...), `prompt / completion`, or `messages`. Where rationale and answer stand in
    one text they are told apart by `####` or `</think>`. Numbers are accepted as answers.

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
    if bad_rows not in ("error", "drop"):
        raise ValueError(f'bad_rows must be "error" or "drop", got {bad_rows!r}.')
    names = [sources] if isinstance(sources, str | Path) else list(sources)
    if not names:
        raise DataError("No data: expected at least one file or hub id.")
    report = DropReport()
    triples: list[Triple] = []
    seen: set[tuple[str, str, str]] = set()
    for place, row in rows_of(names, split):
        report.read += 1
        # Rows left out on purpose first: a teacher's known mistake may well lack an answer.
        if isinstance(row, Mapping) and split is not None and row.get("split") not in (None, split):
            report.drop("other split", f"{place}: {row['split']!r}")
            continue
        if isinstance(row, Mapping) and not keep_incorrect and row.get("correct") is False:
            report.drop("wrong answer", f"{place}: {row.get('answer')!r}, gold {row.get('gold')!r}")
            continue
        try:
            if isinstance(row, DataError):
                raise row
            triple = triple_of(row, place)
            if not keep_incorrect and is_incorrect(row, triple):
                report.drop("wrong answer", f"{place}: {triple.answer!r}, gold {row['gold']!r}")
                continue
        except DataError as error:
            if bad_rows == "error":
                raise
            report.drop("bad row", str(error))
            continue
        key = (squeeze(triple.question), squeeze(triple.rationale), squeeze(triple.answer))
        if deduplicate and key in seen:
            report.drop("duplicate", place)
        else:
            seen.add(key)
            triples.append(triple)
    if not triples:
        raise DataError(f"No usable row in {', '.join(str(n) for n in names)}. {report}")
    return triples, report


def write_triples(path: str | Path, triples: Iterable[Triple]) -> None:
    """Writes triples as JSONL, one object `{id, question, rationale, answer}` a line, UTF-8."""
    with open(path, "w", encoding="utf-8") as file:
        for t in triples:
            row = {"id": t.id, "question": t.question, "rationale": t.rationale, "answer": t.answer}
            file.write(json.dumps(row, ensure_ascii=False) + "\n")


def rows_of(names: Sequence[str | Path], split: str | None) -> Iterator[tuple[str, Any]]:
    """("file:line", row) for every row; in place of a row that cannot be parsed, the `DataError` that says why."""
    for name in names:
        path = Path(name)
        if path.is_dir():
            inside = ", ".join(sorted(p.name for p in path.iterdir() if p.suffix in SUFFIXES)[:5])
            raise DataError(
                f"{path} is a directory: expected .jsonl or .parquet files, or a hub id. "
                f"Name the files in it ({inside or 'it has none'})."
            )
        if path.is_file():
            if path.suffix in (".jsonl", ".json"):
                yield from jsonl_rows(path)
            elif path.suffix == ".parquet":
                # In its name, [ and * are letters and no pattern.
                files = glob.escape(str(path))
                yield from numbered(str(path), load_dataset(path, "parquet", data_files=files, split="train"))
            else:
                raise DataError(
                    f"{path}: unknown kind of file {path.suffix!r}: expected .jsonl or .parquet; convert it."
                )
        elif path.suffix in SUFFIXES or not re.fullmatch(r"[\w.-]+/[\w.-]+(:[\w.-]+)?", str(name)):
            near = difflib.get_close_matches(path.name, [p.name for p in path.parent.glob("*")], n=3)
            hint = f" Did you mean {' or '.join(near)}?" if near else " Check the path."
            raise DataError(f"{path}: no such file.{hint}")
        else:
            yield from hub_rows(str(name), split or "train")


def hub_rows(name: str, split: str) -> Iterator[tuple[str, Any]]:
    """The rows of "org/name" or "org/name:config", or of whatever else `datasets.load_dataset` takes, as in `rows_of`."""
    hub_id, _, config = name.partition(":")
    yield from numbered(
        name, load_dataset(f"{name} is no file, and as a data set", hub_id, config or None, split=split)
    )


def load_dataset(name: str | Path, *args: Any, **kwargs: Any) -> Any:
    """`datasets.load_dataset`, streamed: nothing is copied into a cache. A failure becomes a `DataError` that starts with `name`."""
    import datasets

    try:
        return datasets.load_dataset(*args, **kwargs, streaming=True)
    except Exception as error:  # the library raises many kinds: network, file system, arrow, its own
        raise DataError(
            f"{name} cannot be loaded ({type(error).__name__}: {error}). Check the name and the format."
        ) from error


def numbered(name: str, rows: Iterable[Any]) -> Iterator[tuple[str, Any]]:
    """("name:row number", row), counted from 1; what the reader raises becomes a `DataError`."""
    iterator = iter(rows)
    for number in range(1, 2**63):
        try:
            row = next(iterator)
        except StopIteration:
            return
        except Exception as error:
            raise DataError(
                f"{name}:{number}: cannot be read ({type(error).__name__}: {error}). Is the file whole?"
            ) from error
        yield f"{name}:{number}", row


def jsonl_rows(path: Path) -> Iterator[tuple[str, Any]]:
    """The lines of a JSONL file as in `rows_of`; blank lines are no rows."""
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            if number == 1:  # a byte order mark
                line = line.removeprefix(b"\xef\xbb\xbf")
            if not line.strip():
                continue
            yield f"{path}:{number}", parsed(line.rstrip(), f"{path}:{number}")


def parsed(line: bytes, place: str) -> Any:
    """The JSON value in a line, or the `DataError` that says why there is none."""
    try:
        return json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        byte = f"byte {error.object[error.start]:#04x} at column {error.start + 1}"
        return DataError(f"{place}: not UTF-8 ({byte}). Save the file as UTF-8.")
    except (ValueError, RecursionError) as error:  # also numbers of thousands of digits, and brackets as deep
        detail = f"{error.msg} at column {error.colno}" if isinstance(error, json.JSONDecodeError) else str(error)
        return DataError(f"{place}: not valid JSON ({detail}). Expected one JSON object a line; mend or remove it.")


def triple_of(row: Any, place: str) -> Triple:
    """The triple in one row. Raises DataError naming the place, the field, what was expected and what came."""
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
        elif whole is not None and fields["question"] is not None:
            raise DataError(
                f"{place}: no rationale: expected a field {' or '.join(ALIASES['rationale'])}, "
                "or a reply with '#### answer' or '</think>' in it. Add the field."
            )
    texts = {field: text_of(fields[field], field, row, place) for field in ALIASES}
    return Triple(**texts, id=None if row.get("id") is None else str(row["id"]), source=place)


def text_of(value: Any, field: str, row: Mapping[str, Any], place: str) -> str:
    """The field as stripped text. Raises DataError where it is missing, empty or no text."""
    if value is None:
        keys = ", ".join(map(str, row)) or "nothing"
        raise DataError(
            f"{place}: missing field {field!r} (or {', '.join(ALIASES[field][1:]) or 'none'}); the row has {keys}. Add it."
        )
    is_number = (isinstance(value, float) and math.isfinite(value)) or type(value) is int
    if field == "answer" and is_number:
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
    """Question and reply of a chat of one turn: a system text stands before the question, `reasoning_content` is the rationale."""
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
    question, reply = messages[-2].get("content"), messages[-1]
    system = messages[0].get("content") if len(messages) == 3 else None
    if system and question and question.strip():
        question = f"{system.strip()}\n\n{question.strip()}"
    if reply.get("reasoning_content") is None:
        return {"question": question, "completion": reply.get("content")}
    return {"question": question, "rationale": reply["reasoning_content"], "answer": reply.get("content")}


def split_reply(text: str) -> tuple[str, str] | None:
    """(rationale, answer) of a reply that holds both, or None: `<think>...</think> answer`, or `... #### answer` in the last line."""
    for mark in ("</think>", "####"):
        rationale, found, answer = text.strip().rpartition(mark)
        if found and (mark == "</think>" or "\n" not in answer.strip()):  # `#### Step 1` may be a heading
            return rationale.replace("<think>", "").strip(), answer.strip()
    return None


def is_incorrect(row: Mapping[str, Any], triple: Triple) -> bool:
    """Whether `gold` is another answer than the triple's, in a row whose `correct` does not say. Raises DataError where `correct` is no bool."""
    if row.get("correct") is not None:
        if not isinstance(row["correct"], bool):
            raise DataError(
                f"{triple.source}: field 'correct' must be true or false, got {row['correct']!r:.40}. Mend the row."
            )
        return not row["correct"]
    return row.get("gold") is not None and not answers_match(triple.answer, str(row["gold"]))


def squeeze(text: str) -> str:
    """The text with every run of white space as one blank."""
    return " ".join(text.split())
