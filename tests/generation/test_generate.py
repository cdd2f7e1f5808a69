"""`cotgrpo generate` against a server with faults, killed and resumed; and a key that is found nowhere."""

from __future__ import annotations

import json
import logging
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from helpers.commands import error_of, write_model
from helpers.faulty_server import KEY, FaultyServer

from cotgrpo.cli import main
from cotgrpo.config import ConfigError, GenerateConfig, parse_settings, save_config
from cotgrpo.config.generate import VerifyConfig
from cotgrpo.data.own.loading import OwnCodeError
from cotgrpo.data.sources import DataError
from cotgrpo.data.triples import read_triples
from cotgrpo.generation.generate import load_questions, run_generate
from cotgrpo.teachers.endpoint import EndpointTeacher, TeacherError

pytest.importorskip("openai")

pytestmark = pytest.mark.usefixtures("teacher_key")


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


def all_text(folder: Path) -> str:
    """Everything in a folder, as text."""
    return "\n".join(path.read_bytes().decode("utf-8", "replace") for path in folder.rglob("*") if path.is_file())


def test_every_fault_is_survived_or_listed(server: FaultyServer, tmp_path: Path) -> None:
    """Passing faults cost no question, lasting ones are listed; run again, only those are asked."""
    lasting = {"[broken]": "HTTP 500", "[half_json]": "reply is not JSON", "[bad_request]": "HTTP 400"}
    orders = ["[busy x1]", "[reset x1]", "[no_choice x1]", *lasting, "", ""]
    write_questions(tmp_path, orders)
    summary = generate(server, tmp_path, "--teacher.failures_in_a_row", "100")
    kept = lines(tmp_path / "out" / "triples.jsonl")
    assert [row["id"] for row in kept] == ["q10", "q11", "q12", "q16", "q17"]
    assert all(row["answer"] == row["gold"] and row["rationale"].startswith(row["id"][1:]) for row in kept)
    assert [summary[name] for name in ("requests", "replies", "kept", "failed")] == [8, 5, 5, 3]
    assert max(server.answered.values()) == 1 and sum(server.answered.values()) == summary["kept"]
    failures = {failure["question_id"]: failure["reason"] for failure in summary["failures"]}
    assert failures == {f"q{13 + i}": f"failed: {reason}" for i, reason in enumerate(lasting.values())}
    records = lines(tmp_path / "out" / "replies.jsonl")
    assert len(records) == len(orders) == len({(r["prompt_hash"], r["candidate"]) for r in records})
    assert summary["usage"]["completion_tokens"] == 10 * summary["kept"]

    before = len(server.asked)
    again = generate(server, tmp_path, "--teacher.failures_in_a_row", "2", "--teacher.retries", "0")
    assert len(server.asked) - before == len(lasting) and lines(tmp_path / "out" / "triples.jsonl") == kept
    assert [again[name] for name in ("requests", "replies", "kept", "failed")] == [8, 5, 5, 3]


def test_a_teacher_that_fails_is_one_line_and_exit_code_2(
    server: FaultyServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "sk-test-another-key-9999")
    write_questions(tmp_path, [""] * 9)
    assert main(["generate", *options(server, tmp_path)]) == 2
    error = error_of(capsys)
    assert "HTTP 401" in error and "another-key" not in error + all_text(tmp_path)


def test_the_key_is_written_nowhere(
    server: FaultyServer, tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    """Not in files, logs, output, settings or representations, even if the server echoes it."""
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


def test_nothing_kept_is_an_error_with_the_commonest_reasons(server: FaultyServer, tmp_path: Path) -> None:
    """Of twelve kinds of reasons the ten commonest are named, in order, with examples.

    A setting that helps needs no new request.
    """
    kinds = ["wrong", "truncated", "refused", "unparsable"]
    faults = ["broken", "broken_html", "half_json", "no_choice", "empty", "bad_request"]
    orders = [f"[{kind}]" for i, kind in enumerate(kinds) for _ in range(6 - i)] + [f"[{fault}]" for fault in faults]
    write_questions(tmp_path, orders)
    with pytest.raises(TeacherError, match=f"Not one of {len(orders)} replies could be kept") as caught:
        generate(server, tmp_path, "--teacher.retries", "0")
    reasons = str(caught.value).partition("reasons: ")[2].split("; ")
    assert len(reasons) == 10
    starts = [
        "6 x wrong answer ('12', expected '11')",
        "5 x truncated",
        "4 x refused (I'm sorry",
        "3 x unparsable (no answer",
    ]
    assert [reason[: len(start)] for reason, start in zip(reasons, starts, strict=False)] == starts
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


def test_questions_get_ids_and_repeated_texts_are_left_out(tmp_path: Path) -> None:
    path = tmp_path / "questions.jsonl"
    rows = [
        {"id": 5, "question": " What? ", "gold": "1", "answer": "2"},
        {"problem": "And?", "answer": "Add.\n#### 42", "split": "train"},
        {"prompt": "Or?", "final_answer": 3.5},
        {"question": "what is\nit", "gold": "so\n#### 7"},
        {"question": "What?", "gold": "again"},
        {"question": "Not here", "split": "test"},
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    config = GenerateConfig(questions=str(path), split="train")
    questions, report, test = load_questions(config)
    assert [(q.id, q.question, q.gold) for q in questions] == [
        ("5", "What?", "1"),
        ("1", "And?", "42"),
        ("2", "Or?", "3.5"),
        ("3", "what is\nit", "7"),
    ]
    assert report.dropped == {"duplicate": 1, "other split": 1} and test is None and questions[0].row["answer"] == "2"
    _, report, _ = load_questions(GenerateConfig(questions=str(path), split="train", max_questions=3))
    assert report.dropped["beyond max_questions"] == 1
    verify = VerifyConfig(test_sets=str(path), ngram=1)
    with pytest.raises(DataError, match=r"No question is left to ask[^$]*contaminated"):
        load_questions(GenerateConfig(questions=str(path), split="train", verify=verify))
    path.write_text(
        '{"question": "a", "id": 1, "gold": 1}\n{"question": "b", "id": "1", "gold": 1}\n', encoding="utf-8"
    )
    with pytest.raises(DataError, match=r"questions.jsonl:2: .*questions.jsonl:1 has the id '1' too"):
        load_questions(config)


def test_bad_rows_are_left_out_if_asked(tmp_path: Path) -> None:
    path = tmp_path / "questions.jsonl"
    rows = ('{"question": "a", "gold": 1}', '{"gold": 1}', '{"question": "b"}', "{", '{"question": "c", "gold": "2"}')
    path.write_text("\n".join(rows), encoding="utf-8")
    with pytest.raises(DataError, match=r"questions.jsonl:2: missing field 'question'"):
        load_questions(GenerateConfig(questions=str(path)))
    questions, report, _ = load_questions(GenerateConfig(questions=str(path), bad_rows="drop"))
    assert [question.question for question in questions] == ["a", "c"] and report.dropped == {"bad row": 3}
    assert "questions.jsonl:3: no right answer" in str(report)
    unverified = VerifyConfig(without_gold="unverified")
    questions, report, _ = load_questions(GenerateConfig(questions=str(path), bad_rows="drop", verify=unverified))
    assert [question.question for question in questions] == ["a", "b", "c"] and report.dropped == {"bad row": 2}
    with pytest.raises(DataError, match=r"questions.jsonl:2: missing field"):
        verify = VerifyConfig(test_sets=str(path))
        load_questions(GenerateConfig(questions=str(path), bad_rows="drop", verify=verify))


def test_functions_of_the_users_own_judge_and_choose(
    server: FaultyServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An error in one loses no reply: once it is mended, the same command asks nobody again."""
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "own_judges.py").write_text(
        "def mends(reply, gold, row):\n    return row['question'].startswith('[wrong]'), 'not wrong'\n"
        "def fails(reply, gold, row):\n    return {'a': True}[gold]\n"
        "def odd(reply, gold, row):\n    return 'yes'\n"
        "def lowest(reply, gold, row):\n    return -int(gold)\n"
    )
    write_questions(tmp_path, ["[wrong]", "[right]", "[wrong]"])
    for name, what in (
        ("fails", r"failed \(KeyError: '11'\) at \S+own_judges.py:4"),
        ("odd", "must return True or False"),
    ):
        message = rf"questions.jsonl:1 \(the question .*\): verify.function own_judges:{name} {what}"
        with pytest.raises(OwnCodeError, match=message) as found:
            generate(server, tmp_path, "--verify.function", f"own_judges:{name}")
        assert "replies.jsonl: run the same command again" in str(found.value) and len(server.asked) == 3
    summary = generate(server, tmp_path, "--verify.function", "own_judges:mends")
    assert len(server.asked) == 3 and summary["kept"] == 2 and summary["rejected"]["wrong answer"] == 1
    assert "not wrong" in all_text(tmp_path / "out")
    assert "own_judges:mends" in (tmp_path / "out" / "README.md").read_text()
    best = ["--verify.reward", "own_judges:lowest", "--verify.keep", "best"]
    assert generate(server, tmp_path, *best)["kept"] == 1
    with pytest.raises(OwnCodeError, match="own_judges:nothing cannot be loaded"):
        generate(server, tmp_path, "--verify.function", "own_judges:nothing")


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


def test_killed_every_question_is_there_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The real command with -9, with requests in flight: those are asked twice, and recorded once."""
    write_questions(tmp_path, [""] * 30)
    log = tmp_path / "out" / "replies.jsonl"
    environment = {**os.environ, "OPENAI_API_KEY": KEY}
    with FaultyServer(KEY, delay=0.1) as server:
        arguments = ["generate", *options(server, tmp_path, "--teacher.concurrency", "3")]
        command = [sys.executable, "-m", "cotgrpo.cli", *arguments]
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, env=environment)
        while process.poll() is None and count_lines(log) < 12:
            time.sleep(0.01)
        process.kill()
        _, error = process.communicate()
        assert process.returncode == -signal.SIGKILL, error
        assert 12 <= count_lines(log) < 30
        with open(log, "ab") as file:
            file.write(b'{"prompt_hash": "half a li')
        assert main(arguments) == 0
    output = capsys.readouterr()
    assert "half-written" in output.out and "30 triples kept, for 30 of 30" in output.out
    records = lines(log)
    assert len(records) == 30 == len({record["prompt_hash"] for record in records})
    assert [row["id"] for row in lines(tmp_path / "out" / "triples.jsonl")] == [f"q{n}" for n in range(10, 40)]
    assert 30 <= len(server.asked) <= 30 + 3 and set(server.answered) == {record["question"] for record in records}
    assert KEY not in all_text(tmp_path) + output.out + output.err


def count_lines(path: Path) -> int:
    return path.read_bytes().count(b"\n") if path.exists() else 0


@pytest.mark.parametrize(
    ("arguments", "facts"),
    [
        ([], ("questions is empty",)),
        (["--questions", "q.jsonl"], ("teacher.model", "teacher.path")),
        (["--questions", "q.jsonl", "--teacher.model", "m", "--teacher.path", "p"], ("teacher.model", "teacher.path")),
        (["--teacher.modle", "m"], ("--teacher.modle", "--teacher.model?")),
        (["--candidates", "4", "--teacher.temperature", "0"], ("candidates", "temperature")),
        (["--verify.without_gold", "majority"], ("verify.without_gold", "at least 3")),
        (["--prompt.question", "no place"], ("prompt.question", "{question}", "'no place'")),
        (["--teacher.timeout", "0"], ("teacher.timeout", "positive")),
        (["--verify.function", "module"], ("verify.function", "package.module:function", "'module'")),
        (["--verify.keep", "best"], ("verify.reward", "belong together")),
        (["--verify.reward", "a:b"], ("verify.reward", "belong together")),
        (["--verify.check", "a:b", "--verify.function", "a:b"], ("verify.function", "check both")),
        (["--verify.check", "module"], ("verify.check", "package.module:function", "'module'")),
    ],
)
def test_wrong_settings(capsys: pytest.CaptureFixture[str], arguments: list[str], facts: tuple[str, ...]) -> None:
    assert main(["generate", *arguments]) == 2
    error = error_of(capsys)
    assert all(fact in error for fact in facts), error


def test_a_folder_as_teacher(tmp_path: Path) -> None:
    write_questions(tmp_path, ["", "Well,"])
    model = write_model(tmp_path / "model", [f"What is {n} + 1?\n#### {n + 1}" for n in range(60)])
    arguments = ["--questions", str(tmp_path / "questions.jsonl"), "--out", str(tmp_path / "out")]
    arguments += ["--teacher.path", str(model), "--teacher.max_tokens", "6", "--teacher.temperature", "0"]
    with pytest.raises(TeacherError, match="Not one of 2 replies"):
        run_generate(parse_settings([*arguments, "--teacher.batch_size", "2"], GenerateConfig()))
    records = lines(tmp_path / "out" / "replies.jsonl")
    assert [record["question_id"] for record in records] == ["q10", "q11"]
    assert all(1 <= record["reply"]["completion_tokens"] <= 6 for record in records)


@pytest.mark.slow
@pytest.mark.skipif(
    not {"COTGRPO_SMOLLM2", "COTGRPO_SERVE_PYTHON"} <= set(os.environ),
    reason="set COTGRPO_SMOLLM2 to SmolLM2-135M-Instruct's folder and COTGRPO_SERVE_PYTHON to a Python with "
    "transformers[serving]",
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
            while process.poll() is None and count_lines(log) < stop:
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
