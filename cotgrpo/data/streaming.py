"""Rows that are read while training: an index of the files, and packed batches in bounded memory.

The index has 18 bytes a row, on disk. Each epoch has its own order of all rows. A window of consecutive rows of that
order is read, tokenized and packed at a time, ahead of the training and maybe in other processes. A window is a
function of the seed and its number, so the position in the data is two numbers.
"""

from __future__ import annotations

import codecs
import collections
import contextlib
import dataclasses
import functools
import hashlib
import json
import os
import pickle
import weakref
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, Literal

import numpy as np

from cotgrpo.atomic_files import find_json_object, read_json, whole_file, write_json
from cotgrpo.data.batches import (
    Progress,
    call_work,
    encode_fitting,
    filled,
    no_progress,
    packed_rows,
    shifted,
    worker_ended,
    worker_pool,
)
from cotgrpo.data.layouts.own import OwnLayout
from cotgrpo.data.questions import Question, question_text, questions_in
from cotgrpo.data.rows import EXAMPLES_KEPT, BadRows, DropReport, RowResult, parse_rows
from cotgrpo.data.sources import DataError, encoding_of, files_of, parse_json_line, raw_rows
from cotgrpo.data.template import AnyTemplate, Example
from cotgrpo.data.triples import Triple, triples_in
from cotgrpo.types import Metric, Metrics, SftBatch

if TYPE_CHECKING:
    import grain

WINDOW = 1_024
"""Rows that are read, tokenized and packed together. Best fit leaves about 2 % of the positions free."""
HELD_OUT = 0x74657374
"""Added to the seed for the order in which held-out rows are drawn, so that it is not the order of training."""
ROW = np.dtype([("file", "<u2"), ("line", "<u4"), ("start", "<i8"), ("length", "<u4")])
"""A row in the index: number of its file, line from 1, first byte and number of bytes."""
HASH_BYTES = 8
LINES_AT_ONCE = 16_384
ROWS_CHECKED = 16 * WINDOW
"""Rows in which a column that `data.columns` names has to be found."""


@dataclasses.dataclass(frozen=True)
class RowFiles:
    """The rows of JSONL files by number, in the order of the files. Exact copies of an earlier line are left out.

    It holds no row and no open file, and can be sent to another process.

    Attributes:
        names: of the files, as errors name them.
        paths: of the files to read. A file that is not JSONL has a copy with a row a line.
        index: `.npy` file of `ROW` items. `hashes_file` of it holds a hash of each line.
        duplicates: lines that were left out.
    """

    names: tuple[str, ...]
    paths: tuple[str, ...]
    index: str
    duplicates: int

    def __len__(self) -> int:
        return len(self.entries)

    def __getstate__(self) -> dict[str, Any]:
        """Return the attributes without the mapped index, which would be sent as a whole."""
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}

    @functools.cached_property
    def entries(self) -> np.ndarray:
        return np.load(self.index, mmap_mode="r")

    @property
    def hashes(self) -> np.ndarray:
        """The uint64 hash of each row's line."""
        return np.load(hashes_file(Path(self.index)))

    def select(self, numbers: np.ndarray, folder: Path) -> RowFiles:
        """Return these rows alone, in this order. `folder` keeps their index."""
        if np.array_equal(numbers, np.arange(len(self))):
            return self
        index = folder / f"{Path(self.index).stem}-{digest(numbers.tobytes()).hex()}.npy"
        for path, array in ((hashes_file(index), self.hashes), (index, self.entries)):
            if items_in(path) != len(numbers):
                with whole_file(path) as temporary, open(temporary, "wb") as file:
                    np.save(file, array[numbers])
        return dataclasses.replace(self, index=str(index))

    def raw_rows(self, numbers: Sequence[int]) -> Iterator[tuple[str, Any]]:
        """Yield ("file:line", row) for these rows in order, as `cotgrpo.data.sources.raw_rows` does."""
        entries = self.entries[np.asarray(numbers, np.int64)]
        order = np.lexsort((entries["start"], entries["file"])).tolist()
        found: dict[int, tuple[str, bytes]] = {}
        opened: dict[int, BinaryIO] = {}
        with contextlib.ExitStack() as files:
            for i in order:
                file, line, start, length = entries[i].item()
                place = f"{self.names[file]}:{line}"
                try:
                    if file not in opened:
                        files.close()
                        opened = {file: files.enter_context(open(self.paths[file], "rb", buffering=0))}
                    opened[file].seek(start)
                    text = opened[file].read(length)
                except OSError as error:
                    raise DataError(f"{place}: cannot be read any more ({error}). Was the file moved?") from error
                if len(text) < length:
                    raise DataError(f"{place}: the file has become shorter while it was read. Start again.")
                found[i] = place, text
        for i in range(len(numbers)):
            place, text = found.pop(i)
            copied_error = text.startswith(BAD_LINE)
            yield place, DataError(text[len(BAD_LINE) :].decode()) if copied_error else parse_json_line(text, place)


COPY = ".rows"
"""Ends the name of a copy."""
BAD_LINE = b"cannot be read: "
"""Starts a line of a copy in place of a row that could not be read. The message follows. It is not JSON."""


def index_rows(
    names: Sequence[str | Path], folder: Path, *, split: str | None = None, progress: Progress = no_progress
) -> RowFiles:
    """Index the rows of these sources, or find the index that an earlier call has made.

    A pass over a file takes a few seconds per GB. Files other than `.jsonl` in UTF-8, which have no lines to go to, are
    copied first, with a row a line.

    Args:
        names: as `read_triples` takes them.
        folder: keeps the index and the copies. A file of another size or time gets a new index.
        split: of folders and hub ids, as in `read_triples`.
        progress: called with the number of lines that were read.

    Raises:
        DataError: a file that is missing or cannot be read, or no row.
    """
    folder.mkdir(parents=True, exist_ok=True)
    sources = [source for name in names for source in files_of(name, split)]
    paths = tuple(str(lines_of(source, folder, split, progress)) for source in sources)
    index = folder / f"{identity(paths)}.npy"
    described = index.with_suffix(".json")
    known = find_json_object(described) or {}
    counted = all(isinstance(known.get(name), int) for name in ("rows", "duplicates"))
    if not counted or not known["rows"] == items_in(index) == items_in(hashes_file(index)):
        with whole_file(index) as temporary:
            lines, rows = write_index(paths, temporary, progress)
            if not rows:
                raise DataError(f"No row in {', '.join(map(str, names))}.")
        write_json(described, {"files": paths, "rows": rows, "duplicates": lines - rows})
    return RowFiles(tuple(map(str, sources)), paths, str(index), int(read_json(described)["duplicates"]))


def items_in(path: Path) -> int | None:
    """Return the number of items of an array's file; None if it is missing, cut off or anything else."""
    try:
        return len(np.load(path, mmap_mode="r"))
    except (OSError, ValueError, EOFError, TypeError):
        return None


def hashes_file(index: Path) -> Path:
    """Return the path of the hashes that belong to an index."""
    return index.with_suffix(".hashes.npy")


def identity(paths: Sequence[str]) -> str:
    """Return a name for the files as they are now: it depends on their paths, sizes and times."""
    stats = [(path, os.stat(path).st_size, os.stat(path).st_mtime_ns) for path in map(os.path.abspath, paths)]
    return digest(repr(stats).encode()).hex()


def digest(text: bytes) -> bytes:
    """Return a hash of `HASH_BYTES`."""
    return hashlib.blake2b(text, digest_size=HASH_BYTES).digest()


def write_index(paths: Sequence[str], index: Path, progress: Progress = no_progress) -> tuple[int, int]:
    """Write the `ROW` items of all lines that are not blank, each text once, as a `.npy` file, if there is one.

    Two texts count as equal if a hash of 64 bits is. It takes about 35 bytes of memory a row.

    Returns:
        The number of lines that are not blank, and of different ones.
    """
    lines, hashes = index.with_suffix(".lines"), bytearray()
    with open(lines, "wb") as file:
        for entries, digests in scan_lines(paths):
            file.write(entries.tobytes())
            hashes += digests
            progress(len(hashes) // HASH_BYTES)
    every = np.frombuffer(hashes, np.uint64)
    again = is_again(every)
    rows = int(np.count_nonzero(~again))
    if rows:
        header = {"descr": np.lib.format.dtype_to_descr(ROW), "fortran_order": False, "shape": (rows,)}
        with open(index, "wb") as file:  # a mapped file would end the process on a full disk
            np.lib.format.write_array_header_1_0(file, header)
            for start in range(0, len(again), LINES_AT_ONCE):
                entries = np.fromfile(lines, ROW, LINES_AT_ONCE, offset=start * ROW.itemsize)
                file.write(entries[~again[start : start + len(entries)]].tobytes())
    lines.unlink()
    with whole_file(hashes_file(index.with_suffix(""))) as temporary, open(temporary, "wb") as file:
        np.save(file, every[~again])
    return len(again), rows


def is_again(hashes: np.ndarray) -> np.ndarray:
    """Return for each hash whether an earlier one is equal."""
    order = np.argsort(hashes, kind="stable")
    found = np.zeros(len(hashes), bool)
    in_order = hashes[order]
    found[order[1:][in_order[1:] == in_order[:-1]]] = True
    return found


def scan_lines(paths: Sequence[str]) -> Iterator[tuple[np.ndarray, bytes]]:
    """Yield the `ROW` items and the hashes of the lines that are not blank, `LINES_AT_ONCE` or fewer at a time."""
    found: list[tuple[int, int, int, int]] = []
    hashes = bytearray()
    for file, path in enumerate(paths):
        copied, start = path.endswith(COPY), 0
        with open(path, "rb") as lines:
            for number, line in enumerate(lines, 1):
                text = line.strip()
                if copied:
                    place, _, text = text.partition(b"\t")
                    number = int(place)
                elif number == 1 and text.startswith(codecs.BOM_UTF8):
                    text = text.removeprefix(codecs.BOM_UTF8).lstrip()
                if text:
                    found.append((file, number, start + line.index(text), len(text)))
                    hashes += digest(text)
                start += len(line)
                if len(found) == LINES_AT_ONCE:
                    yield np.array(found, ROW), bytes(hashes)
                    found, hashes = [], bytearray()
    yield np.array(found, ROW), bytes(hashes)


def lines_of(source: str | Path, folder: Path, split: str | None, progress: Progress) -> Path:
    """Return a file with a row in each line: the source, or a copy with its line number in front."""
    if isinstance(source, Path) and source.suffix == ".jsonl" and encoding_of(source) == "utf-8-sig":
        return source
    known = identity([str(source)]) if isinstance(source, Path) else digest(f"{source} {split}".encode()).hex()
    copied = folder / f"{known}{COPY}"
    described = copied.with_suffix(f"{COPY}.json")
    size = (find_json_object(described) or {}).get("size")
    if not copied.is_file() or copied.stat().st_size != size:
        with whole_file(copied) as temporary, open(temporary, "wb") as file:
            for done, (place, row) in enumerate(raw_rows([source], split), 1):
                file.write(place.rpartition(":")[2].encode() + b"\t" + line_of(row) + b"\n")
                if not done % LINES_AT_ONCE:
                    progress(done)
        write_json(described, {"size": copied.stat().st_size})
    return copied


def line_of(row: object) -> bytes:
    """Return a raw row as a line of JSON; of a `DataError`, its message."""
    if isinstance(row, DataError):
        return BAD_LINE + " ".join(str(row).split()).encode()
    return json.dumps(row, ensure_ascii=True, default=str).encode()


@dataclasses.dataclass(frozen=True)
class StreamedTriples:
    """The triples of row files, by the rows' numbers.

    Attributes:
        files: the rows.
        split, bad_rows, keep_incorrect, columns, row_function: as in `read_triples`.
        held_out: the `question_text` of questions that are left out: a set, or a rule with `in`.
        keep_rows: whether each triple holds its row as it was read.
    """

    files: RowFiles
    split: str | None = None
    bad_rows: BadRows = "error"
    keep_incorrect: bool = False
    columns: Mapping[str, str] = dataclasses.field(default_factory=dict)
    row_function: str = ""
    held_out: Container[str] = frozenset()
    keep_rows: bool = False

    def __getstate__(self) -> dict[str, Any]:
        """Return the attributes. A function of the user's own is imported again in another process."""
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}

    @functools.cached_property
    def own(self) -> OwnLayout:
        """The user's own layout."""
        return OwnLayout(self.columns, self.row_function)

    def check_columns(self, seed: int) -> None:
        """Raise DataError if none of many rows has a column that `columns` names."""
        for numbers in self.numbers(seed, ROWS_CHECKED):
            if not self.own.unseen:
                return
            collections.deque(self.parsed(numbers), maxlen=0)
        self.own.check_columns()

    def numbers(self, seed: int, rows: int) -> Iterator[list[int]]:
        """Yield the numbers of the first rows of the first epoch, a window at a time."""
        order, rows = epoch_order(len(self.files), seed), min(rows, len(self.files))
        for start in range(0, rows, WINDOW):
            yield [int(order[i]) for i in range(start, min(start + WINDOW, rows))]

    def parsed(self, numbers: Sequence[int]) -> Iterator[RowResult]:
        """Yield these rows as `read_rows` does."""
        yield from parse_rows(self.files.raw_rows(numbers), self.split, self.own)

    def read(self, numbers: Sequence[int]) -> tuple[list[Triple], DropReport]:
        """Return the triples of these rows, maybe none, and the report of what was left out."""
        triples, report = triples_in(
            self.parsed(numbers),
            bad_rows=self.bad_rows,
            keep_incorrect=self.keep_incorrect,
            deduplicate=False,
            keep_rows=self.keep_rows,
        )
        kept = []
        for triple in triples:
            if question_text(triple) in self.held_out:
                report.drop("question is in the test set", triple.source)
            else:
                kept.append(triple)
        return kept, report

    def sample(self, seed: int, *, rows: int, characters: int) -> Iterator[Triple]:
        """Yield triples in the order of the first epoch, up to so many rows and characters."""
        read = 0
        for numbers in self.numbers(seed, rows):
            for triple in self.read(numbers)[0]:
                yield triple
                read += len(triple.question) + len(triple.rationale) + len(triple.answer)
                if read > characters:
                    return

    def draw_questions(self, count: int, seed: int, progress: Progress = no_progress) -> list[Question]:
        """Draw questions that have a right answer, at most `count`, all different, in the order of the files."""
        return [question for _, question in self.draw_numbered(count, seed, progress)]

    def draw_numbered(self, count: int, seed: int, progress: Progress = no_progress) -> list[tuple[int, Question]]:
        """Draw as `draw_questions` does, and return each question with the number of its row."""
        order = epoch_order(len(self.files), (seed + HELD_OUT) % 2**32)
        numbers = (int(order[i]) for i in range(len(self.files)))
        found = self.find_questions(numbers, lambda text: True, count, progress)
        return sorted(found, key=lambda pair: pair[0])

    def find_questions(
        self,
        numbers: Iterable[int],
        wanted: Callable[[str], bool],
        count: int | None = None,
        progress: Progress = no_progress,
    ) -> list[tuple[int, Question]]:
        """Return questions that have a right answer and whose `question_text` is wanted, each once.

        Args:
            numbers: rows to look at, in this order.
            wanted: whether a text is looked for.
            count: stop after so many.
            progress: called with the number of questions that are found.
        """
        found: dict[str, tuple[int, Question]] = {}
        for number in numbers:
            for question in questions_in(self.parsed([number]), bad_rows="drop")[0]:
                if wanted(text := question_text(question)):
                    found.setdefault(text, (number, question))
            progress(len(found))
            if len(found) == count:
                break
        return list(found.values())


def epoch_order(rows: int, seed: int) -> grain.MapDataset[int]:
    """Return the orders of all epochs, one after another, without holding them: `order[epoch * rows + i]`."""
    import grain

    return grain.MapDataset.range(rows).seed(seed).shuffle().repeat(None)


@dataclasses.dataclass(frozen=True)
class Window:
    """Documents that were packed together.

    Attributes:
        examples: the documents.
        rows: packed rows, each of indices of documents, in the order of training.
        report: what was left out.
    """

    examples: list[Example]
    rows: list[tuple[int, ...]]
    report: DropReport


@dataclasses.dataclass(frozen=True)
class WindowReader:
    """Reads, tokenizes and packs the rows of a window.

    Attributes:
        triples: the rows.
        template, seq_len, too_long: as in `make_examples`.
        packing: several documents a row.
    """

    triples: StreamedTriples
    template: AnyTemplate
    seq_len: int
    too_long: Literal["error", "drop"] = "error"
    packing: bool = True

    def __call__(self, numbers: Sequence[int], seed: Sequence[int]) -> Window:
        """Return the window of these rows; `seed` shuffles its packed rows."""
        examples, _, report = self.encode(numbers)
        lengths = [len(example.tokens) - 1 for example in examples]
        rows = packed_rows(lengths, self.seq_len) if self.packing else [(i,) for i in range(len(examples))]
        order = np.random.default_rng(seed).permutation(len(rows))
        return Window(examples, [rows[i] for i in order], report)

    def encode(self, numbers: Sequence[int]) -> tuple[list[Example], list[Triple], DropReport]:
        """Return the documents of these rows that fit, the rows' triples, and the report of what was left out."""
        triples, report = self.triples.read(numbers)
        examples, encoded = encode_fitting(
            triples, self.template, self.seq_len, too_long=self.too_long, bad_rows=self.triples.bad_rows
        )
        add_report(report, dataclasses.replace(encoded, read=0))
        return examples, triples, report


def add_report(total: DropReport, more: DropReport) -> None:
    """Add the counts of `more` to `total`."""
    total.read += more.read
    for name, counts in dataclasses.asdict(more).items():
        own = getattr(total, name)
        if name == "examples":
            for what, places in counts.items():
                own[what] = [*own.get(what, []), *places][:EXAMPLES_KEPT]
        elif name != "read":
            for what, count in counts.items():
                own[what] = own.get(what, 0) + count


class StreamedBatches:
    """An iterator of `SftBatch`es as `make_batches` returns it, whose rows are read while it runs.

    Every row of the files is read once an epoch. Documents are packed within a window of rows, and windows never cross
    epochs. Batches depend neither on the number of workers nor on `only_rows`.

    Args:
        reader: reads windows.
        batch_size, seed, num_epochs, only_rows: as in `make_batches`.
        workers: processes that read and tokenize; 0: a thread of this process.
        window: rows that are packed together.
        report: counts what was read and left out, over all epochs; None: a report of its own.
        on_epoch: called with the number of epochs that are done.
        on_other_rows: called with a sentence if a position is of other rows, which is then kept as well as can be.
            None: that is an error.

    Raises:
        DataError: from the first window, or from `next`: a bad row, a document that does not fit, or none in an epoch.
    """

    def __init__(
        self,
        reader: WindowReader,
        *,
        batch_size: int,
        seed: int = 0,
        num_epochs: int | None = None,
        only_rows: Sequence[int] | None = None,
        workers: int = 0,
        window: int = WINDOW,
        report: DropReport | None = None,
        on_epoch: Callable[[int], None] = no_progress,
        on_other_rows: Callable[[str], None] | None = None,
    ) -> None:
        self.reader, self.batch_size, self.seed, self.window_size = reader, batch_size, seed, window
        self.mine = set(range(batch_size) if only_rows is None else only_rows)
        self.count = len(reader.triples.files)
        self.order = epoch_order(self.count, seed)
        self.windows = -(-self.count // window)  # of an epoch
        self.end = None if num_epochs is None else num_epochs * self.windows
        self.report, self.on_epoch = DropReport() if report is None else report, on_epoch
        self.on_other_rows = on_other_rows
        self.executor: Executor
        self.work: Callable[[list[int], tuple[int, int]], Window]
        if workers:
            self.executor, self.work = worker_pool(reader, workers), call_work
        else:
            # A copy: a tokenizer must not be used by two threads at once.
            self.executor, self.work = ThreadPoolExecutor(1), pickle.loads(pickle.dumps(reader))
        self.close = weakref.finalize(self, self.executor.shutdown, wait=False, cancel_futures=True)
        self.lookahead = max(workers, 1)
        self.pending: dict[int, Future[Window]] = {}
        self.next_window, self.row, self.empty = 0, 0, 0
        self.current = Window([], [], DropReport())
        self.entered = DropReport()
        self.expect(0)
        self.pending[0].result()  # an error of the first rows comes before the run begins

    def __iter__(self) -> StreamedBatches:
        return self

    def __next__(self) -> SftBatch:
        self.entered = DropReport()
        batch: list[list[dict[str, np.ndarray]]] = []
        while len(batch) < self.batch_size:
            if self.row == len(self.current.rows):
                if self.next_window == self.end:
                    break
                self.enter()
            else:
                documents = self.current.rows[self.row] if len(batch) in self.mine else ()
                batch.append([shifted(self.current.examples[i]) for i in documents])
                self.row += 1
        if not batch:
            raise StopIteration
        return filled(batch, self.batch_size, self.reader.seq_len)

    def enter(self) -> None:
        """Go on with the next window, and count what was left out of it."""
        self.current, self.row = self.take(self.next_window), 0
        self.next_window += 1
        for report in (self.entered, self.report):
            add_report(report, self.current.report)
        self.empty = 0 if self.current.rows else self.empty + 1
        if self.empty == self.windows:
            raise DataError(f"No document of an epoch is left to train on. {self.report}")
        if not self.next_window % self.windows:
            self.on_epoch(self.next_window // self.windows)

    def expect(self, window: int) -> None:
        """Start the work on a window and on those that follow."""
        last = window + self.lookahead if self.end is None else min(window + self.lookahead, self.end - 1)
        for number in range(window, last + 1):
            if number not in self.pending:
                epoch, place = divmod(number, self.windows)
                start, end = place * self.window_size, min((place + 1) * self.window_size, self.count)
                rows = [int(self.order[epoch * self.count + i]) for i in range(start, end)]
                self.pending[number] = self.executor.submit(self.work, rows, (self.seed, number))

    def take(self, window: int) -> Window:
        """Return a window, and start the work on those that follow."""
        self.expect(window)
        try:
            return self.pending.pop(window).result()
        except BrokenProcessPool as error:
            raise worker_ended() from error

    def observed(self) -> Metrics:
        """Return the share of rows that were left out, of those read for the newest batch."""
        read = self.entered.read
        values = (np.asarray(value, np.float32) for value in (read - self.entered.kept, read))
        return {"rows_left_out": Metric(*values)}

    def get_state(self) -> dict[str, Any]:
        """Return the position after the last batch taken, as JSON-able values."""
        used_up = self.row == len(self.current.rows)
        position = (
            {"window": self.next_window, "row": 0} if used_up else {"window": self.next_window - 1, "row": self.row}
        )
        return position | {
            "rows": self.count,
            "window_size": self.window_size,
            "report": dataclasses.asdict(self.report),
        }

    def set_state(self, state: dict[str, Any]) -> None:
        """Continue from a position.

        Raises:
            DataError: the files have other rows now.
        """
        state = self.same_place(state)
        for future in self.pending.values():
            future.cancel()
        self.pending.clear()
        for name, value in dataclasses.asdict(DropReport(**state["report"])).items():
            setattr(self.report, name, value)
        self.next_window, self.row, self.empty = state["window"], state["row"], 0
        self.current, self.entered = Window([], [], DropReport()), DropReport()
        if self.row:
            self.current = self.take(self.next_window)
            self.next_window += 1

    def same_place(self, state: dict[str, Any]) -> dict[str, Any]:
        """Return a position in these rows. Of other rows: the same share of the same epoch, at the start of a window.

        Raises:
            DataError: the position is of other rows, and nobody has allowed that.
        """
        if (state["rows"], state["window_size"]) == (self.count, self.window_size):
            return state
        other = (
            f"The run was saved with {state['rows']} rows in windows of {state['window_size']}, and data.train has "
            f"{self.count} now, in windows of {self.window_size}"
        )
        if self.on_other_rows is None:
            raise DataError(f"{other}: restore the files, or choose another run_dir.")
        windows = -(-state["rows"] // state["window_size"])
        epoch, place = divmod(state["window"], windows)
        window = epoch * self.windows + place * self.windows // windows
        self.on_other_rows(f"{other}: epoch {epoch + 1} goes on after {place} of its {windows} windows.")
        return state | {"window": window, "row": 0}
