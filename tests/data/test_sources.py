"""Files of rows: every kind gives the same rows with their places; what cannot be read is an error that names it."""

from __future__ import annotations

import bz2
import csv
import gzip
import io
import json
import lzma
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
from rich.console import Console

import cotgrpo.data.sources
from cotgrpo.config import Config, DataConfig
from cotgrpo.data.sources import DataError, raw_rows
from cotgrpo.data.triples import read_triples
from cotgrpo.training.inputs import read_test_rows

ROWS: list[dict[str, Any]] = [
    {"question": "1+2?", "rationale": '1+2=3,\nso "3"', "answer": "3"},
    {"question": "鸡有几只？", "rationale": "2×2=4", "answer": "4"},
    {"question": "a\u2028b", "rationale": "c", "answer": "5"},
]


def jsonl(rows: list[dict[str, Any]]) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def table(rows: list[dict[str, Any]], delimiter: str = ",") -> str:
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, list(rows[0]), delimiter=delimiter)
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


TEXTS: dict[str, tuple[str, list[int]]] = {
    "rows.jsonl": (jsonl(ROWS), [1, 2, 3]),
    "rows.ndjson": (jsonl(ROWS), [1, 2, 3]),
    "lines.json": (jsonl(ROWS), [1, 2, 3]),
    "array.json": (json.dumps(ROWS, ensure_ascii=False), [1, 1, 1]),
    "indented.json": (" \n" + json.dumps(ROWS, indent=1), [3, 8, 13]),
    "object.json": (json.dumps({"version": 1, "data": ROWS}), [1, 2, 3]),
    "indented_object.json": (json.dumps({"version": [1, 2], "rows": ROWS}, indent=2), [1, 2, 3]),
    "splits.json": (json.dumps({"test": [{"question": "x"}], "train": ROWS}), [1, 2, 3]),
    "rows.csv": (table(ROWS), [2, 4, 5]),
    "semicolons.csv": (table(ROWS, ";"), [2, 4, 5]),
    "rows.tsv": (table(ROWS, "\t"), [2, 4, 5]),
}
"""File -> its text, and the line or number of each row."""
PACK: dict[str, Callable[[bytes], bytes]] = {
    "": bytes,
    ".gz": gzip.compress,
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
    ".zst": lambda data: bytes(pyarrow.Codec("zstd").compress(data, asbytes=True)),
}


@pytest.mark.parametrize("packed", PACK)
@pytest.mark.parametrize("name", TEXTS)
def test_kinds_of_files(name: str, packed: str, tmp_path: Path) -> None:
    text, lines = TEXTS[name]
    path = tmp_path / f"{name}{packed}"
    path.write_bytes(PACK[packed](text.encode("utf-8")))
    assert list(raw_rows([path], None)) == [(f"{path}:{n}", row) for n, row in zip(lines, ROWS, strict=True)]


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-32"])
@pytest.mark.parametrize("name", TEXTS)
def test_byte_order_marks(name: str, encoding: str, tmp_path: Path) -> None:
    text, lines = TEXTS[name]
    path = tmp_path / name
    path.write_bytes(text.encode(encoding))
    assert [(place, row) for place, row in raw_rows([path], None)] == [
        (f"{path}:{n}", row) for n, row in zip(lines, ROWS, strict=True)
    ]


@pytest.mark.parametrize("block", [1, 2, 7, 64, 4096])
def test_arrays_are_read_in_blocks(block: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Wherever a block ends: in a number, a word, a text or between items."""
    monkeypatch.setattr(cotgrpo.data.sources, "BLOCK", block)
    items = [12345, -1.5e3, True, None, "text", {"a": [1, {"b": "]"}]}, [], {}, '\\"', 7]
    for indent in (None, 2):
        path = tmp_path / "rows.json"
        path.write_text(json.dumps(items, indent=indent), encoding="utf-8")
        assert [row for _, row in raw_rows([path], None)] == items


BROKEN: dict[str, tuple[str, bytes, str]] = {
    "empty": ("rows.jsonl", b"", "rows.jsonl is empty: expected rows"),
    "no end": ("rows.json", b'[{"question": "a"},\n', "rows.json:2: the array never ends. Is the file complete"),
    "cut item": ("rows.json", b'[{"question": "a"},\n{"question', "rows.json:2: not valid JSON .* in the array item"),
    "cut number": ("rows.json", b"[1, 23", "rows.json:1: "),
    "word": ("rows.json", b'[{"question": "a"}, x]', "rows.json:1: not valid JSON .Expecting value"),
    "more": ("rows.json", b"[1, 2]\n[3]", "rows.json:1: not valid JSON: there is more after the end of the array"),
    "several lists": ("rows.json", b'{"a": [{"q": 1}], "b": [{"q": 2}]}', "expected one list of rows.* got a, b"),
    "bytes": ("rows.json", b'["\xff"]', "rows.json: not UTF-8"),
    "GB18030": ("rows.csv", "question,answer\n小明有几个苹果,3\n".encode("gb18030"), "GB18030 .小明.*iconv -f GB18030"),
    "quote": ("rows.csv", b'question,answer\n"a,1\n', "rows.csv:2: not valid CSV"),
    "two names": ("rows.csv", b"question,question\na,1\n", "two columns of the header have one name"),
    "gz": ("rows.jsonl.gz", gzip.compress(jsonl(ROWS * 99).encode())[:-20], "rows.jsonl.gz cannot be read .EOFError"),
    "no gz": ("rows.jsonl.gz", b"{}", "rows.jsonl.gz cannot be read .BadGzipFile.*compressed as it says"),
    "zst": ("rows.csv.zst", PACK[".zst"](table(ROWS * 99).encode())[:-20], "rows.csv.zst cannot be read .OSError"),
    "xz": ("rows.json.xz", b"no", "rows.json.xz cannot be read .(LZMAError|EOFError)"),
    "bz2": ("rows.jsonl.bz2", bz2.compress(b"{}")[:-9], "rows.jsonl.bz2 cannot be read .EOFError"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_broken_files(case: str, tmp_path: Path) -> None:
    """Never a row less in silence, asked to drop bad rows or not."""
    name, content, message = BROKEN[case]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message):
        read_triples(tmp_path / name, bad_rows="drop")


def test_bad_rows_of_tables(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    path.write_text("question,answer,rationale\n1+2?,3,r\n\n4,5\n6,7,8,9\nq,,r\n", encoding="utf-8")
    triples, report = read_triples(path, bad_rows="drop")
    assert [t.answer for t in triples] == ["3"] and report.examples["bad row"][:2] == [
        f"{path}:4: expected 3 cells, got 2. Quote the cells.",
        f"{path}:5: expected 3 cells, got 4. Quote the cells.",
    ]
    assert f"{path}:6: missing field 'answer'" in report.examples["bad row"][2]


def test_cells_are_text(tmp_path: Path) -> None:
    """A leading zero stays; the flag `correct` is a truth value; messages may be JSON."""
    path = tmp_path / "rows.csv"
    rows = [{"question": "q", "rationale": "r", "answer": "007", "correct": flag} for flag in ("True", "false", "")]
    path.write_text(table(rows), encoding="utf-8")
    triples, report = read_triples(path, deduplicate=False)
    assert [t.answer for t in triples] == ["007", "007"] and report.dropped == {"wrong answer": 1}
    messages = json.dumps([{"role": "user", "content": "q"}, {"role": "assistant", "content": "r #### 7"}])
    path.write_text(table([{"messages": messages}]), encoding="utf-8")
    assert read_triples(path)[0][0].answer == "7"


def test_a_bad_line_may_be_gb18030(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(jsonl(ROWS[:1]).encode() + jsonl(ROWS[1:2]).encode("gb18030"))
    with pytest.raises(DataError, match=r"rows.jsonl:2: not UTF-8 .*It may be GB18030 .鸡有几只"):
        read_triples(path)


def write(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(json.dumps({"question": name, "answer": "r #### 1"}) + "\n", encoding="utf-8")


def questions(source: str | Path, split: str | None = None) -> list[str]:
    return [str(row["question"]) for _, row in raw_rows([source], split)]


def test_folders(tmp_path: Path) -> None:
    write(tmp_path, "b.jsonl", "a.jsonl", "sub/c.json", ".cache/d.jsonl", "_e.jsonl", "notes.txt", "dataset_info.json")
    pyarrow.parquet.write_table(pyarrow.table({"question": ["d"], "answer": ["r #### 1"]}), tmp_path / "d.parquet")
    assert questions(tmp_path) == ["a.jsonl", "b.jsonl", "d", "sub/c.json"]
    assert questions(tmp_path, "test") == questions(tmp_path)


@pytest.mark.parametrize(
    ("train", "test", "dev"),
    [
        ("train.jsonl", "test.jsonl", "dev.jsonl"),
        ("data/train-00000-of-00001.jsonl", "data/test-00000-of-00001.jsonl", "data/validation-0.jsonl"),
        ("train/rows.jsonl", "test/rows.jsonl", "val/rows.jsonl"),
        ("math_train.json", "math_test.json", "math_valid.json"),
    ],
)
def test_folders_with_splits(train: str, test: str, dev: str, tmp_path: Path) -> None:
    write(tmp_path, train, test, dev, "README.jsonl")
    assert questions(tmp_path) == questions(tmp_path, "train") == [train]
    assert questions(tmp_path, "test") == [test] and questions(tmp_path, "validation") == [dev]
    assert [row["question"] for _, row in raw_rows([tmp_path], None, folder_split="test")] == [test]
    held_out, _ = read_test_rows(Config(data=DataConfig(test=str(tmp_path))), Console(quiet=True))
    assert [question.question for question in held_out] == [test]
    (tmp_path / test).unlink()
    with pytest.raises(DataError, match=r"expected files of the split 'test', but by their names .* train, validation"):
        questions(tmp_path, "test")


def test_patterns(tmp_path: Path) -> None:
    write(tmp_path, "a1.jsonl", "a2.jsonl", "b.jsonl", "sub/a3.jsonl", "a[1].jsonl", "a4.txt", "a5/d.jsonl")
    assert questions(tmp_path / "a?.jsonl") == ["a1.jsonl", "a2.jsonl"]
    assert questions(tmp_path / "a[1].jsonl") == ["a[1].jsonl"]  # a file of that name
    assert questions(f"{tmp_path}/**/a*.jsonl") == ["a1.jsonl", "a2.jsonl", "a[1].jsonl", "sub/a3.jsonl"]
    assert questions(f"{tmp_path}/a5*") == ["a5/d.jsonl"]
    for name in ("c*.jsonl", "a4.*"):
        with pytest.raises(DataError, match="no file matches this pattern"):
            questions(tmp_path / name)
