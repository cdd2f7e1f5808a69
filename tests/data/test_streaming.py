"""Streamed rows: every row once an epoch, exact resume, the same batches for any workers, errors with a place."""

from __future__ import annotations

import csv
import gzip
import inspect
import json
import pickle
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cotgrpo.data.batches import make_batches, make_examples
from cotgrpo.data.chat import ChatTemplate
from cotgrpo.data.rows import DropReport
from cotgrpo.data.sources import DataError, raw_rows
from cotgrpo.data.streaming import RowFiles, StreamedBatches, StreamedTriples, WindowReader, index_rows
from cotgrpo.data.template import Template
from cotgrpo.data.tokenizer import train_tokenizer
from cotgrpo.data.triples import read_triples
from cotgrpo.types import SftBatch

TEMPLATE = Template(train_tokenizer([], vocab_size=260))
"""A token is a byte."""


def row(number: int, length: int = 3, **more: Any) -> dict[str, Any]:
    return {"id": number, "question": f"{number}?", "rationale": "r" * length, "answer": str(number)} | more


def write_rows(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(line if isinstance(line, str) else json.dumps(line) + "\n" for line in rows))
    return path


def batches(path: Path | list[Path], folder: Path, *, seq_len: int = 64, options: Any = None, **more: Any) -> Any:
    """`options` are those of `StreamedTriples`, `more` those of `StreamedBatches`."""
    files = index_rows([path] if isinstance(path, Path) else path, folder)
    too_long, packing = more.pop("too_long", "error"), more.pop("packing", True)
    reader = WindowReader(StreamedTriples(files, **(options or {})), TEMPLATE, seq_len, too_long, packing)
    return StreamedBatches(reader, **({"batch_size": 4, "window": 8, "seed": 5} | more))


def texts(batch: SftBatch) -> Iterator[str]:
    """The documents of a batch, after checking positions and the padding."""
    for b, segments in enumerate(batch.segment_ids):
        assert not batch.tokens[b][segments == 0].any() and not batch.loss_mask[b][segments == 0].any()
        for segment in range(1, segments.max() + 1):
            here = segments == segment
            np.testing.assert_array_equal(batch.positions[b][here], np.arange(here.sum()))
            np.testing.assert_array_equal(batch.tokens[b][here][1:], batch.targets[b][here][:-1])
            yield TEMPLATE.tokenizer.decode([*batch.tokens[b][here], batch.targets[b][here][-1]])


def documents(rows: list[dict[str, Any]]) -> list[str]:
    return [f"{r['question']}<sep>{r['rationale']}<sep>{r['answer']}<eos>" for r in rows]


def assert_equal(left: SftBatch, right: SftBatch) -> None:
    jax.tree.map(np.testing.assert_array_equal, left, right)


MANY = [row(number, 1 + number * 7 % 31) for number in range(37)]


@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_rows(tmp_path_factory.mktemp("rows") / "many.jsonl", MANY)


@given(
    lengths=st.lists(st.integers(1, 40), min_size=1, max_size=30),
    window=st.integers(1, 12),
    batch_size=st.integers(1, 5),
    num_epochs=st.integers(1, 3),
    packing=st.booleans(),
    seed=st.integers(0, 2**32 - 1),
)
@settings(deadline=None, max_examples=20, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_every_document_comes_once_an_epoch(
    tmp_path: Path, lengths: list[int], window: int, batch_size: int, num_epochs: int, packing: bool, seed: int
) -> None:
    rows = [row(number, length) for number, length in enumerate(lengths)]
    path, options = write_rows(tmp_path / "rows.jsonl", rows), {"batch_size": batch_size, "num_epochs": num_epochs}
    stream = batches(path, tmp_path / "index", window=window, packing=packing, seed=seed, **options)
    found = list(stream)
    assert Counter(text for batch in found for text in texts(batch)) == dict.fromkeys(documents(rows), num_epochs)
    assert all(batch.tokens.shape == (batch_size, 64) for batch in found)
    assert all(batch.segment_ids[:, 0].all() for batch in found[:-1])
    assert stream.report == DropReport(read=num_epochs * len(rows))
    if not packing:
        assert all(batch.segment_ids.max() == 1 for batch in found)


@given(cut=st.integers(0, 40), batch_size=st.integers(1, 7), window=st.integers(1, 40))
@settings(deadline=None, max_examples=15, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_saved_state_goes_on_with_the_same_batches(
    many: Path, tmp_path: Path, cut: int, batch_size: int, window: int
) -> None:
    """At any point of several epochs, through JSON, in a fresh iterator and in one that has run elsewhere."""
    fresh = lambda: batches(
        many, tmp_path, batch_size=batch_size, window=window, options={"held_out": frozenset({"3?", "30?"})}
    )
    whole = fresh()
    for _ in range(cut):
        next(whole)
    state, elsewhere = json.loads(json.dumps(whole.get_state())), fresh()
    next(elsewhere)
    expected = [(next(whole), whole.observed(), whole.get_state()) for _ in range(6)]
    for resumed in (fresh(), elsewhere):
        resumed.set_state(state)
        assert resumed.get_state() == state
        for batch, observed, after in expected:
            assert_equal(next(resumed), batch)
            assert resumed.observed() == observed and resumed.get_state() == after


def test_batches_depend_neither_on_the_workers_nor_on_the_rows_of_a_process(many: Path, tmp_path: Path) -> None:
    whole = batches(many, tmp_path, batch_size=6)
    in_processes = batches(many, tmp_path, batch_size=6, workers=2)
    shares = [[0, 3], [1, 2, 4, 5]]
    parts = [batches(many, tmp_path, batch_size=6, only_rows=rows) for rows in shares]
    for _ in range(9):
        batch = next(whole)
        assert_equal(next(in_processes), batch)
        for mine, part in zip(shares, parts, strict=True):
            own, others = next(part), [b for b in range(6) if b not in mine]
            for ours, theirs in zip(jax.tree.leaves(own), jax.tree.leaves(batch), strict=True):
                np.testing.assert_array_equal(ours[mine], theirs[mine])
                assert not ours[others].any()
        assert all(part.get_state() == whole.get_state() for part in (*parts, in_processes))
    in_processes.close()


def test_chats_are_the_documents_that_reading_in_memory_gives(many: Path, tmp_path: Path) -> None:
    template = ChatTemplate(train_tokenizer([], vocab_size=264, chat=True), "think", loss_on="completion")
    examples, _ = make_examples(read_triples(many)[0], template, 128)
    reader = WindowReader(StreamedTriples(index_rows([many], tmp_path)), template, 128, packing=False)
    stream = StreamedBatches(reader, batch_size=37, num_epochs=1)
    whole = next(make_batches(examples, batch_size=37, seq_len=128, packing=False, num_epochs=1))
    batch = next(stream)
    streamed, in_memory = (
        sorted((tokens.tobytes(), mask.tobytes()) for tokens, mask in zip(b.targets, b.loss_mask, strict=True))
        for b in (batch, whole)
    )
    assert streamed == in_memory and batch.loss_mask.any()


def test_epochs_and_seeds_have_their_own_order(many: Path, tmp_path: Path) -> None:
    def orders(seed: int) -> list[list[str]]:
        stream = batches(many, tmp_path, batch_size=37, seed=seed, packing=False, num_epochs=2)
        return [list(texts(batch)) for batch in stream]

    first, second = orders(0)
    assert sorted(first) == sorted(second) and first != second != sorted(second)
    assert orders(0) == [first, second] and orders(1)[0] != first


def test_the_index_by_hand(tmp_path: Path) -> None:
    """A byte order mark, blank lines, both line ends, copies in a file and across files, no newline at the end."""
    one, two, three = (json.dumps(row(n)).encode() for n in (1, 2, 3))
    (tmp_path / "a.jsonl").write_bytes(b"\xef\xbb\xbf" + one + b"\r\n\n  \n" + two + b"\n" + one + b"\n")
    (tmp_path / "b.jsonl").write_bytes(two + b"\n" + three)
    names = [tmp_path / "a.jsonl", tmp_path / "b.jsonl"]
    files = index_rows(names, tmp_path / "index")
    assert (len(files), files.duplicates) == (3, 2)
    found = list(files.raw_rows([2, 0, 1]))
    assert [value["id"] for _, value in found] == [3, 1, 2]
    assert [place for place, _ in found] == [f"{tmp_path}/b.jsonl:2", f"{tmp_path}/a.jsonl:1", f"{tmp_path}/a.jsonl:4"]
    assert dict(found).items() <= {place: value for place, value in raw_rows(names, None)}.items()


def test_the_index_is_made_once_and_again_for_another_file(tmp_path: Path) -> None:
    path, folder, counted = tmp_path / "rows.jsonl", tmp_path / "index", []
    write_rows(path, MANY[:3])
    assert len(index_rows([path], folder, progress=counted.append)) == 3 and counted == [3]
    assert len(index_rows([path], folder, progress=counted.append)) == 3 and counted == [3]
    write_rows(path, MANY[:5])
    files = index_rows([path], folder, progress=counted.append)
    assert len(files) == 5 and counted == [3, 5]
    assert list(files.raw_rows([4])) == list(pickle.loads(pickle.dumps(files)).raw_rows([4]))


def write_parquet(path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(MANY), path, row_group_size=5)


def write_csv(path: Path) -> None:
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, MANY[0])
        writer.writeheader()
        writer.writerows(MANY)


LINES = "".join(json.dumps(r) + "\n" for r in MANY)
FORMS: dict[str, Callable[[Path], object]] = {
    "rows.json": lambda path: path.write_text(LINES),
    "array.json": lambda path: path.write_text(json.dumps(MANY)),
    "rows.jsonl.gz": lambda path: path.write_bytes(gzip.compress(LINES.encode())),
    "utf-16.jsonl": lambda path: path.write_bytes(LINES.encode("utf-16")),
    "rows.parquet": write_parquet,
    "rows.csv": write_csv,
}
"""Files that have no lines to go to, or lines of another encoding."""


@pytest.mark.parametrize("name", FORMS)
def test_other_files_are_copied_once_and_give_the_same_rows(tmp_path: Path, many: Path, name: str) -> None:
    """With the places that reading has, and the same batches as plain JSONL."""
    path = tmp_path / name
    FORMS[name](path)
    files, again = (index_rows([path], tmp_path / "index") for _ in range(2))
    assert files == again and len(files) == 37
    assert list(files.raw_rows(range(37))) == list(raw_rows([path], None))
    stream, plain = batches(path, tmp_path / "index"), batches(many, tmp_path / "index")
    for _ in range(12):
        assert_equal(next(stream), next(plain))


def test_a_folder_of_files(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    write_rows(tmp_path / "data" / "b.jsonl", MANY[:9])
    write_rows(tmp_path / "data" / "a.json", MANY[9:20])
    for source in (tmp_path / "data", tmp_path / "data" / "*.json*"):
        files = index_rows([source], tmp_path / "index")
        assert list(files.raw_rows(range(20))) == list(raw_rows([source], None))


def exclaim(row: dict[str, Any]) -> dict[str, Any] | None:
    """A row function: it leaves out every row that can be divided by 3."""
    return row | {"q": row["q"] + "!"} if int(row["a"]) % 3 else None


@pytest.mark.parametrize("workers", [0, 1])
def test_columns_and_a_row_function(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, workers: int) -> None:
    rows = [{"q": r["question"], "why": r["rationale"], "a": r["answer"]} for r in MANY]
    path, columns = write_rows(tmp_path / "rows.jsonl", rows), {"question": "q", "rationale": "why", "answer": "a"}
    (tmp_path / "exclaiming.py").write_text("from typing import Any\n\n\n" + inspect.getsource(exclaim))
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    options = {"columns": columns, "row_function": "exclaiming:exclaim"}
    stream = batches(path, tmp_path / "index", options=options, num_epochs=1, workers=workers)
    wanted = documents([r | {"question": r["question"] + "!"} for r in MANY if int(r["answer"]) % 3])
    assert sorted(text for batch in stream for text in texts(batch)) == sorted(wanted)
    assert stream.report.dropped == {"row_function returned None": 13}
    stream.close()


def test_a_column_that_no_row_has(tmp_path: Path, many: Path) -> None:
    files = index_rows([many], tmp_path)
    StreamedTriples(files, columns={"answer": "answer"}).check_columns(seed=0)
    with pytest.raises(DataError, match=r"data.columns.gold: no row has a column 'answr'.* Did you mean 'answer'"):
        StreamedTriples(files, columns={"gold": "answr"}).check_columns(seed=0)


BAD = {
    "not JSON": ("{\n", "not valid JSON"),
    "not an object": ("[1]\n", "expected a JSON object"),
    "no question": (json.dumps({"rationale": "r", "answer": "1"}) + "\n", "missing field 'question'"),
    "no answer": (json.dumps({"question": "q", "rationale": "r", "answer": ""}) + "\n", "answer"),
}


@pytest.mark.parametrize(
    ("kind", "suffix", "workers"),
    [*((kind, suffix, 0) for kind in BAD for suffix in (".jsonl", ".json")), ("not JSON", ".json", 1)],
)
def test_a_bad_row_is_an_error_with_its_place_or_counted(tmp_path: Path, kind: str, suffix: str, workers: int) -> None:
    line, message = BAD[kind]
    path = write_rows(tmp_path / f"rows{suffix}", [row(1), line, row(2)])
    with pytest.raises(DataError, match=f"rows{suffix}:2: .*{message}"):
        batches(path, tmp_path / "index", workers=workers)
    stream = batches(path, tmp_path / "index", options={"bad_rows": "drop"}, num_epochs=2, workers=workers)
    assert Counter(text for batch in stream for text in texts(batch)) == dict.fromkeys(documents([row(1), row(2)]), 2)
    assert (stream.report.read, stream.report.dropped) == (6, {"bad row": 2})
    assert f"rows{suffix}:2" in stream.report.examples["bad row"][0]
    stream.close()


def test_what_is_left_out_is_counted(tmp_path: Path) -> None:
    """Held-out questions, other splits, known mistakes, and documents that do not fit."""
    rows = [
        row(1),
        row(2, split="test"),
        row(3, correct=False),
        row(4),
        row(5, 90),
        row(6, rationale="another", question="4?"),
    ]
    path = write_rows(tmp_path / "rows.jsonl", rows)
    options = {"held_out": frozenset({"4?"}), "split": "train"}
    with pytest.raises(DataError, match=r"rows.jsonl:5: needs 9\d positions"):
        batches(path, tmp_path / "index", options=options)
    stream = batches(path, tmp_path / "index", options=options, too_long="drop", num_epochs=1)
    assert list(texts(next(stream))) == documents(rows[:1])
    expected = {"question is in the test set": 2, "other split": 1, "wrong answer": 1, "too long": 1}
    assert stream.report.dropped == expected and stream.report.kept == 1
    left_out = stream.observed()["rows_left_out"]
    assert (left_out.total, left_out.weight) == (5, 6) and list(stream) == []


def test_an_epoch_without_a_document_is_an_error(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "rows.jsonl", MANY)
    stream = batches(path, tmp_path / "index", options={"held_out": frozenset(r["question"] for r in MANY)})
    with pytest.raises(DataError, match="No document of an epoch is left to train on"):
        next(stream)


def test_resuming_on_other_rows_is_an_error(many: Path, tmp_path: Path) -> None:
    state = batches(many, tmp_path / "index").get_state()
    other = batches(write_rows(tmp_path / "rows.jsonl", MANY[:9]), tmp_path / "index")
    with pytest.raises(DataError, match=r"saved with 37 rows in windows of 8, and data.train has 9 now"):
        other.set_state(state)


def test_a_position_in_other_rows_is_kept_as_well_as_can_be(many: Path, tmp_path: Path) -> None:
    """It is the same share of the same epoch."""
    source = batches(many, tmp_path / "index")
    while source.next_window < 2 * source.windows + 3:
        next(source)
    epoch, place = divmod(source.get_state()["window"], source.windows)
    other, said = batches(write_rows(tmp_path / "rows.jsonl", MANY[:9]), tmp_path / "index"), list[str]()
    other.on_other_rows = said.append
    other.set_state(source.get_state())
    assert divmod(other.get_state()["window"], other.windows) == (epoch, place * other.windows // source.windows)
    assert len(said) == 1 and "9 now" in said[0] and f"epoch {epoch + 1}" in said[0]
    next(other)


def test_some_rows_in_an_order_of_their_own(many: Path, tmp_path: Path) -> None:
    files = index_rows([many], tmp_path)
    assert len(files.hashes) == len(files) == len(set(files.hashes.tolist()))
    some = files.select(np.array([5, 2, 30]), tmp_path)
    assert [place for place, _ in some.raw_rows([0, 1, 2])] == [
        place for n in (5, 2, 30) for place, _ in files.raw_rows([n])
    ]
    assert some.hashes.tolist() == files.hashes[[5, 2, 30]].tolist()
    assert files.select(np.arange(len(files)), tmp_path) is files


def test_a_file_that_is_cut_or_moved_while_it_is_read(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "rows.jsonl", MANY)
    files: RowFiles = index_rows([path], tmp_path / "index")
    write_rows(path, MANY[:20])
    with pytest.raises(DataError, match=r"rows.jsonl:37: the file has become shorter"):
        list(files.raw_rows([36]))
    path.unlink()
    with pytest.raises(DataError, match=r"rows.jsonl:1: cannot be read any more"):
        list(files.raw_rows([0]))
    with pytest.raises(DataError, match=r"rows.jsonl: no such file"):
        index_rows([path], tmp_path / "index")
    with pytest.raises(DataError, match="No row in"):
        index_rows([write_rows(path, ["\n\n"])], tmp_path / "index")


def test_held_out_questions_are_drawn_by_the_seed(tmp_path: Path, many: Path) -> None:
    """Different ones, in the order of the files, from rows that have a right answer."""
    rows = [*MANY[:9], "{\n", row(0, rationale="again"), row(50, answer="", correct=False)]
    triples = StreamedTriples(index_rows([write_rows(tmp_path / "rows.jsonl", rows)], tmp_path / "index"))
    assert sorted(question.question for question in triples.draw_questions(20, seed=1)) == [f"{n}?" for n in range(9)]
    triples = StreamedTriples(index_rows([many], tmp_path / "index"))
    drawn = [[int(q.gold) for q in triples.draw_questions(5, seed)] for seed in (0, 0, 1)]
    assert drawn[0] == drawn[1] != drawn[2]
    assert all(numbers == sorted(set(numbers)) and len(numbers) == 5 for numbers in drawn)


def test_a_sample_is_bounded(many: Path, tmp_path: Path) -> None:
    triples = StreamedTriples(index_rows([many], tmp_path), held_out=frozenset({"7?"}))
    everything, _ = read_triples(many)
    whole = list(triples.sample(0, rows=100, characters=10**6))
    assert sorted(int(t.answer) for t in whole) == [n for n in range(37) if n != 7]
    assert {t for t in whole} < set(everything)
    assert len(list(triples.sample(0, rows=9, characters=10**6))) in (8, 9)
    assert len(list(triples.sample(0, rows=100, characters=30))) < 10
