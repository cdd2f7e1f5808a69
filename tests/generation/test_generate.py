"""`cotgrpo generate` against a real server with every fault, killed and resumed; and a key that is found nowhere."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import logging
import os
import signal
import socket
import subprocess
import sys
import time
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from helpers.commands import write_model
from helpers.faulty_server import FAULTS, FaultyServer

from cotgrpo.cli import main
from cotgrpo.config.files import parse_settings, save_config
from cotgrpo.config.generate import GenerateConfig
from cotgrpo.config.settings import ConfigError
from cotgrpo.data.chat import ChatTemplate
from cotgrpo.data.tokenizer import load_tokenizer
from cotgrpo.data.sources import DataError
from cotgrpo.data.triples import read_triples
from cotgrpo.generation.generate import make_teacher, run_generate
from cotgrpo.teachers.endpoint import (
    EndpointSettings,
    EndpointTeacher,
    Failure,
    RateLimiter,
    Request,
    TeacherError,
    TeacherReply,
    parse_retry_after,
)
from cotgrpo.teachers.journal import Journal, Record

pytest.importorskip("openai")

KEY = "sk-test-0a1b2c3d4e5f-secret"


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    monkeypatch.delenv("OPENAI_BASE_URL", raising=False)


@pytest.fixture
def server() -> Iterator[FaultyServer]:
    with FaultyServer(KEY) as server:
        yield server


def write_questions(folder: Path, orders: list[str]) -> Path:
    """One question for each order, `n + 1` for the n-th."""
    path = folder / "questions.jsonl"
    rows = [
        {"id": f"q{n}", "question": f"{order} What is {n} + 1?".strip(), "gold": str(n + 1)}
        for n, order in enumerate(orders, 10)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def options(server: FaultyServer, folder: Path, *more: str) -> list[str]:
    """Settings for a short test: quick retries."""
    return [
        *("--questions", str(folder / "questions.jsonl"), "--out", str(folder / "out")),
        *("--teacher.base_url", server.url, "--teacher.model", "adder"),
        *("--teacher.retry_delay", "0.01", "--teacher.timeout", "60", "--teacher.retries", "3"),
        *more,
    ]


def generate(server: FaultyServer, folder: Path, *more: str) -> dict[str, Any]:
    return run_generate(parse_settings(options(server, folder, *more), GenerateConfig()))


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_every_fault_is_survived_or_listed(server: FaultyServer, tmp_path: Path) -> None:
    """Each fault once, and then a reply; and some that never end. All good replies are kept, none twice, and the failures are listed."""
    passing = [name for name in FAULTS if name not in ("hang", "busy_1h", "no_quota", "lost", "bad_request")]
    lasting = ["[broken]", "[half_json]", "[no_choice]", "[html]", "[reset]", "[bad_request]"]
    orders = [*(f"[{name} x1]" for name in passing), *lasting, "", ""]
    write_questions(tmp_path, orders)
    summary = generate(server, tmp_path, "--teacher.failures_in_a_row", "100")
    kept = lines(tmp_path / "out" / "triples.jsonl")
    assert [row["id"] for row in kept] == [f"q{n}" for n, order in enumerate(orders, 10) if order not in lasting]
    assert all(row["answer"] == row["gold"] and row["rationale"].startswith(row["id"][1:]) for row in kept)
    assert summary["kept"] == summary["replies"] == len(passing) + 2 and summary["failed"] == len(lasting)
    assert max(server.answered.values()) == 1 and sum(server.answered.values()) == summary["kept"]
    failures = {failure["question_id"]: failure["reason"] for failure in summary["failures"]}
    first = 10 + len(passing)
    reasons = ["HTTP 500", "reply is not JSON", "reply has no choice", "reply is not JSON", "no connection", "HTTP 400"]
    assert failures == {f"q{first + i}": f"failed: {reason}" for i, reason in enumerate(reasons)}
    # Four attempts each, but one where a retry would be of no use.
    attempts = [sum(asked.startswith(order) for asked, _ in server.asked) for order in lasting]
    assert attempts == [4, 4, 4, 4, 4, 1]
    records = lines(tmp_path / "out" / "replies.jsonl")
    assert len(records) == len(orders) == len({(r["prompt_hash"], r["candidate"]) for r in records})
    assert summary["usage"]["completion_tokens"] == 10 * summary["kept"]

    # Run again, only what failed is asked, and what was kept stays.
    before = len(server.asked)
    again = generate(server, tmp_path, "--teacher.failures_in_a_row", "2", "--teacher.retries", "0")
    assert len(server.asked) - before == len(lasting)
    assert lines(tmp_path / "out" / "triples.jsonl") == kept and again["failures"] != []
    assert [again[name] for name in ("kept", "replies", "failed")] == [
        summary[n] for n in ("kept", "replies", "failed")
    ]


def test_a_server_that_hangs(server: FaultyServer, tmp_path: Path) -> None:
    """A timeout ends the request, and the next attempt has the reply; or it is a failure, and the others are kept."""
    write_questions(tmp_path, ["[hang x1]", "[hang]", ""])
    summary = generate(server, tmp_path, "--teacher.timeout", "1.5", "--teacher.retries", "1")
    assert summary["failed"] >= 1 and summary["kept"] + summary["failed"] == 3
    assert summary["failures"][-1] == {
        "question_id": "q11",
        "candidate": 0,
        "reason": "failed: timeout",
        "detail": "no reply in 1.5 s",
    }
    generate(server, tmp_path, "--teacher.timeout", "10", "--max_questions", "1")
    assert [row["id"] for row in lines(tmp_path / "out" / "triples.jsonl")] == ["q10"]


def test_retry_after_holds_everybody(server: FaultyServer, tmp_path: Path) -> None:
    write_questions(tmp_path, ["[busy_1s x1]", *[""] * 4])
    generate(server, tmp_path, "--teacher.concurrency", "1")
    first, *others = (at for _, at in server.asked)
    assert len(others) == 5 and min(others) - first >= 1.0
    assert parse_retry_after({"retry-after": "7"}) == 7.0 and parse_retry_after({"retry-after-ms": "250"}) == 0.25
    assert parse_retry_after({}) is None and parse_retry_after({"retry-after": "soon"}) is None
    date = time.strftime("%a, %d %b %Y %H:%M:%S GMT", time.gmtime(time.time() + 100))
    assert 98 <= (parse_retry_after({"retry-after": date}) or 0) <= 100


def test_requests_per_minute() -> None:
    """Six workers at 1200 a minute begin 0.05 s apart, and none of them in a pause that the server asks for."""

    async def begin() -> list[float]:
        gate = RateLimiter(1200.0)
        times = []

        async def work(number: int) -> None:
            await gate.wait_turn()
            times.append(time.monotonic())
            if number == 2:
                gate.pause(0.3)

        await asyncio.gather(*(work(number) for number in range(6)))
        return times

    times = asyncio.run(begin())
    assert times[2] - times[0] >= 0.1 and times[5] - times[0] >= 0.25
    assert times[3] - times[2] >= 0.3


@pytest.mark.parametrize(
    ("orders", "key", "message"),
    [
        ([""] * 30, "sk-test-another-key-9999", r"rejected the key \(HTTP 401; model 'adder'\).*teacher.api_key_env"),
        (["[lost]"] * 30, KEY, "does not know this address or model .*HTTP 404.*no such model"),
        (["[no_quota]"] * 30, KEY, r"no quota left .*no money for \[key\]"),
        (["[busy_1h]"] * 30, KEY, "asks for a pause of 3600 s"),
        (["[bad_request]"] * 30, KEY, r"10 requests in a row failed, .*HTTP 400: .*I do not like \[key\]"),
    ],
)
def test_what_no_retry_mends_stops_at_once(
    server: FaultyServer,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    orders: list[str],
    key: str,
    message: str,
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", key)
    write_questions(tmp_path, orders)
    with pytest.raises(TeacherError, match=message) as caught:
        generate(server, tmp_path, "--teacher.concurrency", "4")
    assert len(server.asked) <= (4 if "10 requests" not in message else 14)
    shown = "".join(traceback.format_exception(caught.value))
    assert key not in shown and key not in all_text(tmp_path)
    capsys.readouterr()
    assert main(["generate", *options(server, tmp_path)]) == 2
    error = capsys.readouterr().err
    assert error.startswith("cotgrpo: ") and key not in error and "Traceback" not in error


def all_text(folder: Path) -> str:
    """Everything in a folder, as text."""
    return "\n".join(path.read_bytes().decode("utf-8", "replace") for path in folder.rglob("*") if path.is_file())


def test_the_key_is_written_nowhere(
    server: FaultyServer, tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    """Not by a server that says it back in replies and errors, not in files, logs, output, settings, exceptions or representations."""
    caplog.set_level(logging.DEBUG)
    orders = ["[echo]", "[broken]", "[broken x1]", "[html]", "[an_error]", "[bad_request]", "[unparsable]", "[wrong]"]
    write_questions(tmp_path, orders)
    summary = generate(server, tmp_path, "--teacher.retries", "1")
    assert summary["kept"] == 2 and summary["failed"] == 4
    records = lines(tmp_path / "out" / "replies.jsonl")
    echoed = next(record for record in records if record["question"].startswith("[echo]"))
    assert "Your key is [key]." in echoed["reply"]["text"] and echoed["reply"]["reasoning"] == "I read [key]."
    assert any("I broke over [key]" in record["detail"] for record in records)
    written = {path.name for path in (tmp_path / "out").iterdir()}
    assert written == {"README.md", "config.yaml", "replies.jsonl", "summary.json", "triples.jsonl"}
    output = capsys.readouterr()
    config = parse_settings(options(server, tmp_path), GenerateConfig())
    save_config(config, tmp_path / "dump.yaml")
    everything = all_text(tmp_path) + output.out + output.err + caplog.text + repr(config)
    assert "adder" in everything and server.url in everything
    assert KEY not in everything and "0a1b2c3d4e5f" not in everything
    teacher = EndpointTeacher(config.teacher)
    assert teacher.api_key == KEY and KEY not in repr(teacher)


@pytest.mark.parametrize("setting", ["teacher.model", "teacher.api_key_env", "teacher.extra_body", "prompt.system"])
def test_a_key_among_the_settings_is_refused(
    server: FaultyServer, tmp_path: Path, capsys: pytest.CaptureFixture[str], setting: str
) -> None:
    write_questions(tmp_path, [""])
    value = json.dumps({"api_key": KEY}) if setting == "teacher.extra_body" else KEY
    assert main(["generate", *options(server, tmp_path), f"--{setting}", value]) == 2
    output = capsys.readouterr()
    assert "key" in output.err and KEY not in output.out + output.err + all_text(tmp_path) and not server.asked


def test_short_keys_are_no_secrets(server: FaultyServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """`EMPTY` is what servers without keys are sent; to cut it out of replies would maim them."""
    settings = EndpointSettings(server.url, "m")
    for key, text, expected in (
        ("EMPTY", "an EMPTY box", "an EMPTY box"),
        ("sk/abc+defgh", "sk%2Fabc%2Bdefgh sk/abc+defgh", "[key] [key]"),
    ):
        monkeypatch.setenv("OPENAI_API_KEY", key)
        assert EndpointTeacher(settings).redact(text) == expected


def test_nothing_kept_is_an_error_with_the_commonest_reasons(
    server: FaultyServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Twelve kinds of reasons: the ten commonest are named, in order, with examples; a setting that mends it needs no new request."""
    kinds = ["wrong", "truncated", "refused", "unparsable"]
    faults = ["broken", "broken_html", "half_json", "no_choice", "empty", "bad_request"]
    orders = [f"[{kind}]" for i, kind in enumerate(kinds) for _ in range(6 - i)] + [f"[{fault}]" for fault in faults]
    write_questions(tmp_path, orders)
    assert main(["generate", *options(server, tmp_path, "--teacher.retries", "0")]) == 2
    error = capsys.readouterr().err
    assert f"Not one of {len(orders)} replies could be kept" in error
    reasons = error.splitlines()[1:]
    assert len(reasons) == 10
    starts = [
        "6 x wrong answer ('12', expected '11')",
        "5 x truncated",
        "4 x refused (I'm sorry",
        "3 x unparsable (no answer",
    ]
    assert [reason.strip()[: len(start)] for reason, start in zip(reasons, starts, strict=False)] == starts
    assert not (tmp_path / "out" / "triples.jsonl").exists()
    assert json.loads((tmp_path / "out" / "summary.json").read_text())["rejected"]["wrong answer"] == 6
    before = len(server.asked)
    more = ["--verify.check", "checks:anything", "--teacher.retries", "0"]
    (tmp_path / "checks.py").write_text("anything = lambda row, rationale, answer: True\n")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(tmp_path))
        assert generate(server, tmp_path, *more)["kept"] == 6
    assert len(server.asked) - before == len(faults)


def test_kinds_of_replies(server: FaultyServer, tmp_path: Path) -> None:
    """Each is counted for what it is; reasoning fields and <think> become the rationale."""
    kinds = ["wrong", "unparsable", "truncated", "refused", "filtered", "declined", "reasoning", "thinking", "right"]
    write_questions(tmp_path, [f"[{kind}]" for kind in kinds])
    summary = generate(server, tmp_path, "--teacher.input_price", "2", "--teacher.output_price", "8")
    assert {name: n for name, n in summary["rejected"].items() if n} == {
        "wrong answer": 1,
        "unparsable": 1,
        "truncated": 1,
        "refused": 3,
    }
    assert summary["replies"] == summary["kept"] + sum(summary["rejected"].values()) + summary["not_chosen"] == 9
    assert summary["cost"] == pytest.approx(9 * (20 * 2 + 10 * 8) / 1e6) and summary["models"] == ["adder-1"]
    rows = {row["id"]: row for row in lines(tmp_path / "out" / "triples.jsonl")}
    assert (rows["q16"]["rationale"], rows["q16"]["answer"]) == ("Let me add. It is 17.", "17")
    assert (rows["q17"]["rationale"], rows["q17"]["answer"]) == ("Let me add.", "18")
    assert (rows["q18"]["rationale"], rows["q18"]["answer"]) == ("18 and 1 make 19.", "19")
    record = lines(tmp_path / "out" / "replies.jsonl")[0]
    assert record["reply"]["finish_reason"] and len(record["prompt_hash"]) == 64
    body = server.bodies[0]
    assert body["model"] == "adder" and body["max_tokens"] == 1024 and body["temperature"] == 0.7
    assert body["messages"][0]["content"].startswith("Solve the problem. Think step by step")


def test_prompt_and_fields_can_be_replaced(server: FaultyServer, tmp_path: Path) -> None:
    write_questions(tmp_path, [""])
    more = ["--prompt.system", "Be brief.", "--prompt.question", "Now: {question}", "--teacher.temperature", "null"]
    more += ["--teacher.token_limit_field", "max_completion_tokens", "--teacher.extra_body", '{"top_k": 5}']
    generate(server, tmp_path, *more)
    (body,) = server.bodies
    assert body == {
        "model": "adder",
        "messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Now: What is 10 + 1?"}],
        "max_completion_tokens": 1024,
        "top_k": 5,
    }
    with pytest.raises(ConfigError, match=r"another teacher or to another prompt: .*prompt\.system"):
        generate(server, tmp_path)


def test_candidates_majority_and_what_loads_the_triples(server: FaultyServer, tmp_path: Path) -> None:
    """Three replies that are all the same: two are duplicates, whichever came first, and three make a majority."""
    path = write_questions(tmp_path, ["", ""])
    rows = [{**row, "gold": None} for row in lines(path)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    with pytest.raises(DataError, match=r"questions.jsonl:1: no right answer .*verify.without_gold"):
        generate(server, tmp_path)
    more = ["--verify.without_gold", "unverified", "--candidates", "3", "--format", "parquet"]
    summary = generate(server, tmp_path, *more)
    assert summary["requests"] == summary["replies"] == 6 and summary["rejected"]["duplicate"] == 4
    triples, _ = read_triples(tmp_path / "out" / "triples.parquet")
    assert [(t.id, t.answer) for t in triples] == [("q10-0", "11"), ("q11-0", "12")]
    # More candidates ask only for those that are missing.
    summary = generate(server, tmp_path, "--verify.without_gold", "majority", "--candidates", "4")
    assert summary["kept"] == 2 and summary["rejected"]["duplicate"] == 6 and not summary["rejected"]["no majority"]
    assert len(server.asked) == 8
    triples, report = read_triples(tmp_path / "out" / "triples.jsonl")
    assert len(triples) == 2 and not report.dropped and not (tmp_path / "out" / "triples.parquet").exists()


def test_questions_of_test_sets_are_never_asked(server: FaultyServer, tmp_path: Path) -> None:
    write_questions(tmp_path, ["", "", "[echo]"])
    test = tmp_path / "test.jsonl"
    test.write_text('{"question": "what is 10 + 1"}\n{"question": "Tell me: I read key 13, and then?"}\n')
    summary = generate(server, tmp_path, "--verify.test_sets", str(test), "--verify.ngram", "6")
    assert summary["questions"]["dropped"] == {"contaminated": 1} and len(server.asked) == 2
    assert summary["rejected"]["contaminated"] == 0 and summary["kept"] == 2
    summary = generate(server, tmp_path, "--verify.test_sets", str(test), "--verify.ngram", "4")
    assert summary["rejected"]["contaminated"] == 1 and summary["kept"] == 1 and len(server.asked) == 2


def test_killed_twice_every_question_is_there_once(tmp_path: Path) -> None:
    """The real command with -9, while requests are under way. What was asked twice was under way when it was killed, and is recorded once."""
    write_questions(tmp_path, [""] * 60)
    log = tmp_path / "out" / "replies.jsonl"
    environment = {**os.environ, "OPENAI_API_KEY": KEY}

    def count() -> int:
        return log.read_bytes().count(b"\n") if log.exists() else 0

    with FaultyServer(KEY, delay=0.1) as server:
        command = [sys.executable, "-m", "cotgrpo.cli", "generate", *options(server, tmp_path)]
        command += ["--teacher.concurrency", "3", "--teacher.timeout", "60"]
        for stop in (12, 30):
            process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, env=environment)
            while process.poll() is None and count() < stop:
                time.sleep(0.01)
            process.kill()
            _, error = process.communicate()
            assert process.returncode == -signal.SIGKILL, error
            assert stop <= count() < 60
        with open(log, "ab") as file:
            file.write(b'{"prompt_hash": "half a li')
        done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
        assert done.returncode == 0, done.stderr
    assert "a half-written last line was cut off" in done.stdout and "60 triples kept, for 60 of 60" in done.stdout
    records = lines(log)
    assert len(records) == 60 == len({record["prompt_hash"] for record in records})
    assert [row["id"] for row in lines(tmp_path / "out" / "triples.jsonl")] == [f"q{n}" for n in range(10, 70)]
    assert 60 <= len(server.asked) <= 60 + 2 * 3 and set(server.answered) == {record["question"] for record in records}
    assert KEY not in all_text(tmp_path) + done.stdout + done.stderr


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


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "questions is empty"),
        (["--questions", "q.jsonl"], "Name one teacher"),
        (["--questions", "q.jsonl", "--teacher.model", "m", "--teacher.path", "p"], "Name one teacher"),
        (["--teacher.modle", "m"], r"Unknown option --teacher.modle. Did you mean --teacher.model\?"),
        (["--candidates", "4", "--teacher.temperature", "0"], "raise the temperature"),
        (["--verify.without_gold", "majority"], "at least 3 candidates"),
        (["--prompt.question", "no place"], "must hold {question} once"),
        (["--teacher.base_url", "localhost:8000"], "must be a URL such as"),
        (["--teacher.base_url", "http://me:secret@host/v1"], "holds a user name or a query"),
        (["--teacher.extra_body", "[1]"], "must be a JSON object"),
        (["--teacher.timeout", "0"], "timeout must be positive"),
        (["--verify.check", "module"], "must be package.module:function"),
    ],
)
def test_wrong_settings(capsys: pytest.CaptureFixture[str], arguments: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse_settings(arguments, GenerateConfig()).check_complete()
    assert main(["generate", *arguments]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_a_missing_key(monkeypatch: pytest.MonkeyPatch) -> None:
    """An endpoint elsewhere needs one; this machine does not."""
    monkeypatch.delenv("OPENAI_API_KEY")
    elsewhere = EndpointSettings("https://host.example/v1", "m")
    with pytest.raises(TeacherError, match="OPENAI_API_KEY is not set"):
        EndpointTeacher(elsewhere)
    assert EndpointTeacher(EndpointSettings("http://localhost:1/v1", "m")).api_key == "none"
    monkeypatch.setenv("OPENAI_API_KEY", "sk-\u00e9-1234567890")
    with pytest.raises(TeacherError, match="an HTTP header cannot") as caught:
        EndpointTeacher(elsewhere)
    assert "1234567890" not in str(caught.value)


def test_a_server_that_is_down(tmp_path: Path) -> None:
    with FaultyServer() as server:
        pass
    write_questions(tmp_path, [""] * 30)
    with pytest.raises(TeacherError, match=r"3 requests in a row failed, .*no connection.* the same command"):
        generate(server, tmp_path, "--teacher.failures_in_a_row", "3", "--teacher.retries", "1")
    assert len(lines(tmp_path / "out" / "replies.jsonl")) < 30


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small random model with a chat template."""
    folder = tmp_path_factory.mktemp("local")
    return write_model(folder / "model", [f"What is {n} + 1?\n#### {n + 1}" for n in range(60)])


def test_a_folder_as_teacher(model: Path, tmp_path: Path) -> None:
    """Two replies at a time, a third prompt waiting: each greedy reply is the one that comes when its prompt is asked alone."""
    write_questions(tmp_path, ["", "Well,", "A much longer question, in many words:"])
    arguments = ["--questions", str(tmp_path / "questions.jsonl"), "--out", str(tmp_path / "out")]
    arguments += ["--teacher.path", str(model), "--teacher.max_tokens", "8", "--teacher.temperature", "0"]
    config = parse_settings([*arguments, "--teacher.batch_size", "2"], GenerateConfig())
    with pytest.raises(TeacherError, match="Not one of 3 replies"):
        run_generate(config)
    records = lines(tmp_path / "out" / "replies.jsonl")
    assert [record["question_id"] for record in records] == ["q10", "q11", "q12"]
    chats = [config.prompt.messages(record["question"]) for record in records]
    alone: list[Any] = []
    teacher = make_teacher(parse_settings([*arguments, "--teacher.batch_size", "1"], GenerateConfig()))
    teacher.ask([Request(("", n), chat) for n, chat in enumerate(chats)], lambda request, reply: alone.append(reply))
    template = ChatTemplate(load_tokenizer(model))
    for record, chat, reply in zip(records, chats, alone, strict=True):
        assert {**record["reply"], "seconds": 0.0} == {**dataclasses.asdict(reply), "seconds": 0.0}
        assert reply.prompt_tokens == len(template.prompt(chat[0]["content"])) and 1 <= reply.completion_tokens <= 8
        assert reply.finish_reason == ("length" if reply.completion_tokens == 8 else "stop")


@pytest.mark.slow
@pytest.mark.skipif(
    not {"COTGRPO_SMOLLM2", "COTGRPO_SERVE_PYTHON"} <= set(os.environ),
    reason="set COTGRPO_SMOLLM2 to SmolLM2-135M-Instruct's folder and COTGRPO_SERVE_PYTHON to a Python with transformers[serving]",
)
def test_transformers_serve_killed_twice(tmp_path: Path) -> None:
    """A real server with a real model: killed twice with -9 and resumed, every question is there once."""
    write_questions(tmp_path, [""] * 12)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [os.environ["COTGRPO_SERVE_PYTHON"], "-m", "transformers.cli.transformers", "serve"]
    command += [os.environ["COTGRPO_SMOLLM2"], "--host", "127.0.0.1", "--port", str(port), "--device", "cpu"]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment |= {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    log = tmp_path / "out" / "replies.jsonl"
    count = lambda: log.read_bytes().count(b"\n") if log.exists() else 0
    with open(tmp_path / "serve.log", "wb") as output:
        serve = subprocess.Popen(command, stdout=output, stderr=output, env=environment)
    try:
        wait_for_port(port, serve)
        arguments = ["--questions", str(tmp_path / "questions.jsonl"), "--out", str(tmp_path / "out")]
        arguments += [
            "--teacher.base_url",
            f"http://127.0.0.1:{port}/v1",
            "--teacher.model",
            environment["COTGRPO_SMOLLM2"],
        ]
        arguments += ["--teacher.max_tokens", "24", "--teacher.concurrency", "2", "--teacher.timeout", "600"]
        arguments += ["--prompt.question", "{question} Answer in one short sentence."]
        generate = [sys.executable, "-m", "cotgrpo.cli", "generate", *arguments]
        for stop in (3, 7):
            process = subprocess.Popen(generate, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
            while process.poll() is None and count() < stop:
                time.sleep(0.05)
            process.kill()
            process.wait()
            assert process.returncode == -signal.SIGKILL
        done = subprocess.run(generate, capture_output=True, text=True, check=False)
        assert done.returncode == 0 or "Not one of 12 replies" in done.stderr, done.stderr
    finally:
        serve.kill()
        serve.wait()
    records = lines(log)
    assert len(records) == 12 == len({record["prompt_hash"] for record in records})
    assert all(record["reply"]["completion_tokens"] > 0 for record in records)


def wait_for_port(port: int, server: subprocess.Popen[bytes]) -> None:
    """Returns when a server listens."""
    while server.poll() is None:
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.2)
    raise AssertionError("the server ended")
