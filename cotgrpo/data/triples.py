"""Reasoning data as (question, rationale, answer) triples, read from JSONL, Parquet or a hub, with nothing lost in silence.

A bad row is an error that names the file, the line and the fix; rows that are left out on purpose are counted, with the reason, in a `DropReport`.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

ALIASES: dict[str, tuple[str, ...]] = {
    "question": ("question", "prompt", "problem"),
    "rationale": ("rationale", "reasoning", "solution", "reasoning_content"),
    "answer": ("answer",),
}
"""Field of a triple -> the row keys that may hold it, the first one present counts."""

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
        keep_incorrect: keep rows with `correct: false`, or whose `gold` differs from `answer`: real mistakes of the teacher.
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
        if isinstance(row, Mapping) and split is not None and row.get("split", split) != split:
            report.drop("other split", f"{place}: {row['split']!r}")
            continue
        if isinstance(row, Mapping) and not keep_incorrect and is_incorrect(row):
            report.drop("wrong answer", f"{place}: {row.get('answer')!r}, gold {row.get('gold')!r}")
            continue
        try:
            if isinstance(row, DataError):
                raise row
            triple = triple_of(row, place)
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
            raise DataError(
                f"{path} is a directory: expected .jsonl or .parquet files, or a hub id; name the files in it."
            )
        if path.is_file():
            if path.suffix in (".jsonl", ".json"):
                yield from jsonl_rows(path)
            elif path.suffix == ".parquet":
                yield from numbered(str(path), load_dataset("parquet", data_files=str(path), split="train"))
            else:
                raise DataError(
                    f"{path}: unknown kind of file {path.suffix!r}: expected .jsonl or .parquet; convert it."
                )
        elif path.suffix in (".jsonl", ".json", ".parquet") or not re.fullmatch(
            r"[\w.-]+/[\w.-]+(:[\w.-]+)?", str(name)
        ):
            near = difflib.get_close_matches(path.name, [p.name for p in path.parent.glob("*")], n=3)
            hint = f" Did you mean {' or '.join(near)}?" if near else " Check the path."
            raise DataError(f"{path}: no such file.{hint}")
        else:
            hub_id, _, config = str(name).partition(":")
            yield from numbered(str(name), load_dataset(hub_id, config or None, split=split or "train"))


def load_dataset(*args: Any, **kwargs: Any) -> Any:
    """`datasets.load_dataset`, streamed: nothing is copied into a cache. A failure becomes a `DataError`."""
    import datasets

    try:
        return datasets.load_dataset(*args, **kwargs, streaming=True)
    except Exception as error:  # the library raises many kinds: network, file system, arrow, its own
        name = kwargs.get("data_files", args[0])
        raise DataError(
            f"{name}: cannot be loaded ({type(error).__name__}: {error}). Check the name and the format."
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
            if number == 1:
                line = line.removeprefix(b"\xef\xbb\xbf")
            if not line.strip():
                continue
            place = f"{path}:{number}"
            try:
                row = json.loads(line.decode("utf-8"))
            except UnicodeDecodeError as error:
                byte = f"byte {error.object[error.start]:#04x} at column {error.start + 1}"
                yield place, DataError(f"{place}: not UTF-8 ({byte}). Save the file as UTF-8.")
            except json.JSONDecodeError as error:
                detail = f"{error.msg} at column {error.colno}"
                yield (
                    place,
                    DataError(
                        f"{place}: not valid JSON ({detail}). Expected one JSON object a line; mend or remove it."
                    ),
                )
            else:
                yield place, row


def triple_of(row: Any, place: str) -> Triple:
    """The triple in one row. Raises DataError naming the place, the field, what was expected and what came."""
    if not isinstance(row, Mapping):
        raise DataError(
            f"{place}: expected a JSON object with question, rationale and answer, got {type(row).__name__}."
        )
    if "messages" in row:
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
    if field == "answer" and isinstance(value, int | float) and not isinstance(value, bool):
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
    """Question and reply of a chat: what the user said, and the last assistant message with its `reasoning_content`."""
    valid = isinstance(messages, Sequence) and all(isinstance(m, Mapping) and "role" in m for m in messages)
    if not valid or isinstance(messages, str):
        raise DataError(f"{place}: 'messages' must be a list of objects with role and content. Mend the row.")
    asked = [m.get("content") for m in messages if m["role"] == "user"]
    replies = [m for m in messages if m["role"] == "assistant"]
    if len(asked) != 1 or len(replies) != 1:
        raise DataError(
            f"{place}: expected one user and one assistant message, got {len(asked)} and {len(replies)}. Split longer chats into rows."
        )
    reasoning = replies[0].get("reasoning_content")
    if reasoning is None:
        return {"question": asked[0], "completion": replies[0].get("content")}
    return {"question": asked[0], "rationale": reasoning, "answer": replies[0].get("content")}


def split_reply(text: str) -> tuple[str, str] | None:
    """(rationale, answer) of a reply that holds both, or None: `<think>...</think> answer`, or `... #### answer`."""
    for mark in ("</think>", "####"):
        if mark in text:
            rationale, _, answer = text.rpartition(mark)
            return rationale.replace("<think>", "").strip(), answer.strip()
    return None


def is_incorrect(row: Mapping[str, Any]) -> bool:
    """True for a known mistake: `correct` is false, or, without `correct`, `gold` is another answer."""
    if row.get("correct") is not None:
        return row["correct"] is False
    gold, answer = row.get("gold"), row.get("answer")
    return gold is not None and answer is not None and plain_answer(str(gold)) != plain_answer(str(answer))


def plain_answer(text: str) -> str | float:
    """Numbers as numbers ("1,000.0" is 1000), anything else as lower-case text."""
    bare = text.strip().lower().replace(",", "").removeprefix("$").removesuffix(".")
    try:
        return float(bare)
    except ValueError:
        return squeeze(bare)


def squeeze(text: str) -> str:
    """The text with every run of white space as one blank."""
    return " ".join(text.split())
