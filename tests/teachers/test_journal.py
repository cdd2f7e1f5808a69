"""The journal: records survive a cut at any place."""

from __future__ import annotations

from pathlib import Path

import pytest

from cotgrpo.data.sources import DataError
from cotgrpo.teachers.endpoint import Failure, TeacherReply
from cotgrpo.teachers.journal import Journal, Record


def test_the_journal(tmp_path: Path) -> None:
    path = tmp_path / "replies.jsonl"
    reply = TeacherReply("two\u2028lines\r\nof é", "why", "stop", prompt_tokens=3)
    records = [
        Record("a" * 64, 0, "q", "what?", reply, True, "correct"),
        Record("a" * 64, 1, "q", "what?", Failure("timeout", "no reply", 4, 1.5), False, "failed: timeout", "no reply"),
    ]
    with Journal(path) as journal:
        for record in records:
            journal.append(record)
        with pytest.raises(DataError, match="in use by another process"):
            Journal(path)
    whole = path.read_bytes()
    assert whole.count(b"\n") == 2
    # Cut anywhere, whole records stay; a record appended later stands on a line of its own.
    for length in (*range(0, len(whole), 37), len(whole) - 1):
        path.write_bytes(whole[:length])
        with Journal(path) as journal:
            assert list(journal.records.values()) == records[: whole[:length].count(b"\n")]
            assert journal.repaired == (length > 0 and whole[length - 1 : length] != b"\n")
            journal.append(records[1])
        with Journal(path) as journal:
            assert not journal.repaired and journal.records[records[1].key] == records[1]
    # A disk that lost power may hold zeros at the end; damage before the end is nobody's to mend.
    path.write_bytes(whole + b"\0\0\0\n")
    with Journal(path) as journal:
        assert journal.repaired and len(journal.records) == 2
    path.write_bytes(b"{}\n" + whole)
    with pytest.raises(DataError, match=r"replies.jsonl:1: not a record"):
        Journal(path)


def test_many_records_at_once(tmp_path: Path) -> None:
    path = tmp_path / "replies.jsonl"
    reply = TeacherReply("7", finish_reason="stop")
    records = [Record("a" * 64, n, "q", "what?", reply, True, "correct", judged_by="rules") for n in range(3)]
    with Journal(path) as journal:
        journal.extend(records)
        journal.extend([])
        assert list(journal.records.values()) == records
    with Journal(path) as journal:
        assert list(journal.records.values()) == records and path.read_bytes().count(b"\n") == 3


def test_a_record_of_an_earlier_version(tmp_path: Path) -> None:
    """Without a fingerprint; a reply that the server broke off is none."""
    line = '{"prompt_hash": "a", "candidate": 0, "question_id": "q", "question": "?", "accepted": true, "reason": ""'
    path = tmp_path / "replies.jsonl"
    path.write_text(f'{line}, "reply": {{"text": "7", "finish_reason": "abort"}}}}\n')
    with Journal(path) as journal:
        (record,) = journal.records.values()
        assert record.judged_by == "" and not record.has_reply
