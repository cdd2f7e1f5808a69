"""Batches from triples: tokens, the shift by one, packing and shuffling, on Grain, with a state that can be saved."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import signal
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from cotgrpo.data.rows import BadRows, DropReport
from cotgrpo.data.sources import DataError
from cotgrpo.data.template import AnyTemplate, Example
from cotgrpo.data.triples import Triple
from cotgrpo.types import SftBatch

if TYPE_CHECKING:
    import grain

ENCODED_AT_ONCE = 1_024
"""Rows that a template renders and tokenizes together."""
REFUSED = "refused by the template"
"""The reason for rows left out because the template cannot write them."""
DOCUMENTS_BETWEEN_REPORTS = 16_384

Progress = Callable[[int], None]
"""Called with the number of rows that are done."""


def no_progress(done: int) -> None:
    """Show nothing."""


def make_examples(
    triples: Sequence[Triple],
    template: AnyTemplate,
    seq_len: int,
    *,
    too_long: Literal["error", "drop"] = "error",
    bad_rows: BadRows = "error",
    progress: Progress = no_progress,
    workers: int = 0,
) -> tuple[list[Example], DropReport]:
    """Tokenize triples. A document of n tokens takes n - 1 of the `seq_len` positions: its last token is only a target.

    A triple whose turns do not share a sequence gives several documents. They are kept or left out together.

    Args:
        triples: rows.
        template: renders and masks them.
        seq_len: the window, in positions.
        too_long: "error" stops at the first document that does not fit; "drop" counts it in the report.
        bad_rows: "error" stops at the first row that the template refuses; "drop" counts it in the report.
        progress: called with the number of triples that are done.
        workers: processes that tokenize; 0: this one.

    Raises:
        DataError: a document that does not fit, a row that the template refuses, or no document at all.
    """
    examples, report = encode_fitting(
        triples, template, seq_len, too_long=too_long, bad_rows=bad_rows, progress=progress, workers=workers
    )
    if not examples:
        raise DataError(f"No document fits into {seq_len} positions. {report}")
    return examples, report


def encode_fitting(
    triples: Sequence[Triple],
    template: AnyTemplate,
    seq_len: int,
    *,
    too_long: Literal["error", "drop"],
    prompts: Sequence[np.ndarray | None] | None = None,
    bad_rows: BadRows = "error",
    progress: Progress = no_progress,
    workers: int = 0,
) -> tuple[list[Example], DropReport]:
    """Tokenize triples as `make_examples` does; there may be no example. `prompts` are the triples' prompt tokens."""
    for name, value in (("too_long", too_long), ("bad_rows", bad_rows)):
        if value not in ("error", "drop"):
            raise ValueError(f'{name} must be "error" or "drop", got {value!r}.')
    report = DropReport(read=len(triples))
    examples: list[Example] = []
    done = 0
    for encoded in encoded_rows(triples, template, prompts, workers):
        for found in encoded:
            if not isinstance(found, DataError):
                longest = max(found, key=lambda example: len(example.tokens))
                if fits(longest.source, len(longest.tokens) - 1, seq_len, too_long, report):
                    examples.extend(found)
            elif bad_rows == "error":
                raise found
            else:
                report.drop(REFUSED, str(found))
        done += len(encoded)
        progress(done)
    return examples, report


def encoded_rows(
    triples: Sequence[Triple], template: AnyTemplate, prompts: Sequence[np.ndarray | None] | None, workers: int
) -> Iterator[list[list[Example] | DataError]]:
    """Yield what the template's `encode_batch` returns for `ENCODED_AT_ONCE` triples at a time, in order."""
    starts = range(0, len(triples), ENCODED_AT_ONCE)
    rows = [triples[start : start + ENCODED_AT_ONCE] for start in starts]
    known = [None if prompts is None else prompts[start : start + ENCODED_AT_ONCE] for start in starts]
    if workers == 0 or len(starts) < 2:
        yield from map(template.encode_batch, rows, known)
        return
    with worker_pool(template.encode_batch, workers) as pool:
        try:
            yield from pool.map(call_work, rows, known)
        except BrokenProcessPool as error:
            raise worker_ended() from error
        finally:
            pool.shutdown(cancel_futures=True)


WORK: list[Callable[..., Any]] = []
"""In a worker process, the function that it calls."""


def worker_pool(work: Callable[..., Any], workers: int) -> ProcessPoolExecutor:
    """Return processes that call `work`, which is sent to each of them once, through `call_work`."""
    context = multiprocessing.get_context("spawn")
    return ProcessPoolExecutor(workers, context, start_worker, (pickle.dumps(work),))


def start_worker(work: bytes) -> None:
    """Set up a worker process. It leaves signals to its parent, and ends when the parent does."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # one thread for each process
    threading.Thread(target=end_with_parent, daemon=True).start()
    WORK.append(pickle.loads(work))


def end_with_parent() -> None:
    """Wait for the end of the parent process, however it ends, and end this one."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def call_work(*arguments: Any) -> Any:
    """Call the function of a worker process."""
    return WORK[0](*arguments)


def worker_ended() -> DataError:
    """Return the error for a worker process that was killed."""
    return DataError("A process that tokenizes rows has ended (out of memory?). Lower data.num_workers.")


def fits(
    source: str, needed: int, seq_len: int, too_long: Literal["error", "drop"], report: DropReport, part: str = ""
) -> bool:
    """Return whether a document fits into the window.

    Args:
        source: the row's place, as "file:line".
        needed, seq_len: positions needed and available.
        too_long: "error" raises if it does not fit; "drop" counts it in the report.
        report: counts the rows left out.
        part: "prompt" if only that part of the row is meant.

    Raises:
        DataError: it does not fit, and `too_long` is "error".
    """
    if needed <= seq_len:
        return True
    if too_long == "error":
        raise DataError(
            f"{source}: {f'the {part} ' if part else ''}needs {needed} positions, but the window (seq_len) has "
            f'{seq_len}. Raise seq_len, or set too_long to "drop".'
        )
    report.drop("too long", f"{source}: {f'a {part} of ' if part else ''}{needed} positions")
    return False


def make_batches(
    examples: Sequence[Example],
    *,
    batch_size: int,
    seq_len: int,
    seed: int = 0,
    packing: bool = True,
    shuffle: bool = True,
    num_epochs: int | None = None,
    only_rows: Sequence[int] | None = None,
    progress: Progress = no_progress,
) -> grain.DatasetIterator[SftBatch]:
    """Return an iterator of `SftBatch`es of NumPy arrays, `[batch_size, seq_len]`.

    A document is never cut and never crosses rows. Each is a segment of its own with positions from 0. Rows are packed
    once; every epoch has its own order. With `num_epochs` the last batch is filled up with empty rows (segment 0, mask
    0), so every document comes exactly `num_epochs` times.

    Args:
        examples: tokenized documents, each of at most `seq_len + 1` tokens.
        batch_size: rows of a batch.
        seq_len: positions of a row.
        seed: seed of the order, in [0, 2^32).
        packing: several documents a row, best fit; False: one a row.
        shuffle: False keeps the order of `examples`, or of the first document of each packed row.
        num_epochs: at least 1, or None: endless.
        only_rows: the rows that this process needs of a batch shared by several processes; it leaves the others empty.
            None: all. The content of a row and the iterator's position do not depend on it.
        progress: called with the number of documents that are packed.

    Returns:
        A `grain.DatasetIterator`. `get_state()` is a JSON-able dict of the position after the last batch taken.
        `set_state(d)` on a fresh iterator continues from there with exactly the same batches.

    Raises:
        DataError: no example, or one that is too long, too short or without a supervised token.
        ValueError: sizes that do not fit together.
    """
    import grain

    if batch_size < 1 or seq_len < 1 or (num_epochs is not None and num_epochs < 1):
        raise ValueError(
            f"batch_size, seq_len and num_epochs must be at least 1, got {batch_size}, {seq_len} and {num_epochs}."
        )
    if not 0 <= seed < 2**32:
        raise ValueError(f"seed must be in [0, 2^32), got {seed}.")
    check_examples(examples, seq_len)
    lengths = [len(example.tokens) - 1 for example in examples]
    rows = packed_rows(lengths, seq_len, progress) if packing else [(i,) for i in range(len(examples))]
    mine = set(range(batch_size) if only_rows is None else only_rows)

    def fill(batch: Sequence[tuple[int, ...]]) -> SftBatch:
        rows_here = [row if b in mine else () for b, row in enumerate(batch)]
        documents = [[shifted(examples[i]) for i in row] for row in rows_here]
        return filled(documents, batch_size, seq_len, examples[0].extra)

    dataset = grain.MapDataset.source(rows).seed(seed)
    dataset = (dataset.shuffle() if shuffle else dataset).repeat(num_epochs)
    rows_in_order = dataset.to_iter_dataset(grain.ReadOptions(num_threads=0, prefetch_buffer_size=0))
    return iter(rows_in_order.batch(batch_size, batch_fn=fill))


def check_examples(examples: Sequence[Example], seq_len: int) -> None:
    """Raise DataError without any example, or for one that does not fit or has no supervised token."""
    if not examples:
        raise DataError("No example to batch: the data set is empty.")
    for number, example in enumerate(examples):
        place = example.source or f"example {number}"
        if not 2 <= len(example.tokens) <= seq_len + 1:
            raise DataError(
                f"{place}: expected 2 to {seq_len + 1} tokens (seq_len + 1), got {len(example.tokens)}. "
                'Raise seq_len, or leave it out (make_examples with too_long="drop").'
            )
        if not example.supervised[1:].any():
            raise DataError(f"{place}: no token is supervised (an all-zero loss mask). Leave it out.")


def packed_rows(lengths: Sequence[int], seq_len: int, progress: Progress = no_progress) -> list[tuple[int, ...]]:
    """Choose the documents that share a row, by best fit decreasing: longest first, into the fullest row with room.

    Args:
        lengths: positions of each document, in [1, seq_len].
        seq_len: positions of a row.
        progress: called with the number of documents that have a row.

    Returns:
        Indices of documents, ascending in a row, rows by their first. Every document is in one row.
    """
    rows: list[list[int]] = []
    with_room: list[list[list[int]]] = [[] for _ in range(seq_len + 1)]  # index n: the rows with n positions left
    rooms = 0  # bit n is set if with_room[n] has a row
    for done, document in enumerate(sorted(range(len(lengths)), key=lambda i: -lengths[i])):
        if not done % DOCUMENTS_BETWEEN_REPORTS:
            progress(done)
        length = lengths[document]
        enough = rooms >> length
        if enough:
            room = length + (enough & -enough).bit_length() - 1
            row = with_room[room].pop()
            rooms ^= 0 if with_room[room] else 1 << room
        else:
            room, row = seq_len, []
            rows.append(row)
        row.append(document)
        with_room[room - length].append(row)
        rooms |= 1 << (room - length)
    return sorted(tuple(sorted(row)) for row in rows)


def shifted(example: Example) -> dict[str, Any]:
    """Return the inputs, targets and weights of a document: position t predicts token t + 1."""
    return {
        "tokens": example.tokens[:-1],
        "targets": example.tokens[1:],
        "loss_mask": example.supervised[1:].astype(np.float32),
        "extra": example.extra,
    }


def filled(
    rows: Sequence[Sequence[dict[str, Any]]],
    batch_size: int,
    seq_len: int,
    extra: Mapping[str, np.ndarray] | None = None,
) -> SftBatch:
    """Lay documents out in their rows as a batch: segments from 1, positions from 0, zeros in the padding.

    `extra` has the types of the documents' further arrays.
    """
    batch = SftBatch(
        tokens=np.zeros((batch_size, seq_len), np.int32),
        targets=np.zeros((batch_size, seq_len), np.int32),
        positions=np.zeros((batch_size, seq_len), np.int32),
        segment_ids=np.zeros((batch_size, seq_len), np.int32),
        loss_mask=np.zeros((batch_size, seq_len), np.float32),
        extra={name: np.zeros((batch_size, seq_len, *x.shape[1:]), x.dtype) for name, x in (extra or {}).items()},
    )
    for b, row in enumerate(rows):
        start = 0
        for segment, document in enumerate(row, 1):
            length = len(document["tokens"])
            place = b, slice(start, start + length)
            batch.tokens[place], batch.targets[place] = document["tokens"], document["targets"]
            batch.positions[place], batch.segment_ids[place] = np.arange(length), segment
            batch.loss_mask[place] = document["loss_mask"]
            for name, array in batch.extra.items():
                array[place] = document["extra"][name]
            start += length
    return batch


def packing_efficiency(batches: Iterable[SftBatch]) -> float:
    """Return the share of positions that hold a document's token, over the given (finite) batches."""
    real = total = 0
    for batch in batches:
        real += int(np.count_nonzero(batch.segment_ids))
        total += batch.segment_ids.size
    return real / max(total, 1)
