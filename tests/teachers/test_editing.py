"""Ghosts edited by hand: to a file and back, through the command."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from cotgrpo.cli import main
from cotgrpo.data.sources import DataError
from cotgrpo.data.triples import Triple, read_triples
from cotgrpo.teachers.editing import read_edited, read_student_replies, write_pairs


def write_rows(path: Path, *rows: dict[str, Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def test_gold_there_and_back(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Export, edit and import, by the command line; from either file of a student's replies."""
    ghosts = write_rows(
        tmp_path / "ghosts.jsonl",
        {"id": "a", "question": "What is 3 + 4?", "rationale": "3 + 4 is 8", "answer": "8"},
        {"id": "b", "question": "What is 1 + 1?", "rationale": "1 + 1 = 2", "answer": "2"},
        {"id": "c", "question": "What is 2 + 2?", "rationale": "2 + 2 = 4", "answer": "4"},
        {"id": "d", "question": "Never asked?", "rationale": "So", "answer": "1"},
    )
    replies = [{"question": f"What is {x} + {x}?", "text": f"it is {y}"} for x, y in ((1, 2), (2, 5))]
    replies.append({"question": "What is  3 + 4?", "text": "seven"})
    evaluated = tmp_path / "eval.json"
    evaluated.write_text(json.dumps({"replies": replies}), encoding="utf-8")
    generated = write_rows(
        tmp_path / "replies.jsonl",
        *({"question": r["question"], "reply": {"text": r["text"]}} for r in replies),
        {"question": "Never asked?", "failure": {"reason": "timeout"}},
    )
    edit, gold = tmp_path / "edit.jsonl", tmp_path / "gold.jsonl"
    for student in (evaluated, generated):
        edit.unlink(missing_ok=True)
        assert (
            main(["gold", "--student", str(student), "--ghosts", str(ghosts), "--out", str(edit), "--rows", "wrong"])
            == 0
        )
        output = capsys.readouterr().out
        assert "1 dropped, no reply of the student" in output and "1 dropped, the student is right" in output
        rows = [json.loads(line) for line in edit.read_text().splitlines()]
        assert [list(row) for row in rows] == [["id", "question", "student", "ghost", "rationale", "answer"]] * 2
        assert [(row["id"], row["student"]) for row in rows] == [("a", "seven"), ("c", "it is 5")]
    # What was edited is never written over.
    assert main(["gold", "--student", str(student), "--ghosts", str(ghosts), "--out", str(edit)]) == 2
    assert "may hold edits" in capsys.readouterr().err

    rows[0] |= {"rationale": "3 + 4 = 7", "answer": "7"}
    write_rows(edit, *rows)
    assert main(["gold", "--edited", str(edit), "--out", str(gold), "--rows", "edited"]) == 0
    assert "1 dropped, not edited" in capsys.readouterr().out
    mine = tmp_path / "mine.txt"
    mine.write_text("my notes")
    for out in (edit, mine, tmp_path):
        before = None if out.is_dir() else out.read_bytes()
        assert main(["gold", "--edited", str(edit), "--out", str(out)]) == 2
        assert "may hold edits" in capsys.readouterr().err
        assert out.is_dir() or out.read_bytes() == before
    triples, _ = read_triples(gold)
    assert [(t.id, t.question, t.rationale, t.answer) for t in triples] == [("a", "What is 3 + 4?", "3 + 4 = 7", "7")]
    rows[1] |= {"rationale": "", "answer": " "}
    write_rows(edit, *rows)
    assert main(["gold", "--edited", str(edit), "--out", str(gold)]) == 0
    assert "1 dropped, emptied" in capsys.readouterr().out and len(read_triples(gold)[0]) == 1
    for change, message in (
        ({"answer": ""}, "edit.jsonl:1: rationale or answer is empty"),
        ({"answer": 7}, "edit.jsonl:1: expected question, ghost, rationale and answer, .* the answer in quotes"),
    ):
        write_rows(edit, {**rows[0], **change})
        assert main(["gold", "--edited", str(edit), "--out", str(gold)]) == 2
        error = capsys.readouterr().err
        assert re.search(message, error), error


def test_gold_names_what_is_wrong(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    missing = str(tmp_path / "no.jsonl")
    for arguments, facts in (
        (["--out", "o.jsonl"], ("--student", "--ghosts", "--edited")),
        (["--edited", "e.jsonl", "--out", "o.jsonl", "--rows", "wrong"], ("--rows must be all or edited", "'wrong'")),
        (["--edited", missing, "--out", "o.jsonl"], (missing, "no such file")),
        (["--student", missing, "--ghosts", "g.jsonl", "--out", "o.jsonl"], (missing, "no such file")),
        (["--student", f"{missing}.json", "--ghosts", "g.jsonl", "--out", "o.jsonl"], ("eval.json", "No such file")),
    ):
        assert main(["gold", *arguments]) == 2
        error = capsys.readouterr().err
        assert all(fact in error for fact in facts), error


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", r"replies.jsonl:1: not valid JSON"),
        ('{"question": "q"}', r"replies.jsonl:1: expected a question and the student's reply"),
        ('{"reply": {"text": "t"}}', r"replies.jsonl:1: expected a question and the student's reply"),
    ],
)
def test_files_that_hold_no_replies(tmp_path: Path, line: str, message: str) -> None:
    path = tmp_path / "replies.jsonl"
    path.write_text(line + "\n", encoding="utf-8")
    with pytest.raises(DataError, match=message):
        read_student_replies(path)


def test_nothing_to_edit_and_nothing_edited(tmp_path: Path) -> None:
    ghost = Triple("q", "r", "1", source="f:1")
    with pytest.raises(DataError, match=r"Nothing to edit[^$]*no reply of the student: f:1"):
        write_pairs(tmp_path / "edit.jsonl", [ghost], {})
    write_pairs(tmp_path / "edit.jsonl", [ghost], {"q": "2"})
    with pytest.raises(DataError, match=r"edit.jsonl: no triple[^$]*not edited"):
        read_edited(tmp_path / "edit.jsonl", rows="edited")
    (tmp_path / "edit.jsonl").write_text("{\n", encoding="utf-8")
    with pytest.raises(DataError, match=r"edit.jsonl:1: not valid JSON"):
        read_edited(tmp_path / "edit.jsonl")


def test_what_a_record_of_generate_says_of_a_reply(tmp_path: Path) -> None:
    """Its verdict counts, and a thought in a field of its own belongs to the reply."""
    records = [
        ("a", "correct", {"text": "odd", "reasoning": ""}, True),
        ("b", "wrong answer", {"text": "1"}, False),
        ("c", "truncated", {"text": "The answer is 1, so", "reasoning": ""}, False),
        ("d", "unverified", {"text": "The answer is 1.", "reasoning": "One."}, None),
        ("e", "unparsable", {"text": "", "reasoning": "The answer is 1."}, None),
    ]
    rows = ({"question": name, "reason": reason, "reply": reply} for name, reason, reply, _ in records)
    replies = read_student_replies(write_rows(tmp_path / "replies.jsonl", *rows))
    assert {name: reply.correct for name, reply in replies.items()} == {r[0]: r[3] for r in records}
    assert (
        replies["d"].text == "<think>\nOne.\n</think>\n\nThe answer is 1." and replies["e"].text == "The answer is 1."
    )


def test_system_messages_stay_and_chats_of_several_turns_are_counted(tmp_path: Path) -> None:
    chat = ({"role": "user", "content": "hi"}, {"role": "assistant", "content": "hi"}, {"role": "user", "content": "q"})
    ghosts = [
        Triple("q", "r", "1", source="f:1", system="Be brief."),
        Triple("q", "", "1", source="f:2", context=chat, verbatim=True),
    ]
    path = tmp_path / "edit.jsonl"
    report = write_pairs(path, ghosts, {"q": "2"})
    assert report.dropped == {"several turns": 1} and "f:2" in str(report)
    ((triple,), _) = read_edited(path)
    assert (triple.question, triple.rationale, triple.answer, triple.system) == ("q", "r", "1", "Be brief.")
    row = json.loads(path.read_text())
    write_rows(path, {**row, "system": 3})
    with pytest.raises(DataError, match=r"edit.jsonl:1: system must be text, got int"):
        read_edited(path)


def test_ghosts_that_are_left_out_are_counted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    row = {"question": "q", "rationale": "r", "answer": "1"}
    ghosts = write_rows(tmp_path / "ghosts.jsonl", row, row, {**row, "question": "p", "correct": False})
    student = write_rows(tmp_path / "replies.jsonl", {"question": "q", "text": "2"})
    assert main(["gold", "--student", str(student), "--ghosts", str(ghosts), "--out", str(tmp_path / "e.jsonl")]) == 0
    output = capsys.readouterr().out
    assert "1 dropped, duplicate" in output and "1 dropped, wrong answer" in output
