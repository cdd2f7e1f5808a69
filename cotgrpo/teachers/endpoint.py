"""Teachers: whoever takes chats and gives replies. Here, a model behind an OpenAI-compatible endpoint, asked many things at a time.

A request ends in one of two ways, and is handed over in either: a reply, or a failure with its reason, after the retries that its kind of
failure deserves. What no retry can mend (a wrong key, a model that is not there, a server that is down) stops everything with a `TeacherError`.

The key is sent to the endpoint and appears nowhere else: whatever comes back from there, a reply or an error, has it cut out.
"""

from __future__ import annotations

import asyncio
import dataclasses
import email.utils
import json
import math
import random
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Protocol, runtime_checkable
from urllib.parse import quote

DETAIL_LENGTH = 300
"""Characters of a server's words that are kept."""
SHORTEST_SECRET = 8
"""A key of fewer characters ("none", "EMPTY") is no secret, and to cut it out would maim texts."""
FATAL = {401: "refused the key", 402: "asks for payment", 404: "knows no such address or model"}
RETRIED = (408, 409, 425, 429)
"""And everything from 500 on."""


class TeacherError(RuntimeError):
    """No more can come from this teacher as things are; the message says what it said and how to mend it."""


@dataclasses.dataclass(frozen=True)
class Request:
    """One reply that is wanted.

    Attributes:
        key: tells requests apart.
        messages: the chat, with role and content.
        again: it failed in an earlier run: one more failure says nothing new about the teacher.
    """

    key: tuple[str, int]
    messages: list[dict[str, str]]
    again: bool = False


@dataclasses.dataclass(frozen=True)
class TeacherReply:
    """What a teacher wrote.

    Attributes:
        text: the reply.
        reasoning: what a reasoning model thought before it, where that comes in a field of its own.
        finish_reason: "stop", "length" (cut off at the limit of tokens), "content_filter", or whatever else the endpoint says.
        refusal: why it would not answer, where that comes in a field of its own.
        prompt_tokens, completion_tokens: what was read and written, as counted by the teacher; None: it did not say.
        model: the model's name, as the endpoint gives it.
        attempts: requests sent for it, the failed ones included.
        seconds: from the first attempt to the reply.
    """

    text: str
    reasoning: str = ""
    finish_reason: str = ""
    refusal: str = ""
    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    model: str = ""
    attempts: int = 1
    seconds: float = 0.0


@dataclasses.dataclass(frozen=True)
class Failure:
    """A request that no reply came to, after all its retries.

    Attributes:
        reason: in a few words, the same for all failures of its kind.
        detail: of this one.
        attempts, seconds: as in `TeacherReply`.
    """

    reason: str
    detail: str = ""
    attempts: int = 1
    seconds: float = 0.0


Outcome = TeacherReply | Failure

REPLY_TEXTS = ("text", "reasoning", "finish_reason", "refusal", "model")


@runtime_checkable
class Teacher(Protocol):
    """`ask` hands every request to `done` once, with its outcome, as soon as it is known, in any order."""

    def ask(self, requests: Iterable[Request], done: Callable[[Request, Outcome], None]) -> None: ...


class BadReply(ValueError):
    """A reply of HTTP status 200 that holds no answer. `args` are reason and detail."""


@dataclasses.dataclass(frozen=True)
class Problem:
    """What went wrong with one attempt. `wait` is the server's own Retry-After, in seconds."""

    reason: str
    detail: str = ""
    retried: bool = True
    wait: float | None = None


class Gate:
    """Lets requests begin: at most so many a minute, and none while the server has asked for a pause.

    Args:
        per_minute: 0: no limit.
    """

    def __init__(self, per_minute: float) -> None:
        self.interval = 60 / per_minute if per_minute else 0.0
        self.next_turn = self.held_until = 0.0

    async def turn(self) -> None:
        """Returns when one more request may begin."""
        turn = max(time.monotonic(), self.next_turn)
        self.next_turn = turn + self.interval
        while (wait := max(turn, self.held_until) - time.monotonic()) > 0:
            await asyncio.sleep(wait)

    def hold(self, seconds: float) -> None:
        """Nothing begins for so long."""
        self.held_until = max(self.held_until, time.monotonic() + seconds)


@dataclasses.dataclass(frozen=True)
class EndpointTeacher:
    """A model behind an OpenAI-compatible endpoint: `POST base_url/chat/completions`, through the `openai` client.

    A request is retried after a failed connection, a timeout, HTTP 408, 409, 425, 429 and 5xx, and a reply that is none; before retry k it
    waits min(longest_delay, retry_delay 2^(k-1)) seconds times a random number in [1/2, 1], or as long as the server's Retry-After says, and then
    all others wait too. Other statuses are failures at once.

    Attributes:
        model: its name at the endpoint.
        base_url: None: the client's own.
        api_key: sent as the bearer token.
        fields: of every request, such as temperature and max_tokens.
        concurrency: requests at a time, >= 1.
        requests_per_minute: begun at most, retries included; 0: no limit.
        timeout: seconds for one attempt, from its beginning to the last byte.
        retries, retry_delay, longest_delay: as above.
        longest_wait: seconds; a longer Retry-After stops everything.
        failures_in_a_row: stops everything, counted over requests that are asked for the first time.
    """

    model: str
    base_url: str | None
    api_key: str = dataclasses.field(repr=False)
    fields: dict[str, Any] = dataclasses.field(default_factory=dict)
    concurrency: int = 8
    requests_per_minute: float = 0.0
    timeout: float = 120.0
    retries: int = 5
    retry_delay: float = 1.0
    longest_delay: float = 60.0
    longest_wait: float = 600.0
    failures_in_a_row: int = 10

    def ask(self, requests: Iterable[Request], done: Callable[[Request, Outcome], None]) -> None:
        """Hands every request to `done` with its outcome.

        Raises:
            TeacherError: the teacher cannot be asked, or asking on is useless. What was handed over stays; the rest was not.
        """
        asyncio.run(Conversation(self, client_of(self)).run(iter(requests), done))

    def redacted(self, text: str) -> str:
        """The text without the key."""
        if len(self.api_key) < SHORTEST_SECRET:
            return text
        for form in (self.api_key, quote(self.api_key, safe="")):
            text = text.replace(form, "[key]")
        return text


def client_of(teacher: EndpointTeacher) -> Any:
    """The `openai` client. Its own retries are off: it knows neither a broken body nor a run of many requests."""
    try:
        from openai import AsyncOpenAI
    except ImportError as error:
        raise TeacherError('A teacher behind an endpoint needs openai: pip install "cotgrpo[teacher]".') from error
    return AsyncOpenAI(api_key=teacher.api_key, base_url=teacher.base_url, max_retries=0, timeout=teacher.timeout)


class Conversation:
    """One run of requests against an endpoint."""

    def __init__(self, teacher: EndpointTeacher, client: Any) -> None:
        self.teacher, self.client = teacher, client
        self.gate = Gate(teacher.requests_per_minute)
        self.failed_in_a_row = 0

    async def run(self, requests: Iterator[Request], done: Callable[[Request, Outcome], None]) -> None:
        """Asks them all, `concurrency` at a time."""

        async def work() -> None:
            for request in requests:  # one iterator for all workers
                outcome = await self.outcome(request)
                done(request, outcome)
                self.count(request, outcome)

        try:
            async with self.client, asyncio.TaskGroup() as group:
                for _ in range(self.teacher.concurrency):
                    group.create_task(work())
        except BaseExceptionGroup as group:
            raise group.exceptions[0] from None  # the first worker to stop has stopped the others

    def count(self, request: Request, outcome: Outcome) -> None:
        """Raises TeacherError after too many failures with no reply between them."""
        if isinstance(outcome, TeacherReply):
            self.failed_in_a_row = 0
        elif not request.again:
            self.failed_in_a_row += 1
            if self.failed_in_a_row >= self.teacher.failures_in_a_row:
                raise TeacherError(
                    f"{self.failed_in_a_row} requests in a row failed, the last after {outcome.attempts} attempts with: "
                    f"{outcome.reason}{': ' + outcome.detail if outcome.detail else ''}. Is {self.client.base_url} the right address, "
                    "and up? Run the same command to go on."
                )

    async def outcome(self, request: Request) -> Outcome:
        """The reply, or the failure that is left when the retries are spent."""
        teacher, started = self.teacher, time.monotonic()
        for attempt in range(1, teacher.retries + 2):
            await self.gate.turn()
            found = await self.attempt(request)
            seconds = round(time.monotonic() - started, 3)
            if isinstance(found, TeacherReply):
                return dataclasses.replace(found, attempts=attempt, seconds=seconds)
            if not found.retried or attempt > teacher.retries:
                return Failure(found.reason, found.detail, attempt, seconds)
            delay = min(teacher.longest_delay, teacher.retry_delay * 2 ** (attempt - 1)) * random.uniform(0.5, 1)
            if found.wait is not None:
                self.gate.hold(found.wait)
                delay = found.wait + random.uniform(0, teacher.retry_delay)  # not all at the same moment
            await asyncio.sleep(delay)
        raise AssertionError("the last attempt returns")

    async def attempt(self, request: Request) -> TeacherReply | Problem:
        """One request. Raises TeacherError where no request can succeed."""
        teacher = self.teacher
        try:
            async with asyncio.timeout(teacher.timeout):
                # The body is taken apart here: the client gives back whatever it is not able to parse.
                answer = await self.client.chat.completions.with_raw_response.create(
                    model=teacher.model, messages=request.messages, extra_body=teacher.fields
                )
            return self.clean(reply_of(answer.http_response.content))
        except Exception as error:  # of the client or the network below it; all end as a problem or a TeacherError
            return self.problem(error)

    def problem(self, error: Exception) -> Problem:
        """What an attempt failed of. Raises TeacherError where every other would fail too."""
        import openai

        if isinstance(error, BadReply):
            return Problem(error.args[0], self.shortened(error.args[1]))
        if isinstance(error, TimeoutError | openai.APITimeoutError):
            return Problem("timeout", f"no reply in {self.teacher.timeout:g} s")
        if isinstance(error, openai.APIStatusError):
            return self.problem_of_status(error)
        cause = error.__cause__ or error
        return Problem("no connection", self.shortened(f"{type(cause).__name__}: {cause}"))

    def problem_of_status(self, error: Any) -> Problem:
        """What an HTTP status means. Raises TeacherError for those that mean it for every request."""
        status, words, where = error.status_code, self.shortened(str(error.message)), self.client.base_url
        if status in FATAL:
            # The words of a 401 may hold a part of the key.
            said = "" if status == 401 else f" It said: {words}"
            fix = (
                "teacher.api_key_env names the variable that holds it"
                if status == 401
                else "Mend teacher.base_url or teacher.model"
            )
            raise TeacherError(
                f"The teacher at {where} {FATAL[status]} (HTTP {status}; model {self.teacher.model!r}). {fix}.{said}"
            ) from None
        if error.code == "insufficient_quota" or getattr(error, "type", None) == "insufficient_quota":
            raise TeacherError(f"The teacher at {where} has no quota left for this key. It said: {words}") from None
        wait = retry_after(error.response.headers)
        if wait is not None and wait > self.teacher.longest_wait:
            raise TeacherError(
                f"The teacher at {where} asks for a pause of {wait:.0f} s (HTTP {status}), longer than teacher.longest_wait "
                f"({self.teacher.longest_wait:g} s). Run the same command later to go on. It said: {words}"
            ) from None
        return Problem(f"HTTP {status}", words, retried=status in RETRIED or status >= 500, wait=wait)

    def clean(self, reply: TeacherReply) -> TeacherReply:
        """The reply without the key, in any of its texts."""
        texts = {name: self.teacher.redacted(getattr(reply, name)) for name in REPLY_TEXTS}
        return dataclasses.replace(reply, **texts)  # type: ignore[arg-type]

    def shortened(self, text: str) -> str:
        """On one line, without the key, and not too long."""
        text = " ".join(self.teacher.redacted(text).split())
        return text if len(text) <= DETAIL_LENGTH else text[: DETAIL_LENGTH - 1] + "…"


def reply_of(body: bytes) -> TeacherReply:
    """The reply in the body of a chat completion. Raises BadReply where there is none."""
    try:
        answer = json.loads(body)
    except (ValueError, RecursionError):
        raise BadReply("reply is not JSON", f"{body[:DETAIL_LENGTH]!r}") from None
    answer = answer if isinstance(answer, dict) else {}
    choices = answer.get("choices")
    choice = choices[0] if isinstance(choices, list) and choices and isinstance(choices[0], dict) else {}
    message = choice.get("message")
    if not isinstance(message, dict):
        raise BadReply("reply has no choice", json.dumps(answer)[: DETAIL_LENGTH * 2])
    usage = answer.get("usage")
    usage = usage if isinstance(usage, dict) else {}
    reply = TeacherReply(
        text=text_of(message.get("content")),
        reasoning=text_of(message.get("reasoning_content")) or text_of(message.get("reasoning")),
        finish_reason=text_of(choice.get("finish_reason")),
        refusal=text_of(message.get("refusal")),
        prompt_tokens=count_of(usage.get("prompt_tokens")),
        completion_tokens=count_of(usage.get("completion_tokens")),
        model=text_of(answer.get("model")),
    )
    if not (reply.text or reply.refusal or reply.finish_reason in ("length", "content_filter")):
        raise BadReply("reply is empty", json.dumps(choice)[: DETAIL_LENGTH * 2])
    return reply


def text_of(value: Any) -> str:
    """A text, or the texts of a list of parts; of anything else, nothing. Half a surrogate pair, which no file takes, becomes a mark."""
    if isinstance(value, list):
        value = "".join(part["text"] for part in value if isinstance(part, dict) and isinstance(part.get("text"), str))
    return value.encode("utf-8", "replace").decode("utf-8").strip() if isinstance(value, str) else ""


def count_of(value: Any) -> int | None:
    """A number of tokens, or None for whatever else an endpoint may say."""
    return value if type(value) is int and value >= 0 else None


def retry_after(headers: Any) -> float | None:
    """Seconds to wait, from `retry-after-ms` or `Retry-After` (seconds, or a date); None where there is neither."""
    for name, unit in (("retry-after-ms", 1000.0), ("retry-after", 1.0)):
        try:
            seconds = float(headers.get(name, "")) / unit
        except ValueError:
            continue
        if 0 <= seconds < math.inf:
            return seconds
    try:
        at = email.utils.parsedate_to_datetime(headers.get("retry-after", ""))
    except (ValueError, TypeError):
        return None
    return max(at.timestamp() - time.time(), 0.0)
