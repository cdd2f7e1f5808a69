"""From triples to packed batches: the shift by one, shuffling, packing and batching, on Grain, with a state that can be saved."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Literal

import numpy as np

from cotgrpo.data.template import Example, Template
from cotgrpo.data.triples import DataError, DropReport, Triple
from cotgrpo.types import SftBatch

PACKING_BINS = 128
"""Rows that are filled at the same time; more bins waste fewer positions and mix documents over a longer stretch."""


def make_examples(
    triples: Sequence[Triple], template: Template, seq_len: int, *, too_long: Literal["error", "drop"] = "error"
) -> tuple[list[Example], DropReport]:
    """Tokenizes triples; a document of n tokens takes n - 1 of the `seq_len` positions, since the last token is only a target.

    Args:
        triples: rows.
        template: renders and masks them.
        seq_len: the window.
        too_long: "error" stops at the first document that does not fit; "drop" counts it in the report.

    Raises:
        DataError: a document that does not fit, or none that does.
    """
    if too_long not in ("error", "drop"):
        raise ValueError(f'too_long must be "error" or "drop", got {too_long!r}.')
    report = DropReport(read=len(triples))
    examples = []
    for triple in triples:
        example = template.encode(triple)
        needed = len(example.tokens) - 1
        if needed <= seq_len:
            examples.append(example)
        elif too_long == "drop":
            report.drop("too long", f"{triple.source}: {needed} positions")
        else:
            raise DataError(
                f"{triple.source}: needs {needed} positions, but the window (seq_len) has {seq_len}. "
                'Raise seq_len, or set too_long to "drop".'
            )
    if not examples:
        raise DataError(f"No document fits into {seq_len} positions. {report}")
    return examples, report


def make_batches(
    examples: Sequence[Example],
    *,
    batch_size: int,
    seq_len: int,
    seed: int = 0,
    packing: bool = True,
    shuffle: bool = True,
    num_epochs: int | None = None,
    process_index: int = 0,
    process_count: int = 1,
) -> Any:
    """An iterator of `SftBatch`es of NumPy arrays, `[batch_size / process_count, seq_len]`.

    Documents are never cut and never cross rows; each is a segment of its own with positions from 0. Every epoch has an order of its own. With
    `num_epochs` the last batch is filled up with empty rows (segment 0, mask 0), so every document comes exactly as often as asked.

    Args:
        examples: tokenized documents, each of at most `seq_len + 1` tokens.
        batch_size: rows of the global batch.
        seq_len: positions of a row.
        seed: of the order.
        packing: several documents a row, best fit; False: one a row.
        shuffle: False keeps the order of `examples`.
        num_epochs: None: without end.
        process_index, process_count: this host takes its contiguous share of every global batch, which does not depend on the hosts.

    Returns:
        A `grain.DatasetIterator`. `get_state()` is a JSON-able dict of the position after the last batch that was taken;
        `set_state(d)` on a fresh iterator goes on from there with exactly the same batches.

    Raises:
        ValueError: sizes that do not fit together.
    """
    import grain

    if batch_size < 1 or seq_len < 1:
        raise ValueError(f"batch_size and seq_len must be at least 1, got {batch_size} and {seq_len}.")
    if batch_size % process_count or not 0 <= process_index < process_count:
        raise ValueError(
            f"batch_size {batch_size} must be a multiple of process_count {process_count}, and process_index {process_index} below it."
        )
    if not examples:
        raise DataError("No example to batch: the data set is empty.")
    dataset = grain.MapDataset.source([shifted(e) for e in examples]).seed(seed)
    dataset = (dataset.shuffle() if shuffle else dataset).repeat(num_epochs)
    rows = grain.experimental.BestFitPackIterDataset(
        dataset.to_iter_dataset(grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)),
        length_struct={"tokens": seq_len, "targets": seq_len, "loss_mask": seq_len},
        num_packing_bins=PACKING_BINS if packing else batch_size,
        seed=seed,
        shuffle_bins=shuffle and packing,
        max_sequences_per_bin=None if packing else 1,
    )
    share = batch_size // process_count
    mine = slice(process_index * share, (process_index + 1) * share)

    def fill(values: Sequence[Any]) -> Any:
        return grain.experimental.batch_and_pad(values, batch_size=batch_size)

    return iter(rows.batch(batch_size, batch_fn=fill).map(lambda columns: to_batch(columns, mine)))


def shifted(example: Example) -> dict[str, np.ndarray]:
    """Inputs, targets and weights of one document: position t predicts token t + 1. The one place where the shift is done."""
    return {
        "tokens": example.tokens[:-1],
        "targets": example.tokens[1:],
        "loss_mask": example.supervised[1:].astype(np.float32),
    }


def to_batch(columns: dict[str, np.ndarray], rows: slice) -> SftBatch:
    """Grain's packed columns as a batch: it numbers the segments of a row from 1, and padding is 0."""
    return SftBatch(
        tokens=columns["tokens"][rows],
        targets=columns["targets"][rows],
        positions=columns["tokens_positions"][rows],
        segment_ids=columns["tokens_segment_ids"][rows],
        loss_mask=columns["loss_mask"][rows],
    )


def packing_efficiency(batches: Iterator[SftBatch]) -> float:
    """The share of positions that hold a document's token, over the given (finite) batches."""
    real = total = 0
    for batch in batches:
        real += int(np.count_nonzero(batch.segment_ids))
        total += batch.segment_ids.size
    return real / max(total, 1)
