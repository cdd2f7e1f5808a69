"""The command `generate`: questions in, verified triples out, from a teacher behind an endpoint or in a folder.

Every reply is in `replies.jsonl` before it counts, accepted or not. The command run again asks only for what is missing there, judges what is there by
the settings of now, and writes the triples, their card and the summary anew.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import signal
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from cotgrpo.atomic_files import write_json
from cotgrpo.config.files import flat, parse_settings, save_config
from cotgrpo.config.generate import GenerateConfig
from cotgrpo.config.settings import ConfigError
from cotgrpo.data.triples import DataError, DropReport
from cotgrpo.generation.progress import ReplyProgress
from cotgrpo.generation.triple_files import write_card, write_rows
from cotgrpo.teachers.decontamination import TestQuestions
from cotgrpo.teachers.endpoint import (
    MIN_SECRET_LENGTH,
    EndpointTeacher,
    Outcome,
    Request,
    Teacher,
    TeacherError,
    TeacherReply,
)
from cotgrpo.teachers.filtering import (
    REJECTED,
    Candidate,
    Judge,
    Verdict,
    commonest,
    distinct,
    load_check,
    majority,
    most_diverse,
    parts_of,
    shortest,
)
from cotgrpo.teachers.journal import Journal, Record
from cotgrpo.teachers.questions import Question, read_questions
from cotgrpo.training.loop import Interrupted

ASKED_ALIKE = ("model", "path", "temperature", "top_p", "max_tokens", "extra_body", "seed")
"""Settings of a teacher that decide what its replies are: one folder holds those of one teacher."""
REASONS_SHOWN = 10
FAILURES_SHOWN = 5


def run_generate(config: GenerateConfig, console: Console | None = None) -> dict[str, Any]:
    """Asks the teacher every question, keeps the verified replies as triples in `out`, and returns the summary.

    Raises:
        ConfigError, DataError, ModelError: settings or questions that cannot be used; all before the first request.
        TeacherError: the teacher cannot be asked, or not one reply could be kept. What came is in `replies.jsonl`.
        Interrupted: Ctrl-C. Run again, the command goes on.
    """
    config.check_complete()
    started = time.monotonic()
    console = console or Console()
    questions, report, test = read_all(config)
    say(console, f"questions: {report}")
    out = Path(config.out)
    check_folder(out, config)
    out.mkdir(parents=True, exist_ok=True)
    with Journal(out / "replies.jsonl") as journal:
        judge = Judge(load_check(config.verify.check) if config.verify.check else None, test)
        generation = Generation(config, questions, journal, judge, console)
        generation.judge_again()
        waiting = generation.waiting()
        try:
            if waiting:
                teacher = make_teacher(config)
                save_config(config, out / "config.yaml")
                generation.ask(teacher, waiting)
        except KeyboardInterrupt:
            raise Interrupted(
                signal.SIGINT,
                f"stopped with {len(journal.records)} replies in {journal.path}. Run the same command to go on.",
            ) from None
        save_config(config, out / "config.yaml")
        return generation.finish(report, started)


def read_all(config: GenerateConfig) -> tuple[list[Question], DropReport, TestQuestions | None]:
    """The questions to ask, the report of those left out, and the test questions.

    Raises:
        DataError: what is wrong with the questions, or a right answer that is missing.
    """
    verify = config.verify
    questions, report = read_questions(config.questions, split=config.split)
    test = None
    if verify.test_sets:
        test = TestQuestions((question.text for question in read_questions(verify.test_sets)[0]), verify.ngram)
        for question in questions:
            if overlap := test.overlap(question.text):
                report.drop("contaminated", f"{question.source}: {overlap!r}")
        questions = [question for question in questions if test.overlap(question.text) is None]
    for question in questions[config.max_questions :] if config.max_questions else []:
        report.drop("beyond max_questions", question.source)
    questions = questions[: config.max_questions or None]
    if not questions:
        raise DataError(f"No question is left to ask. {report}")
    without = next((question for question in questions if question.gold is None), None)
    if without is not None and not verify.check and verify.without_gold == "error":
        raise DataError(
            f"{without.source}: no right answer (gold or answer) to verify replies against. Add it, or name a function in verify.check, or set "
            "verify.without_gold to majority or unverified."
        )
    return questions, report, test


def check_folder(out: Path, config: GenerateConfig) -> None:
    """Raises ConfigError where the folder holds replies of another teacher or to another prompt, or a setting holds the key."""
    key = os.environ.get(config.teacher.api_key_env, "").strip()
    if len(key) >= MIN_SECRET_LENGTH and any(key in str(value) for _, value in flat(dataclasses.asdict(config))):
        raise ConfigError(
            f"The key in {config.teacher.api_key_env} stands in a setting too, and settings are saved with the output. Remove it there."
        )
    path = out / "config.yaml"
    if not path.is_file():
        return
    before, now = (identity(c) for c in (parse_settings(["--config", str(path)], GenerateConfig()), config))
    differing = [f"{name} ({before[name]!r} there, {now[name]!r} now)" for name in now if before[name] != now[name]]
    if differing:
        raise ConfigError(
            f"{out} holds replies of another teacher or to another prompt: {'; '.join(differing)}. Choose another out, or give the same "
            "settings to go on there."
        )


def identity(config: GenerateConfig) -> dict[str, Any]:
    """The settings that decide what replies are, by dotted key."""
    teacher = {f"teacher.{name}": getattr(config.teacher, name) for name in ASKED_ALIKE}
    return teacher | {f"prompt.{name}": value for name, value in dataclasses.asdict(config.prompt).items()}


def make_teacher(config: GenerateConfig) -> Teacher:
    """The teacher that the config names."""
    settings = config.teacher
    if settings.path is None:
        return EndpointTeacher(settings)
    from cotgrpo.teachers.local import LocalTeacher

    assert settings.temperature is not None  # as check_complete has seen
    return LocalTeacher(
        settings.path,
        max_tokens=settings.max_tokens,
        temperature=settings.temperature,
        top_p=1.0 if settings.top_p is None else settings.top_p,
        batch_size=settings.batch_size,
        dtype=settings.dtype,
        seed=settings.seed,
    )


def prompt_hash(messages: Sequence[dict[str, str]]) -> str:
    """SHA-256 of a chat, as hexadecimal digits."""
    return hashlib.sha256(json.dumps(messages, ensure_ascii=False, sort_keys=True).encode("utf-8")).hexdigest()


@dataclasses.dataclass
class Generation:
    """One call of the command: what is wanted, what is there, and what becomes of it."""

    config: GenerateConfig
    questions: list[Question]
    journal: Journal
    judge: Judge
    console: Console

    def __post_init__(self) -> None:
        chats = [self.config.prompt.messages(question.text) for question in self.questions]
        self.asked = {prompt_hash(chat): (question, chat) for question, chat in zip(self.questions, chats, strict=True)}
        self.wanted = [(asked, candidate) for asked in self.asked for candidate in range(self.config.candidates)]
        if self.journal.repaired:
            say(self.console, f"{self.journal.path}: a half-written last line was cut off; its request is asked again.")

    def records(self) -> list[Record]:
        """What is there of what is wanted, question by question."""
        return [self.journal.records[key] for key in self.wanted if key in self.journal.records]

    def judge_again(self) -> None:
        """Judges every reply that is there, since the settings may be others than when it came; verdicts that changed are appended."""
        changed = 0
        for record in self.records():
            if isinstance(record.outcome, TeacherReply):
                judged = self.judged(record.key, record.outcome)
                if (judged.accepted, judged.reason) != (record.accepted, record.reason):
                    self.journal.append(judged)
                    changed += 1
        if changed:
            say(self.console, f"{changed} replies are judged otherwise than before.")

    def waiting(self) -> list[Request]:
        """Requests without a reply: first those that were never asked, then those that failed."""
        known = self.journal.records
        new = [Request(key, self.asked[key[0]][1]) for key in self.wanted if key not in known]
        failed = [
            Request(record.key, self.asked[record.prompt_hash][1], failed_before=True)
            for record in self.records()
            if not isinstance(record.outcome, TeacherReply)
        ]
        done = len(self.wanted) - len(new) - len(failed)
        if done or failed:
            say(
                self.console,
                f"Going on: {done} replies are there, {len(new)} are missing, {len(failed)} failed before.",
            )
        return new + failed

    def judged(self, key: tuple[str, int], outcome: Outcome) -> Record:
        """The outcome of a request with its verdict."""
        question = self.asked[key[0]][0]
        if isinstance(outcome, TeacherReply):
            verdict = self.judge(question, outcome)
        else:
            verdict = Verdict(False, f"failed: {outcome.reason}", outcome.detail)
        return Record(*key, question.id, question.text, outcome, verdict.accepted, verdict.reason, verdict.detail)

    def ask(self, teacher: Teacher, waiting: list[Request]) -> None:
        """Asks for what is missing; each outcome is on the disk before the next one is looked at."""
        there = [record for record in self.records() if isinstance(record.outcome, TeacherReply)]
        with ReplyProgress(len(self.wanted), there, self.cost, self.console) as progress:

            def done(request: Request, outcome: Outcome) -> None:
                record = self.judged(request.key, outcome)
                self.journal.append(record)
                progress.add(record)

            teacher.ask(waiting, done)

    def cost(self, prompt_tokens: int, completion_tokens: int) -> float:
        """The price of so many tokens."""
        prices = self.config.teacher
        return (prompt_tokens * prices.input_price + completion_tokens * prices.output_price) / 1e6

    def finish(self, report: DropReport, started: float) -> dict[str, Any]:
        """Chooses the triples, writes them with their card and the summary, and prints it.

        Raises:
            TeacherError: there is not one triple.
        """
        rows, verdicts = self.choose()
        summary = self.summary(report, rows, verdicts) | {"seconds": round(time.monotonic() - started, 1)}
        out = Path(self.config.out)
        write_json(out / "summary.json", summary)
        if not rows:
            reasons = commonest([(v.reason, v.detail) for v in verdicts], REASONS_SHOWN)
            raise TeacherError(
                f"Not one of {len(verdicts)} replies could be kept (see {self.journal.path}). The commonest reasons:\n  "
                + "\n  ".join(reasons)
            )
        write_rows(out, rows, self.config.format)
        write_card(out, self.config, summary)
        for line in lines_of(summary):
            say(self.console, line)
        say(self.console, f"written: {out / f'triples.{self.config.format}'}, with README.md and summary.json")
        return summary

    def choose(self) -> tuple[list[dict[str, Any]], list[Verdict]]:
        """(rows of triples, one final verdict for each record): majority, duplicates and choice, question by question."""
        rows: list[dict[str, Any]] = []
        verdicts: list[Verdict] = []
        for asked, (question, _) in self.asked.items():
            keys = [(asked, candidate) for candidate in range(self.config.candidates)]
            records = {k[1]: self.journal.records[k] for k in keys if k in self.journal.records}
            final = {number: Verdict(r.accepted, r.reason, r.detail) for number, r in records.items()}
            right = []
            for number, record in records.items():
                if record.accepted and isinstance(record.outcome, TeacherReply):
                    rationale, answer = parts_of(record.outcome)
                    right.append(Candidate(number, rationale, answer or ""))
            if self.config.verify.without_gold == "majority" and any(v.reason == "unverified" for v in final.values()):
                agreed = majority([candidate.answer for candidate in right])
                for candidate in right:
                    final[candidate.number] = Verdict(False, "no majority", repr(candidate.answer)[:80])
                right = [right[place] for place in agreed]
            for candidate in right:
                final[candidate.number] = Verdict(False, "duplicate")
            right = distinct(right)
            for candidate in right:
                final[candidate.number] = Verdict(False, "not chosen")
            for candidate in self.kept(right):
                reason = records[candidate.number].reason
                final[candidate.number] = Verdict(True, reason)
                rows.append(self.row(question, candidate, reason == "correct"))
            verdicts += final.values()
        return rows, verdicts

    def kept(self, right: list[Candidate]) -> list[Candidate]:
        """Those of a question's right replies that `verify.keep` asks for, by their numbers."""
        verify = self.config.verify
        chosen = {
            "all": lambda: right,
            "shortest": lambda: shortest(right, verify.keep_at_most),
            "diverse": lambda: most_diverse(right, verify.keep_at_most),
        }[verify.keep]()
        return sorted(chosen, key=lambda candidate: candidate.number)

    def row(self, question: Question, candidate: Candidate, is_correct: bool) -> dict[str, Any]:
        """A triple as it is written."""
        return {
            "id": question.id if self.config.candidates == 1 else f"{question.id}-{candidate.number}",
            "question": question.text,
            "rationale": candidate.rationale,
            "answer": candidate.answer,
            "gold": question.gold,
            "correct": True if is_correct else None,
            "teacher": self.config.teacher.name,
        }

    def summary(self, report: DropReport, rows: list[dict[str, Any]], verdicts: list[Verdict]) -> dict[str, Any]:
        """Everything that was counted. `replies` is the sum of kept, not_chosen and rejected."""
        records = self.records()
        replies = [record.outcome for record in records if isinstance(record.outcome, TeacherReply)]
        failures = [record for record in records if not isinstance(record.outcome, TeacherReply)]
        count = lambda reason: sum(verdict.reason == reason for verdict in verdicts)
        read, written = (sum(getattr(r, f"{side}_tokens") or 0 for r in replies) for side in ("prompt", "completion"))
        return {
            "questions": report.to_dict(),
            "requests": len(self.wanted),
            "replies": len(replies),
            "kept": len(rows),
            "questions_with_triples": len({row["question"] for row in rows}),
            "rejected": {reason: count(reason) for reason in REJECTED},
            "not_chosen": count("not chosen"),
            "failed": len(failures),
            "failures": [
                {"question_id": r.question_id, "candidate": r.candidate, "reason": r.reason, "detail": r.detail}
                for r in failures
            ],
            "models": sorted({reply.model for reply in replies if reply.model}),
            "attempts": sum(record.outcome.attempts for record in records),
            "usage": {
                "prompt_tokens": read,
                "completion_tokens": written,
                "replies_without_count": sum(reply.completion_tokens is None for reply in replies),
            },
            "cost": round(self.cost(read, written), 6),
        }


def lines_of(summary: dict[str, Any]) -> list[str]:
    """The summary for a person."""
    lines = [
        f"{summary['kept']} triples kept, for {summary['questions_with_triples']} of {summary['questions']['kept']} questions, "
        f"from {summary['replies']} replies to {summary['requests']} requests"
    ]
    left_out = summary["rejected"] | {"not chosen": summary["not_chosen"]}
    lines.append("left out: " + ", ".join(f"{count} {reason}" for reason, count in left_out.items()))
    failures = summary["failures"]
    if failures:
        lines.append(f"{summary['failed']} requests failed; the same command asks them again:")
        shown = commonest([(failure["reason"], failure["detail"]) for failure in failures], FAILURES_SHOWN)
        lines += [f"  {line}" for line in shown]
    usage = summary["usage"]
    cost = f", cost {summary['cost']:g}" if summary["cost"] else ""
    unknown = (
        f" ({usage['replies_without_count']} replies came without a count)" if usage["replies_without_count"] else ""
    )
    lines.append(f"tokens: {usage['prompt_tokens']:,} read, {usage['completion_tokens']:,} written{unknown}{cost}")
    return lines


def say(console: Console, text: str) -> None:
    """Prints a line as it is."""
    console.print(text, highlight=False, markup=False, soft_wrap=True)
