"""Batches: the shift by hand, every document once an epoch for any sizes, and a state that resumes exactly."""

from __future__ import annotations

import json
import time
from collections import Counter
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cotgrpo.data.batches import make_batches, make_examples, packed_rows, packing_efficiency
from cotgrpo.data.template import Example, Template
from cotgrpo.data.tokenizer import train_tokenizer
from cotgrpo.data.triples import DataError, Triple, read_triples
from cotgrpo.types import SftBatch

GSM8K = Path(__file__).parents[3] / "shared" / "data" / "gsm8k_train.jsonl"


def documents(lengths: list[int]) -> list[Example]:
    """Document d of n positions: tokens 1000 d + 1 ... 1000 d + n + 1, all but the first two supervised.

    Of a document of one position the last token is supervised.
    """
    return [
        Example(1000 * d + np.arange(1, n + 2, dtype=np.int32), np.arange(n + 1) >= min(n, 2), f"f:{d}")
        for d, n in enumerate(lengths)
    ]


def spans(batch: SftBatch) -> list[tuple[int, slice]]:
    """(row, positions) of every document in a batch, after checking that a row is documents and then padding."""
    found = []
    for b, segments in enumerate(np.asarray(batch.segment_ids)):
        count = segments.max()
        lengths = [int((segments == s).sum()) for s in range(1, count + 1)]
        expected = np.repeat(np.arange(1, count + 1), lengths)
        np.testing.assert_array_equal(segments, np.pad(expected, (0, len(segments) - len(expected))))
        for array in (batch.tokens, batch.targets, batch.positions, batch.loss_mask):
            assert not np.asarray(array)[b, sum(lengths) :].any()
        ends = np.cumsum(lengths)
        found += [(b, slice(end - n, end)) for n, end in zip(lengths, ends, strict=True)]
    return found


def taken(batches: Any, examples: list[Example]) -> Counter[int]:
    """How often each document came, every one whole: tokens, targets, positions and mask."""
    count: Counter[int] = Counter()
    for batch in batches:
        for place in spans(batch):
            document = int(batch.tokens[place][0]) // 1000
            tokens, supervised = examples[document].tokens, examples[document].supervised
            np.testing.assert_array_equal(batch.tokens[place], tokens[:-1])
            np.testing.assert_array_equal(batch.targets[place], tokens[1:])
            np.testing.assert_array_equal(batch.positions[place], np.arange(len(tokens) - 1))
            np.testing.assert_array_equal(batch.loss_mask[place], supervised[1:])
            count[document] += 1
    return count


def assert_equal(left: SftBatch, right: SftBatch) -> None:
    jax.tree.map(np.testing.assert_array_equal, left, right)


def test_the_shift_by_hand() -> None:
    """Two documents, 5 6 7 8 (supervised from 7 on) and 9 1, in one row of six, and a row of padding."""
    two = [
        Example(np.array([5, 6, 7, 8], np.int32), np.array([False, False, True, True])),
        Example(np.array([9, 1], np.int32), np.array([False, True])),
    ]
    (batch,) = make_batches(two, batch_size=2, seq_len=6, num_epochs=1, shuffle=False)
    assert batch.tokens.tolist() == [[5, 6, 7, 9, 0, 0], [0] * 6]
    assert batch.targets.tolist() == [[6, 7, 8, 1, 0, 0], [0] * 6]
    assert batch.positions.tolist() == [[0, 1, 2, 0, 0, 0], [0] * 6]
    assert batch.segment_ids.tolist() == [[1, 1, 1, 2, 0, 0], [0] * 6]
    assert batch.loss_mask.tolist() == [[0, 1, 1, 1, 0, 0], [0] * 6]
    for name in ("tokens", "targets", "positions", "segment_ids"):
        assert getattr(batch, name).dtype == np.int32
    assert batch.loss_mask.dtype == np.float32
    assert packing_efficiency([batch]) == 4 / 12


def test_without_packing_the_order_is_kept() -> None:
    examples = documents([3, 1, 4, 1, 5])
    batches = list(make_batches(examples, batch_size=2, seq_len=5, num_epochs=2, packing=False, shuffle=False))
    assert [int(b.tokens[i, 0]) // 1000 for b in batches for i in range(2)] == [0, 1, 2, 3, 4] * 2
    assert all(b.segment_ids.max() == 1 for b in batches)


@given(
    lengths=st.lists(st.integers(1, 20), min_size=1, max_size=40),
    batch_size=st.integers(1, 9),
    room=st.integers(0, 20),
    packing=st.booleans(),
    shuffle=st.booleans(),
    num_epochs=st.integers(1, 3),
    seed=st.integers(0, 2**32 - 1),
)
@settings(deadline=None, max_examples=50)
def test_every_document_comes_once_an_epoch(
    lengths: list[int], batch_size: int, room: int, packing: bool, shuffle: bool, num_epochs: int, seed: int
) -> None:
    examples, seq_len = documents(lengths), max(lengths) + room
    sizes = {"batch_size": batch_size, "seq_len": seq_len, "packing": packing, "shuffle": shuffle, "seed": seed}
    batches = list(make_batches(examples, **sizes, num_epochs=num_epochs))
    assert all(np.shape(batch.tokens) == (batch_size, seq_len) for batch in batches)
    assert taken(batches, examples) == dict.fromkeys(range(len(lengths)), num_epochs)
    # Only the last batch has empty rows. Without an end there are none, and epochs do not overlap.
    rows = sum(int((batch.segment_ids[:, 0] > 0).sum()) for batch in batches)
    assert len(batches) == -(-rows // batch_size) and rows % num_epochs == 0
    endless = make_batches(examples, **sizes)
    rows_of_it = [next(endless) for _ in range(len(batches))]
    assert all((batch.segment_ids[:, 0] > 0).all() for batch in rows_of_it)
    assert set(taken(rows_of_it, examples)) == set(range(len(lengths)))


@given(st.lists(st.integers(1, 30), min_size=1, max_size=60), st.integers(30, 50))
def test_packed_rows(lengths: list[int], seq_len: int) -> None:
    """All documents, none twice, and the room left in the rows is what a plain search for the best row leaves."""
    rows = packed_rows(lengths, seq_len)
    assert sorted(i for row in rows for i in row) == list(range(len(lengths)))
    rooms: list[int] = []
    for length in sorted(lengths, reverse=True):
        enough = [room for room in rooms if room >= length]
        if enough:
            rooms.remove(min(enough))
        rooms.append((min(enough) if enough else seq_len) - length)
    assert sorted(seq_len - sum(lengths[i] for i in row) for row in rows) == sorted(rooms)
    assert all(list(row) == sorted(row) for row in rows) and rows == sorted(rows)


def test_packed_rows_by_hand() -> None:
    """7, 6, 5 open rows; 4 joins the 6, 3 the 7, 3 the 5, and 2 that last row, the only one with room."""
    assert packed_rows([3, 7, 5, 4, 6, 3, 2], 10) == [(0, 1), (2, 5, 6), (3, 4)]
    assert packed_rows([10, 10, 1], 10) == [(0,), (1,), (2,)]
    assert packed_rows([5, 5, 5], 10) == [(0, 1), (2,)]


LENGTHS = [3, 9, 4, 4, 1, 7, 2, 8, 5, 6, 3, 3, 9, 1, 2]


@pytest.mark.parametrize("packing", [True, False])
@pytest.mark.parametrize("shuffle", [True, False])
def test_a_saved_state_goes_on_with_the_same_batches(packing: bool, shuffle: bool) -> None:
    """At every point, over several epochs, through JSON, in a fresh iterator and in one that has run elsewhere."""

    def fresh() -> Any:
        return make_batches(documents(LENGTHS), batch_size=4, seq_len=10, seed=3, packing=packing, shuffle=shuffle)

    first, states, seen = fresh(), [], []
    for _ in range(14):
        states.append(json.dumps(first.get_state()))
        seen.append(next(first))
    elsewhere = fresh()
    for start, state in enumerate(states):
        iterator = fresh()
        iterator.set_state(json.loads(state))
        elsewhere.set_state(json.loads(state))
        for expected in seen[start:]:
            assert_equal(next(iterator), expected)
        assert_equal(next(elsewhere), seen[start])


def test_the_state_after_the_last_batch_is_the_end() -> None:
    batches = make_batches(documents(LENGTHS), batch_size=4, seq_len=10, num_epochs=1)
    assert len(list(batches)) > 1
    again = make_batches(documents(LENGTHS), batch_size=4, seq_len=10, num_epochs=1)
    again.set_state(batches.get_state())
    assert list(again) == []


@pytest.mark.parametrize("packing", [True, False])
def test_processes_that_fill_their_own_rows_fill_the_same_batches(packing: bool) -> None:
    """A row is where it is with one process, rows of others are empty, and all iterators have the same position."""
    options = {"batch_size": 12, "seq_len": 10, "packing": packing, "num_epochs": 3, "seed": 1}
    whole = make_batches(documents(LENGTHS), **options)
    shares = [range(0, 4), [4, 6, 8, 10], [5, 7, 9, 11]]
    parts = [make_batches(documents(LENGTHS), **options, only_rows=rows) for rows in shares]
    for batch in whole:
        for rows, part in zip(shares, parts, strict=True):
            mine = next(part)
            others = [row for row in range(12) if row not in rows]
            assert_equal(
                jax.tree.map(lambda x, rows=rows: x[list(rows)], mine),
                jax.tree.map(lambda x, rows=rows: x[list(rows)], batch),
            )
            assert not any(array[others].any() for array in jax.tree.leaves(mine))
            assert part.get_state() == whole.get_state()


def test_order_and_seeds() -> None:
    def rows(seed: int) -> list[list[int]]:
        batches = make_batches(documents([9] * 64), batch_size=64, seq_len=9, seed=seed, num_epochs=2)
        return [batch.tokens[:, 0].tolist() for batch in batches]

    first, second = rows(0)
    assert sorted(first) == sorted(second) and first != second != sorted(second)
    assert rows(0) == [first, second]
    assert rows(1)[0] != first


def test_processes_tokenize_the_same_documents() -> None:
    """In order, with the errors and counts of one process, and the progress of the rows."""
    template = Template(train_tokenizer([], vocab_size=260))
    triples = [Triple(f"{n}?", "<sep>" if n == 2050 else "r" * (n % 50), str(n), source=f"f:{n}") for n in range(2100)]
    for workers in (0, 2):
        done: list[int] = []
        options: dict[str, Any] = {"too_long": "drop", "bad_rows": "drop", "workers": workers, "progress": done.append}
        examples, report = make_examples(triples, template, 50, **options)
        assert done == [1024, 2048, 2100]
        if workers == 0:
            expected, expected_report = examples, report
            assert report.dropped["refused by the template"] == 1 and report.dropped["too long"] > 10
    assert report == expected_report and len(examples) == len(expected) == report.kept
    for one, other in zip(examples, expected, strict=True):
        np.testing.assert_array_equal(one.tokens, other.tokens)
        np.testing.assert_array_equal(one.supervised, other.supervised)
        assert (one.source, one.prompt_length) == (other.source, other.prompt_length)


def test_bad_arguments() -> None:
    examples = documents([3, 4])

    def make(examples: list[Example] = examples, **options: Any) -> Any:
        return make_batches(examples, **({"batch_size": 4, "seq_len": 4} | options))

    for name, value in (("batch_size", 0), ("seq_len", 0), ("num_epochs", 0), ("batch_size", -1)):
        with pytest.raises(ValueError, match=f"num_epochs must be at least 1, got .*{value}"):
            make(**{name: value})
    for seed in (-1, 2**32):
        with pytest.raises(ValueError, match="seed must be in"):
            make(seed=seed)
    with pytest.raises(DataError, match="the data set is empty"):
        make([])
    with pytest.raises(DataError, match=r"f:1: expected 2 to 4 tokens \(seq_len \+ 1\), got 5. Raise seq_len"):
        make(seq_len=3)
    with pytest.raises(DataError, match=r"example 0: expected 2 to 5 tokens .* got 1"):
        make([Example(np.ones(1, np.int32), np.ones(1, bool))])
    with pytest.raises(DataError, match=r"example 0: no token is supervised .an all-zero loss mask"):
        make([Example(np.ones(3, np.int32), np.array([True, False, False]))])  # nothing predicts the first


@pytest.mark.slow
@pytest.mark.skipif(not GSM8K.is_file(), reason=f"the real data set is not at {GSM8K}")
def test_gsm8k_is_packed_tightly_and_at_once(capsys: pytest.CaptureFixture[str]) -> None:
    triples, _ = read_triples(GSM8K)
    tokenizer = train_tokenizer((t.question + t.rationale for t in triples[:2000]), vocab_size=2048)
    examples, report = make_examples(triples, Template(tokenizer), 512, too_long="drop")
    assert report.read == len(triples) == report.kept + sum(report.dropped.values())
    start = time.perf_counter()
    batches = make_batches(examples, batch_size=16, seq_len=512, num_epochs=1)
    first = next(batches)
    started = time.perf_counter() - start
    rest = list(batches)
    rate = len(rest) / (time.perf_counter() - start - started)
    efficiency = packing_efficiency([first, *rest])
    with capsys.disabled():
        print(
            f"\nGSM8K, seq_len 512: packing efficiency {efficiency:.4f}, {started:.2f} s to start, {rate:.0f} batches/s"
        )
    assert efficiency >= 0.97
    assert started < 3  # a tenth of that on two idle cores
    documents_taken = sum(int(batch.segment_ids[b].max()) for batch in (first, *rest) for b in range(16))
    assert documents_taken == len(examples)
