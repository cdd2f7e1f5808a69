"""A teacher on a server: it is asked for the log-probabilities of texts in a thread of its own, while training goes on.

A server that is down is waited for, without end: the training has nothing else to learn from. What no waiting can mend
is a `TeacherError`: a rejected key, an unknown model, a server without log-probabilities, another tokenizer.
"""

from __future__ import annotations

import asyncio
import atexit
import dataclasses
import random
import re
import threading
import time
from collections.abc import Callable, Coroutine, Sequence
from concurrent.futures import Future
from typing import Any, ClassVar, Literal, Protocol, TypeVar, runtime_checkable

import numpy as np

from cotgrpo.objectives import MASKED_LOGIT
from cotgrpo.teacher_servers.dialects import DIALECTS, Call, Dialect, Malformed, Top
from cotgrpo.teacher_servers.vocabulary import Vocabulary, first_difference
from cotgrpo.teachers.endpoint import (
    AttemptFailed,
    Connection,
    ConnectionSettings,
    RateLimiter,
    TeacherError,
    parse_retry_after,
    server_error,
)
from cotgrpo.teachers.server_errors import CONTEXT, FATAL_STATUSES, ServerError

T = TypeVar("T")

SAID_AFTER = 1.0
"""Seconds without an answer before the user is told."""
SAID_AGAIN_AFTER = 600.0
"""Seconds between two such lines."""
LARGEST_DRIFT = 0.5
"""Nats by which a server's log-probabilities of one text may differ from one time to another. Rounding gives less."""
PROBED_TOKENS = 32
"""Places of the text that shows whether a server still has the same model."""
CLOSING_SECONDS = 5.0
TOO_MANY = re.compile(
    "max[_ ]?logprobs|log ?probs?.{0,80}(?:max|greater|at most|less|exceed)", re.IGNORECASE | re.DOTALL
)


@dataclasses.dataclass(frozen=True)
class ServerSettings(ConnectionSettings):
    """Settings of a server that returns the log-probabilities of a given text.

    Attributes:
        base_url: the server's address, such as http://localhost:8000/v1.
        model: the model's name at the server; null: not sent, for a server with one model.
        retries: retries of an answer that cannot be used. A server that is down is tried without end.
        dialect: how the server is asked. vllm: completions with prompt_logprobs. sglang: /generate. echo: completions
            with echo and logprobs. echo_text: the same with texts in place of token ids. llama_cpp: /completion with
            n_probs, one request for each token. auto: the first that the server answers.
    """

    dialect: Literal["auto", "vllm", "sglang", "echo", "echo_text", "llama_cpp"] = "auto"

    section: ClassVar[str] = "grpo.ghosts"
    top_settings: ClassVar[str] = "grpo.objective.top_k, grpo.ghosts.top_logprobs"
    """The settings that say how many tokens are wanted, for messages."""


@dataclasses.dataclass(frozen=True)
class Text:
    """A text that is scored.

    Attributes:
        context: the tokens before the scored ones, at least one.
        scored: the tokens at whose places the teacher's likeliest tokens are wanted.
    """

    context: list[int]
    scored: list[int]


@dataclasses.dataclass(frozen=True)
class Scores:
    """The teacher's likeliest tokens at each scored place of several texts, padded to N places.

    Attributes:
        ids: int32 `[B, N, K]`, the likeliest first; 0 where there is none.
        log_probs: float32 `[B, N, K]`; -1e30 where there is none.
    """

    ids: np.ndarray
    log_probs: np.ndarray

    @property
    def known(self) -> np.ndarray:
        """Bool `[B, N]`: whether the teacher's likeliest token is known there."""
        return self.log_probs[..., 0] > MASKED_LOGIT / 2

    @classmethod
    def of(cls, rows: Sequence[Sequence[Top | None]], columns: int, top_k: int) -> Scores:
        """Return the scores of rows as arrays."""
        ids = np.zeros((len(rows), columns, top_k), np.int32)
        log_probs = np.full((len(rows), columns, top_k), MASKED_LOGIT, np.float32)
        for b, row in enumerate(rows):
            for n, top in enumerate(row):
                for k, (token, log_prob) in enumerate(top or ()):
                    ids[b, n, k], log_probs[b, n, k] = token, log_prob
        return cls(ids, log_probs)


@runtime_checkable
class Scorer(Protocol):
    """What scores texts: a `ScoringServer`, or a model in this process that stands for one."""

    def score_later(self, make_texts: Callable[[], Sequence[Text]], columns: int) -> Future[Scores]:
        """Score texts in the background, in arrays of `columns` places."""
        ...

    def check_same_model(self, before: Sequence[float], now: Sequence[float], when: str) -> None:
        """Raise an error if a sample has other log-probabilities than `when`."""
        ...


class Refused(Exception):
    """The server refuses a request, and would refuse it again."""

    def __init__(self, error: ServerError) -> None:
        super().__init__(error.message)
        self.error = error


class ScoringServer:
    """A server that scores texts.

    Args:
        settings: the server. The key is read from the environment here.
        vocabulary: the student's tokens, which must be the server's too.
        top_k: likeliest tokens wanted at each place.
        samples: texts of the student's tokens, to compare the tokenizers.
        say: prints a line for the user, from any thread.

    Raises:
        TeacherError: the key is missing, or the package openai.
    """

    def __init__(
        self,
        settings: ServerSettings,
        vocabulary: Vocabulary,
        top_k: int,
        samples: Sequence[Text],
        say: Callable[[str], None],
    ) -> None:
        self.settings, self.vocabulary, self.top_k, self.samples, self.say = settings, vocabulary, top_k, samples, say
        self.connection = Connection(settings)
        self.connection.make_client()  # raises here, not in the thread
        self.dialect: Dialect | None = None
        self.fingerprint: list[float] = []
        self.client: Any = None
        self.down_since: float | None = None
        self.told: float | None = None
        self.was_down = False
        self.limiter = RateLimiter(settings.requests_per_minute)
        self.loop = asyncio.new_event_loop()
        self.thread = threading.Thread(target=self.loop.run_forever, name="teacher server", daemon=True)
        self.thread.start()
        atexit.register(self.close)

    @property
    def where(self) -> str:
        """The server's address."""
        return self.connection.where

    def close(self) -> None:
        """Stop asking. Called at the end of the process, too."""
        if self.loop.is_closed():
            return

        async def cancel() -> None:
            tasks = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            if self.client is not None:
                await self.client.close()

        try:
            asyncio.run_coroutine_threadsafe(cancel(), self.loop).result(CLOSING_SECONDS)
        except TimeoutError:
            return
        self.loop.call_soon_threadsafe(self.loop.stop)
        self.thread.join(CLOSING_SECONDS)
        self.loop.close()
        atexit.unregister(self.close)

    def submit(self, work: Coroutine[Any, Any, T]) -> Future[T]:
        """Run a coroutine in the server's thread."""
        return asyncio.run_coroutine_threadsafe(work, self.loop)

    def connect(self) -> list[float]:
        """Find out how the server is asked, and compare the tokenizers. Waits while the server is down.

        Returns:
            The log-probabilities of a sample, by which the model is known again.

        Raises:
            TeacherError: it returns no log-probabilities, or has another tokenizer.
        """
        return self.submit(self.start()).result()

    async def start(self) -> list[float]:
        """Do what `connect` says."""
        self.client = self.connection.make_client()
        self.dialect = await self.find_dialect()
        await self.check_tokens()
        self.fingerprint = await self.probe()
        return self.fingerprint

    async def find_dialect(self) -> Dialect:
        """Return the first dialect that the server answers."""
        settings, sample, attempt = self.settings, self.samples[0], 0
        wanted = [kind for kind in DIALECTS if settings.dialect in ("auto", kind.name)]
        while True:
            refusals: list[str] = []
            down: AttemptFailed | None = None
            for kind in wanted:
                dialect = kind(str(settings.base_url), settings.model, self.vocabulary)
                try:
                    found = await self.score_once(dialect, Text(sample.context, sample.scored[:PROBED_TOKENS]))
                    if any(found):
                        return dialect
                    refusals.append(f"{kind.name}: its likeliest tokens are none of the student's")
                except Refused as refused:
                    self.raise_if_fatal(refused.error)
                    refusals.append(f"{kind.name}: HTTP {refused.error.status} {refused.error.message}")
                except Malformed as error:
                    refusals.append(f"{kind.name}: {error}")
                except AttemptFailed as failed:
                    down = failed
            if down is None:
                raise self.without_log_probs(wanted, refusals)
            attempt += 1
            await self.pause(attempt, down)

    def without_log_probs(self, wanted: Sequence[type[Dialect]], refusals: Sequence[str]) -> TeacherError:
        """Return the error of a server that no dialect gets log-probabilities from."""
        fixes = "; ".join(dict.fromkeys(kind.fix.format(top_k=self.top_k) for kind in wanted))
        words = "; ".join(self.connection.shorten(text) for text in refusals)
        return TeacherError(
            f"The teacher at {self.where} does not return the {self.top_k} likeliest tokens of a given text. {fixes}. "
            f"Or ask for fewer ({self.settings.top_settings}). What it answered: {words}"
        )

    async def check_tokens(self) -> None:
        """Raise TeacherError unless the server cuts the samples into the student's tokens."""
        assert self.dialect is not None
        for sample in self.samples:
            text = self.vocabulary.text([*sample.context, *sample.scored])
            own = self.vocabulary.encode(text)
            theirs = await self.usable(lambda text=text: self.tokens_once(text), len(own))  # type: ignore[misc]
            if len(theirs) == len(own) + 1 and theirs[1:] == own:
                theirs = theirs[1:]  # a token that the server puts before each text
            if theirs and theirs[0] is None:
                theirs = [*own[:1], *theirs[1:]]
            difference = first_difference(self.vocabulary, own, [t for t in theirs if t is not None])
            if difference is not None and (named := getattr(self.settings, "tokenizer", None)):
                raise TeacherError(
                    f"The teacher at {self.where} has another tokenizer than {named} (grpo.ghosts.tokenizer): in "
                    f"{text!r:.80}, {difference.replace('the student', 'that one')}. Name the tokenizer of the model "
                    "that is served."
                )
            if difference is not None:
                raise TeacherError(
                    f"The teacher at {self.where} has another tokenizer than the student: in {text!r:.80}, "
                    f"{difference}. Ghost tokens are the student's own, so both need the same: serve a model of the "
                    "same family, or name its tokenizer in grpo.ghosts.tokenizer."
                )

    async def tokens_once(self, text: str) -> list[Any]:
        """Return the server's tokens of a text."""
        assert self.dialect is not None
        return self.dialect.read_tokens(await self.send(self.dialect.token_call(text)))

    async def probe(self) -> list[float]:
        """Return the log-probabilities of the likeliest tokens of the first sample."""
        sample = self.samples[0]
        return [top[0][1] for top in await self.score(Text(sample.context, sample.scored[:PROBED_TOKENS])) if top]

    def check_same_model(self, before: Sequence[float], now: Sequence[float], when: str) -> None:
        """Raise TeacherError if a sample has other log-probabilities than `when`."""
        if len(before) == len(now) and all(abs(a - b) < LARGEST_DRIFT for a, b in zip(before, now, strict=True)):
            return
        raise TeacherError(
            f"The teacher at {self.where} gives other log-probabilities of the same text than {when}: another model is "
            "served there. Serve the same one, and run the same command to continue; or begin another run_dir."
        )

    def score_later(self, make_texts: Callable[[], Sequence[Text]], columns: int) -> Future[Scores]:
        """Score texts in the background. `make_texts` may wait for a device, and is called in another thread."""
        return self.submit(self.score_all(make_texts, columns))

    async def score_all(self, make_texts: Callable[[], Sequence[Text]], columns: int) -> Scores:
        """Return the scores of texts, `concurrency` of them at a time."""
        texts = await asyncio.to_thread(make_texts)
        slots = asyncio.Semaphore(self.settings.concurrency)

        async def one(text: Text) -> list[Top | None]:
            async with slots:
                return await self.score(text)

        try:
            async with asyncio.TaskGroup() as group:
                tasks = [group.create_task(one(text)) for text in texts]
        except BaseExceptionGroup as errors:
            raise errors.exceptions[0] from None
        if self.was_down:  # another model may have taken its place
            self.was_down = False
            await self.check_tokens()
            self.check_same_model(self.fingerprint, await self.probe(), "before it went down")
        return Scores.of([task.result() for task in tasks], columns, self.top_k)

    async def score(self, text: Text) -> list[Top | None]:
        """Return the likeliest tokens at each scored place of a text. Waits while the server is down."""
        dialect = self.dialect
        assert dialect is not None
        return await self.usable(lambda: self.score_once(dialect, text), len(text.context) + len(text.scored))

    async def score_once(self, dialect: Dialect, text: Text) -> list[Top | None]:
        """Ask once. Raises Malformed, Refused or AttemptFailed."""
        if not text.scored:
            return []
        ids, start = [*text.context, *text.scored], len(text.context)
        answers = [await self.send(call) for call in dialect.score_calls(ids, start, self.top_k)]
        return dialect.read_scores(answers, ids, start, self.top_k)

    async def usable(self, ask: Callable[[], Coroutine[Any, Any, T]], length: int) -> T:
        """Return the answer to a request. Waits while the server is down.

        Args:
            ask: sends the request once.
            length: tokens of its text.

        Raises:
            TeacherError: the server refuses it, or its answers cannot be used.
        """
        malformed = attempt = 0
        while True:
            try:
                return await ask()
            except Refused as refused:
                self.raise_if_fatal(refused.error)
                raise self.refusal(refused.error, length) from None
            except Malformed as error:
                malformed += 1
                if malformed > self.settings.retries:
                    raise TeacherError(
                        f"The teacher at {self.where} sent {malformed} answers in a row that cannot be used, the last "
                        f"one because {self.connection.shorten(str(error))}. None of them was trained on. Run the same "
                        "command to continue once it is mended."
                    ) from None
                await asyncio.sleep(self.backoff(malformed))
            except AttemptFailed as failed:
                attempt += 1
                await self.pause(attempt, failed)

    async def send(self, call: Call) -> object:
        """Send one request once, and return the JSON of its answer. Raises Refused, Malformed or AttemptFailed."""
        import openai

        await self.limiter.wait_turn()
        try:
            async with asyncio.timeout(self.settings.timeout):
                body = call.body | self.settings.extra_fields()
                answer = await self.client.post(call.url, body=body, cast_to=object)
        except (TimeoutError, openai.APITimeoutError):
            raise AttemptFailed("timeout", f"no answer in {self.settings.timeout:g} s") from None
        except openai.APIStatusError as status:
            error = server_error(status)
            if error.retryable and error.status != 501 and not error.no_quota:
                wait = parse_retry_after(error.headers)
                raise AttemptFailed(f"HTTP {error.status}", error.message, retry_after=wait) from None
            raise Refused(error) from None
        except ValueError as error:
            raise Malformed(f"it is not JSON ({error})") from None
        except Exception as error:  # of the client or the network below it
            cause = error.__cause__ or error
            raise AttemptFailed("no connection", f"{type(cause).__name__}: {cause}") from None
        self.answered()
        return answer

    def raise_if_fatal(self, error: ServerError) -> None:
        """Raise TeacherError if every request would meet this error, whatever its dialect."""
        names_model = error.status == 404 and bool(self.settings.model) and str(self.settings.model) in error.message
        if error.no_quota or names_model or (error.status in FATAL_STATUSES and error.status != 404):
            meaning = self.connection.meaning(error)
            raise meaning if isinstance(meaning, TeacherError) else AssertionError(meaning)

    def refusal(self, error: ServerError, length: int) -> TeacherError:
        """Return the error of a text that the server refuses to score."""
        words = self.connection.shorten(error.message)
        fix = ""
        if CONTEXT.search(error.message):
            fix = (
                f"The text has {length} tokens. Serve the model with a longer context (vLLM: --max-model-len "
                f"{length + 1}), or lower data.seq_len. "
            )
        elif TOO_MANY.search(error.message):
            fix = (
                f"Let it give {self.top_k} log-probabilities (vLLM: --max-logprobs {self.top_k}), or ask for fewer "
                f"({self.settings.top_settings}). "
            )
        return TeacherError(
            f"The teacher at {self.where} refuses to score a text (HTTP {error.status}). {fix}Its message: {words}"
        )

    async def pause(self, attempt: int, failed: AttemptFailed) -> None:
        """Wait before the next attempt at a server that is down, and tell the user.

        Raises:
            TeacherError: the server asks for a longer pause than the settings allow.
        """
        now, settings = time.monotonic(), self.settings
        reason = self.connection.shorten(": ".join(filter(None, (failed.reason, failed.detail))))
        if failed.retry_after is not None and failed.retry_after > settings.longest_wait:
            raise TeacherError(
                f"The teacher at {self.where} asks for a pause of {failed.retry_after:.0f} s, longer than "
                f"{settings.section}.longest_wait ({settings.longest_wait:g} s). Run the same command later to "
                f"continue. Its message: {reason}"
            )
        self.down_since = now if self.down_since is None else self.down_since
        is_news = self.told is None or now - self.told >= SAID_AGAIN_AFTER
        if now - self.down_since >= SAID_AFTER and is_news:
            self.told = now
            self.say(
                f"The teacher at {self.where} does not answer ({reason}), for {now - self.down_since:.0f} s now. The "
                "run waits and tries again. It can be stopped, and goes on later with the same command."
            )
        if failed.retry_after is not None:
            self.limiter.pause(failed.retry_after)
        await asyncio.sleep(self.backoff(attempt))

    def backoff(self, attempt: int) -> float:
        """Return the seconds before another attempt."""
        settings = self.settings
        return min(settings.longest_delay, settings.retry_delay * 2 ** min(attempt - 1, 20)) * random.uniform(0.5, 1)

    def answered(self) -> None:
        """Take note that the server answers."""
        if self.down_since is not None:
            self.was_down = True
            if self.told is not None:
                self.say(
                    f"The teacher at {self.where} answers again, after {time.monotonic() - self.down_since:.0f} s."
                )
        self.down_since = self.told = None
