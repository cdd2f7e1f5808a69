"""Rows from files: every alias and both formats give the same triples; a bad row names its file, line and fix."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import datasets
import pyarrow
import pyarrow.parquet
import pytest

from cotgrpo.data.rows import DropReport, parse_row
from cotgrpo.data.sources import DataError, hub_rows
from cotgrpo.data.triples import Triple, read_triples, triple_of, write_triples

SHARED = Path(__file__).parents[3] / "shared" / "data"
real_data = pytest.mark.skipif(not SHARED.is_dir(), reason=f"the real data sets are not at {SHARED}")

GOOD = {"question": "What is 1+2?", "rationale": "1+2=3", "answer": "3"}


def jsonl(path: Path, *rows: Any) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def texts(triples: list[Triple]) -> list[tuple[str, str, str]]:
    return [(t.question, t.rationale, t.answer) for t in triples]


@pytest.mark.parametrize(
    "row",
    [
        GOOD,
        {"problem": "What is 1+2?", "reasoning": "1+2=3", "answer": "3"},
        {"prompt": "What is 1+2?", "solution": "1+2=3", "answer": 3},
        {"question": "What is 1+2?", "reasoning_content": "1+2=3", "answer": " 3\n"},
        {"question": "What is 1+2?", "answer": "1+2=3\n#### 3"},  # GSM8K's own
        {"question": "What is 1+2?", "answer": "1+2=3\n#### 3", "gold": "3.0"},
        {"prompt": "What is 1+2?", "completion": "1+2=3\n#### 3"},
        {"prompt": "What is 1+2?", "response": "<think>\n1+2=3\n</think>\n\n3"},
        {"prompt": "What is 1+2?", "completion": "1+2=3</think>3", "rationale": None, "answer": None},
        {
            "messages": [
                {"role": "user", "content": "What is 1+2?"},
                {"role": "assistant", "reasoning_content": "1+2=3", "content": "3"},
            ]
        },
        {
            "messages": [
                {"role": "system", "content": None},
                {"role": "user", "content": "What is 1+2?"},
                {"role": "assistant", "content": "<think>1+2=3</think> 3"},
            ]
        },
        GOOD | {"messages": None, "gold": "$3.00", "correct": None, "split": None},
        GOOD | {"gold": "4", "correct": True},  # `correct` says
    ],
)
def test_aliases(tmp_path: Path, row: dict[str, Any]) -> None:
    """In JSONL and in Parquet, where every row has every column."""
    other = {"id": 7, "question": "What is 2+2?", "rationale": "2+2=4", "answer": "4"}
    other |= {"answer": 4} if isinstance(row.get("answer"), int) else {}
    lines = jsonl(tmp_path / "rows.jsonl", row, other)
    columns = {key: [row.get(key), other.get(key)] for key in row | other}
    pyarrow.parquet.write_table(pyarrow.table(columns), tmp_path / "rows.parquet")
    expected = [("What is 1+2?", "1+2=3", "3"), ("What is 2+2?", "2+2=4", "4")]
    for path in (lines, tmp_path / "rows.parquet"):
        triples, report = read_triples(path, split="train")
        assert texts(triples) == expected
        assert [t.source for t in triples] == [f"{path}:1", f"{path}:2"]
        assert [t.id for t in triples] == [None, "7"]
        assert (report.read, report.kept, report.dropped) == (2, 2, {})


def test_system_messages(tmp_path: Path) -> None:
    """From messages, or from a field; two rows that differ in it alone are two."""
    turns = [{"role": "user", "content": "1+2?"}, {"role": "assistant", "content": "1+2=3 #### 3"}]
    said = [{"role": "system", "content": "Be brief. "}, *turns]
    rows = [{"messages": said}, {"messages": turns}, {"messages": turns, "system": "Be kind."}, GOOD | {"system": " "}]
    triples, _ = read_triples(jsonl(tmp_path / "rows.jsonl", *rows))
    assert [(t.system, t.question) for t in triples] == [
        ("Be brief.", "1+2?"),
        ("", "1+2?"),
        ("Be kind.", "1+2?"),
        ("", "What is 1+2?"),
    ]
    write_triples(tmp_path / "again.jsonl", triples)
    assert [t.system for t in read_triples(tmp_path / "again.jsonl")[0]] == [t.system for t in triples]


BAD_ROWS = {
    "missing": ({"question": "q", "rationale": "r"}, "missing field 'answer'.*the row has question, rationale"),
    "missing question": ({"rationale": "r", "answer": "a"}, "missing field 'question' .or prompt, problem"),
    "null": (GOOD | {"question": None}, "missing field 'question'"),
    "empty": (GOOD | {"rationale": " \n"}, "'rationale' is empty. Fill it in"),
    "empty answer": ({"question": "q", "answer": "r ####"}, "'answer' is empty"),
    "list": (GOOD | {"question": ["q"]}, r"'question' must be text, got list \['q'\]. Make it a string"),
    "number": (GOOD | {"question": 5}, "'question' must be text, got int 5"),
    "bool": (GOOD | {"answer": True}, "'answer' must be text, got bool True"),
    "nan": (GOOD | {"answer": float("nan")}, "'answer' must be text, got float nan"),
    "surrogate": (GOOD | {"rationale": "a\ud83d"}, "half a surrogate pair.*Remove it"),
    "system": (GOOD | {"system": 5}, "'system' must be text, got int 5"),
    "no object": ([GOOD], "expected a JSON object.*got list"),
    "text": ("row", "expected a JSON object.*got str"),
    "no rationale": ({"question": "q", "answer": "42"}, "no rationale: expected a field rationale or reasoning.*Add"),
    "heading": ({"prompt": "q", "completion": "#### Step one\nadd\nso I think"}, "no rationale"),
    "unclosed": ({"prompt": "q", "completion": "<think>2 + 3 is 5"}, "the thought in 'completion' never ends"),
    "correct": (GOOD | {"correct": "false"}, "'correct' must be true or false, got 'false'"),
    "messages text": ({"messages": "hello"}, "'messages' must be a list of objects with role and content"),
    "messages role": ({"messages": [{"content": "q"}]}, "'messages' must be a list"),
    "messages parts": (
        {"messages": [{"role": "user", "content": [{"type": "text"}]}]},
        "message 1: a part of type 'text'",
    ),
    "no messages": ({"messages": []}, "expected a user message in 'messages' before the assistant's, got none"),
    "no content": ({"messages": [{"role": r} for r in ("user", "assistant") * 2]}, "field 'question' is empty"),
    "backwards": ({"messages": [{"role": r} for r in ("assistant", "user")]}, "'question' is empty"),
    "no reply": (
        {"messages": [{"role": r, "content": "hi"} for r in ("assistant", "user")]},
        "the last message is the user.s: expected a reply",
    ),
    "no user": ({"messages": [{"role": "assistant", "content": "hi"}]}, "a user message.*got assistant"),
    "role": (
        {"messages": [{"role": "judge", "content": "hi"}]},
        "message 1: unknown role 'judge': expected one of system",
    ),
}


@pytest.mark.parametrize("case", BAD_ROWS)
def test_bad_rows(tmp_path: Path, case: str) -> None:
    row, message = BAD_ROWS[case]
    path = jsonl(tmp_path / "rows.jsonl", GOOD, row)
    with pytest.raises(DataError, match=message) as error:
        read_triples(path)
    assert str(error.value).startswith(f"{path}:2: ")
    triples, report = read_triples(path, bad_rows="drop")
    assert texts(triples) == texts([Triple(**GOOD)])
    assert report.dropped == {"bad row": 1} and report.examples["bad row"] == [str(error.value)]


BAD_LINES = {
    "cut": (b'{"question": "q"', r"not valid JSON \(Expecting ',' delimiter at column 17\)"),
    "no JSON": (b"question: q", r"not valid JSON \(Expecting value at column 1\).*one JSON object a line"),
    "two values": (b"{} {}", r"not valid JSON \(Extra data at column 4\)"),
    "latin-1": ('{"question": "\xe9"}'.encode("latin-1"), r"not UTF-8 \(byte 0xe9 at column 15\). Save"),
    "utf-16": ("{}".encode("utf-16"), r"not UTF-8 \(byte 0xff at column 1\)"),
    "nested": (b"[" * 200_000, "not valid JSON"),
    "digits": (b'{"answer": ' + b"1" * 5000 + b"}", "not valid JSON"),
}


@pytest.mark.parametrize("ending", [b"\n", b"\r\n", b""])
@pytest.mark.parametrize("case", BAD_LINES)
def test_bad_lines(tmp_path: Path, case: str, ending: bytes) -> None:
    line, message = BAD_LINES[case]
    path = tmp_path / "rows.jsonl"
    path.write_bytes(json.dumps(GOOD).encode() + b"\n\n" + line + ending)
    with pytest.raises(DataError, match=message) as error:
        read_triples(path)
    assert str(error.value).startswith(f"{path}:3: ")
    _, report = read_triples(path, bad_rows="drop")
    assert (report.read, report.kept, report.dropped) == (2, 1, {"bad row": 1})


def test_marks_blank_lines_and_line_ends_are_no_errors(tmp_path: Path) -> None:
    path, row = tmp_path / "rows.json", json.dumps(GOOD | {"question": "a\u2028b?"}, ensure_ascii=False).encode()
    path.write_bytes(b"\xef\xbb\xbf" + row + b"\r\n\r\n  \n" + row.replace(b"1+2=3", b"3") + b"\n\n")
    triples, report = read_triples(str(path))
    assert [t.source for t in triples] == [f"{path}:1", f"{path}:4"] and triples[0].question == "a\u2028b?"
    assert report.read == 2


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    rows = jsonl(tmp_path / "train_rows.jsonl", GOOD)
    with pytest.raises(DataError, match=r"train_row.jsonl: no such file. Did you mean train_rows.jsonl\?"):
        read_triples(tmp_path / "train_row.jsonl")
    with pytest.raises(DataError, match=r"zzz.jsonl: no such file. Check the path"):
        read_triples(tmp_path / "elsewhere" / "zzz.jsonl")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"empty: this folder has no file that ends in .jsonl, .ndjson, .json, .csv"):
        read_triples(tmp_path / "empty")
    for name in ("rows.docx", "rows", "rows.parquet.gz"):
        (tmp_path / name).write_bytes(rows.read_bytes())
        with pytest.raises(DataError, match=rf"{name}: unknown kind of file .*expected .jsonl, .* Convert it"):
            read_triples(tmp_path / name)
    (tmp_path / "no_rows.jsonl").write_text("\n\n")
    with pytest.raises(DataError, match=r"No usable row in .*no_rows.jsonl. 0 of 0 rows kept"):
        read_triples(tmp_path / "no_rows.jsonl")
    with pytest.raises(DataError, match="at least one file or hub id"):
        read_triples([])


def test_broken_parquet(tmp_path: Path) -> None:
    """Never a row less in silence, asked to drop bad rows or not."""
    path = tmp_path / "rows.parquet"
    table = pyarrow.table({k: [f"{v}{i}" for i in range(2000)] for k, v in GOOD.items()})
    pyarrow.parquet.write_table(table, path, row_group_size=100)
    whole = path.read_bytes()
    garbled = whole[: len(whole) // 3] + bytes(2000) + whole[len(whole) // 3 + 2000 :]
    for content in (whole[: len(whole) // 2], whole[:-8], b"", b"PAR1", garbled):
        path.write_bytes(content)
        with pytest.raises(DataError, match=r"rows.parquet(:\d+:)? cannot be (read|loaded) \(\w+.*\)"):
            read_triples(path, bad_rows="drop")
    path.write_bytes(whole)
    assert len(read_triples(path)[0]) == 2000


def test_parquet_names_are_no_patterns(tmp_path: Path) -> None:
    datasets.Dataset.from_list([GOOD]).to_parquet(tmp_path / "rows[1]*.parquet")
    assert len(read_triples(tmp_path / "rows[1]*.parquet")[0]) == 1


def test_parquet_types(tmp_path: Path) -> None:
    path = tmp_path / "rows.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"question": [b"q"], "rationale": ["r"], "answer": [3]}), path)
    with pytest.raises(DataError, match=r"rows.parquet:1: field 'question' must be text, got bytes"):
        read_triples(path)


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
def test_hub_data_sets_through_a_local_folder(tmp_path: Path, suffix: str) -> None:
    """`datasets.load_dataset` lays no difference between a hub id and a folder laid out as a data set."""
    for split, answers in (("train", "34"), ("test", "5")):
        rows = datasets.Dataset.from_list([{"question": a, "answer": f"r{a} #### {a}"} for a in answers])
        rows.to_json(tmp_path / f"{split}.jsonl") if suffix == "jsonl" else rows.to_parquet(
            tmp_path / f"{split}.parquet"
        )
    found = [triple_of(parse_row(row, place)) for place, row in hub_rows(str(tmp_path), "test")]
    assert found == [Triple("5", "r5", "5", source=f"{tmp_path}:1")]
    assert [row["question"] for _, row in hub_rows(str(tmp_path), "train")] == ["3", "4"]
    with pytest.raises(DataError, match=r"is not a file, and as a data set cannot be loaded .*Check the name"):
        list(hub_rows(str(tmp_path), "validation"))
    with pytest.raises(DataError, match="is not a file, and as a data set cannot be loaded"):
        list(hub_rows(str(tmp_path / "none"), "train"))


def test_a_name_that_is_no_file_is_a_hub_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[Any, ...]] = []
    monkeypatch.setattr("cotgrpo.data.sources.hub_rows", lambda *args: asked.append(args) or iter([("x:1", GOOD)]))
    monkeypatch.chdir(tmp_path)
    for name in ("openai/gsm8k", "openai/gsm8k:main", "org/name-v1.5"):
        assert len(read_triples(name)[0]) == 1
    assert asked == [(name, "train") for name in ("openai/gsm8k", "openai/gsm8k:main", "org/name-v1.5")]
    for name in ("gsm8k", "a/b/c", "org/rows.parquet", "org name/x"):
        with pytest.raises(DataError, match="no such file"):
            read_triples(name)


@pytest.mark.parametrize(
    ("name", "asked"),
    [
        ("org/name", ("org/name", None, None)),
        ("org/name:main", ("org/name", "main", None)),
        ("org/name@v1.5", ("org/name", None, "v1.5")),
        ("org/name-v1.5:main@e53f048", ("org/name-v1.5", "main", "e53f048")),
        ("org/name@refs/pr/1", ("org/name", None, "refs/pr/1")),
    ],
)
def test_a_hub_id_has_a_configuration_and_a_revision(
    name: str, asked: tuple[str | None, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    found: list[tuple[str | None, ...]] = []

    def load(path: str, config: str | None, *, split: str, revision: str | None, streaming: bool) -> list[Any]:
        found.append((path, config, revision))
        assert streaming and split == "train"
        return [GOOD]

    monkeypatch.setattr(datasets, "load_dataset", load)
    assert len(read_triples(name)[0]) == 1
    assert found == [asked]


def test_wrong_answers_and_splits(tmp_path: Path) -> None:
    rows: list[Mapping[str, Any]] = [
        {"question": "1", "rationale": "r", "answer": "5", "correct": False, "gold": "5"},
        {"question": "2", "rationale": "r", "answer": None, "correct": False},  # a mistake may lack an answer
        {"question": "3", "rationale": "r", "answer": "1,000", "gold": 1000},
        {"question": "4", "rationale": "r", "answer": "9007199254740993", "gold": 9007199254740992},
        {"question": "5", "answer": "r #### 4", "gold": "5"},
        {"question": "6", "rationale": "r", "answer": "6", "split": "test"},
        {"question": "7", "rationale": "r", "answer": "7", "split": None},
        {"question": "7", "rationale": " r", "answer": "7"},
    ]
    path = jsonl(tmp_path / "rows.jsonl", *rows)
    triples, report = read_triples(path, split="train")
    assert [t.question for t in triples] == ["3", "7"]
    assert report.dropped == {"wrong answer": 4, "other split": 1, "duplicate": 1}
    assert report.read == 8 == report.kept + sum(report.dropped.values()) and report.kept == len(triples)
    assert report.examples["wrong answer"] == [f"{path}:1: '5', gold '5'", f"{path}:2: None, gold None", report_4(path)]
    assert report.examples["other split"] == [f"{path}:6: 'test'"] and report.examples["duplicate"] == [f"{path}:8"]
    with pytest.raises(DataError, match=r"rows.jsonl:2: missing field 'answer'"):
        read_triples(path, keep_incorrect=True)
    triples, report = read_triples(path, keep_incorrect=True, bad_rows="drop", deduplicate=False)
    assert [t.question for t in triples] == ["1", "3", "4", "5", "6", "7", "7"]
    with pytest.raises(DataError, match=r"No usable row in .*8 of 8|0 of 8 rows kept\n"):
        read_triples(jsonl(path, *[dict(row) | {"split": "test"} for row in rows]), split="train")


def report_4(path: Path) -> str:
    return f"{path}:4: '9007199254740993', gold 9007199254740992"


def test_several_sources_are_one(tmp_path: Path) -> None:
    a, b = jsonl(tmp_path / "a.jsonl", GOOD), jsonl(tmp_path / "b.jsonl", GOOD, GOOD | {"answer": "4"})
    triples, report = read_triples([a, str(b)])
    assert [t.source for t in triples] == [f"{a}:1", f"{b}:2"]
    assert report.examples == {"duplicate": [f"{b}:1"]}


def test_drop_report() -> None:
    report = DropReport(read=9)
    for line in range(5):
        report.drop("too long", f"f:{line}")
    report.drop("duplicate", "f:7")
    assert report.kept == 3
    assert report.to_dict() == {
        "read": 9,
        "kept": 3,
        "dropped": {"too long": 5, "duplicate": 1},
        "examples": {"too long": ["f:0", "f:1", "f:2"], "duplicate": ["f:7"]},
    }
    assert str(report) == "3 of 9 rows kept\n  5 dropped, too long: f:0; f:1; f:2\n  1 dropped, duplicate: f:7"
    report.note("gold read from prose", "f:8: '3'")
    assert report.kept == 3 and report.to_dict()["noted"] == {"gold read from prose": 1}
    assert str(report).endswith("duplicate: f:7\n  1 noted, gold read from prose: f:8: '3'")


def test_written_triples_are_read_again(tmp_path: Path) -> None:
    triples = [Triple("q\u2028\n\"'", "r\\n\x00", "π", id="1"), Triple("q", "r", "2")]
    write_triples(tmp_path / "rows.jsonl", triples)
    again, _ = read_triples(tmp_path / "rows.jsonl")
    assert [(*t, i.id) for t, i in zip(texts(again), again, strict=True)] == [
        (*t, i.id) for t, i in zip(texts(triples), triples, strict=True)
    ]


@real_data
def test_gsm8k() -> None:
    triples, report = read_triples(SHARED / "gsm8k_train.jsonl")
    assert report.read == 7473 == len(triples) + sum(report.dropped.values()), report
    assert len(triples) > 7400 and triples[0].answer == "72" and triples[0].id == "gsm8k-train-0"


@real_data
@pytest.mark.parametrize(("name", "correct"), [("svamp_palm540b", 593), ("svamp_llama3_chatqa_8b", None)])
def test_svamp(tmp_path: Path, name: str, correct: int | None) -> None:
    """Real mistakes are left out and counted; without the `correct` flag, by the gold answer, the same ones."""
    rows = [json.loads(line) for line in (SHARED / f"{name}.jsonl").read_text(encoding="utf-8").split("\n") if line]
    train = [row for row in rows if row["split"] == "train"]
    right = sum(row["correct"] for row in train)
    assert len(train) == 800 and right == (correct or right)
    for row in rows:
        del row["correct"]
    for path in (SHARED / f"{name}.jsonl", jsonl(tmp_path / "no_flag.jsonl", *rows)):
        triples, report = read_triples(path, split="train", deduplicate=False, bad_rows="drop")
        assert (report.read, report.dropped["other split"], len(triples)) == (1000, 200, right)
        assert report.dropped["wrong answer"] + report.dropped.get("bad row", 0) == 800 - right
