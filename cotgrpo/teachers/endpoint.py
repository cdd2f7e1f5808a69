"""Teachers that answer chats, and one of them: a model behind an OpenAI-compatible endpoint, asked concurrently.

Every request ends as a reply or as a failure with its reason, after the retries that suit the failure. An error that no
retry can fix (a rejected key, an unknown model, a server that is down) stops the run with a `TeacherError`.

The key is sent to the endpoint and written nowhere. Replies and error messages from the server are searched for it, and
it is cut out.
"""

from __future__ import annotations

import asyncio
import dataclasses
import email.utils
import json
import math
import os
import random
import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, Literal, Protocol, runtime_checkable
from urllib.parse import quote, urlsplit

DETAIL_LENGTH = 300
"""Characters kept of a server's error message."""
MIN_SECRET_LENGTH = 8
"""Shorter keys ("none", "EMPTY") are placeholders: cutting them out would damage texts."""
FATAL_STATUSES = {401: "rejected the key", 402: "asks for payment", 404: "does not know this address or model"}
RETRIED_STATUSES = (408, 409, 425, 429)
"""All statuses from 500 on are retried too."""
NO_KEY = "none"
"""Sent if no key is needed: the client insists on one."""
LOOPBACK = ("localhost", "127.0.0.1", "::1")
VARIABLE_NAME = re.compile("[A-Z_][A-Z0-9_]*")


class TeacherError(RuntimeError):
    """The teacher cannot answer any more; the message gives the server's reason and the fix."""


@dataclasses.dataclass(frozen=True)
class Request:
    """One reply that is wanted.

    Attributes:
        key: identifies the request.
        messages: the chat, each message with role and content.
        failed_before: whether it failed in an earlier run. Another failure then does not count against the teacher.
    """

    key: tuple[str, int]
    messages: list[dict[str, str]]
    failed_before: bool = False


@dataclasses.dataclass(frozen=True)
class TeacherReply:
    """A teacher's reply.

    Attributes:
        text: the reply.
        reasoning: the thoughts of a reasoning model, if they come in a field of their own.
        finish_reason: "stop", "length" (cut off at the token limit), "content_filter", or the endpoint's own word.
        refusal: why the model refused, if that comes in a field of its own.
        prompt_tokens, completion_tokens: the teacher's counts; None if it gave none.
        model: the model's name as the endpoint reports it.
        attempts: requests sent, failed ones included.
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
    """A request that got no reply in any of its attempts.

    Attributes:
        reason: the kind of failure, in a few words.
        detail: what happened this time.
        attempts, seconds: as in `TeacherReply`.
    """

    reason: str
    detail: str = ""
    attempts: int = 1
    seconds: float = 0.0


Outcome = TeacherReply | Failure


@runtime_checkable
class Teacher(Protocol):
    """Answers chats: `ask` hands each request once to `done` with its outcome, in any order, as soon as it is known."""

    def ask(self, requests: Iterable[Request], done: Callable[[Request, Outcome], None]) -> None: ...


@dataclasses.dataclass(frozen=True)
class EndpointSettings:
    """Settings of a model behind an OpenAI-compatible endpoint.

    Attributes:
        base_url: the endpoint, such as http://localhost:8000/v1; null: OPENAI_BASE_URL, or OpenAI's own.
        model: the model's name at the endpoint.
        api_key_env: name of the environment variable that holds the key. The key itself is not a setting and is written
            nowhere. An endpoint on this machine needs none.
        temperature: sampling temperature; 0 is greedy; null: not sent, as some reasoning models demand.
        top_p: sample from the fewest likeliest tokens that hold this much probability; null: not sent.
        max_tokens: longest reply in tokens, reasoning included.
        token_limit_field: the endpoint's name of max_tokens; OpenAI's reasoning models want max_completion_tokens.
        extra_body: a JSON object of further fields of each request, such as {"top_k": 20}.
        concurrency: requests in flight at a time.
        requests_per_minute: most requests started in a minute, retries included; 0: no limit.
        timeout: seconds for one attempt, from its start to the last byte.
        retries: retries of a request that failed and may still succeed.
        retry_delay: seconds before the first retry. Exponential backoff doubles it, with jitter. A longer Retry-After
            of the server wins.
        longest_delay: seconds, the upper bound of the backoff.
        longest_wait: seconds, the longest Retry-After that is waited for. A longer one stops the run.
        failures_in_a_row: consecutive requests that may fail for good before the run stops.
    """

    base_url: str | None = None
    model: str | None = None
    api_key_env: str = "OPENAI_API_KEY"
    temperature: float | None = 0.7
    top_p: float | None = None
    max_tokens: int = 1024
    token_limit_field: Literal["max_tokens", "max_completion_tokens"] = "max_tokens"
    extra_body: str = ""
    concurrency: int = 8
    requests_per_minute: float = 0.0
    timeout: float = 120.0
    retries: int = 5
    retry_delay: float = 1.0
    longest_delay: float = 60.0
    longest_wait: float = 600.0
    failures_in_a_row: int = 10

    def __post_init__(self) -> None:
        minima = dict.fromkeys(("max_tokens", "concurrency", "failures_in_a_row"), 1)
        minima |= dict.fromkeys(("requests_per_minute", "retries", "retry_delay", "longest_delay", "longest_wait"), 0)
        for name, least in minima.items():
            if getattr(self, name) < least:
                raise ValueError(f"{name} must be at least {least}, got {getattr(self, name)}.")
        if not 0 < self.timeout < math.inf:
            raise ValueError(f"timeout must be positive, got {self.timeout}.")
        if self.temperature is not None and not 0 <= self.temperature < math.inf:
            raise ValueError(f"temperature must be at least 0, or null, got {self.temperature}.")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must lie in (0, 1], or be null, got {self.top_p}.")
        if not VARIABLE_NAME.fullmatch(self.api_key_env):
            raise ValueError(  # without the value, which may be the key itself
                "api_key_env must be the name of an environment variable in capitals, such as OPENAI_API_KEY, "
                "not the key."
            )
        if self.base_url is not None:
            check_url(self.base_url)
        self.extra_fields()

    def extra_fields(self) -> dict[str, Any]:
        """Return the fields in `extra_body`. Raises ValueError if it is not a JSON object."""
        try:
            fields = json.loads(self.extra_body or "{}")
        except ValueError as error:
            raise ValueError(f"extra_body is not valid JSON ({error}).") from error
        if not isinstance(fields, dict):
            raise ValueError(f"extra_body must be a JSON object, got {type(fields).__name__}.")
        return fields

    def request_fields(self) -> dict[str, Any]:
        """Return the body fields of each request, besides model and messages."""
        sampling = {"temperature": self.temperature, "top_p": self.top_p, self.token_limit_field: self.max_tokens}
        return {name: value for name, value in sampling.items() if value is not None} | self.extra_fields()

    def api_key(self) -> str:
        """Return the key in the environment, or a placeholder for an endpoint on this machine.

        Raises:
            TeacherError: a key is needed and missing, or cannot be sent.
        """
        key = os.environ.get(self.api_key_env, "").strip()
        host = urlsplit(self.base_url or os.environ.get("OPENAI_BASE_URL", "")).hostname
        if not key and host not in LOOPBACK:
            raise TeacherError(
                f"The environment variable {self.api_key_env} is not set: expected the teacher's key in it. Export it, "
                "or name another variable in teacher.api_key_env."
            )
        if not all(" " < letter <= "~" for letter in key):
            raise TeacherError(
                f"The key in {self.api_key_env} holds characters that an HTTP header cannot: copy it again."
            )
        return key or NO_KEY


def check_url(base_url: str) -> None:
    """Raise ValueError unless this is the plain URL of an endpoint."""
    url = urlsplit(base_url)
    if url.scheme not in ("http", "https") or not url.hostname:
        raise ValueError(f"base_url must be a URL such as http://localhost:8000/v1, got {base_url!r:.60}.")
    if url.username is not None or url.query:
        raise ValueError(
            "base_url holds a user name or a query, which may be a key, and settings are saved with the "
            "output. Give the endpoint alone, and the key in the environment (teacher.api_key_env)."
        )


class EndpointTeacher:
    """A model behind an OpenAI-compatible endpoint: `POST base_url/chat/completions`, through the `openai` client.

    A request is retried after a failed connection, a timeout, HTTP 408, 409, 425, 429 and 5xx, and a body without a
    reply. Other statuses fail at once. Before retry k it waits for

        min(longest_delay, retry_delay 2^(k-1)) u    seconds,    u uniform in [1/2, 1]

    or for the server's Retry-After, which then holds up all requests.

    Args:
        settings: the endpoint. The key is read from the environment here.

    Raises:
        TeacherError: `settings.model` is not set, or the key is missing.
    """

    def __init__(self, settings: EndpointSettings) -> None:
        if settings.model is None:
            raise TeacherError("teacher.model is not set: expected the model's name at the endpoint.")
        self.settings, self.api_key = settings, settings.api_key()

    def ask(self, requests: Iterable[Request], done: Callable[[Request, Outcome], None]) -> None:
        """Hand every request to `done` with its outcome.

        Raises:
            TeacherError: the teacher cannot be asked, or asking further is useless. Outcomes handed over before stay.
        """
        asyncio.run(Session(self).run(iter(requests), done))

    def redact(self, text: str) -> str:
        """Return the text without the key."""
        if len(self.api_key) < MIN_SECRET_LENGTH:
            return text
        for form in (self.api_key, quote(self.api_key, safe="")):
            text = text.replace(form, "[key]")
        return text

    def shorten(self, text: str) -> str:
        """Return the text on one line, without the key, cut to `DETAIL_LENGTH`."""
        text = " ".join(self.redact(text).split())
        return text if len(text) <= DETAIL_LENGTH else text[: DETAIL_LENGTH - 1] + "…"

    def make_client(self) -> Any:
        """Return the `openai` client. Its retries are off: they ignore broken bodies and hold up one request only."""
        try:
            from openai import AsyncOpenAI
        except ImportError as error:
            raise TeacherError('A teacher behind an endpoint needs openai: pip install "cotgrpo[teacher]".') from error
        settings = self.settings
        return AsyncOpenAI(api_key=self.api_key, base_url=settings.base_url, max_retries=0, timeout=settings.timeout)


class RateLimiter:
    """Spaces out the starts of requests, and pauses all of them when the server asks for it.

    Args:
        per_minute: most starts in a minute; 0: no limit.
    """

    def __init__(self, per_minute: float) -> None:
        self.interval = 60 / per_minute if per_minute else 0.0
        self.next_turn = self.paused_until = 0.0

    async def wait_turn(self) -> None:
        """Return when one more request may start."""
        turn = max(time.monotonic(), self.next_turn)
        self.next_turn = turn + self.interval
        while (wait := max(turn, self.paused_until) - time.monotonic()) > 0:
            await asyncio.sleep(wait)

    def pause(self, seconds: float) -> None:
        """Let no request start for this long."""
        self.paused_until = max(self.paused_until, time.monotonic() + seconds)


class AttemptFailed(Exception):
    """One attempt brought no reply.

    Args:
        reason, detail: as in `Failure`.
        retryable: whether another attempt may succeed.
        retry_after: the server's Retry-After in seconds.
    """

    def __init__(
        self, reason: str, detail: str = "", *, retryable: bool = True, retry_after: float | None = None
    ) -> None:
        super().__init__(reason, detail)
        self.reason, self.detail, self.retryable, self.retry_after = reason, detail, retryable, retry_after


class Session:
    """One run of requests against an endpoint."""

    def __init__(self, teacher: EndpointTeacher) -> None:
        self.teacher, self.settings, self.client = teacher, teacher.settings, teacher.make_client()
        self.limiter = RateLimiter(self.settings.requests_per_minute)
        self.consecutive_failures = 0

    async def run(self, requests: Iterator[Request], done: Callable[[Request, Outcome], None]) -> None:
        """Ask all requests, `concurrency` at a time."""

        async def work() -> None:
            for request in requests:  # all workers share one iterator
                outcome = await self.ask(request)
                done(request, outcome)
                self.count_failures(request, outcome)

        try:
            async with self.client, asyncio.TaskGroup() as group:
                for _ in range(self.settings.concurrency):
                    group.create_task(work())
        except BaseExceptionGroup as group:
            raise group.exceptions[0] from None  # the first worker to stop has stopped the others

    def count_failures(self, request: Request, outcome: Outcome) -> None:
        """Raise TeacherError after `failures_in_a_row` failures without a reply between them."""
        if isinstance(outcome, TeacherReply):
            self.consecutive_failures = 0
        elif not request.failed_before:
            self.consecutive_failures += 1
            if self.consecutive_failures >= self.settings.failures_in_a_row:
                detail = f": {outcome.detail}" if outcome.detail else ""
                raise TeacherError(
                    f"{self.consecutive_failures} requests in a row failed, the last after {outcome.attempts} attempts "
                    f"with: {outcome.reason}{detail}. Check that {self.client.base_url} is right and up, then run the "
                    "same command to continue."
                )

    async def ask(self, request: Request) -> Outcome:
        """Return the reply, or the failure left after all retries."""
        settings, started = self.settings, time.monotonic()
        for attempt in range(1, settings.retries + 2):
            await self.limiter.wait_turn()
            try:
                reply = await self.attempt(request)
                return dataclasses.replace(reply, attempts=attempt, seconds=round(time.monotonic() - started, 3))
            except AttemptFailed as failed:
                if not failed.retryable or attempt > settings.retries:
                    detail = self.teacher.shorten(failed.detail)
                    return Failure(failed.reason, detail, attempt, round(time.monotonic() - started, 3))
                delay = min(settings.longest_delay, settings.retry_delay * 2 ** (attempt - 1)) * random.uniform(0.5, 1)
                if failed.retry_after is not None:
                    self.limiter.pause(failed.retry_after)
                    delay = failed.retry_after + random.uniform(0, settings.retry_delay)  # not all at once
            await asyncio.sleep(delay)
        raise AssertionError("the last attempt returns")

    async def attempt(self, request: Request) -> TeacherReply:
        """Send one request. Raises AttemptFailed, or TeacherError if no request can succeed."""
        import openai

        settings = self.settings
        try:
            async with asyncio.timeout(settings.timeout):
                # The raw body: the client returns whatever it cannot parse.
                answer = await self.client.chat.completions.with_raw_response.create(
                    model=settings.model, messages=request.messages, extra_body=settings.request_fields()
                )
            reply = parse_reply(answer.http_response.content)
        except AttemptFailed:
            raise
        except (TimeoutError, openai.APITimeoutError):
            raise AttemptFailed("timeout", f"no reply in {settings.timeout:g} s") from None
        except openai.APIStatusError as error:
            no_quota = "insufficient_quota" in (error.code, getattr(error, "type", None))
            raise self.status_error(error.status_code, str(error.message), error.response.headers, no_quota) from None
        except Exception as error:  # of the client or the network below it
            cause = error.__cause__ or error
            raise AttemptFailed("no connection", f"{type(cause).__name__}: {cause}") from None
        texts = {
            name: self.teacher.redact(getattr(reply, name))
            for name in ("text", "reasoning", "finish_reason", "refusal", "model")
        }
        return dataclasses.replace(reply, **texts)  # type: ignore[arg-type]

    def status_error(
        self, status: int, message: str, headers: Mapping[str, str], no_quota: bool
    ) -> AttemptFailed | TeacherError:
        """Return what an HTTP error status means: this attempt failed, or every request would."""
        where, words = self.client.base_url, self.teacher.shorten(message)
        if status == 401:  # the message of a 401 may hold a part of the key
            fix = "Check the variable that teacher.api_key_env names."
        else:
            fix = f"Check teacher.base_url and teacher.model. The server's message: {words}"
        if status in FATAL_STATUSES:
            return TeacherError(
                f"The teacher at {where} {FATAL_STATUSES[status]} (HTTP {status}; model {self.settings.model!r}). {fix}"
            )
        if no_quota:
            return TeacherError(f"The teacher at {where} has no quota left for this key. The server's message: {words}")
        wait = parse_retry_after(headers)
        if wait is not None and wait > self.settings.longest_wait:
            return TeacherError(
                f"The teacher at {where} asks for a pause of {wait:.0f} s (HTTP {status}), longer than "
                f"teacher.longest_wait ({self.settings.longest_wait:g} s). Run the same command later to continue. "
                f"The server's message: {words}"
            )
        retryable = status in RETRIED_STATUSES or status >= 500
        return AttemptFailed(f"HTTP {status}", message, retryable=retryable, retry_after=wait)


def parse_reply(body: bytes) -> TeacherReply:
    """Return the reply in the body of a chat completion. Raises AttemptFailed if it holds none."""
    try:
        answer = json.loads(body)
    except (ValueError, RecursionError):
        raise AttemptFailed("reply is not JSON", repr(body)) from None
    answer = answer if isinstance(answer, dict) else {}
    choices = answer.get("choices")
    choice = choices[0] if isinstance(choices, list) and choices and isinstance(choices[0], dict) else {}
    message = choice.get("message")
    if not isinstance(message, dict):
        raise AttemptFailed("reply has no choice", json.dumps(answer))
    usage = answer.get("usage")
    usage = usage if isinstance(usage, dict) else {}
    reply = TeacherReply(
        text=text_in(message.get("content")),
        reasoning=text_in(message.get("reasoning_content")) or text_in(message.get("reasoning")),
        finish_reason=text_in(choice.get("finish_reason")),
        refusal=text_in(message.get("refusal")),
        prompt_tokens=count_in(usage.get("prompt_tokens")),
        completion_tokens=count_in(usage.get("completion_tokens")),
        model=text_in(answer.get("model")),
    )
    if not (reply.text or reply.refusal or reply.finish_reason in ("length", "content_filter")):
        raise AttemptFailed("reply is empty", json.dumps(choice))
    return reply


def text_in(value: object) -> str:
    """Return a JSON text, or the joined texts of a list of parts; empty for anything else.

    Half a surrogate pair, which a file cannot hold, becomes `?`.
    """
    if isinstance(value, list):
        value = "".join(part["text"] for part in value if isinstance(part, dict) and isinstance(part.get("text"), str))
    return value.encode("utf-8", "replace").decode("utf-8").strip() if isinstance(value, str) else ""


def count_in(value: object) -> int | None:
    """Return a number of tokens, or None for any other JSON value."""
    return value if isinstance(value, int) and not isinstance(value, bool) and value >= 0 else None


def parse_retry_after(headers: Mapping[str, str]) -> float | None:
    """Return the seconds of `retry-after-ms` or `Retry-After` (seconds or a date), or None without either."""
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
