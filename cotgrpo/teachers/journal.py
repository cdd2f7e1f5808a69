"""The journal of requests and outcomes: one JSON object a line, synced to disk before anything else happens.

A record survives a kill and a power cut once `append` has returned. A half-written line is cut off when the journal is
opened again, and its request is sent again. One process at a time may hold a journal.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType

from cotgrpo.atomic_files import sync
from cotgrpo.data.sources import DataError
from cotgrpo.disk_errors import explain_disk_errors
from cotgrpo.teachers.completions import TeacherReply, ending
from cotgrpo.teachers.endpoint import Failure, Outcome

Key = tuple[str, int]
"""(hash of the prompt, number of the candidate)."""


@dataclasses.dataclass(frozen=True)
class Record:
    """One request and its outcome.

    Attributes:
        prompt_hash: SHA-256 of the messages.
        candidate: number of the candidate, from 0.
        question_id: the row's id.
        question: the question's text.
        outcome: reply or failure.
        accepted: whether the reply may become a triple.
        reason: the reason of the verdict or failure, in a few words.
        detail: details of this one.
        judged_by: fingerprint of what the verdict depends on besides the reply; empty: judge it again.
    """

    prompt_hash: str
    candidate: int
    question_id: str
    question: str
    outcome: Outcome
    accepted: bool
    reason: str
    detail: str = ""
    judged_by: str = ""

    @property
    def has_reply(self) -> bool:
        """Whether the outcome is a reply that the server did not break off."""
        return isinstance(self.outcome, TeacherReply) and ending(self.outcome) != "broken off"

    @property
    def key(self) -> Key:
        return self.prompt_hash, self.candidate

    def to_json(self) -> str:
        """Return the record as one line, without its end."""
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        kind = "reply" if isinstance(self.outcome, TeacherReply) else "failure"
        del fields["outcome"]
        return json.dumps(fields | {kind: dataclasses.asdict(self.outcome)}, ensure_ascii=False)

    @classmethod
    def from_json(cls, line: bytes) -> Record:
        """Parse a line of `to_json`. Raises ValueError, TypeError or KeyError for any other."""
        fields = json.loads(line)
        reply, failure = fields.pop("reply", None), fields.pop("failure", None)
        return cls(outcome=TeacherReply(**reply) if failure is None else Failure(**failure), **fields)


class Journal:
    """An append-only file of records.

    Attributes:
        records: the newest record of each request.
        repaired: whether a half-written last line was cut off.

    Raises:
        DataError: another process holds it, or a line before the last is not a record.
        CheckpointError: the file cannot be read or written, here or in `append`.
    """

    def __init__(self, path: Path) -> None:
        import fcntl

        self.path = path
        is_new = not path.exists()
        # For reading, and for appending at the end, wherever that is after a repair.
        with explain_disk_errors(path):
            self.file = open(path, "a+b", buffering=0)  # noqa: SIM115  open until `close`
        try:
            fcntl.flock(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            self.file.close()
            raise DataError(f"{path} is in use by another process: wait for it, or choose another folder.") from None
        try:
            self.repaired = False
            self.records = {record.key: record for record in self.read()}
        except BaseException:
            self.file.close()
            raise
        if is_new:
            with explain_disk_errors(path):
                sync(path.parent)

    def read(self) -> list[Record]:
        """Read all records, and cut off a last one that a killed process left unfinished."""
        self.file.seek(0)
        records, whole = [], 0
        lines = self.file.read().splitlines(keepends=True)
        for number, line in enumerate(lines, 1):
            try:
                if not line.endswith(b"\n"):
                    raise ValueError("no end of line")
                records.append(Record.from_json(line))
            except (ValueError, TypeError, KeyError, AttributeError) as error:
                if number < len(lines):
                    raise DataError(
                        f"{self.path}:{number}: not a record ({type(error).__name__}: {error}). The file was changed "
                        "by hand: fix or remove the line."
                    ) from None
                self.repaired = True
                with explain_disk_errors(self.path):
                    self.file.truncate(whole)
                    os.fsync(self.file.fileno())
                break
            whole += len(line)
        return records

    def append(self, record: Record) -> None:
        """Write a record; it is on the disk when this returns."""
        self.extend([record])

    def extend(self, records: Sequence[Record]) -> None:
        """Write records, with one sync for all."""
        if not records:
            return
        lines = memoryview(b"".join(record.to_json().encode("utf-8") + b"\n" for record in records))
        with explain_disk_errors(self.path):
            while lines:
                lines = lines[self.file.write(lines) :]
            os.fsync(self.file.fileno())
        self.records |= {record.key: record for record in records}

    def close(self) -> None:
        self.file.close()

    def __enter__(self) -> Journal:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()
