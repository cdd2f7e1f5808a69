"""`cotgrpo generate` run again: verdicts stay, what has changed is judged again, and batches are waited for."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from helpers.batch_server import BatchServer
from helpers.faulty_server import KEY, completion
from helpers.loopback_server import Answer, Asked, LoopbackServer
from rich.console import Console

from cotgrpo.cli import main
from cotgrpo.config import ConfigError, GenerateConfig, parse_settings
from cotgrpo.data.sources import DataError
from cotgrpo.generation.generate import load_questions, run_generate
from cotgrpo.teachers.endpoint import TeacherError
from cotgrpo.teachers.filtering import Judge

pytest.importorskip("openai")

pytestmark = pytest.mark.usefixtures("teacher_key")


def write_rows(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def options(url: str, folder: Path, *more: str) -> list[str]:
    return [
        *("--questions", str(folder / "questions.jsonl"), "--out", str(folder / "out")),
        *("--teacher.base_url", url, "--teacher.model", "m", "--teacher.retry_delay", "0.01"),
        *("--teacher.retries", "1", "--prompt.question", "{question}", *more),
    ]


def generate(url: str, folder: Path, *more: str) -> tuple[dict[str, Any], str]:
    """Return the summary, and what was printed."""
    console = Console(width=200)
    with console.capture() as printed:
        summary = run_generate(parse_settings(options(url, folder, *more), GenerateConfig()), console)
    return summary, printed.get()


def echo_server(asked: Asked) -> Answer:
    """Replies with the question, which ends in its own finish reason: `Add. #### 7 | stop`; [x] stands for <x>."""
    text, _, word = asked.json()["messages"][-1]["content"].rpartition(" | ")
    text = text.replace("[", "<").replace("]", ">")
    return Answer(completion(text, None if word == "none" else word))


@pytest.fixture
def judged(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The questions of all replies that are judged."""
    found: list[str] = []
    judge = Judge.__call__

    def count(self: Judge, question: Any, reply: Any) -> Any:
        found.append(question.id)
        return judge(self, question, reply)

    monkeypatch.setattr(Judge, "__call__", count)
    return found


def test_only_what_has_changed_is_judged_again(
    tmp_path: Path, judged: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [{"id": f"q{n}", "question": f"Add.\n#### {n} | stop", "gold": str(n)} for n in range(5)]
    questions = write_rows(tmp_path / "questions.jsonl", rows)
    with LoopbackServer(echo_server) as server:
        assert generate(server.url, tmp_path)[0]["kept"] == 5 and len(judged) == 5
        summary, printed = generate(server.url, tmp_path)
        assert summary["kept"] == 5 and len(judged) == 5 and "Judging" not in printed
        # Another right answer.
        write_rows(questions, [*rows[:4], rows[4] | {"gold": "5"}])
        summary, printed = generate(server.url, tmp_path)
        assert summary["kept"] == 4 and judged[5:] == ["q4"]
        assert "Judging 1 recorded replies." in printed and "1 replies get another verdict" in printed
        # Another test set.
        test = write_rows(tmp_path / "test.jsonl", [{"question": "Count 3"}])
        more = ["--verify.test_sets", str(test), "--verify.ngram", "2"]
        assert generate(server.url, tmp_path, *more)[0]["kept"] == 4 and len(judged) == 11
        assert generate(server.url, tmp_path, *more)[0]["kept"] == 4 and len(judged) == 11
        # Other rules.
        monkeypatch.setattr("cotgrpo.teachers.filtering.rules_version", lambda: "another")
        assert generate(server.url, tmp_path, *more)[0]["kept"] == 4 and len(judged) == 16
        # A check of the user's own may have changed, and nobody can see it.
        (tmp_path / "my_checks.py").write_text("yes = lambda row, rationale, answer: True\n")
        monkeypatch.syspath_prepend(str(tmp_path))
        for total in (21, 26):
            assert generate(server.url, tmp_path, "--verify.check", "my_checks:yes")[0]["kept"] == 5
            assert len(judged) == total
    assert len(server.asked) == 5


def test_a_journal_without_fingerprints_is_judged_once(tmp_path: Path, judged: list[str]) -> None:
    """As an earlier version wrote it: a cut-off reply counted as right, one that broke off is asked for again."""
    words = ["MAX_TOKENS", "stop", "abort", "stop"]
    rows = [{"id": f"q{n}", "question": f"Add.\n#### {n} | {word}", "gold": str(n)} for n, word in enumerate(words)]
    write_rows(tmp_path / "questions.jsonl", rows)
    with LoopbackServer(lambda asked: Answer(completion("Add.\n#### 3", "stop"))) as server:
        generate(server.url, tmp_path)
        journal = tmp_path / "out" / "replies.jsonl"
        records = {record["question_id"]: record for record in lines(journal)}
        for n, word in enumerate(words):
            record = records[f"q{n}"]
            del record["judged_by"]
            record["reply"] |= {"text": f"Add.\n#### {n}", "finish_reason": word}
            record |= {"accepted": True, "reason": "correct"}
        write_rows(journal, list(records.values()))
        judged.clear()
        summary, printed = generate(server.url, tmp_path)
        assert len(server.asked) == 5 and sorted(judged) == ["q0", "q1", "q2", "q2", "q3"]
        assert summary["kept"] == 2 and summary["rejected"]["truncated"] == 1
        assert "Judging 4 recorded replies." in printed
        judged.clear()
        assert generate(server.url, tmp_path)[0]["kept"] == 2 and not judged


@pytest.mark.parametrize(
    ("text", "word", "reason"),
    [
        *(
            ("Add.\n#### 7", word, "truncated")
            for word in ("length", "LENGTH", "MAX_TOKENS", "max_tokens", "token_limit")
        ),
        ("[think]Add. 3 + 4 is 7", "stop", "truncated"),
        ("Add.\n#### 7", "SAFETY", "refused"),
        ("对不起，我无法回答这个问题。", "stop", "refused"),
        ("End with [|im_end|].\n#### 7", "stop", "control token"),
        ("Add.\n#### 3\nMore.\n\\boxed{7}", "stop", "control token"),
        ("Add.\n#### 7", "weird", None),
    ],
)
def test_replies_that_are_left_out(tmp_path: Path, text: str, word: str, reason: str | None) -> None:
    rows = [{"question": "Sum.\n#### 1 | stop", "gold": "1"}, {"question": f"{text} | {word}", "gold": "7"}]
    write_rows(tmp_path / "questions.jsonl", rows)
    with LoopbackServer(echo_server) as server:
        summary, _ = generate(server.url, tmp_path)
    assert {name for name, count in summary["rejected"].items() if count} == ({reason} if reason else set())
    assert summary["kept"] == (1 if reason else 2) and summary["finish_reasons"][word] >= 1


@pytest.mark.parametrize("word", ["abort", "error", "insufficient_system_resource"])
def test_a_reply_that_broke_off_is_a_failure(tmp_path: Path, word: str) -> None:
    """It is retried, and the next run asks for it again."""
    rows = [{"question": "Sum.\n#### 1 | stop", "gold": "1"}, {"question": f"Add.\n#### 7 | {word}", "gold": "7"}]
    write_rows(tmp_path / "questions.jsonl", rows)
    with LoopbackServer(echo_server) as server:
        for asked in (3, 5):
            summary, _ = generate(server.url, tmp_path)
            assert (summary["kept"], summary["failed"], len(server.asked)) == (1, 1, asked)
        assert summary["failures"][0]["reason"] == f"failed: reply broke off ({word})"


def test_a_server_that_only_streams(tmp_path: Path) -> None:
    """Its thought comes in a field of its own; a note is printed once."""

    def streams_only(asked: Asked) -> Answer:
        if not asked.json().get("stream"):
            return Answer({"error": {"message": "该模型仅支持流式输出"}}, 400)
        deltas = [
            {"reasoning_content": "先算3"},
            {"reasoning_content": "加4。"},
            {"content": "答案是"},
            {"content": "７。"},
        ]
        ends = [
            {"choices": [{"delta": {}, "finish_reason": "stop"}]},
            {"choices": [], "usage": {"completion_tokens": 9}},
        ]
        events = [*({"choices": [{"index": 0, "delta": delta}]} for delta in deltas), *ends]
        data = "".join(f"data: {json.dumps(event, ensure_ascii=False)}\n\n" for event in events)
        return Answer(f"{data}data: [DONE]\n\n".encode(), kind="text/event-stream")

    rows = [{"question": f"{n}加4等于几？", "gold": "7"} for n in range(3)]
    write_rows(tmp_path / "questions.jsonl", rows)
    with LoopbackServer(streams_only) as server:
        summary, printed = generate(server.url, tmp_path, "--teacher.concurrency", "1")
    assert summary["kept"] == 3 and summary["usage"]["completion_tokens"] == 27 and len(server.asked) == 4
    assert printed.count("The server sends streams alone.") == 1
    row = lines(tmp_path / "out" / "triples.jsonl")[0]
    assert row["rationale"] == "先算3加4。" and row["correct"]


def test_an_unfinished_reply_without_a_finish_reason(tmp_path: Path) -> None:
    """The server counts 10 tokens."""
    write_rows(tmp_path / "questions.jsonl", [{"question": "Add.\n#### 7 | none", "gold": "7"}])
    with LoopbackServer(echo_server) as server:
        with pytest.raises(TeacherError, match="truncated"):
            generate(server.url, tmp_path, "--teacher.max_tokens", "10")
        assert (
            generate(server.url, tmp_path, "--teacher.max_tokens", "11", "--out", str(tmp_path / "b"))[0]["kept"] == 1
        )


def test_questions_without_a_right_answer_are_named_before_the_first_request(tmp_path: Path) -> None:
    rows = [{"question": "Who? | stop", "gold": "Nobody knows that, and nobody will ever know it, whoever asks."}]
    write_rows(tmp_path / "questions.jsonl", [{"question": "3 + 4?\n#### 7 | stop"}, *rows])
    with LoopbackServer(echo_server) as server:
        with pytest.raises(DataError, match=r"questions.jsonl:1: no right answer"):
            generate(server.url, tmp_path)
        assert not server.asked
        _, printed = generate(server.url, tmp_path, "--verify.without_gold", "unverified")
    assert "have no right answer (verify.without_gold: unverified)" in printed.splitlines()[2]


TEST_QUESTION = "一个果园里有苹果树35棵，梨树比苹果树的2倍少8棵，这个果园一共有多少棵果树？"


@pytest.mark.parametrize(
    ("question", "found"),
    [
        (f"应用题：{TEST_QUESTION}", True),
        (TEST_QUESTION.replace("35", "３５").replace("2", "２"), True),
        ("一列火车每小时行120千米，从甲地到乙地用了4小时，两地相距多少千米？", False),
    ],
)
def test_chinese_questions_of_test_sets_are_never_asked(tmp_path: Path, question: str, found: bool) -> None:
    questions = write_rows(
        tmp_path / "q.jsonl", [{"question": question, "gold": "1"}, {"question": "别的", "gold": "1"}]
    )
    test = write_rows(tmp_path / "t.jsonl", [{"question": TEST_QUESTION, "answer": "97"}])
    config = parse_settings(["--questions", str(questions), "--verify.test_sets", str(test)], GenerateConfig())
    _, report, _ = load_questions(config)
    assert report.dropped == ({"contaminated": 1} if found else {})


def test_questions_that_templates_refuse_are_never_asked(tmp_path: Path) -> None:
    rows = [{"question": text, "gold": "1"} for text in ("What is <|im_end|>?", "If |x| < 3 and |y| > 2, is x < y?")]
    questions, report, _ = load_questions(GenerateConfig(questions=str(write_rows(tmp_path / "q.jsonl", rows))))
    assert len(questions) == 1 and report.dropped == {"control token": 1}


def test_chats_with_several_turns_are_left_out(tmp_path: Path) -> None:
    turns = [
        {"role": role, "content": text} for role, text in (("user", "1 + 1?"), ("assistant", "2"), ("user", "+ 1?"))
    ]
    rows = [{"messages": [*turns, {"role": "assistant", "content": "Add.\n#### 3"}]}, {"question": "a", "gold": "1"}]
    questions, report, _ = load_questions(GenerateConfig(questions=str(write_rows(tmp_path / "q.jsonl", rows))))
    assert [question.question for question in questions] == ["a"] and report.dropped == {"several turns": 1}


def test_a_batch_is_waited_for_after_a_kill(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The real command with -9 while a batch is under way."""
    rows = [{"id": f"q{n}", "question": f"What is {n} + 1?", "gold": str(n + 1)} for n in range(20)]
    write_rows(tmp_path / "questions.jsonl", rows)
    with BatchServer(looks=10**9) as server:
        arguments = ["generate", *options(server.url, tmp_path, "--teacher.batch", "true")]
        arguments += ["--teacher.output_price", "4"]
        environment = {**os.environ, "OPENAI_API_KEY": KEY}
        process = subprocess.Popen([sys.executable, "-m", "cotgrpo.cli", *arguments], env=environment)
        while process.poll() is None and not any(asked.path.startswith("/v1/batches/") for asked in server.asked):
            time.sleep(0.01)
        process.kill()
        process.wait()
        assert process.returncode == -signal.SIGKILL
        (sent,) = json.loads((tmp_path / "out" / "batches.json").read_text())
        assert sent["id"] == "batch-0" and len(sent["requests"]) == 20
        server.looks = 0
        assert main(arguments) == 0
    output = capsys.readouterr().out
    assert "20 triples kept, for 20 of 20" in output and "cost 0.0008" in output
    assert len(server.batches) == 1 and len(lines(tmp_path / "out" / "replies.jsonl")) == 20
    assert not (tmp_path / "out" / "batches.json").exists()


def test_a_batch_needs_an_endpoint() -> None:
    config = parse_settings(["--questions", "q", "--teacher.path", "p", "--teacher.batch", "true"], GenerateConfig())
    with pytest.raises(ConfigError, match=r"teacher\.batch"):
        config.check_complete()
