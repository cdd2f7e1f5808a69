"""The rows of a stage: training rows and held-out rows, apart by the run's split, in the order that it has recorded.

A stage that goes on uses exactly its own rows, in its own order, whatever was appended or shuffled since. The next
stage uses those rows first, and then what is new.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from cotgrpo.config import Config, ConfigError
from cotgrpo.data.questions import Question, note_rows, question_text, questions_in, read_questions
from cotgrpo.data.rows import DropReport, Row, RowResult, check_usable, read_rows
from cotgrpo.data.sources import DataError, as_list
from cotgrpo.data.streaming import StreamedTriples, index_rows
from cotgrpo.data.triples import Triple, triples_in
from cotgrpo.distributed.processes import on_process_0
from cotgrpo.identity.changes import RowChanges, row_changes
from cotgrpo.identity.fingerprints import asked_hash, question_hash, row_hash
from cotgrpo.identity.known import HELD_OUT, Known
from cotgrpo.identity.record import NO_ROWS, RowsRecord
from cotgrpo.identity.split import (
    HeldOutQuestions,
    HeldOutSplit,
    check_test_rows,
    draw_as_older_versions,
    draw_split,
    extend_split,
    list_split,
    text_hash,
)
from cotgrpo.logs.progress import PhaseProgress
from cotgrpo.terminal import say

IN_THE_TEST = "question is in the test set"
LATER = "appended since this stage began"


@dataclasses.dataclass(frozen=True)
class StageRows:
    """The rows of a stage.

    Attributes:
        train: training rows in memory; empty if they are streamed.
        test: all held-out rows.
        reports: what was left out, by name.
        held_out: the questions that must not be trained on.
        asked: those of them that these rows ask. Questions from elsewhere may be trained on, even if the split would
            hold them out.
        split_text: how the held-out rows were chosen, in one line.
        train_record, test_record: what the run records of them.
        changes: a sentence on each kind of rows that has changed since the record: "data", "held_out".
        notes: what to tell the user.
        stream: the training rows if they are streamed.
    """

    train: list[Triple]
    test: list[Question]
    reports: dict[str, DropReport]
    held_out: HeldOutQuestions
    asked: Container[str]
    split_text: str
    train_record: RowsRecord
    test_record: RowsRecord
    changes: Mapping[str, str]
    notes: Sequence[str] = ()
    stream: StreamedTriples | None = None


def train_files(config: Config) -> list[str] | str:
    """Return `data.train`. Raises ConfigError if it is empty."""
    if not config.data.train:
        raise ConfigError("data.train is empty: name at least one .jsonl or .parquet file, or a hub id.")
    return config.data.train


def train_settings(config: Config) -> dict[str, Any]:
    """Return the settings that decide which training rows there are."""
    data = config.data
    names = [str(name) for name in as_list(train_files(config))]
    own = {"columns": dict(data.columns), "row_function": data.row_function}
    return {"train": names, "split": data.train_split, "streaming": data.streaming} | own


def test_settings(config: Config) -> dict[str, Any]:
    """Return the settings that decide which held-out rows there are."""
    data = config.data
    if not data.test:
        return train_settings(config)
    own = {"columns": dict(data.columns), "row_function": data.row_function}
    return {"test": [str(name) for name in as_list(data.test)], "split": data.test_split} | own


def read_test_rows(config: Config, console: Console) -> tuple[list[Question], DropReport]:
    """Return the rows of `data.test`, and what was left out."""
    data = config.data
    with PhaseProgress("reading held-out rows", console) as progress:
        return read_questions(
            data.test,
            split=data.test_split,
            bad_rows=data.bad_rows,
            columns=data.columns,
            row_function=data.row_function,
            folder_split="test",
            progress=progress,
        )


def read_stage_rows(config: Config, console: Console, known: Known) -> StageRows:
    """Read the rows of a stage, and hold some out.

    Raises:
        DataError, ConfigError: rows that cannot be used, or none to train on or to hold out.
    """
    return stream_rows(config, console, known) if config.data.streaming else read_into_memory(config, console, known)


def read_test_alone(config: Config, console: Console, known: Known) -> StageRows:
    """Read the rows of `data.test`, for a measurement."""
    candidates, report = read_test_rows(config, console)
    chosen = choose_test(candidates, config, known)
    return StageRows(
        [],
        chosen.rows,
        {"held-out rows": report},
        HeldOutQuestions(known.split, frozenset(map(question_text, candidates))),
        frozenset(map(question_text, candidates)),
        split_text(config, known.split, chosen.rows, known),
        RowsRecord({}),
        chosen.record,
        sentences(RowChanges(), chosen.changes),
    )


def read_into_memory(config: Config, console: Console, known: Known) -> StageRows:
    """Read the rows of a stage whose training rows are in memory."""
    data = config.data
    names = as_list(train_files(config))
    hashes: dict[str, int] = {}
    rows: Iterable[RowResult] = hashed(
        read_rows(names, data.train_split, columns=data.columns, row_function=data.row_function), hashes
    )
    phase = PhaseProgress("reading rows", console)
    recorded = same_rows(None if known.recorded is None else known.recorded.train, train_settings(config))
    if not data.test or recorded is not None:  # the rows are needed twice
        with phase as progress:
            rows = in_recorded_order(list(progress.over(rows)), hashes, known)
        phase = PhaseProgress("looking for duplicates", console, len(rows))
    with phase as progress:
        train, report = triples_in(
            progress.over(rows),
            bad_rows=data.bad_rows,
            keep_incorrect=data.keep_incorrect,
            keep_rows=config.reads_rows,
        )
    check_usable(train, names, report)
    reports = {"training rows": report}
    if data.test:
        candidates, reports["held-out rows"] = read_test_rows(config, console)
        held_out = HeldOutQuestions(known.split, frozenset(map(question_text, candidates)))
        chosen = choose_test(candidates, config, known)
    else:
        # A bad row has raised an error by now. A row with a wrong reply may lack the right answer.
        with PhaseProgress("drawing held-out rows", console, report.read) as progress:
            questions, _ = questions_in(progress.over(rows), bad_rows="drop")
        split, candidates = split_of(questions, config, known)
        held_out = HeldOutQuestions(split)
        chosen = choose_test(candidates, config, known, lambda question: hashes[question.source])
        drawn = {question.source for question in chosen.rows}
        reports["held-out rows"] = note_rows(row for row in rows if isinstance(row, Row) and row.source in drawn)
    train = leave_out(train, held_out, {question.source for question in candidates}, report)
    record = rows_record(train_settings(config), train, hashes)
    changes = RowChanges() if recorded is None else row_changes(recorded, record, as_array(hashes.values()))
    if recorded is not None and known.own is not None and not changes.lost:
        train = leave_out_later(train, recorded, hashes, report)
        record = rows_record(train_settings(config), train, hashes)
    return StageRows(
        train,
        chosen.rows,
        reports,
        held_out,
        held_out if data.test else frozenset(map(question_text, candidates)),
        split_text(config, held_out.split, chosen.rows, known),
        record,
        chosen.record,
        sentences(changes, chosen.changes),
        notes_of(config, known, held_out.split, changes, chosen.changes, recorded is not None),
    )


def hashed(rows: Iterable[RowResult], hashes: dict[str, int]) -> Iterator[RowResult]:
    """Yield the rows, and add the hash of each to `hashes` by its place."""
    for row in rows:
        if isinstance(row, Row):
            hashes[row.source] = row_hash(row)
        yield row


def as_array(hashes: Iterable[int]) -> np.ndarray:
    """Return hashes as uint64."""
    return np.fromiter(hashes, np.uint64)


def same_rows(record: RowsRecord | None, settings: dict[str, Any]) -> RowsRecord | None:
    """Return the record if it is of rows of these settings."""
    return record if record is not None and record.settings == settings else None


def in_recorded_order(rows: list[RowResult], hashes: Mapping[str, int], known: Known) -> list[RowResult]:
    """Return the rows of the record first, in its order, then the others in theirs.

    Of two rows that count as duplicates, the one that was used before is then used again.
    """
    if known.recorded is None:
        return rows
    order = [*known.recorded.train.hashes.tolist(), *known.recorded.held_out.hashes.tolist()]
    rank = {one: number for number, one in enumerate(order)}
    last = len(rank)
    return sorted(rows, key=lambda row: rank.get(hashes[row.source], last) if isinstance(row, Row) else last)


def rows_record(settings: dict[str, Any], train: Sequence[Triple], hashes: Mapping[str, int]) -> RowsRecord:
    """Return the record of training rows."""
    places = [triple.source for triple in train]
    texts = (text_hash(question_text(triple)) for triple in train)
    return RowsRecord.of(settings, (hashes[place] for place in places), texts, places)


def leave_out(train: list[Triple], held_out: HeldOutQuestions, drawn: set[str], report: DropReport) -> list[Triple]:
    """Return the rows whose question is not held out, and count the others. `drawn` are the held-out rows' places."""
    kept = []
    for triple in train:
        if question_text(triple) not in held_out:
            kept.append(triple)
        else:
            own = triple.source in drawn and not held_out.texts
            report.drop("held out for testing" if own else IN_THE_TEST, triple.source)
    if not kept:
        raise DataError("No row is left to train on: every question is in the test set.")
    return kept


def leave_out_later(
    train: list[Triple], recorded: RowsRecord, hashes: Mapping[str, int], report: DropReport
) -> list[Triple]:
    """Return the rows that a stage began with, and count the others."""
    known, kept = set(recorded.hashes.tolist()), []
    for triple in train:
        if hashes[triple.source] in known:
            kept.append(triple)
        else:
            report.drop(LATER, triple.source)
    return kept


@dataclasses.dataclass(frozen=True)
class ChosenTest:
    """Held-out rows, their record, and how they differ from an earlier one."""

    rows: list[Question]
    record: RowsRecord
    changes: RowChanges


def choose_test(
    candidates: Sequence[Question], config: Config, known: Known, hash_of: Callable[[Question], int] = question_hash
) -> ChosenTest:
    """Return the held-out rows: those of the record first, in its order, then others unless the stage goes on.

    Args:
        candidates: all rows that are held out. Without `data.test`, one row of each question is chosen.
        config: the settings.
        known: the record.
        hash_of: what tells one row from another.
    """
    settings = test_settings(config)
    recorded = same_rows(None if known.recorded is None else known.recorded.held_out, settings)
    hashes = [hash_of(question) for question in candidates]
    first = dict(zip(reversed(hashes), reversed(candidates), strict=True))
    before = [] if recorded is None else [one for one in recorded.hashes.tolist() if one in first]
    rows = {one: first[one] for one in before}
    asked = {question_text(question) for question in rows.values()}
    for one, question in zip(hashes, candidates, strict=True):
        text = question_text(question)
        if one not in rows and (config.data.test or known.older or text not in asked):
            rows[one] = question
            asked.add(text)

    def record(rows: Mapping[int, Question]) -> RowsRecord:
        texts = (text_hash(question_text(question)) for question in rows.values())
        return RowsRecord.of(settings, rows, texts, [question.source for question in rows.values()])

    changes = RowChanges() if recorded is None else row_changes(recorded, record(rows), as_array(hashes))
    if recorded is not None and known.own is not None and not changes.lost:
        rows = {one: first[one] for one in before}
    return ChosenTest(list(rows.values()), record(rows), changes)


def split_of(questions: Sequence[Question], config: Config, known: Known) -> tuple[HeldOutSplit, list[Question]]:
    """Return the run's split, drawn now if it has none, and the questions that it holds out.

    Raises:
        ConfigError: no question can be held out, or none would be left to train on.
    """
    count, seed = config.data.test_rows, config.seed
    if known.older is not None:
        seed, count = known.older
        drawn = draw_as_older_versions(questions, count, seed)
        return list_split(drawn, count, seed, "older version"), drawn
    trained = set() if known.recorded is None else set(known.recorded.trained.tolist())
    split = known.split
    if split is None and not trained:
        split = draw_split(questions, count, seed)
    elif split is None or not any(question_text(question) in split for question in questions):
        split = extend_split(split, questions, trained, count, seed)
    return split, [question for question in questions if question_text(question) in split]


def split_text(config: Config, split: HeldOutSplit | None, test: Sequence[Question], known: Known) -> str:
    """Return how the held-out rows were chosen."""
    if config.data.test or split is None:
        return f"held-out split: {len(test):,} rows of data.test ({', '.join(map(str, as_list(config.data.test)))})"
    where = known.place if known.split is not None and known.place else str(Path(config.run_dir) / HELD_OUT)
    return f"held-out split: {len(test):,} questions, {split} ({where})"


def sentences(train: RowChanges, test: RowChanges) -> dict[str, str]:
    """Return a sentence on the rows that were lost, by kind."""
    found = {}
    if train.lost:
        found["data"] = f"training rows: {train}"
    if test.lost:
        found["held_out"] = f"held-out rows: {test}"
    return found


def notes_of(
    config: Config, known: Known, split: HeldOutSplit | None, train: RowChanges, test: RowChanges, compared: bool
) -> list[str]:
    """Return what to say of rows that were appended, and of settings that the split does not follow."""
    notes = []
    since = f"since {known.recorded_folder} {'began' if known.own is not None else 'was trained'}"
    added = (() if train.lost else train.added) + (() if test.lost or config.data.test else test.added)
    if added:
        use = "they are used by the next stage" if known.own is not None else "they are used from now on"
        held = f" ({len(test.added):,} of them are held out)" if test.added and not config.data.test else ""
        notes.append(f"{len(added):,} rows were appended {since}: {use}{held} (first: {added[0]})")
    if config.data.test and test.added and not test.lost:
        use = "measured by the next stage" if known.own is not None else "measured from now on"
        notes.append(f"{len(test.added):,} rows were appended to data.test {since}: they are {use}")
    if known.recorded is not None and not compared:
        notes.append(f"the training rows are not compared with those of {known.recorded_folder}: other data settings")
    wanted = config.data.test_rows
    if split is not None and known.split is not None and not config.data.test and wanted != split.test_rows:
        notes.append(
            f"data.test_rows {wanted} is not used: the run holds out the questions of data.test_rows "
            f"{split.test_rows}, for it may have been trained on others"
        )
    return notes


def stream_rows(config: Config, console: Console, known: Known) -> StageRows:
    """Index the rows of a stage whose training rows are streamed, and hold some out."""
    data, settings = config.data, train_settings(config)
    folder = Path(config.run_dir) / "row_index"
    rows = indexed(config, folder, console)
    rows.check_columns(config.seed)
    recorded = same_rows(None if known.recorded is None else known.recorded.train, settings)
    record, changes = stream_record(settings, rows), RowChanges()
    if recorded is not None:
        changes = row_changes(recorded, record, record.hashes)
        if known.own is not None and not changes.lost:
            place = {one: number for number, one in enumerate(record.hashes.tolist())}
            numbers = np.array([place[one] for one in recorded.hashes.tolist()], np.int64)
            rows = dataclasses.replace(rows, files=rows.files.select(numbers, folder))
            record = stream_record(settings, rows)
    found = f"training rows: {len(rows.files)}, read while training, without {rows.files.duplicates} exact copies"
    say(console, found)
    if data.test:
        candidates, report = read_test_rows(config, console)
        held_out = HeldOutQuestions(known.split, frozenset(map(question_text, candidates)))
    else:
        split, candidates = streamed_split(rows, config, known, console)
        held_out, report = HeldOutQuestions(split), DropReport(read=len(candidates))
    # Another row of the same question may come first now, and the lines' hashes tell what was edited.
    chosen = choose_test(candidates, config, known, question_hash if data.test else asked_hash)
    return StageRows(
        [],
        chosen.rows,
        {"held-out rows": report},
        held_out,
        held_out if data.test else frozenset(map(question_text, candidates)),
        split_text(config, held_out.split, chosen.rows, known),
        record,
        chosen.record,
        sentences(changes, chosen.changes),
        notes_of(config, known, held_out.split, changes, chosen.changes, recorded is not None),
        dataclasses.replace(rows, held_out=held_out),
    )


def indexed(config: Config, folder: Path, console: Console) -> StreamedTriples:
    """Return the streamed rows of a config. Process 0 makes the index first."""
    data, names = config.data, as_list(train_files(config))

    def index() -> StreamedTriples:
        with PhaseProgress("indexing rows", console) as progress:
            files = index_rows(names, folder, split=data.train_split, progress=progress)
        return StreamedTriples(
            files,
            data.train_split,
            data.bad_rows,
            data.keep_incorrect,
            data.columns,
            data.row_function,
            keep_rows=config.reads_rows,
        )

    on_process_0(lambda: len(index().files))
    return index()


def stream_record(settings: dict[str, Any], rows: StreamedTriples) -> RowsRecord:
    """Return the record of streamed rows: all of them, by the hashes of their lines."""
    files, entries = rows.files, rows.files.entries
    numbers, lines = (np.asarray(entries[name], np.uint32) for name in ("file", "line"))
    return RowsRecord(settings, files.names, np.asarray(files.hashes), NO_ROWS, numbers, lines)


def streamed_split(
    rows: StreamedTriples, config: Config, known: Known, console: Console
) -> tuple[HeldOutSplit, list[Question]]:
    """Return the split of streamed rows, drawn now if the run has none, and the questions that it holds out.

    Raises:
        ConfigError: no question is held out, or none would be left to train on.
    """
    (seed, count), size = known.older or (config.seed, config.data.test_rows), len(rows.files)
    split = known.split
    if split is None:
        check_test_rows(count, size)
        with PhaseProgress("drawing held-out rows", console, count) as progress:
            drawn = rows.draw_numbered(count, seed, progress)
        made = list_split((q for _, q in drawn), count, seed, "list" if known.older is None else "older version")
        return dataclasses.replace(made, numbers=tuple(number for number, _ in drawn)), [q for _, q in drawn]
    # Rows that moved are looked for in all others. Of a threshold, nobody knows how many there are.
    count_known = len(split.listed) if split.threshold < 0 else None
    numbers = itertools.chain((number for number in split.numbers if number < size), range(size))
    with PhaseProgress("finding held-out rows", console, count_known) as progress:
        found = rows.find_questions(numbers, lambda text: text in split, count_known, progress)
    if not found:
        raise ConfigError(
            f"No question of data.train is held out by the split of this run ({known.place}). Name held-out rows in "
            "data.test, or choose another run_dir."
        )
    return split, [question for _, question in found]
