"""A teacher behind a batch API: every request is paid for once, whatever happens in between."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from helpers.batch_server import BatchServer, answered, good_result
from helpers.faulty_server import KEY, completion
from helpers.loopback_server import Answer

from cotgrpo.teachers import batches
from cotgrpo.teachers.batches import BatchTeacher
from cotgrpo.teachers.endpoint import EndpointSettings, Failure, Outcome, Request, TeacherError, TeacherReply

pytest.importorskip("openai")

pytestmark = pytest.mark.usefixtures("teacher_key")

REQUESTS = [Request(("a" * 63 + str(n), n), [{"role": "user", "content": f"What is {n} + 4?"}]) for n in range(5)]


def teacher_of(server: BatchServer, folder: Path, said: list[str] | None = None, **more: Any) -> BatchTeacher:
    quick = {"base_url": server.url, "model": "m", "retry_delay": 0.01, "retries": 2, "failures_in_a_row": 1}
    settings = EndpointSettings(**quick | more)
    return BatchTeacher(settings, folder / "batches.json", (said if said is not None else []).append)


def ask(teacher: BatchTeacher, requests: list[Request] = REQUESTS) -> dict[int, Outcome]:
    """Number of the request -> outcome; each is handed over once."""
    outcomes: dict[int, Outcome] = {}

    def done(request: Request, outcome: Outcome) -> None:
        assert request.key[1] not in outcomes
        outcomes[request.key[1]] = outcome

    teacher.ask(requests, done)
    return outcomes


def test_requests_go_in_parts_and_come_back_in_any_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batches, "MOST_REQUESTS", 2)
    said: list[str] = []
    with BatchServer(looks=2) as server:
        outcomes = ask(teacher_of(server, tmp_path, said, temperature=None))
    assert {n: reply.text[-1] for n, reply in outcomes.items() if isinstance(reply, TeacherReply)} == {
        n: str(n + 4) for n in range(5)
    }
    assert len(server.batches) == 3 and len(set(server.paid())) == 5 == len(server.paid())
    line = json.loads(server.files["file-0"].splitlines()[0])
    body = {"model": "m", "messages": REQUESTS[0].messages, "max_tokens": 1024}
    assert line == {"custom_id": line["custom_id"], "method": "POST", "url": "/v1/chat/completions", "body": body}
    assert len(line["custom_id"]) <= 64
    assert server.batches["batch-0"]["endpoint"] == "/v1/chat/completions"
    assert any("0 of 5 requests done" in text for text in said) and not (tmp_path / "batches.json").exists()


def test_parts_are_bounded_in_bytes() -> None:
    lines = [(REQUESTS[0], b"x" * size) for size in (4, 4, 4, 20, 1)]
    assert [[len(line) for _, line in part] for part in batches.parts(lines, 3, 8)] == [[4, 4], [4], [20], [1]]


@pytest.mark.parametrize("stop", ["GET /batches/batch-0", "POST /batches", "GET /files/batch-0-output/content"])
def test_stopped_anywhere_and_run_again_nothing_is_paid_twice(tmp_path: Path, stop: str) -> None:
    """The server answers what only a killed process leaves behind: a batch that the client has not heard of."""
    with BatchServer() as server:
        lost = [Answer({"error": {"message": "lost"}}, 500)] * 3
        if stop == "POST /batches":
            server.created_unseen = True
            server.faults["GET /batches"] = lost[:]
        else:
            server.faults[stop] = lost[:]
        with pytest.raises(TeacherError, match="Run the same command to continue"):
            ask(teacher_of(server, tmp_path))
        assert (tmp_path / "batches.json").exists() and KEY not in (tmp_path / "batches.json").read_text()
        outcomes = ask(teacher_of(server, tmp_path))
    assert len(outcomes) == 5 and all(isinstance(reply, TeacherReply) for reply in outcomes.values())
    assert len(server.batches) == 1 and not (tmp_path / "batches.json").exists()


def test_a_batch_whose_creation_was_not_heard_of_is_found(tmp_path: Path) -> None:
    with BatchServer() as server:
        server.created_unseen = True
        assert len(ask(teacher_of(server, tmp_path))) == 5
    assert len(server.batches) == 1


def test_an_outage_while_a_batch_is_under_way(tmp_path: Path) -> None:
    with BatchServer() as server:
        server.faults["GET /batches/batch-0"] = [Answer({"error": {"message": "lost"}}, 500)] * 2
        assert len(ask(teacher_of(server, tmp_path, retries=0, failures_in_a_row=3))) == 5
        server.faults["GET /batches/batch-1"] = [Answer({"error": {"message": "unknown"}}, 404)]
        with pytest.raises(TeacherError, match=r"not this batch .*batches\.json"):
            ask(teacher_of(server, tmp_path, retries=0, failures_in_a_row=3))


def test_new_requests_join_batches_under_way(tmp_path: Path) -> None:
    with BatchServer() as server:
        server.faults["GET /batches/batch-0"] = [Answer({"error": {"message": "lost"}}, 500)] * 3
        with pytest.raises(TeacherError):
            ask(teacher_of(server, tmp_path), REQUESTS[:3])
        assert len(ask(teacher_of(server, tmp_path))) == 5
    assert len(server.batches) == 2 and len(server.paid()) == 5


@pytest.mark.parametrize("status", ["expired", "cancelled", "failed"])
def test_a_batch_that_ends_early_keeps_what_is_there(tmp_path: Path, status: str) -> None:
    """The rest has failed, and the next run asks for it again."""
    half = lambda request: good_result(request) if request["custom_id"].endswith(("0", "1")) else None
    with BatchServer(status=status, result=None if status == "failed" else half) as server:
        if status == "failed":
            server.result = lambda request: None
        outcomes = ask(teacher_of(server, tmp_path))
        kinds = {n: type(outcome) for n, outcome in outcomes.items()}
        good = 0 if status == "failed" else 2
        assert kinds == {n: TeacherReply if n < good else Failure for n in range(5)}
        failure = outcomes[4]
        assert isinstance(failure, Failure) and failure.reason == f"batch {status}"
        assert status != "failed" or failure.detail == "the model is unknown"
        server.status, server.result = "completed", good_result
        assert len(ask(teacher_of(server, tmp_path), REQUESTS[good:])) == 5 - good


@pytest.mark.parametrize(("refused", "failed"), [(("batch-1", "batch-2"), 0), (("batch-0", "batch-1", "batch-2"), 5)])
def test_batches_that_the_queue_has_no_room_for_are_sent_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, refused: tuple[str, ...], failed: int
) -> None:
    """Once others have brought replies. If none has, the requests have failed."""
    monkeypatch.setattr(batches, "MOST_REQUESTS", 2)
    with BatchServer() as server:
        server.error, server.refused = "Enqueued token limit reached for m", {*refused}
        outcomes = ask(teacher_of(server, tmp_path))
    assert sum(isinstance(outcome, Failure) for outcome in outcomes.values()) == failed and len(outcomes) == 5
    assert len(server.batches) == (3 if failed else 5)


def test_lines_are_read_as_replies_are(tmp_path: Path) -> None:
    """A refusal, a reply that was broken off, an error of the server and a line of no use."""

    def result(request: dict[str, Any]) -> dict[str, Any] | None:
        number = int(request["custom_id"][-1])
        return [
            answered(request, completion("7", "length")),
            answered(request, completion("7", "abort")),
            answered(request, {"error": {"message": f"I broke over {KEY}"}}, 500),
            answered(request, {"error": {"message": "Content Exists Risk"}}, 400),
            {"custom_id": request["custom_id"], "response": None, "error": {"code": "batch_expired"}},
        ][number]

    with BatchServer(result=result) as server:
        outcomes = ask(teacher_of(server, tmp_path))
    cut, broken, error, refused, late = (outcomes[n] for n in range(5))
    assert isinstance(cut, TeacherReply) and cut.finish_reason == "length"
    assert isinstance(broken, Failure) and broken.reason == "reply broke off (abort)"
    assert isinstance(error, Failure) and error.reason == "HTTP 500" and "over [key]" in error.detail
    assert isinstance(refused, TeacherReply) and "Risk" in refused.refusal
    assert isinstance(late, Failure) and late.reason == "batch error" and "batch_expired" in late.detail


@pytest.mark.parametrize(
    ("message", "fix"),
    [
        ("'temperature' does not support 0.7. Only the default is supported.", "teacher.temperature: null"),
        ("'max_tokens' is unsupported. Use 'max_completion_tokens' instead.", "teacher.token_limit_field"),
    ],
)
def test_a_setting_that_the_server_refuses_is_named_after_the_batch(tmp_path: Path, message: str, fix: str) -> None:
    result = lambda request: answered(request, {"error": {"message": message}}, 400)
    with BatchServer(result=result) as server, pytest.raises(TeacherError, match=fix):
        ask(teacher_of(server, tmp_path))


@pytest.mark.parametrize(
    ("path", "answer", "facts"),
    [
        ("POST /files", Answer({"error": {"message": "no such route"}}, 404), ("no batch API", "teacher.batch: false")),
        ("POST /batches", Answer({"error": {"message": "bad window"}}, 400), ("HTTP 400", "bad window")),
        ("POST /files", Answer({"error": {"message": "who?"}}, 401), ("HTTP 401", "teacher.api_key_env")),
    ],
)
def test_a_provider_that_refuses(tmp_path: Path, path: str, answer: Answer, facts: tuple[str, ...]) -> None:
    """Nothing is left to wait for."""
    with BatchServer() as server:
        server.faults[path] = [answer]
        with pytest.raises(TeacherError) as caught:
            ask(teacher_of(server, tmp_path))
    assert all(fact in str(caught.value) for fact in facts), caught.value
    assert not server.batches and not (tmp_path / "batches.json").exists()


def test_a_server_that_is_down(tmp_path: Path) -> None:
    with BatchServer() as server:
        pass
    with pytest.raises(TeacherError, match="does not answer"):
        ask(teacher_of(server, tmp_path, retries=0))
