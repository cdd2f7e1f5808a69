"""A teacher behind an endpoint, against a real server with every fault; and a key that no message holds."""

from __future__ import annotations

import asyncio
import base64
import dataclasses
import json
import re
import time
import traceback
import urllib.parse
from collections.abc import Callable
from typing import Any

import pytest
from helpers.faulty_server import FAULTS, KEY, FaultyServer, completion
from helpers.loopback_server import Answer, Asked, LoopbackServer

from cotgrpo.teachers.endpoint import (
    AttemptFailed,
    EndpointSettings,
    EndpointTeacher,
    Failure,
    Outcome,
    RateLimiter,
    Request,
    TeacherError,
    TeacherReply,
    parse_reply,
    parse_retry_after,
)

pytest.importorskip("openai")

pytestmark = pytest.mark.usefixtures("teacher_key")


def settings(server: FaultyServer, **more: Any) -> EndpointSettings:
    """Settings for a short test: quick retries."""
    return EndpointSettings(**{"base_url": server.url, "model": "adder", "retry_delay": 0.01, "retries": 3} | more)


def ask(teacher: EndpointTeacher, *questions: str) -> dict[str, Outcome]:
    """Question -> outcome."""
    outcomes: dict[str, Outcome] = {}
    requests = [Request((text, 0), [{"role": "user", "content": text}]) for text in questions]
    teacher.ask(requests, lambda request, outcome: outcomes.setdefault(request.key[0], outcome))
    return outcomes


@pytest.mark.parametrize("fault", [name for name in FAULTS if name not in ("hang", "busy_1h", "no_quota", "lost")])
def test_a_fault_is_retried_or_a_failure(server: FaultyServer, fault: str) -> None:
    """Four attempts at a fault that stays, unless a retry cannot help; a fault that passes leaves no trace."""
    reasons = {
        "busy": "HTTP 429",
        "busy_1s": "HTTP 429",
        "broken": "HTTP 500",
        "broken_html": "HTTP 502",
        "bad_request": "HTTP 400",
        "reset": "no connection",
        "half_body": "no connection",
        "half_json": "reply is not JSON",
        "no_choice": "reply has no choice",
        "empty": "reply is empty",
        "html": "reply is not JSON",
        "an_error": "reply has no choice",
    }
    stays, passes = f"[{fault}] What is 1 + 2?", f"[{fault} x1] What is 3 + 4?"
    attempts = 1 if fault in ("bad_request", "busy_1s") else 4
    found = ask(EndpointTeacher(settings(server, retries=attempts - 1)), stays)[stays]
    assert isinstance(found, Failure) and (found.reason, found.attempts) == (reasons[fault], attempts)
    assert len(server.asked) == attempts and KEY not in found.detail
    if fault not in ("bad_request", "busy_1s"):
        reply = ask(EndpointTeacher(settings(server)), passes)[passes]
        assert isinstance(reply, TeacherReply) and reply.attempts == 2 and reply.text.endswith("#### 7")
        assert (reply.prompt_tokens, reply.completion_tokens, reply.model) == (20, 10, "adder-1")


def test_a_server_that_hangs(server: FaultyServer) -> None:
    """A timeout ends the attempt; the next one gets the reply, or the request is a failure."""
    passes, stays = "[hang x1] What is 1 + 2?", "[hang] What is 3 + 4?"
    outcomes = ask(EndpointTeacher(settings(server, timeout=1.0, retries=1)), passes, stays)
    assert outcomes[passes].attempts == outcomes[stays].attempts == 2
    failure = outcomes[stays]
    assert isinstance(failure, Failure) and (failure.reason, failure.detail) == ("timeout", "no reply in 1 s")


def test_retry_after_pauses_every_request(server: FaultyServer) -> None:
    questions = ["[busy_1s x1] What is 0 + 1?", *(f"What is {n} + 1?" for n in range(1, 4))]
    assert all(isinstance(reply, TeacherReply) for reply in ask(teacher_of(server), *questions).values())
    first, *others = (at for _, at in server.asked)
    assert len(others) == 4 and min(others) - first >= 1.0


def teacher_of(server: FaultyServer) -> EndpointTeacher:
    """One that sends one request at a time."""
    return EndpointTeacher(settings(server, concurrency=1))


def test_parse_retry_after() -> None:
    date = time.strftime("%a, %d %b %Y %H:%M:%S GMT", time.gmtime(time.time() + 100))
    for headers, low, high in (
        ({"retry-after": "7"}, 7.0, 7.0),
        ({"retry-after-ms": "250"}, 0.25, 0.25),
        ({"retry-after": date}, 98, 100),
    ):
        assert low <= (parse_retry_after(headers) or 0) <= high
    for useless in ({}, {"retry-after": "soon"}, {"retry-after": "-1"}, {"retry-after": "inf"}):
        assert parse_retry_after(useless) is None


@pytest.mark.parametrize(
    ("order", "key", "facts"),
    [
        ("", "sk-test-another-key-9999", ("HTTP 401", "'adder'", "teacher.api_key_env")),
        ("[lost]", KEY, ("HTTP 404", "'adder'", "teacher.base_url", "no such model")),
        ("[no_quota]", KEY, ("no quota", "no money for [key]")),
        ("[busy_1h]", KEY, ("3600 s", "teacher.longest_wait", "slow down")),
        ("[bad_request]", KEY, ("10 requests in a row failed", "HTTP 400", "I do not like [key]")),
    ],
)
def test_what_no_retry_can_fix_stops_at_once(
    server: FaultyServer, monkeypatch: pytest.MonkeyPatch, order: str, key: str, facts: tuple[str, ...]
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", key)
    with pytest.raises(TeacherError) as caught:
        ask(EndpointTeacher(settings(server, concurrency=4)), *(f"{order} What is {n} + 1?" for n in range(30)))
    assert all(fact in str(caught.value) for fact in facts), caught.value
    assert len(server.asked) <= (14 if order == "[bad_request]" else 4)
    assert key not in "".join(traceback.format_exception(caught.value))


def test_a_server_that_is_down() -> None:
    with FaultyServer() as server:
        pass
    teacher = EndpointTeacher(settings(server, failures_in_a_row=3, retries=1))
    with pytest.raises(TeacherError, match=r"3 requests in a row failed.*no connection") as caught:
        ask(teacher, *(f"What is {n} + 1?" for n in range(30)))
    assert server.url in str(caught.value)


@pytest.mark.parametrize(
    ("setting", "value", "facts"),
    [
        ("base_url", "localhost:8000", ("base_url", "http://localhost:8000/v1", "localhost:8000")),
        ("base_url", "http://me:secret@host/v1", ("base_url", "user name or a query")),
        ("base_url", "http://host/v1?key=secret", ("base_url", "user name or a query")),
        ("extra_body", "[1]", ("extra_body", "JSON object", "list")),
        ("extra_body", "{", ("extra_body", "JSON")),
        ("api_key_env", KEY, ("api_key_env", "name of an environment variable")),
        ("timeout", 0.0, ("timeout", "positive", "0.0")),
        ("temperature", -1.0, ("temperature", "at least 0", "-1.0")),
        ("top_p", 0.0, ("top_p", "(0, 1]", "0.0")),
        ("concurrency", 0, ("concurrency", "at least 1", "0")),
        ("retries", -1, ("retries", "at least 0", "-1")),
    ],
)
def test_settings_out_of_range(setting: str, value: Any, facts: tuple[str, ...]) -> None:
    with pytest.raises(ValueError) as caught:
        EndpointSettings(**{setting: value})
    assert all(fact in str(caught.value) for fact in facts), caught.value
    assert "secret" not in str(caught.value)


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


def test_short_keys_are_no_secrets(server: FaultyServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """`EMPTY` is what servers without keys are sent; to cut it out of replies would maim them."""
    settings = EndpointSettings(server.url, "m")
    for key, text, expected in (
        ("EMPTY", "an EMPTY box", "an EMPTY box"),
        ("sk/abc+defgh", "sk%2Fabc%2Bdefgh sk/abc+defgh", "[key] [key]"),
    ):
        monkeypatch.setenv("OPENAI_API_KEY", key)
        assert EndpointTeacher(settings).redact(text) == expected


SECRET = "sk-Ab1/cd2+Ef3=gh4.ij5"


@pytest.mark.parametrize(
    "echo",
    [
        SECRET,
        SECRET[3:],
        SECRET[:-4],
        SECRET[5:14],
        urllib.parse.quote(SECRET, safe=""),
        json.dumps({"headers": {"authorization": f"Bearer {SECRET}"}}),
        base64.b64encode(f"user:{SECRET}".encode()).decode(),
        base64.b64encode(f"u:{SECRET}".encode()).decode(),
        base64.b64encode(f":{SECRET}".encode()).decode(),
        "x" * 290 + SECRET + "y" * 300,
        "x" * 280 + SECRET[:9] + " " + SECRET[9:],
        f"{SECRET}{SECRET}",
    ],
)
def test_no_part_of_the_key_is_kept(monkeypatch: pytest.MonkeyPatch, echo: str) -> None:
    """Wherever a text is cut: the key is cut out first."""
    monkeypatch.setenv("OPENAI_API_KEY", SECRET)
    teacher = EndpointTeacher(EndpointSettings("http://localhost:1/v1", "m"))
    forms = [SECRET, urllib.parse.quote(SECRET, safe="")]
    for text in (teacher.redact(f"before {echo} after"), teacher.shorten(f"before {echo} after")):
        assert not [form[i : i + 8] for form in forms for i in range(len(form) - 7) if form[i : i + 8] in text]
        assert base64.b64encode(SECRET.encode()).decode()[8:16] not in text
    assert teacher.redact(f"before {echo} after").startswith("before ")


@pytest.mark.parametrize(
    "detail",
    [
        "Authorization: Basic dXNlcjpwYXNzd29yZA==",
        "authorization: bearer eyJhbGciOi.abc-def_ghi",
        "proxy https://me:hunter2secret@proxy.example:8080 refused",
    ],
)
def test_credentials_of_others_in_errors(monkeypatch: pytest.MonkeyPatch, detail: str) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", SECRET)
    teacher = EndpointTeacher(EndpointSettings("http://localhost:1/v1", "m"))
    shown = teacher.shorten(detail)
    assert "[key]" in shown and not re.search("dXNlcjpw|eyJhbGciOi|hunter2|abc-def", shown)
    assert teacher.redact("Basic arithmetic: see https://a.example/b") == "Basic arithmetic: see https://a.example/b"


@pytest.mark.parametrize(
    "url", ["http://me:secret123@localhost:1/v1", "http://localhost:1/v1?key=secret123", "localhost"]
)
def test_an_address_in_the_environment_is_checked_too(monkeypatch: pytest.MonkeyPatch, url: str) -> None:
    monkeypatch.setenv("OPENAI_BASE_URL", url)
    with pytest.raises(TeacherError, match="OPENAI_BASE_URL cannot be used") as caught:
        EndpointTeacher(EndpointSettings(model="m"))
    assert "secret123" not in str(caught.value)


def test_a_missing_key(monkeypatch: pytest.MonkeyPatch) -> None:
    """An endpoint elsewhere needs one; this machine does not."""
    monkeypatch.delenv("OPENAI_API_KEY")
    elsewhere = EndpointSettings("https://host.example/v1", "m")
    with pytest.raises(TeacherError, match="OPENAI_API_KEY is not set"):
        EndpointTeacher(elsewhere)
    assert EndpointTeacher(EndpointSettings("http://localhost:1/v1", "m")).api_key == "none"
    with pytest.raises(TeacherError, match=r"teacher\.model is not set"):
        EndpointTeacher(EndpointSettings("http://localhost:1/v1"))
    monkeypatch.setenv("OPENAI_API_KEY", "sk-\u00e9-1234567890")
    with pytest.raises(TeacherError, match="an HTTP header cannot") as caught:
        EndpointTeacher(elsewhere)
    assert "1234567890" not in str(caught.value)


STREAM_ONLY = "This model only support stream mode, please enable the stream parameter to access the model."
NO_MAX_TOKENS = "Unsupported parameter: 'max_tokens' is not supported. Use 'max_completion_tokens' instead."


def refusal(message: str, status: int = 400, **error: object) -> Answer:
    """An answer with an error."""
    return Answer({"error": {"message": message} | error}, status)


def events(*texts: str, end: bytes = b"data: [DONE]\n\n") -> Answer:
    """A stream of pieces of a reply."""
    choices = [{"index": 0, "delta": {"content": text}, "finish_reason": None} for text in texts]
    body = b"".join(b"data: " + json.dumps({"choices": [choice]}).encode() + b"\n\n" for choice in choices)
    return Answer(body + end, kind="text/event-stream")


def streams_only(asked: Asked) -> Answer:
    """Several Chinese providers' thinking models."""
    return events("3 + 4 ", "= 7") if asked.json().get("stream") else refusal(STREAM_ONLY)


def streams_only_in_words(asked: Asked) -> Answer:
    """Its errors are no JSON."""
    return streams_only(asked) if asked.json().get("stream") else Answer(STREAM_ONLY.encode(), 400, "text/plain")


def streams_without_counts(asked: Asked) -> Answer:
    if "stream_options" in asked.json():
        return refusal("Extra parameters ['stream_options'] are not allowed", 422)
    return streams_only(asked)


def wants_another_limit(asked: Asked) -> Answer:
    """OpenAI's reasoning models."""
    return refusal(NO_MAX_TOKENS) if "max_tokens" in asked.json() else Answer(completion("3 + 4 = 7"))


def wants_the_old_limit(asked: Asked) -> Answer:
    if "max_completion_tokens" in asked.json():
        return refusal("Unrecognized request argument supplied: max_completion_tokens")
    return Answer(completion("3 + 4 = 7"))


def wants_both(asked: Asked) -> Answer:
    return refusal(NO_MAX_TOKENS) if "max_tokens" in asked.json() else streams_only(asked)


def error_in_a_good_answer(asked: Asked) -> Answer:
    if asked.json().get("stream"):
        return events("3 + 4 = 7")
    return Answer({"choices": None, "error": {"code": 400, "message": STREAM_ONLY}})


@pytest.mark.parametrize(
    ("server", "more", "requests", "notes"),
    [
        (streams_only, {}, 4, 1),
        (streams_only, {"stream": True}, 3, 0),
        (streams_only_in_words, {}, 4, 1),
        (streams_without_counts, {}, 5, 2),
        (wants_another_limit, {}, 4, 1),
        (wants_another_limit, {"token_limit_field": "max_completion_tokens"}, 3, 0),
        (wants_the_old_limit, {"token_limit_field": "max_completion_tokens"}, 4, 1),
        (wants_both, {}, 5, 2),
        (error_in_a_good_answer, {}, 4, 1),
        (lambda asked: events("3 + 4 ", "= 7"), {}, 3, 0),
    ],
)
def test_the_form_of_requests_follows_the_server(
    server: Callable[[Asked], Answer], more: dict[str, Any], requests: int, notes: int
) -> None:
    """A refused form is sent once in a session and said once; retries are not used for it."""
    said: list[str] = []
    with LoopbackServer(server) as running:
        one_by_one = EndpointSettings(running.url, "m", concurrency=1, retries=0, **more)
        teacher = EndpointTeacher(one_by_one, said.append)
        replies = ask(teacher, *(f"What is {n} + 4?" for n in range(3)))
    assert [reply.text for reply in replies.values() if isinstance(reply, TeacherReply)] == ["3 + 4 = 7"] * 3
    assert len(running.asked) == requests and len(said) == notes
    assert all(asked.json()["temperature"] == 0.7 for asked in running.asked)


def test_many_requests_at_once_change_their_form_once() -> None:
    said: list[str] = []
    with LoopbackServer(wants_both) as running:
        teacher = EndpointTeacher(EndpointSettings(running.url, "m", concurrency=8, retries=0), said.append)
        replies = ask(teacher, *(f"What is {n} + 4?" for n in range(16)))
    assert all(isinstance(reply, TeacherReply) for reply in replies.values()) and len(said) == 2


@pytest.mark.parametrize(
    ("answer", "more", "facts"),
    [
        (refusal("invalid temperature: only 1 is allowed for this model"), {}, ("teacher.temperature: null", "only 1")),
        (refusal("'top_p' is not supported", param="top_p"), {"top_p": 0.5}, ("teacher.top_p: null", "0.5")),
        (refusal("Range of max_tokens should be [1, 512]"), {}, ("teacher.max_tokens", "[1, 512]")),
        (refusal("Unknown parameter: 'top_k'"), {"extra_body": '{"top_k": 5}'}, ("teacher.extra_body", "top_k")),
        (refusal(STREAM_ONLY), {"stream": False}, ("teacher.stream: auto", "only support stream")),
        (refusal("max_tokens and max_completion_tokens are unsupported"), {}, ("every form", "token_limit_field")),
        (refusal("您的账户已欠费", 429), {}, ("no quota",)),
        (refusal("Access denied", code="Arrearage"), {}, ("no quota",)),
        (Answer({"error": {"code": "401", "message": "bad key"}}), {}, ("HTTP 401", "teacher.api_key_env")),
    ],
)
def test_a_setting_that_the_server_refuses_stops_at_once(
    answer: Answer, more: dict[str, Any], facts: tuple[str, ...]
) -> None:
    with LoopbackServer(lambda asked: answer) as running, pytest.raises(TeacherError) as caught:
        teacher = EndpointTeacher(EndpointSettings(running.url, "m", concurrency=1, retry_delay=0.01, **more))
        ask(teacher, *(f"What is {n} + 4?" for n in range(9)))
    assert all(fact in str(caught.value) for fact in (*facts, running.url)), caught.value
    assert len(running.asked) <= 2


def test_a_system_message_that_the_server_refuses() -> None:
    chat = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "3 + 4?"}]
    with LoopbackServer(lambda asked: refusal("System role not supported")) as running:
        teacher = EndpointTeacher(EndpointSettings(running.url, "m"))
        with pytest.raises(TeacherError, match=r"Leave prompt\.system empty"):
            teacher.ask([Request(("q", 0), chat)], lambda request, outcome: None)


@pytest.mark.parametrize(
    ("answers", "reason"),
    [
        ([events("3 +", end=b"")], "stream broke off"),
        ([events("3 +", end=b'data: {"error": {"message": "lost"}}\n\n')], "error in the stream"),
        ([dataclasses.replace(events("3 + 4 = 7"), cut=True)], "no connection"),
        ([Answer(completion("3 + 4 = 7", word)) for word in ("abort", "error")], "reply broke off (error)"),
        ([Answer(completion("3 + 4 = 7", "insufficient_system_resource"))], "reply broke off (insufficient"),
        ([Answer({"error": {"message": "busy", "code": 503}})], "HTTP 503"),
        ([Answer({"choices": None, "usage": None})], "reply has no choice"),
        ([refusal("I should not answer: What is 3 + 4, the temperature?")], "HTTP 400"),
        ([Answer(b"<HTML><style>p {}</style><p>No temperature</p></HTML>", 403, "text/html")], "HTTP 403"),
        ([refusal("max_tokens is too large for the context")], "HTTP 400"),
        ([Answer(b"Bad request: try later", 400, "text/plain")], "HTTP 400"),
    ],
)
def test_an_attempt_that_brings_half_a_reply_fails(answers: list[Answer], reason: str) -> None:
    """It is retried if that may help; the last failure is the outcome."""
    left = [*answers]
    with LoopbackServer(lambda asked: left.pop(0)) as running:
        settings = EndpointSettings(running.url, "m", retry_delay=0.01, retries=len(answers) - 1)
        (found,) = ask(EndpointTeacher(settings), "What is 3 + 4, the temperature?").values()
    assert isinstance(found, Failure) and found.reason.startswith(reason) and not left
    assert found.attempts == len(answers) and "<" not in found.detail


@pytest.mark.parametrize(
    "answer",
    [
        refusal("Content Exists Risk"),
        refusal("The response was filtered due to Azure's content management policy", code="content_filter"),
        refusal("Input data may contain inappropriate content.", code="data_inspection_failed"),
        refusal("系统检测到不安全或敏感内容", code="1301"),
    ],
)
def test_a_content_filter_refuses_one_question(answer: Answer) -> None:
    with LoopbackServer(lambda asked: answer) as running:
        replies = ask(EndpointTeacher(EndpointSettings(running.url, "m", failures_in_a_row=1)), "a", "b", "c")
    assert all(isinstance(reply, TeacherReply) and reply.refusal for reply in replies.values())
    assert len(running.asked) == 3
