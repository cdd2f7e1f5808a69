"""A server that is asked in a thread of its own, and waited for while it is down.

A server that is down is waited for, without end: the training has nothing else to learn from. What no waiting can mend
is a `TeacherError`: a rejected key, an unknown model, a request that it refuses.
"""

from __future__ import annotations

import abc
import asyncio
import atexit
import random
import threading
import time
from collections.abc import Callable, Coroutine, Mapping
from concurrent.futures import Future
from typing import Any, ClassVar, Generic, TypeVar

from cotgrpo.teacher_servers.dialects import Call, Malformed
from cotgrpo.teachers.endpoint import (
    AttemptFailed,
    Connection,
    ConnectionSettings,
    RateLimiter,
    TeacherError,
    parse_retry_after,
    server_error,
)
from cotgrpo.teachers.server_errors import FATAL_STATUSES, ServerError

T = TypeVar("T")
Settings = TypeVar("Settings", bound=ConnectionSettings)

SAID_AFTER = 1.0
"""Seconds without an answer before the user is told."""
SAID_AGAIN_AFTER = 600.0
"""Seconds between two such lines."""
CLOSING_SECONDS = 5.0


class Refused(Exception):
    """The server refuses a request, and would refuse it again."""

    def __init__(self, error: ServerError) -> None:
        super().__init__(error.message)
        self.error = error


class PatientServer(abc.ABC, Generic[Settings]):
    """A server that is waited for while it is down.

    Args:
        settings: the server. The key is read from the environment here.
        say: prints a line for the user, from any thread.

    Raises:
        TeacherError: the key is missing, or the package openai.
    """

    thread_name: ClassVar[str] = "server"

    def __init__(self, settings: Settings, say: Callable[[str], None]) -> None:
        self.settings, self.say = settings, say
        self.connection = Connection(settings)
        self.connection.make_client()  # raises here, not in the thread
        self.client: Any = None
        self.down_since: float | None = None
        self.told: float | None = None
        self.was_down = False
        self.limiter = RateLimiter(settings.requests_per_minute)
        self.loop = asyncio.new_event_loop()
        self.thread = threading.Thread(target=self.loop.run_forever, name=self.thread_name, daemon=True)
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

    @abc.abstractmethod
    def refusal(self, error: ServerError, length: int) -> TeacherError:
        """Return the error of a request that the server refuses, whose text has `length` tokens."""

    async def first_that_answers(
        self,
        attempts: Mapping[str, Callable[[], Coroutine[Any, Any, T]]],
        none_does: Callable[[list[str]], TeacherError],
    ) -> T:
        """Return the result of the first dialect in which the server answers. Waits while the server is down.

        Args:
            attempts: by the name of each dialect, in the order in which they are tried, what asks once in it. It raises
                Refused, Malformed or AttemptFailed.
            none_does: makes the error of a server that answers in none, from a sentence for each.

        Raises:
            TeacherError: every request would meet the same error, or no dialect is answered.
        """
        pauses = 0
        while True:
            refusals: list[str] = []
            down: AttemptFailed | None = None
            for name, attempt in attempts.items():
                try:
                    return await attempt()
                except Refused as refused:
                    self.raise_if_fatal(refused.error)
                    refusals.append(f"{name}: HTTP {refused.error.status} {refused.error.message}")
                except Malformed as error:
                    refusals.append(f"{name}: {error}")
                except AttemptFailed as failed:
                    down = failed
            if down is None:
                raise none_does([self.connection.shorten(text) for text in refusals])
            pauses += 1
            await self.pause(pauses, down)

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
                        f"{self.connection.name} sent {malformed} answers in a row that cannot be used, the last "
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

    async def pause(self, attempt: int, failed: AttemptFailed) -> None:
        """Wait before the next attempt at a server that is down, and tell the user.

        Raises:
            TeacherError: the server asks for a longer pause than the settings allow.
        """
        now, settings = time.monotonic(), self.settings
        reason = self.connection.shorten(": ".join(filter(None, (failed.reason, failed.detail))))
        if failed.retry_after is not None and failed.retry_after > settings.longest_wait:
            raise TeacherError(
                f"{self.connection.name} asks for a pause of {failed.retry_after:.0f} s, longer than "
                f"{settings.section}.longest_wait ({settings.longest_wait:g} s). Run the same command later to "
                f"continue. Its message: {reason}"
            )
        self.down_since = now if self.down_since is None else self.down_since
        is_news = self.told is None or now - self.told >= SAID_AGAIN_AFTER
        if now - self.down_since >= SAID_AFTER and is_news:
            self.told = now
            self.say(
                f"{self.connection.name} does not answer ({reason}), for {now - self.down_since:.0f} s now. The "
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
                self.say(f"{self.connection.name} answers again, after {time.monotonic() - self.down_since:.0f} s.")
        self.down_since = self.told = None
