"""Teachers that answer chats, and one of them: a model behind an OpenAI-compatible endpoint, asked concurrently.

Every request ends as a reply or as a failure with its reason, after the retries that suit the failure. An error that no
retry can fix (a rejected key, an unknown model, a server that is down) stops the run with a `TeacherError`.

The key is sent to the endpoint and written nowhere. Replies and error messages from the server are searched for it, and
it is cut out.
"""

from __future__ import annotations

import asyncio
import base64
import dataclasses
import email.utils
import functools
import json
import math
import os
import random
import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, ClassVar, Literal, Protocol, runtime_checkable
from urllib.parse import quote, urlsplit

from cotgrpo.teachers.completions import AttemptFailed as AttemptFailed
from cotgrpo.teachers.completions import TeacherReply as TeacherReply
from cotgrpo.teachers.completions import parse_reply as parse_reply
from cotgrpo.teachers.server_errors import (
    FATAL_STATUSES,
    Complaint,
    LimitField,
    RequestForm,
    ServerError,
    find_complaint,
)
from cotgrpo.teachers.server_errors import TeacherError as TeacherError

DETAIL_LENGTH = 300
"""Characters kept of a server's error message."""
MIN_SECRET_LENGTH = 8
"""Shorter keys ("none", "EMPTY") are placeholders: cutting them out would damage texts."""
NO_KEY = "none"
"""Sent if no key is needed: the client insists on one."""
LOOPBACK = ("localhost", "127.0.0.1", "::1")
CREDENTIALS = re.compile(r"(\b(?:Bearer|Basic)\s+|://)(?:[\w.~+/=-]{8,}(?!@)|[^\s/@:]*:[^\s/@]*(?=@))", re.IGNORECASE)
"""What a server may echo of other keys: `Authorization: Basic ...`, and `https://user:password@host`."""
VARIABLE_NAME = re.compile("[A-Z_][A-Z0-9_]*")
TAGS = re.compile(r"<(style|script)\b.*?</\1>|<[^>]*>", re.IGNORECASE | re.DOTALL)
LONG_TEXT = 12
"""Characters of a message that a server may repeat in an error. Shorter ones may be the server's own words."""
MOST_FORMS = 4
"""Forms of a request that are tried, one after the other."""


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
class ConnectionSettings:
    """How a server is reached, and what happens if it fails.

    Attributes:
        base_url: the endpoint, such as http://localhost:8000/v1; null: OPENAI_BASE_URL, or OpenAI's own.
        model: the model's name at the endpoint.
        api_key_env: name of the environment variable that holds the key. The key itself is not a setting and is written
            nowhere. An endpoint on this machine needs none.
        extra_body: a JSON object of further fields of each request, such as {"top_k": 20}.
        concurrency: requests in flight at a time.
        requests_per_minute: most requests started in a minute, retries included; 0: no limit.
        timeout: seconds for one attempt, from its start to the last byte.
        retries: retries of a request that failed and may still succeed.
        retry_delay: seconds before the first retry. Exponential backoff doubles it, with jitter. A longer Retry-After
            of the server wins.
        longest_delay: seconds, the upper bound of the backoff.
        longest_wait: seconds, the longest Retry-After that is waited for. A longer one stops the run.
    """

    base_url: str | None = None
    model: str | None = None
    api_key_env: str = "OPENAI_API_KEY"
    extra_body: str = ""
    concurrency: int = 8
    requests_per_minute: float = 0.0
    timeout: float = 120.0
    retries: int = 5
    retry_delay: float = 1.0
    longest_delay: float = 60.0
    longest_wait: float = 600.0

    section: ClassVar[str] = "teacher"
    """The section of the settings, as messages name it."""
    who: ClassVar[str] = "teacher"
    """What the server is, as messages name it."""

    def __post_init__(self) -> None:
        minima = {"concurrency": 1}
        minima |= dict.fromkeys(("requests_per_minute", "retries", "retry_delay", "longest_delay", "longest_wait"), 0)
        for name, least in minima.items():
            if getattr(self, name) < least:
                raise ValueError(f"{name} must be at least {least}, got {getattr(self, name)}.")
        if not 0 < self.timeout < math.inf:
            raise ValueError(f"timeout must be positive, got {self.timeout}.")
        if not VARIABLE_NAME.fullmatch(self.api_key_env):
            raise ValueError(  # without the value, which may be the key itself
                "api_key_env must be the name of an environment variable in capitals, such as OPENAI_API_KEY, "
                "not the key."
            )
        if self.base_url is not None:
            check_url(self.base_url, self.section)
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

    def api_key(self) -> str:
        """Return the key in the environment, or a placeholder for an endpoint on this machine.

        Raises:
            TeacherError: a key is needed and missing, or cannot be sent.
        """
        key = os.environ.get(self.api_key_env, "").strip()
        url = self.base_url or os.environ.get("OPENAI_BASE_URL", "")
        if url:
            try:
                check_url(url, self.section)
            except ValueError as error:
                where = f"{self.section}.base_url" if self.base_url else "OPENAI_BASE_URL"
                raise TeacherError(f"{where} cannot be used: {error}") from None
        host = urlsplit(url).hostname
        if not key and host not in LOOPBACK:
            raise TeacherError(
                f"The environment variable {self.api_key_env} is not set: expected the teacher's key in it. Export it, "
                f"or name another variable in {self.section}.api_key_env."
            )
        if not all(" " < letter <= "~" for letter in key):
            raise TeacherError(
                f"The key in {self.api_key_env} holds characters that an HTTP header cannot: copy it again."
            )
        return key or NO_KEY


@dataclasses.dataclass(frozen=True)
class EndpointSettings(ConnectionSettings):
    """Settings of a model behind an OpenAI-compatible endpoint.

    Attributes:
        temperature: sampling temperature; 0 is greedy; null: not sent, as some reasoning models demand.
        top_p: sample from the fewest likeliest tokens that hold this much probability; null: not sent.
        max_tokens: longest reply in tokens, reasoning included.
        token_limit_field: the endpoint's name of max_tokens; OpenAI's reasoning models want max_completion_tokens. If
            the server refuses one name, requests use the other.
        stream: whether replies come as streams; auto: only if the server sends nothing else. A stream also keeps
            proxies from closing a connection that waits for a long reply.
        failures_in_a_row: consecutive requests that may fail for good before the run stops.
    """

    temperature: float | None = 0.7
    top_p: float | None = None
    max_tokens: int = 1024
    token_limit_field: LimitField = "max_tokens"
    stream: bool | Literal["auto"] = "auto"
    failures_in_a_row: int = 10

    def __post_init__(self) -> None:
        for name in ("max_tokens", "failures_in_a_row"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}.")
        if self.temperature is not None and not 0 <= self.temperature < math.inf:
            raise ValueError(f"temperature must be at least 0, or null, got {self.temperature}.")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must lie in (0, 1], or be null, got {self.top_p}.")
        super().__post_init__()

    @property
    def longest_reply(self) -> int:
        """The longest reply in tokens, as `extra_body` may overwrite it."""
        own = (self.extra_fields().get(name) for name in ("max_completion_tokens", "max_tokens"))
        return next((value for value in own if isinstance(value, int)), self.max_tokens)

    def first_form(self) -> RequestForm:
        """Return the form of the first request."""
        return RequestForm(self.token_limit_field, self.stream is True)

    def sampling_fields(self) -> dict[str, float]:
        """Return the sampling settings that are sent."""
        sampling = {"temperature": self.temperature, "top_p": self.top_p}
        return {name: value for name, value in sampling.items() if value is not None}

    def fields_of(self, form: RequestForm) -> dict[str, Any]:
        """Return the body fields of a request in this form, besides model and messages."""
        return self.sampling_fields() | {form.limit_field: self.max_tokens} | form.fields() | self.extra_fields()


def check_url(base_url: str, section: str = "teacher") -> None:
    """Raise ValueError unless this is the plain URL of an endpoint."""
    url = urlsplit(base_url)
    if url.scheme not in ("http", "https") or not url.hostname:
        raise ValueError(f"base_url must be a URL such as http://localhost:8000/v1, got {base_url!r:.60}.")
    if url.username is not None or url.query:
        raise ValueError(
            "base_url holds a user name or a query, which may be a key, and settings are saved with the "
            f"output. Give the endpoint alone, and the key in the environment ({section}.api_key_env)."
        )


class Connection:
    """A server that is reached through the `openai` client, its key, and the meaning of its errors.

    Args:
        settings: the server. The key is read from the environment here.
        say: prints a line for the user.

    Raises:
        TeacherError: the key is missing.
    """

    def __init__(self, settings: ConnectionSettings, say: Callable[[str], None] = lambda line: None) -> None:
        self.settings, self.api_key, self.say = settings, settings.api_key(), say

    def redact(self, text: str) -> str:
        """Return the text without the key, and without any part of it of `MIN_SECRET_LENGTH` letters."""
        return text if self.key_parts is None else cut_out(text, self.key_parts)

    @functools.cached_property
    def key_parts(self) -> re.Pattern[str] | None:
        """A pattern that matches where a part of the key begins, in any form that it may have; None: no secret."""
        if len(self.api_key) < MIN_SECRET_LENGTH:
            return None
        # Base64 of a text that ends in the key has one of three forms, by the length of what is before it.
        in_base64 = [base64.b64encode(b"x" * before + self.api_key.encode()).decode()[4:] for before in range(3)]
        forms = [self.api_key, quote(self.api_key, safe=""), json.dumps(self.api_key)[1:-1], *in_base64]
        size = MIN_SECRET_LENGTH
        parts = {form[i : i + size] for form in forms for i in range(len(form) - size + 1)}
        return re.compile(f"(?=({'|'.join(map(re.escape, sorted(parts)))}))")

    def shorten(self, text: str) -> str:
        """Return the text of an error on one line, cut to `DETAIL_LENGTH`, without the key and other credentials."""
        text = " ".join(
            self.redact(CREDENTIALS.sub(r"\1[key]", text)).encode("utf-8", "replace").decode("utf-8").split()
        )
        return text if len(text) <= DETAIL_LENGTH else text[: DETAIL_LENGTH - 1] + "…"

    def meaning(self, error: ServerError, complaint: Complaint | None = None) -> AttemptFailed | TeacherError:
        """Return what an HTTP error means: this attempt failed, or every request would."""
        settings, words = self.settings, self.shorten(error.message)
        if error.status == 401:  # the message of a 401 may hold a part of the key
            fix = f"Check the variable that {settings.section}.api_key_env names."
        else:
            fix = f"Check {settings.section}.base_url and {settings.section}.model. The server's message: {words}"
        if error.no_quota:
            return TeacherError(f"{self.name} has no quota left for this key. The server's message: {words}")
        if error.status in FATAL_STATUSES:
            status = f"HTTP {error.status}; model {settings.model!r}"
            return TeacherError(f"{self.name} {FATAL_STATUSES[error.status]} ({status}). {fix}")
        if complaint is not None and not complaint.of_every_request:
            return AttemptFailed(f"HTTP {error.status}", f"{complaint.fix} {error.message}", retryable=False)
        if complaint is not None:
            return TeacherError(
                f"{self.name} refuses a setting (HTTP {error.status}; model {settings.model!r}). "
                f"{complaint.fix} The server's message: {words}"
            )
        wait = parse_retry_after(error.headers)
        if wait is not None and wait > settings.longest_wait:
            return TeacherError(
                f"{self.name} asks for a pause of {wait:.0f} s (HTTP {error.status}), longer than "
                f"{settings.section}.longest_wait ({settings.longest_wait:g} s). Run the same command later to "
                f"continue. The server's message: {words}"
            )
        return AttemptFailed(f"HTTP {error.status}", error.message, retryable=error.retryable, retry_after=wait)

    @property
    def name(self) -> str:
        """What the server is, and its address, at the beginning of a sentence."""
        return f"The {self.settings.who} at {self.where}"

    @property
    def where(self) -> str:
        """The endpoint's address."""
        return self.settings.base_url or os.environ.get("OPENAI_BASE_URL", "") or "OpenAI"

    def make_client(self) -> Any:
        """Return the `openai` client. Its retries are off: they ignore broken bodies and hold up one request only."""
        try:
            from openai import AsyncOpenAI
        except ImportError as error:
            raise TeacherError("A teacher behind an endpoint needs openai: pip install openai.") from error
        settings = self.settings
        return AsyncOpenAI(api_key=self.api_key, base_url=settings.base_url, max_retries=0, timeout=settings.timeout)


class EndpointTeacher(Connection):
    """A model behind an OpenAI-compatible endpoint: `POST base_url/chat/completions`, through the `openai` client.

    A request is retried after a failed connection, a timeout, HTTP 408, 409, 425, 429 and 5xx, a body without a reply
    and a reply that the server broke off. Other statuses fail at once. If the server names the form of the request as
    the fault (the name of the token limit, a stream), requests change their form. Before retry k it waits for

        min(longest_delay, retry_delay 2^(k-1)) u    seconds,    u uniform in [1/2, 1]

    or for the server's Retry-After, which then holds up all requests.

    Args:
        settings: the endpoint. The key is read from the environment here.
        say: prints a line for the user.
        top_logprobs: how many of the likeliest tokens come with each token of a reply; 0: none.

    Raises:
        TeacherError: `settings.model` is not set, or the key is missing.
    """

    settings: EndpointSettings

    def __init__(
        self, settings: EndpointSettings, say: Callable[[str], None] = lambda line: None, top_logprobs: int = 0
    ) -> None:
        if settings.model is None:
            raise TeacherError("teacher.model is not set: expected the model's name at the endpoint.")
        super().__init__(settings, say)
        self.top_logprobs = top_logprobs

    def ask(self, requests: Iterable[Request], done: Callable[[Request, Outcome], None]) -> None:
        """Hand every request to `done` with its outcome.

        Raises:
            TeacherError: the teacher cannot be asked, or asking further is useless. Outcomes handed over before stay.
        """
        asyncio.run(Session(self).run(iter(requests), done))

    def fields_of(self, form: RequestForm) -> dict[str, Any]:
        """Return the body fields of a request in this form, besides model and messages."""
        wanted = {"logprobs": True, "top_logprobs": self.top_logprobs} if self.top_logprobs else {}
        return wanted | self.settings.fields_of(form)

    def redact_reply(self, reply: TeacherReply) -> TeacherReply:
        """Return the reply with texts that do not hold the key. One that held it loses its log-probabilities.

        Raises:
            AttemptFailed: the reply has no log-probabilities, and they were asked for.
        """
        if self.top_logprobs and reply.logprobs is None and reply.text:
            raise AttemptFailed(
                "reply has no logprobs",
                "The server sends none with a chat completion (logprobs, top_logprobs). Turn them on there, or leave "
                "top_logprobs out.",
                retryable=False,
            )
        texts = {n: self.redact(getattr(reply, n)) for n in ("text", "reasoning", "finish_reason", "refusal", "model")}
        changed = any(texts[name] != getattr(reply, name) for name in ("text", "reasoning"))
        return dataclasses.replace(reply, **texts, logprobs=None if changed else reply.logprobs)  # type: ignore[arg-type]

    def complaint(self, error: ServerError, request: Request, form: RequestForm) -> Complaint | None:
        """Return the server's complaint about a field of the request, if it is one."""
        message = error.message
        for text in (turn["content"] for turn in request.messages):
            if len(text) >= LONG_TEXT:  # words of a question that the server repeats are not the server's
                message = message.replace(text, "")
        settings, has_system = self.settings, any(turn["role"] == "system" for turn in request.messages)
        return find_complaint(
            dataclasses.replace(error, message=message),
            form,
            settings.sampling_fields(),
            settings.extra_fields(),
            stream=settings.stream,
            has_system=has_system,
        )


def cut_out(text: str, parts: re.Pattern[str]) -> str:
    """Return the text with "[key]" for every run that parts of a key cover."""
    spans: list[list[int]] = []
    for match in parts.finditer(text):
        end = match.start() + len(match[1])
        if spans and match.start() <= spans[-1][1]:
            spans[-1][1] = end
        else:
            spans.append([match.start(), end])
    for start, end in reversed(spans):
        text = f"{text[:start]}[key]{text[end:]}"
    return text


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


class Session:
    """One run of requests against an endpoint."""

    def __init__(self, teacher: EndpointTeacher) -> None:
        self.teacher, self.settings, self.client = teacher, teacher.settings, teacher.make_client()
        self.limiter = RateLimiter(self.settings.requests_per_minute)
        self.consecutive_failures = 0
        self.form = self.settings.first_form()
        self.refused_forms: set[RequestForm] = set()

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
        """Send one request, in other forms too. Raises AttemptFailed, or TeacherError if no request can succeed."""
        for _ in range(MOST_FORMS):
            form = self.form
            answer = await self.send(request, form)
            if isinstance(answer, TeacherReply):
                return answer
            self.change_form(form, answer)
        raise AttemptFailed("the server refuses the request in every form", retryable=False)

    async def send(self, request: Request, form: RequestForm) -> TeacherReply | Complaint:
        """Send one request once. Returns the reply, or a complaint that another form of it may settle."""
        import openai

        settings = self.settings
        try:
            async with asyncio.timeout(settings.timeout):
                # The raw body: the client returns whatever it cannot parse. It reads a stream as a whole, too.
                answer = await self.client.chat.completions.with_raw_response.create(
                    model=settings.model, messages=request.messages, extra_body=self.teacher.fields_of(form)
                )
            return self.teacher.redact_reply(parse_reply(answer.http_response.content, settings.longest_reply))
        except AttemptFailed as failed:
            if failed.status is None:
                raise
            return self.refused(ServerError(failed.status, failed.detail, codes=failed.detail), request, form)
        except (TimeoutError, openai.APITimeoutError):
            raise AttemptFailed("timeout", f"no reply in {settings.timeout:g} s") from None
        except openai.APIStatusError as error:
            return self.refused(server_error(error), request, form)
        except Exception as error:  # of the client or the network below it
            cause = error.__cause__ or error
            raise AttemptFailed("no connection", f"{type(cause).__name__}: {cause}") from None

    def refused(self, error: ServerError, request: Request, form: RequestForm) -> TeacherReply | Complaint:
        """Return a refusal, or the complaint that another form may settle. Raises what any other error means."""
        complaint = self.teacher.complaint(error, request, form)
        if complaint is not None and complaint.form is not None:
            return complaint
        if complaint is None and error.is_refusal:
            return TeacherReply("", finish_reason="content_filter", refusal=self.teacher.shorten(error.message))
        raise self.teacher.meaning(error, complaint) from None

    def change_form(self, form: RequestForm, complaint: Complaint) -> None:
        """Use another form from now on, unless another request has changed it already.

        Raises:
            TeacherError: the server has refused that form too.
        """
        self.refused_forms.add(form)
        if self.form != form:
            return
        assert complaint.form is not None
        if complaint.form in self.refused_forms:
            raise TeacherError(
                f"The teacher at {self.client.base_url} refuses a request in every form. {complaint.fix}"
            )
        self.form = complaint.form
        self.teacher.say(f"{complaint.fix} Requests are sent so from now on.")


def server_error(error: Any) -> ServerError:
    """Return what an `openai.APIStatusError` holds."""
    codes = (error.code, getattr(error, "type", None), getattr(error, "body", None))
    message, param = str(error.message), error.param if isinstance(error.param, str) else ""
    body = getattr(error, "body", None)
    if isinstance(body, str) and body not in message:  # the client leaves out a body that is not JSON
        message = f"{message} - {body}"
    message = without_tags(message)
    return ServerError(error.status_code, message, param, " ".join(map(str, codes)), error.response.headers)


def without_tags(message: str) -> str:
    """Return the words of a page of HTML, as proxies send it; any other message as it is."""
    return TAGS.sub(" ", message) if "<html" in message.lower() else message


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
