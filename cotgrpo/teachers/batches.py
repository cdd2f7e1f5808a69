"""A teacher behind a provider's batch API: requests go in files, and replies come back within a day, for less money.

What was sent is written to a file before it counts: a process that is killed and started again waits for the same
batches, and pays for none of them twice.
"""

from __future__ import annotations

import dataclasses
import json
import random
import re
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from cotgrpo.atomic_files import read_json, write_json
from cotgrpo.data.sources import DataError
from cotgrpo.disk_errors import first_line
from cotgrpo.teachers.completions import AttemptFailed, parse_completion
from cotgrpo.teachers.endpoint import (
    EndpointSettings,
    EndpointTeacher,
    Failure,
    Outcome,
    Request,
    TeacherError,
    TeacherReply,
    server_error,
)
from cotgrpo.teachers.server_errors import ServerError

MOST_REQUESTS = 50_000
MOST_BYTES = 100_000_000
"""Limits of one batch that all known providers take."""
WINDOW = "24h"
"""The only completion window that providers offer."""
ENDED = ("completed", "failed", "expired", "cancelled", "canceled")
"""Statuses of a batch that will not change. Providers have different words for the others."""
QUEUE_FULL = re.compile("enqueued|queue.{0,20}(?:limit|full)|token_limit_exceeded|too many batches", re.IGNORECASE)
"""Errors of a batch that has too many others before it."""
BATCHES_SEARCHED = 1000
"""Newest batches of the account that are searched for one whose creation was interrupted."""
HASH_LENGTH = 40
"""Characters of a prompt's hash in the id of a request: some providers allow 64 in all."""


@dataclasses.dataclass
class SentBatch:
    """A batch that was sent.

    Attributes:
        input_file_id: the provider's id of the file of requests.
        requests: ids of the requests in it.
        id: the provider's id of the batch; None while it is created.
    """

    input_file_id: str
    requests: list[str]
    id: str | None = None


class BatchRefused(TeacherError):
    """The provider refuses a batch, so there is none to wait for."""


class BatchTeacher:
    """A model behind the batch API of an OpenAI-compatible endpoint, through the `openai` client.

    Args:
        settings: the endpoint. Replies do not come as streams.
        path: the file of the batches that are under way.
        say: prints a line for the user.
        top_logprobs: as in `EndpointTeacher`.

    Raises:
        TeacherError: `settings.model` is not set, or the key is missing.
    """

    def __init__(
        self,
        settings: EndpointSettings,
        path: Path,
        say: Callable[[str], None] = lambda line: None,
        top_logprobs: int = 0,
    ) -> None:
        self.settings, self.path, self.say = settings, path, say
        self.endpoint = EndpointTeacher(settings, say, top_logprobs)
        self.form = dataclasses.replace(settings.first_form(), stream=False)
        self.refusal: TeacherError | None = None

    def ask(self, requests: Iterable[Request], done: Callable[[Request, Outcome], None]) -> None:
        """Send the requests that no batch holds yet, wait for all batches, and hand over each outcome.

        Raises:
            TeacherError: the endpoint cannot be asked, or it refuses a setting. Outcomes handed over before stay.
        """
        wanted = {request_id(request): request for request in requests}
        sent = self.read_sent()
        with self.make_client() as client:
            for batch in [batch for batch in sent if batch.id is None]:  # killed while it was created
                batch.id = self.find(client, batch.input_file_id)
                self.start(client, batch, sent)
            there = {name for batch in sent for name in batch.requests}
            self.send(client, [request for name, request in wanted.items() if name not in there], sent)
            while postponed := self.wait(client, wanted, sent, done):
                self.send(client, postponed, sent)
        if self.refusal is not None:
            raise self.refusal

    def make_client(self) -> Any:
        """Return the `openai` client, which retries."""
        self.endpoint.make_client()  # says what to install
        from openai import OpenAI

        settings = self.settings
        return OpenAI(
            api_key=self.endpoint.api_key,
            base_url=settings.base_url,
            max_retries=settings.retries,
            timeout=settings.timeout,
        )

    def read_sent(self) -> list[SentBatch]:
        """Read the batches that are under way. Raises DataError if nobody can tell what was sent."""
        if not self.path.exists():
            return []
        try:
            return [SentBatch(**fields) for fields in read_json(self.path)]
        except (OSError, ValueError, TypeError, RecursionError) as error:
            raise DataError(
                f"{self.path} cannot be read ({first_line(error)}). It names the batches that were paid for: put it "
                "back, or delete it to send all missing requests again."
            ) from error

    def save(self, sent: Sequence[SentBatch]) -> None:
        """Write the batches that are under way."""
        if sent:
            write_json(self.path, [dataclasses.asdict(batch) for batch in sent])
        else:
            self.path.unlink(missing_ok=True)

    def send(self, client: Any, requests: Sequence[Request], sent: list[SentBatch]) -> None:
        """Send requests in batches. A batch is on record before it is created."""
        for part in parts(((request, self.line(request)) for request in requests), MOST_REQUESTS, MOST_BYTES):
            data = b"".join(line for _, line in part)
            file = self.call(client.files.create, file=("requests.jsonl", data), purpose="batch")
            batch = SentBatch(file.id, [request_id(request) for request, _ in part])
            sent.append(batch)
            self.save(sent)
            self.start(client, batch, sent)
            self.say(f"batch {batch.id}: {len(part)} requests sent. If you stop now, run the same command later.")

    def start(self, client: Any, batch: SentBatch, sent: list[SentBatch]) -> None:
        """Create a batch, unless it is there, and write its id. Raises TeacherError if the provider refuses it."""
        try:
            batch.id = batch.id or self.create(client, batch.input_file_id)
        except BatchRefused:
            sent.remove(batch)
            raise
        finally:
            self.save(sent)

    def line(self, request: Request) -> bytes:
        """Return the line of a request in a file of requests."""
        body = {"model": self.settings.model, "messages": request.messages, **self.endpoint.fields_of(self.form)}
        line = {"custom_id": request_id(request), "method": "POST", "url": self.url, "body": body}
        return json.dumps(line, ensure_ascii=False).encode("utf-8") + b"\n"

    @property
    def url(self) -> str:
        """The address of chat completions below the provider's host: `/v1/chat/completions`."""
        version = re.search(r"/(v\d+)/?$", self.settings.base_url or "")
        return f"/{version[1] if version else 'v1'}/chat/completions"

    def create(self, client: Any, input_file_id: str) -> str:
        """Create a batch and return its id. After an error, look for it first: it may be there.

        Raises:
            BatchRefused: the provider refuses it.
            TeacherError: the provider does not answer. The batch may be there.
        """
        import openai

        once = client.with_options(max_retries=0)
        for attempt in range(self.settings.retries + 1):
            try:
                made = once.batches.create(input_file_id=input_file_id, endpoint=self.url, completion_window=WINDOW)
                return str(made.id)
            except openai.APIStatusError as error:
                if not server_error(error).retryable:
                    raise BatchRefused(str(self.error(error))) from None
                last: Exception = error
            except openai.APIConnectionError as error:
                last = error
            time.sleep(self.delay(attempt))
            found = self.find(client, input_file_id)
            if found is not None:
                return found
        raise self.error(last) from None

    def find(self, client: Any, input_file_id: str) -> str | None:
        """Return the id of the account's batch with this input, or None."""
        for number, batch in enumerate(self.call(client.batches.list, limit=100)):
            if batch.input_file_id == input_file_id:
                return str(batch.id)
            if number >= BATCHES_SEARCHED:
                break
        return None

    def wait(
        self,
        client: Any,
        wanted: dict[str, Request],
        sent: list[SentBatch],
        done: Callable[[Request, Outcome], None],
    ) -> list[Request]:
        """Wait for the batches that hold wanted requests, and hand over their outcomes.

        Returns:
            The requests of batches that the account's queue had no room for, if others have brought replies.
        """
        polls, shown = 0, ""
        too_many: list[tuple[Request, Outcome]] = []
        brought = 0
        while ours := [batch for batch in sent if not wanted.keys().isdisjoint(batch.requests)]:
            states = []
            for batch in ours:
                state = self.look(client, str(batch.id))
                if str(state.status).casefold() not in ENDED:
                    states.append(state)
                    continue
                is_full = QUEUE_FULL.search(errors_of(state)) is not None
                left = {name: wanted[name] for name in batch.requests if name in wanted}
                for request, outcome in self.outcomes(client, state, left):
                    if is_full:
                        too_many.append((request, outcome))
                    else:
                        done(request, outcome)
                        brought += isinstance(outcome, TeacherReply)
                sent.remove(batch)
                self.save(sent)
            if states:
                line = progress_line(states)
                if line != shown:
                    self.say(line)
                shown = line
                time.sleep(self.delay(polls))
                polls += 1
        if brought:
            return [request for request, _ in too_many]
        for request, outcome in too_many:
            done(request, outcome)
        return []

    def look(self, client: Any, batch_id: str) -> Any:
        """Return the state of a batch. A day has outages, so it takes several in a row to give up."""
        import openai

        for attempt in range(1, self.settings.failures_in_a_row + 1):
            try:
                return client.batches.retrieve(batch_id)
            except openai.APIError as error:
                passes = not isinstance(error, openai.APIStatusError) or server_error(error).retryable
                if not passes or attempt == self.settings.failures_in_a_row:
                    raise self.error(error) from None
            time.sleep(self.delay(attempt))
        raise AssertionError("the last attempt returns or raises")

    def outcomes(self, client: Any, state: Any, left: dict[str, Request]) -> Iterator[tuple[Request, Outcome]]:
        """Yield the outcomes of a batch that has ended. Requests without a line have failed."""
        for file_id in (state.output_file_id, state.error_file_id):
            if not file_id:
                continue
            for line in self.call(client.files.content, file_id).content.split(b"\n"):
                name, outcome = self.outcome(line, left)
                if name in left and outcome is not None:
                    yield left.pop(name), outcome
        errors = errors_of(state)
        if left:
            self.say(f"batch {state.id} {state.status}: {len(left)} requests without a reply. {errors}")
        for request in left.values():
            detail = self.endpoint.shorten(errors or "the batch holds no line for it")
            yield request, Failure(f"batch {state.status}", detail)

    def outcome(self, line: bytes, asked: dict[str, Request]) -> tuple[str, Outcome | None]:
        """Return the id and the outcome in a line of a file of results; ("", None) for a line that is not one."""
        try:
            fields = json.loads(line)
            name, response = str(fields["custom_id"]), fields.get("response") or {}
            status, body = int(response.get("status_code") or 0), response.get("body")
        except (ValueError, KeyError, TypeError, AttributeError):
            return "", None
        try:
            if status == 200:
                return name, self.endpoint.redact_reply(parse_completion(body, self.settings.longest_reply))
        except AttemptFailed as failed:
            return name, Failure(failed.reason, self.endpoint.shorten(failed.detail))
        error = fields.get("error") or (body.get("error") if isinstance(body, dict) else None) or body
        words = json.dumps(error, ensure_ascii=False)
        refused = ServerError(status, words, codes=words)
        if refused.is_refusal:
            return name, TeacherReply("", finish_reason="content_filter", refusal=self.endpoint.shorten(words))
        if name in asked and self.refusal is None:
            complaint = self.endpoint.complaint(refused, asked[name], self.form)
            meaning = self.endpoint.meaning(refused, complaint)
            self.refusal = meaning if isinstance(meaning, TeacherError) else None
        return name, Failure(f"HTTP {status}" if status else "batch error", self.endpoint.shorten(words))

    def call(self, function: Callable[..., Any], *arguments: object, **named: object) -> Any:
        """Call a function of the client. Raises TeacherError for every error that its retries have left."""
        import openai

        try:
            return function(*arguments, **named)
        except openai.OpenAIError as error:
            raise self.error(error) from None

    def error(self, error: Exception) -> TeacherError:
        """Return what an error of the client means."""
        import openai

        where, again = self.endpoint.where, "Run the same command to continue."
        if not isinstance(error, openai.APIStatusError):
            cause = error.__cause__ or error
            words = self.endpoint.shorten(f"{type(cause).__name__}: {cause}")
            return TeacherError(f"The batch API at {where} does not answer: {words}. {again}")
        if error.status_code in (404, 405, 501):
            words = self.endpoint.shorten(str(error.message))
            return TeacherError(
                f"The teacher at {where} has no batch API, or not this batch (HTTP {error.status_code}). Check "
                f"teacher.base_url, or set teacher.batch: false. {self.path.name} in the output folder holds the "
                f"batches under way: without it, their requests are sent again. The server's message: {words}"
            )
        meaning = self.endpoint.meaning(server_error(error))
        if isinstance(meaning, TeacherError):
            return meaning
        words = self.endpoint.shorten(meaning.detail)
        return TeacherError(f"The batch API at {where} answers {meaning.reason}: {words}. {again}")

    def delay(self, number: int) -> float:
        """Return the seconds before a retry or the next look at the batches."""
        settings = self.settings
        return min(settings.longest_delay, settings.retry_delay * 2 ** min(number, 20)) * random.uniform(0.5, 1)


def errors_of(state: Any) -> str:
    """Return why a batch failed, or ""."""
    return "; ".join(str(error.message or error.code) for error in (state.errors.data if state.errors else None) or ())


def progress_line(states: Sequence[Any]) -> str:
    """Return what the batches under way have done, as a line."""
    counts = [state.request_counts for state in states if state.request_counts is not None]
    requests = f"{sum(count.completed for count in counts)} of {sum(count.total for count in counts)} requests done"
    return f"batches under way: {len(states)} ({states[0].status}), {requests}"


def request_id(request: Request) -> str:
    """Return the id of a request in a batch."""
    prompt_hash, number = request.key
    return f"{prompt_hash[:HASH_LENGTH]}-{number}"


def parts(lines: Iterable[tuple[Request, bytes]], most: int, most_bytes: int) -> Iterator[list[tuple[Request, bytes]]]:
    """Yield requests with their lines in lists within the limits of a batch."""
    part: list[tuple[Request, bytes]] = []
    size = 0
    for request, line in lines:
        if part and (len(part) == most or size + len(line) > most_bytes):
            yield part
            part, size = [], 0
        part.append((request, line))
        size += len(line)
    if part:
        yield part
