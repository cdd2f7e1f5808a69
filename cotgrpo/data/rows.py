"""Rows of reasoning data, parsed once, and the count of rows that are left out or noted.

A row that cannot be parsed is an error that names the file, the line and the fix. Rows left out on purpose are counted
with their reason in a `DropReport`. `cotgrpo.data.layouts` knows the columns of public data sets.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar

from cotgrpo.data.answers import Grade, grade
from cotgrpo.data.layouts.columns import Found
from cotgrpo.data.layouts.golds import read_gold
from cotgrpo.data.layouts.own import OwnLayout
from cotgrpo.data.layouts.questions import read_chat, read_question
from cotgrpo.data.layouts.replies import Reply, read_flag, read_reply
from cotgrpo.data.layouts.values import Note, parse_text
from cotgrpo.data.layouts.values import squeeze as squeeze
from cotgrpo.data.sources import DataError, raw_rows

ROWS_BETWEEN_REPORTS = 64
"""Of progress."""
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
        id: its own id.
        fields: the row as it was read.
        not_a_triple: why no triple can be made of it; empty if one can.
        no_gold: why its right answer cannot be used; empty if it can, or if the row has none.
        verbatim: whether `answer` is the whole reply, to be trained as it is.
        context, tools: as in `Triple`.
        prose: the text in which `answer` was found without a mark; else empty.
        notes: what the report counts, each with a place: which of two columns is used, a right answer read from prose.
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
    no_gold: str = ""
    verbatim: bool = False
    context: tuple[Mapping[str, Any], ...] = ()
    tools: tuple[Mapping[str, Any], ...] = ()
    prose: str = ""
    notes: tuple[Note, ...] = ()
    id: str | None = None

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
        examples: reason, or what was noted -> the first few places, as "file:line: detail".
        noted: what a user should know of rows that were kept -> count.
    """

    read: int = 0
    dropped: dict[str, int] = dataclasses.field(default_factory=dict)
    examples: dict[str, list[str]] = dataclasses.field(default_factory=dict)
    noted: dict[str, int] = dataclasses.field(default_factory=dict)

    @property
    def kept(self) -> int:
        return self.read - sum(self.dropped.values())

    def drop(self, reason: str, place: str) -> None:
        """Count one row left out."""
        self._count(self.dropped, reason, place)

    def note(self, what: str, place: str) -> None:
        """Count one row that was read in a way that a user should know of."""
        self._count(self.noted, what, place)

    def _count(self, counts: dict[str, int], what: str, place: str) -> None:
        counts[what] = counts.get(what, 0) + 1
        seen = self.examples.setdefault(what, [])
        if len(seen) < EXAMPLES_KEPT:
            seen.append(place)

    def to_dict(self) -> dict[str, Any]:
        whole = {"read": self.read, "kept": self.kept, "dropped": self.dropped, "examples": self.examples}
        return whole | ({"noted": self.noted} if self.noted else {})

    def __str__(self) -> str:
        lines = [f"{self.kept} of {self.read} rows kept"]
        for reason, count in sorted(self.dropped.items(), key=lambda item: -item[1]):
            lines.append(f"  {count} dropped, {reason}: {'; '.join(self.examples[reason])}")
        for what, count in sorted(self.noted.items(), key=lambda item: -item[1]):
            lines.append(f"  {count} noted, {what}: {'; '.join(self.examples[what])}")
        return "\n".join(lines)


def read_rows(
    names: Sequence[str | Path],
    split: str | None = None,
    *,
    columns: Mapping[str, str] | None = None,
    row_function: str = "",
    optional: tuple[str, ...] = (),
    folder_split: str = "train",
) -> Iterator[RowResult]:
    """Yield every row of these files and hub data sets, parsed; in place of a bad row, the error.

    Args:
        names: files, folders, patterns or hub ids, as `raw_rows` takes them.
        split: rows with another `split` field come as `LeftOut`. For a hub id it is the split to load; None: "train".
        columns: our names of fields -> the rows' columns; a dot leads into an object.
        row_function: "package.module:function", which takes a row and returns one of a known layout, or None.
        optional: fields whose columns no row needs to have.
        folder_split: split of a folder whose files name splits, if `split` is None.

    Raises:
        DataError: a file that is missing or cannot be read, or `columns` names a column that no row has.
    """
    own = OwnLayout(columns, row_function)
    yield from parse_rows(raw_rows(names, split, folder_split), split, own)
    own.check_columns(optional)


def parse_rows(
    raw: Iterable[tuple[str, object]], split: str | None = None, own: OwnLayout | None = None
) -> Iterator[RowResult]:
    """Yield raw rows, as `raw_rows` yields them, parsed; in place of a bad row, the error."""
    for place, row in raw:
        try:
            yield row if isinstance(row, DataError) else parse_row(row, place, own, split)
        except (DataError, LeftOut) as error:
            yield error


def counted(rows: Iterable[T], progress: Callable[[int], None]) -> Iterator[T]:
    """Yield the rows, and call `progress` now and then with the number of those that were used."""
    done = 0
    for row in rows:
        yield row
        done += 1
        if not done % ROWS_BETWEEN_REPORTS:
            progress(done)
    progress(done)


def collect(
    rows: Iterable[RowResult],
    make: Callable[[Row], tuple[T, Sequence[str]]],
    *,
    bad_rows: BadRows,
    deduplicate: bool = True,
    notes: Callable[[Row], Iterable[Note]] = lambda row: row.notes,
) -> tuple[list[T], DropReport]:
    """Return what `make` returns for each row, and the report of the others.

    Args:
        rows: as `read_rows` yields them.
        make: returns an object and the texts that identify it; raises `LeftOut` or `DataError`.
        bad_rows: "error" raises at the first row that cannot be used; "drop" counts it.
        deduplicate: leave out rows whose texts equal those of an earlier one.
        notes: what the report notes of a row that is kept.

    Raises:
        DataError: a bad row.
    """
    if bad_rows not in ("error", "drop"):
        raise ValueError(f'bad_rows must be "error" or "drop", got {bad_rows!r}.')
    report = DropReport()
    made: list[T] = []
    seen: set[bytes] = set()  # of hashes, which take less memory than the texts
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
        key = hashlib.blake2b("\n".join(map(squeeze, texts)).encode("utf-8", "surrogatepass"), digest_size=16).digest()
        if deduplicate and key in seen:
            report.drop("duplicate", row.source)
        else:
            seen.add(key)
            made.append(one)
            for note in notes(row):
                report.note(*note)
    return made, report


def check_usable(found: Sequence[T], names: Sequence[str | Path], report: DropReport) -> None:
    """Raise DataError if nothing was found in these sources."""
    if not found:
        raise DataError(f"No usable row in {', '.join(map(str, names))}. {report}")


def parse_row(row: object, place: str, own: OwnLayout | None = None, split: str | None = None) -> Row:
    """Parse one row. A reply in one text is split into rationale and answer if its form allows it.

    Args:
        row: a JSON object of a known layout, or of one that `own` brings into a known one.
        place: its place, for errors.
        own: the user's own layout.
        split: leave out a row with another `split` field.

    Raises:
        DataError: the row has no question, or a value has the wrong type; names the place, the field and the fix.
        LeftOut: a row of another split, or that the row function leaves out.
    """
    check_object(row, place, split)
    assert isinstance(row, Mapping)
    known: Mapping[str, object] | None = row if own is None else own.apply(row, place)
    if known is None:
        raise LeftOut("row_function returned None", place)
    if known is not row:
        check_object(known, place, split)
    named = () if own is None else tuple(ours for ours in own.columns if known.get(ours) is not None)
    found, notes = Found(known, named), list[Note]()
    chat = read_chat(found, place)
    question = read_question(found, chat, place, notes)
    correct = read_flag(found, place)
    try:
        reply = read_reply(found, chat, place, notes)
    except DataError as error:
        if correct is not False:
            raise
        reply = Reply(golds=tuple(found.all("gold")), problem=str(error))  # a known mistake may lack a reply
    gold, no_gold = read_gold(reply.golds, place, notes)
    if reply.problem and reply.answer and gold and not grade(reply.answer, gold).correct:
        notes.append(
            ("answer and gold differ: gold is the right answer", f"{place}: {reply.answer!r:.40}, {gold!r:.40}")
        )
    system = parse_text(found.value("system"), "system", place)
    if chat is not None and chat.system and squeeze(system) not in ("", squeeze(chat.system)):
        notes.append(("two system messages in one row: that of the chat is used, the other is not", place))
    return Row(
        question=question,
        rationale=reply.rationale,
        answer=reply.answer,
        gold=gold,
        system=(chat.system if chat is not None else "") or system,
        marked_correct=correct,
        source=place,
        fields=row,
        not_a_triple=reply.problem,
        no_gold=no_gold or ("" if gold else reply.no_gold),
        verbatim=reply.verbatim,
        context=() if chat is None else chat.context,
        tools=() if chat is None else chat.tools,
        prose=reply.prose,
        notes=tuple(notes),
        id=None if found.value("id") is None else str(found.value("id")),
    )


def check_object(row: object, place: str, split: str | None) -> None:
    """Raise DataError unless a row is an object, and LeftOut if it is of another split."""
    if not isinstance(row, Mapping):
        raise DataError(
            f"{place}: expected a JSON object with question, rationale and answer, got {type(row).__name__}."
        )
    own_split = row.get("split")
    if split is not None and own_split not in (None, split):
        raise LeftOut("other split", f"{place}: {own_split!r}")
