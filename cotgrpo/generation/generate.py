"""The command `generate`: questions in, verified triples out, from a teacher behind an endpoint or in a folder.

Every reply, accepted or not, goes to `replies.jsonl` before it counts. Run again, the command asks only for missing
replies, judges the others by the current settings, and rewrites the triples, their card and the summary.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import hashlib
import json
import os
import signal
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from cotgrpo.atomic_files import write_json
from cotgrpo.config import ConfigError, GenerateConfig, differences, flat, parse_settings, save_config
from cotgrpo.config.files import saved_by_a_run
from cotgrpo.data.own.loading import OwnCodeError
from cotgrpo.data.questions import Question, place_of, read_questions
from cotgrpo.data.rows import DropReport, squeeze
from cotgrpo.data.sources import DataError
from cotgrpo.distributed.interrupts import raising
from cotgrpo.generation.progress import ReplyProgress
from cotgrpo.generation.score import run_score
from cotgrpo.generation.triple_files import write_card, write_rows
from cotgrpo.logs.progress import PhaseProgress
from cotgrpo.rollouts.cached_ghosts import CachedReply, cached_reply, write_cache
from cotgrpo.teachers.batches import BatchTeacher
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
    best,
    commonest,
    control_token,
    distinct,
    load_check,
    majority,
    most_diverse,
    parts_of,
    shortest,
)
from cotgrpo.teachers.journal import Journal, Record
from cotgrpo.terminal import say
from cotgrpo.training.loop import Interrupted

REPLY_SETTINGS = ("model", "path", "temperature", "top_p", "max_tokens", "extra_body", "seed")
"""Settings of a teacher that change its replies: one folder holds the replies of one teacher."""
JUDGED_AT_ONCE = 256
"""Recorded replies that are judged between two writes to the disk."""
REASONS_SHOWN = 10
FAILURES_SHOWN = 5

Filter = Callable[[list[Candidate]], list[Candidate]]
"""Selects some of the candidates for one question."""


def run_generate(config: GenerateConfig, console: Console | None = None) -> dict[str, Any]:
    """Ask the teacher every question, keep the verified replies as triples in `out`, and return the summary.

    Raises:
        ConfigError, DataError, ModelError: settings or questions that cannot be used; before the first request.
        TeacherError: the teacher cannot be asked, or no reply could be kept. All replies are in `replies.jsonl`.
        Interrupted: Ctrl-C. The same command continues.
    """
    config.check_complete()
    started = time.monotonic()
    console = console or Console()
    if config.score_for is not None:
        check_same_teacher(Path(config.out), config)
        return score_replies(config, console)
    say(console, "reading the questions")
    questions, report, test = load_questions(config, console)
    say(console, f"questions: {report}")
    without = sum(not question.gold for question in questions)
    if without and not (config.verify.check or config.verify.function):
        say(console, f"{without} of them have no right answer (verify.without_gold: {config.verify.without_gold}).")
    out = Path(config.out)
    check_same_teacher(out, config)
    out.mkdir(parents=True, exist_ok=True)
    with Journal(out / "replies.jsonl") as journal:
        check = load_check(config.verify.check) if config.verify.check else None
        judge = Judge(check, test, config.teacher.longest_reply, config.verify.verifier)
        generation = Generation(config, questions, journal, judge, console)
        try:
            generation.judge_again()
            waiting = generation.waiting()
            if waiting:
                teacher = make_teacher(config, console)
                save_config(config, out / "config.yaml")
                with raising():
                    generation.ask(teacher, waiting)
        except KeyboardInterrupt:
            raise Interrupted(
                signal.SIGINT,
                f"stopped with {len(journal.records)} replies in {journal.path}. Run the same command to continue.",
            ) from None
        save_config(config, out / "config.yaml")
        return generation.finish(report, started)


def score_replies(config: GenerateConfig, console: Console) -> dict[str, Any]:
    """Score the replies of the rows for a student. Raises as `run_generate` does."""
    try:
        with raising():
            return run_score(config, console)
    except KeyboardInterrupt:
        raise Interrupted(
            signal.SIGINT, f"stopped; what is scored is in {config.out}. Run the same command to continue."
        ) from None


def load_questions(
    config: GenerateConfig, console: Console | None = None
) -> tuple[list[Question], DropReport, TestQuestions | None]:
    """Return the questions to ask, the report of those left out, and the test questions.

    Args:
        config: the settings.
        console: where progress is shown, if anywhere.

    Raises:
        DataError: questions that cannot be used, or a missing right answer.
    """
    verify, console = config.verify, console or Console(quiet=True)
    read_rows = functools.partial(
        read_questions, need_gold=False, columns=config.columns, row_function=config.row_function
    )
    with PhaseProgress("reading questions", console) as phase:
        read, report = read_rows(config.questions, split=config.split, bad_rows=config.bad_rows, progress=phase)
    needs_gold = not (verify.check or verify.function) and verify.without_gold == "error"
    questions = identify(with_gold(read, report) if needs_gold and config.bad_rows == "drop" else read, report)
    test = None
    if verify.test_sets:
        with PhaseProgress("reading test sets", console) as phase:
            test_questions, _ = read_rows(verify.test_sets, require_columns=False, folder_split="test", progress=phase)
        test = TestQuestions((question.question for question in test_questions), verify.ngram)
        questions = without_overlap(questions, test, report, console)
    for question in questions[config.max_questions :] if config.max_questions else []:
        report.drop("beyond max_questions", question.source)
    questions = questions[: config.max_questions or None]
    if not questions:
        raise DataError(f"No question is left to ask. {report}")
    without = next((question for question in questions if not question.gold), None)
    if without is not None and needs_gold:
        raise DataError(
            f"{lacks_gold(without)} Or name a function in verify.check, or set verify.without_gold to majority or "
            "unverified, or bad_rows to drop."
        )
    return questions, report, test


def lacks_gold(question: Question) -> str:
    """Return the complaint about a question without a right answer."""
    return question.no_gold or (
        f"{question.source}: no right answer (gold or answer) to verify replies against. Add it."
    )


def with_gold(questions: Sequence[Question], report: DropReport) -> list[Question]:
    """Return the questions that have a right answer, and report the others."""
    for question in questions:
        if not question.gold:
            report.drop("bad row", lacks_gold(question))
    return [question for question in questions if question.gold]


def without_overlap(
    questions: Sequence[Question], test: TestQuestions, report: DropReport, console: Console
) -> list[Question]:
    """Return the questions that share no n-gram with a test question, and report the others."""
    kept = []
    with PhaseProgress("comparing with test sets", console, len(questions)) as phase:
        for question in phase.over(questions):
            overlap = test.overlap(question.question)
            if overlap is None:
                kept.append(question)
            else:
                report.drop("contaminated", f"{question.source}: {overlap!r}")
    return kept


def identify(questions: Sequence[Question], report: DropReport) -> list[Question]:
    """Return the questions with different texts, each with an id: the row's own, or else its number.

    Chats with several turns are left out: triples hold one question and one reply. So are questions that templates
    refuse.

    Raises:
        DataError: two questions share an id.
    """
    found: dict[str, Question] = {}
    texts: set[str] = set()
    for question in questions:
        text = squeeze(question.question)
        if len(question.context) > 1:
            report.drop("several turns", question.source)
            continue
        if (token := control_token(text)) is not None:
            report.drop("control token", f"{question.source}: {token}")
            continue
        if text in texts:
            report.drop("duplicate", question.source)
            continue
        texts.add(text)
        question = dataclasses.replace(question, id=str(len(found)) if question.id is None else question.id)
        other = found.setdefault(str(question.id), question)
        if other is not question:
            raise DataError(
                f"{question.source}: {other.source} has the id {question.id!r} too. Give each row its own id."
            )
    return list(found.values())


def check_same_teacher(out: Path, config: GenerateConfig) -> None:
    """Raise ConfigError if the folder holds replies to other settings, or if a setting holds the key."""
    key = os.environ.get(config.teacher.api_key_env, "").strip()
    if len(key) >= MIN_SECRET_LENGTH and any(key in str(value) for _, value in flat(dataclasses.asdict(config))):
        raise ConfigError(
            f"A setting holds the key in {config.teacher.api_key_env}, and settings are saved with the output. Remove "
            "it there."
        )
    path = out / "config.yaml"
    if not path.is_file():
        return
    with saved_by_a_run():
        saved = parse_settings(["--config", str(path)], GenerateConfig())
    before, now = (reply_settings(c) for c in (saved, config))
    differing = differences(before, now)
    if differing:
        raise ConfigError(
            f"{out} holds replies of another teacher or to another prompt: {'; '.join(differing)}. Choose another out, "
            "or give the same settings to continue there."
        )


def reply_settings(config: GenerateConfig) -> dict[str, Any]:
    """Return the settings that change the replies, by dotted key."""
    teacher = {f"teacher.{name}": getattr(config.teacher, name) for name in REPLY_SETTINGS}
    teacher |= {"top_logprobs": config.top_logprobs, "score_for": config.score_for}
    return teacher | {f"prompt.{name}": value for name, value in dataclasses.asdict(config.prompt).items()}


def make_teacher(config: GenerateConfig, console: Console | None = None) -> Teacher:
    """Return the teacher that the config names. It prints notes for the user to `console`, if there is one."""
    settings = config.teacher
    note = functools.partial(say, console or Console(quiet=True))
    if settings.batch:
        return BatchTeacher(settings, Path(config.out) / "batches.json", note, config.top_logprobs)
    if settings.path is None:
        return EndpointTeacher(settings, note, config.top_logprobs)
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
        top_logprobs=config.top_logprobs,
    )


def prompt_hash(messages: Sequence[dict[str, str]]) -> str:
    """Return the SHA-256 of a chat, as hexadecimal digits."""
    return hashlib.sha256(json.dumps(messages, ensure_ascii=False, sort_keys=True).encode("utf-8")).hexdigest()


@dataclasses.dataclass
class Generation:
    """One run of the command: the requests, their outcomes, and the choice of triples."""

    config: GenerateConfig
    questions: list[Question]
    journal: Journal
    judge: Judge
    console: Console

    def __post_init__(self) -> None:
        chats = [self.config.prompt.messages(question.question) for question in self.questions]
        self.chats = {prompt_hash(chat): (question, chat) for question, chat in zip(self.questions, chats, strict=True)}
        self.wanted = [(chat, candidate) for chat in self.chats for candidate in range(self.config.candidates)]
        if self.journal.repaired:
            say(self.console, f"{self.journal.path}: a half-written last line was cut off; its request is sent again.")

    def records(self) -> list[Record]:
        """Return the records of wanted requests, question by question."""
        return [self.journal.records[key] for key in self.wanted if key in self.journal.records]

    def judge_again(self) -> None:
        """Judge recorded replies whose verdict depends on what has changed: a rule, a right answer, a test set."""
        stale = [record for record in self.records() if self.is_stale(record)]
        if not stale:
            return
        say(self.console, f"Judging {len(stale)} recorded replies.")
        changed = 0
        with PhaseProgress("replies judged", self.console, len(stale)) as phase:
            for start in range(0, len(stale), JUDGED_AT_ONCE):
                judged = []
                for done, old in enumerate(stale[start : start + JUDGED_AT_ONCE], start + 1):
                    judged.append((old, self.judged(old.key, old.outcome)))
                    phase(done)
                # A part at a time, so that work on a long journal survives Ctrl-C.
                self.journal.extend([new for old, new in judged if new != old])
                changed += sum((new.accepted, new.reason) != (old.accepted, old.reason) for old, new in judged)
        if changed:
            say(self.console, f"{changed} replies get another verdict than before.")

    def is_stale(self, record: Record) -> bool:
        """Return whether a recorded reply must be judged again."""
        fingerprint = self.judge.fingerprint(self.chats[record.prompt_hash][0])
        return isinstance(record.outcome, TeacherReply) and (not fingerprint or record.judged_by != fingerprint)

    def waiting(self) -> list[Request]:
        """Return the requests without a reply: first those never sent, then those that failed."""
        known = self.journal.records
        new = [Request(key, self.chats[key[0]][1]) for key in self.wanted if key not in known]
        failed = [
            Request(record.key, self.chats[record.prompt_hash][1], failed_before=True)
            for record in self.records()
            if not record.has_reply
        ]
        done = len(self.wanted) - len(new) - len(failed)
        if done or failed:
            say(
                self.console,
                f"Continuing: {done} replies are there, {len(new)} are missing, {len(failed)} failed before.",
            )
        return new + failed

    def judged(self, key: tuple[str, int], outcome: Outcome) -> Record:
        """Return the outcome of a request with its verdict."""
        question = self.chats[key[0]][0]
        judged_by = ""
        if isinstance(outcome, TeacherReply):
            verdict, judged_by = self.judge(question, outcome), self.judge.fingerprint(question)
        else:
            verdict = Verdict(False, f"failed: {outcome.reason}", outcome.detail)
        return Record(
            *key,
            question_id=str(question.id),
            question=question.question,
            outcome=outcome,
            accepted=verdict.accepted,
            reason=verdict.reason,
            detail=verdict.detail,
            judged_by=judged_by,
        )

    def ask(self, teacher: Teacher, waiting: list[Request]) -> None:
        """Send the missing requests; each outcome is on disk before the next one is looked at."""
        there = [record for record in self.records() if record.has_reply]
        with ReplyProgress(len(self.wanted), there, self.cost, self.console) as progress:

            def done(request: Request, outcome: Outcome) -> None:
                record = self.judged(request.key, outcome)
                self.journal.append(record)
                progress.add(record)

            teacher.ask(waiting, done)

    def cost(self, prompt_tokens: int, completion_tokens: int) -> float:
        """Return the price of these tokens."""
        prices = self.config.teacher
        return (prompt_tokens * prices.input_price + completion_tokens * prices.output_price) / 1e6

    def finish(self, report: DropReport, started: float) -> dict[str, Any]:
        """Choose the triples, write all files, and return the summary.

        Raises:
            TeacherError: no reply could be kept.
        """
        places = (place_of(question) for question, _ in self.chats.values())
        if first := next((place for place in places if place in self.judge.failures), None):
            raise OwnCodeError(
                f"{self.judge.failures[first]} All replies are in {self.journal.path}: run the same command again."
            )
        rows, verdicts, cached = self.choose()
        summary = self.summary(report, rows, verdicts) | {"seconds": round(time.monotonic() - started, 1)}
        out = Path(self.config.out)
        write_json(out / "summary.json", summary)
        if not rows:
            reasons = commonest([(v.reason, v.detail) for v in verdicts], REASONS_SHOWN)
            raise TeacherError(
                f"Not one of {len(verdicts)} replies could be kept (see {self.journal.path}). The commonest "
                f"reasons: {'; '.join(reasons)}."
            )
        write_rows(out, rows, self.config.format)
        if self.config.top_logprobs:
            write_cache(out / "ghosts.parquet", cached, self.config.top_logprobs)
            say(self.console, f"written: {out / 'ghosts.parquet'}, for grpo.ghosts.source cached")
        write_card(out, self.config, summary)
        for line in summary_lines(summary):
            say(self.console, line)
        say(self.console, f"written: {out / f'triples.{self.config.format}'}, with README.md and summary.json")
        return summary

    def choose(self) -> tuple[list[dict[str, Any]], list[Verdict], list[CachedReply]]:
        """Return the rows of triples, the final verdict of each record, and cached ghosts, question by question.

        Accepted replies pass through `filters` in sequence; each filter gives its reason to those it leaves out.
        """
        rows: list[dict[str, Any]] = []
        verdicts: list[Verdict] = []
        cached: list[CachedReply] = []
        with PhaseProgress("choosing replies", self.console, len(self.chats)) as phase:
            for chat, (question, _) in phase.over(self.chats.items()):
                chosen, final = self.choose_for(chat)
                rows += [self.row(question, c, final[c.number].reason == "correct") for c in chosen]
                verdicts += final.values()
                for candidate in chosen:
                    outcome = self.journal.records[chat, candidate.number].outcome
                    if isinstance(outcome, TeacherReply) and outcome.logprobs:
                        key = (question.question, candidate.rationale, candidate.answer)
                        cached.append(cached_reply(key, outcome.logprobs))
        return rows, verdicts, cached

    def choose_for(self, chat: str) -> tuple[list[Candidate], dict[int, Verdict]]:
        """Return the replies to one question that become triples, and the final verdict of each by number."""
        keys = [(chat, number) for number in range(self.config.candidates)]
        records = {key[1]: self.journal.records[key] for key in keys if key in self.journal.records}
        final = {number: Verdict(r.accepted, r.reason, r.detail) for number, r in records.items()}
        candidates = []
        for number, record in records.items():
            if record.accepted and isinstance(record.outcome, TeacherReply):
                rationale, answer = parts_of(record.outcome)
                reward = self.judge.reward(self.chats[chat][0], record.outcome)
                candidates.append(Candidate(number, rationale, answer or "", reward))
        for reason, select in self.filters(list(final.values())):
            selected = select(candidates)
            for candidate in candidates:
                if candidate not in selected:
                    final[candidate.number] = Verdict(False, reason, repr(candidate.answer)[:80])
            candidates = selected
        return candidates, final

    def filters(self, verdicts: Sequence[Verdict]) -> list[tuple[str, Filter]]:
        """Return the filters of a question's accepted replies, each with its reason, in order."""
        verify = self.config.verify
        keep: dict[str, Filter] = {
            "all": lambda candidates: candidates,
            "shortest": lambda candidates: shortest(candidates, verify.keep_at_most),
            "diverse": lambda candidates: most_diverse(candidates, verify.keep_at_most),
            "best": lambda candidates: best(candidates, verify.keep_at_most),
        }
        filters: list[tuple[str, Filter]] = [
            ("duplicate", distinct),
            ("not chosen", lambda candidates: sorted(keep[verify.keep](candidates), key=lambda c: c.number)),
        ]
        unverified = any(verdict.reason == "unverified" for verdict in verdicts)
        return [("no majority", majority), *filters] if verify.without_gold == "majority" and unverified else filters

    def row(self, question: Question, candidate: Candidate, is_correct: bool) -> dict[str, Any]:
        """Return a triple as it is written."""
        return {
            "id": question.id if self.config.candidates == 1 else f"{question.id}-{candidate.number}",
            "question": question.question,
            "rationale": candidate.rationale,
            "answer": candidate.answer,
            "gold": question.gold or None,
            "correct": True if is_correct else None,
            "teacher": self.config.teacher.name,
        }

    def summary(self, report: DropReport, rows: list[dict[str, Any]], verdicts: list[Verdict]) -> dict[str, Any]:
        """Return all counts. `replies` is the sum of kept, not_chosen and rejected."""
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
            "finish_reasons": dict(collections.Counter(reply.finish_reason or "none" for reply in replies)),
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


def summary_lines(summary: dict[str, Any]) -> list[str]:
    """Return the summary as lines for a person."""
    lines = [
        f"{summary['kept']} triples kept, for {summary['questions_with_triples']} of {summary['questions']['kept']} "
        f"questions, from {summary['replies']} replies to {summary['requests']} requests"
    ]
    left_out = summary["rejected"] | {"not chosen": summary["not_chosen"]}
    lines.append("left out: " + ", ".join(f"{count} {reason}" for reason, count in left_out.items()))
    failures = summary["failures"]
    if failures:
        lines.append(f"{summary['failed']} requests failed; the same command sends them again:")
        shown = commonest([(failure["reason"], failure["detail"]) for failure in failures], FAILURES_SHOWN)
        lines += [f"  {line}" for line in shown]
    usage = summary["usage"]
    cost = f", cost {summary['cost']:g}" if summary["cost"] else ""
    unknown = f" ({usage['replies_without_count']} replies have no count)" if usage["replies_without_count"] else ""
    lines.append(f"tokens: {usage['prompt_tokens']:,} read, {usage['completion_tokens']:,} written{unknown}{cost}")
    return lines
