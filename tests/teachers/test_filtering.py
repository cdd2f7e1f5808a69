"""Which replies are right, which are kept, which are too like a test set; questions as they are read; and ghosts edited by hand."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from cotgrpo.cli import GOLD_HELP, main
from cotgrpo.data.questions import Question
from cotgrpo.data.sources import DataError
from cotgrpo.data.triples import read_triples
from cotgrpo.teachers.decontamination import TestQuestions
from cotgrpo.teachers.endpoint import AttemptFailed, TeacherReply, parse_reply
from cotgrpo.teachers.filtering import (
    Candidate,
    Judge,
    commonest,
    distinct,
    load_check,
    majority,
    most_diverse,
    parts_of,
    shortest,
)

QUESTION = Question("What is 3 + 4?", "7", source="rows:1", id="q", row={"gold": "7", "level": 2})


@pytest.mark.parametrize(
    ("text", "reasoning", "parts"),
    [
        ("3 + 4 = 7\n#### 7", "", ("3 + 4 = 7", "7")),
        ("3 + 4 = 7, so it is 7.", "", ("3 + 4 = 7, so it is 7.", "7")),
        ("Add.\n#### Sum\nIt is \\boxed{7}", "", ("Add.\n#### Sum\nIt is \\boxed{7}", "7")),
        ("#### 7", "", ("", "7")),
        ("Who knows", "", ("Who knows", None)),
        ("It is \\boxed{7}.", "Let me add 3.", ("Let me add 3.", "7")),
        ("Paris", "A city.", ("A city.", "Paris")),
        ("", "I think.", ("I think.", None)),
        ("<think>3 and 4</think>\nThe answer is 7.", "", ("3 and 4", "7")),
        ("Well.\n\nIt could be", "Hm.", ("Hm.", None)),
    ],
)
def test_parts_of_a_reply(text: str, reasoning: str, parts: tuple[str, str | None]) -> None:
    assert parts_of(TeacherReply(text, reasoning)) == parts


@pytest.mark.parametrize(
    ("reply", "reason"),
    [
        (TeacherReply("Add: 7"), "correct"),
        (TeacherReply("Add: 7.0", finish_reason="stop"), "correct"),
        (TeacherReply("Add: 8"), "wrong answer"),
        (TeacherReply("Add: 7", finish_reason="length"), "truncated"),
        (TeacherReply("", "I thought and thought", finish_reason="length"), "truncated"),
        (TeacherReply("I\u2019m sorry, I cannot."), "refused"),
        (TeacherReply("I can't add, but it is 7"), "correct"),
        (TeacherReply("", refusal="No."), "refused"),
        (TeacherReply("7", finish_reason="content_filter"), "refused"),
        (TeacherReply("No idea"), "unparsable"),
        (TeacherReply("#### 7"), "unparsable"),
        (TeacherReply("Take three apples and add four apples: 7"), "contaminated"),
    ],
)
def test_verdicts(reply: TeacherReply, reason: str) -> None:
    verdict = Judge(test=TestQuestions(["Now take three apples and add"], n=5))(QUESTION, reply)
    assert verdict.reason == reason and verdict.accepted == (reason == "correct")


def test_checks_and_questions_without_gold() -> None:
    judge = Judge()
    other = Question(QUESTION.question, "")
    assert judge(other, TeacherReply("Add: 7")).reason == "unverified"
    judge = Judge(lambda row, rationale, answer: len(rationale) > 1 / (row["level"] - 2 + len(answer) - 1))
    assert judge(QUESTION, TeacherReply("Sum: 70")).reason == "correct"
    assert judge(QUESTION, TeacherReply("7 + 0 =\n#### 7")).reason == "check failed"
    assert judge(QUESTION, TeacherReply("7 + 0 =\n#### 7")).detail == "ZeroDivisionError: division by zero"


def test_load_check() -> None:
    assert load_check("json:dumps") is json.dumps
    for name, message in (
        ("no_such_module:f", "no_such_module"),
        ("json:no", "no attribute"),
        ("json:__doc__", "must be a function"),
    ):
        with pytest.raises(DataError, match=message):
            load_check(name)


def test_distinct() -> None:
    candidates = [Candidate(0, "Add:  it", "7"), Candidate(1, "Add: it", "7"), Candidate(2, "Add: it", "8")]
    assert [c.number for c in distinct(candidates)] == [0, 2]


def test_majority() -> None:
    for answers, chosen in (
        (["5", "7", "5.0", "6"], [0, 2]),
        ([], []),
        (["5"], []),
        (["5", "5", "7", "7.0"], []),
        (["1", "1", "1"], [0, 1, 2]),
    ):
        candidates = [Candidate(number, "so", answer) for number, answer in enumerate(answers)]
        assert [c.number for c in majority(candidates)] == chosen


def test_shortest_and_most_diverse() -> None:
    texts = ["a b c d e f g", "a b c d e f", "a b c d e h", "x y z u v w q p"]
    candidates = [Candidate(number, text, "1") for number, text in enumerate(texts)]
    assert [c.number for c in shortest(candidates, 2)] == [1, 2]
    # Trigrams in common with the shortest (1): of 0, 4 of 5; of 2, 3 of 5; of 3, none.
    assert [c.number for c in most_diverse(candidates, 4)] == [1, 3, 2, 0]
    assert most_diverse(candidates[:1], 3) == candidates[:1] and most_diverse([], 2) == []


def test_decontamination() -> None:
    test = TestQuestions(["The quick, brown fox jumps!", "Hi there"], n=4)
    assert test.overlap("Say THE quick brown fox.") == "the quick brown fox"
    assert test.overlap("quick brown fox leaps") is None and test.overlap("Hi there, you") is None
    assert test.overlap("hi THERE!") == "hi there" and test.overlap("") is None
    with pytest.raises(ValueError, match="at least 1"):
        TestQuestions([], 0)


def test_commonest() -> None:
    pairs = [("a", ""), ("b", "x"), ("b", "y"), ("c", ""), ("a", "late"), ("a", "")]
    assert commonest(pairs, 2) == ["3 x a (late)", "2 x b (x)"]


def write_rows(path: Path, *rows: dict[str, Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        (b"", "reply is not JSON"),
        (b"[" * 100_000, "reply is not JSON"),
        (b"[1]", "reply has no choice"),
        (b'{"choices": [3]}', "reply has no choice"),
        (b'{"choices": [{"message": {"content": [{"type": "image"}]}}]}', "reply is empty"),
        (
            b'{"choices": [{"message": {"content": null, "reasoning": "hm"}, "finish_reason": "stop"}]}',
            "reply is empty",
        ),
    ],
)
def test_bodies_without_a_reply(body: bytes, reason: str) -> None:
    with pytest.raises(AttemptFailed) as caught:
        parse_reply(body)
    assert caught.value.reason == reason


def test_bodies_with_a_reply() -> None:
    message = {"content": [{"text": "half \ud800"}, {"text": " done "}], "reasoning": "so"}
    body = {
        "choices": [{"message": message, "finish_reason": None}],
        "usage": {"prompt_tokens": "many", "completion_tokens": 2},
    }
    assert parse_reply(json.dumps(body).encode()) == TeacherReply("half ? done", "so", completion_tokens=2)


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


def test_gold_says_what_is_wrong(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["gold", "--help"]) == 0 and capsys.readouterr().out.strip() == GOLD_HELP
    for arguments, message in (
        (["--out", "o.jsonl"], "gold needs --student, --ghosts and --out, or --edited and --out"),
        (["--edited", "e.jsonl", "--out", "o.jsonl", "--rows", "wrong"], "--rows must be all or edited"),
        (["--studnet", "s"], "Unknown option --studnet. Did you mean --student?"),
        (["--edited", str(tmp_path / "no.jsonl"), "--out", "o.jsonl"], "no such file"),
        (["--student", str(tmp_path / "no.json"), "--ghosts", "g.jsonl", "--out", "o.jsonl"], "expected the eval.json"),
    ):
        assert main(["gold", *arguments]) == 2
        assert message in capsys.readouterr().err
