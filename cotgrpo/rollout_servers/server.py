"""An engine on a server: it writes the student's replies, and loads the weights that the run gives it.

A server that is down is waited for. If it was away for long, it may have been started anew, with other weights: it gets
the newest ones again, and writes the replies that were under way again.
"""

from __future__ import annotations

import asyncio
import dataclasses
import functools
import secrets
import time
from collections.abc import Callable, Coroutine, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any

from cotgrpo.rollout_servers.dialects import ROLLOUT_DIALECTS, RolloutDialect, ServedReply
from cotgrpo.rollout_servers.settings import RolloutServerSettings
from cotgrpo.sampling import SamplingSettings
from cotgrpo.teacher_servers.dialects import Call, Malformed
from cotgrpo.teacher_servers.patient_server import SAID_AFTER, PatientServer, Refused
from cotgrpo.teacher_servers.server import Text
from cotgrpo.teacher_servers.vocabulary import Vocabulary, cut_differently
from cotgrpo.teachers.endpoint import AttemptFailed, TeacherError
from cotgrpo.teachers.server_errors import CONTEXT, ServerError

BUSY = ("HTTP 429", "HTTP 502", "HTTP 503", "HTTP 504", "timeout", "no connection")
"""Failures that pass by themselves. Any other one of a request to load weights is the server's verdict on them."""


@dataclasses.dataclass(frozen=True)
class Version:
    """Weights that a server was given.

    Attributes:
        folder: where they are.
        number: the rollout that they were written for.
        is_adapter: whether the folder holds LoRA's adapters alone.
    """

    folder: Path
    number: int
    is_adapter: bool


class RolloutServer(PatientServer[RolloutServerSettings]):
    """An engine that writes replies.

    Args:
        settings: the server. The key is read from the environment here.
        vocabulary: the student's tokens, which must be the server's too.
        sampling: how a reply is drawn.
        samples: texts of the student's tokens, to compare the tokenizers and the weights.
        say: prints a line for the user, from any thread.

    Raises:
        TeacherError: the key is missing, or the package openai.
    """

    thread_name = "rollout server"

    def __init__(
        self,
        settings: RolloutServerSettings,
        vocabulary: Vocabulary,
        sampling: SamplingSettings,
        samples: Sequence[Text],
        say: Callable[[str], None],
    ) -> None:
        super().__init__(settings, say)
        self.vocabulary, self.sampling, self.samples = vocabulary, sampling, samples
        self.dialect: RolloutDialect | None = None
        self.loaded: Version | None = None
        self.adapter: str | None = None  # the name of the loaded one
        self.was_away = False

    def connect(self) -> None:
        """Find out how the server is asked, and compare the tokenizers. Waits while the server is down.

        Raises:
            TeacherError: it returns no token ids, or has another tokenizer.
        """
        self.submit(self.start()).result()

    @property
    def takes_adapters(self) -> bool:
        """Whether the server, once connected, takes LoRA's adapters alone."""
        return self.dialect is not None and self.dialect.takes_adapters

    async def start(self) -> None:
        """Do what `connect` says."""
        self.client = self.connection.make_client()
        self.dialect = await self.find_dialect()
        await self.check_tokens()

    @property
    def asked(self) -> RolloutDialect:
        """The dialect, with the name of the loaded adapter, if there is one, in place of the model's."""
        assert self.dialect is not None
        return self.dialect if self.adapter is None else dataclasses.replace(self.dialect, model=self.adapter)

    async def find_dialect(self) -> RolloutDialect:
        """Return the first dialect in which the server returns the ids of a reply's tokens."""
        settings, prompt = self.settings, self.samples[0].context
        wanted = [kind for kind in ROLLOUT_DIALECTS if settings.dialect in ("auto", kind.name)]

        async def attempt(kind: type[RolloutDialect]) -> RolloutDialect:
            dialect = kind(str(settings.base_url), settings.model, self.vocabulary)
            answer = await self.send(dialect.reply_call(prompt, self.sampling, self.seed(0)))
            dialect.reply_fields(answer, prompt, None)
            return dialect

        def without_ids(refusals: list[str]) -> TeacherError:
            return TeacherError(
                f"{self.connection.name} does not return the token ids of its replies with their log-probabilities. "
                f"{'; '.join(kind.returns_ids for kind in wanted)}. What it answered: {'; '.join(refusals)}"
            )

        attempts: dict[str, Callable[[], Coroutine[Any, Any, RolloutDialect]]] = {
            kind.name: functools.partial(attempt, kind) for kind in wanted
        }
        return await self.first_that_answers(attempts, without_ids)

    async def check_tokens(self) -> None:
        """Raise TeacherError unless the server cuts the samples into the student's tokens."""
        dialect = self.dialect
        assert dialect is not None
        for sample in self.samples:
            text = self.vocabulary.text([*sample.context, *sample.scored])
            own = self.vocabulary.encode(text)

            async def ask(text: str = text) -> list[int | str | None]:
                return dialect.read_tokens(await self.send(dialect.token_call(text)))

            difference = cut_differently(self.vocabulary, own, await self.usable(ask, len(own)))
            if difference is not None:
                raise TeacherError(
                    f"{self.connection.name} has another tokenizer than the student: in {text!r:.80}, {difference}. "
                    "Serve the student itself: start the server with the folder or hub id of student.path, or with "
                    "what `cotgrpo export` writes."
                )

    def seed(self, number: int) -> int | None:
        """Return a seed to send, if the settings want one."""
        return number % 2**31 if self.settings.send_seed else None

    def write_later(self, prompts: Sequence[list[int]], seeds: Sequence[int]) -> Future[list[ServedReply]]:
        """Let the server write a reply to each prompt, with the newest weights, in the background."""
        return self.submit(self.write(prompts, seeds))

    async def write(self, prompts: Sequence[list[int]], seeds: Sequence[int]) -> list[ServedReply]:
        """Return a reply to each prompt, `concurrency` of them at a time."""
        slots = asyncio.Semaphore(self.settings.concurrency)

        async def one(prompt: list[int], seed: int) -> ServedReply:
            async with slots:
                return await self.usable(lambda: self.write_once(prompt, seed), len(prompt))

        while True:
            try:
                async with asyncio.TaskGroup() as group:
                    tasks = [group.create_task(one(*pair)) for pair in zip(prompts, seeds, strict=True)]
            except BaseExceptionGroup as errors:
                raise errors.exceptions[0] from None
            if not self.was_away:
                return [task.result() for task in tasks]
            self.was_away = False
            await self.check_tokens()
            self.adapter = None  # of the server before
            if self.loaded is not None:
                await self.load(self.loaded)

    async def write_once(self, prompt: list[int], seed: int) -> ServedReply:
        """Ask once for a reply. Raises Malformed, Refused or AttemptFailed."""
        answer = await self.send(self.asked.reply_call(prompt, self.sampling, self.seed(seed)))
        version = None if self.loaded is None else self.loaded.number
        return self.asked.read_reply(answer, prompt, self.sampling, version)

    def load_later(self, version: Version) -> Future[None]:
        """Let the server load weights, in the background. Raises TeacherError if it does not."""
        return self.submit(self.load(version))

    async def load(self, version: Version) -> None:
        """Do what `load_later` says."""
        dialect, folder = self.dialect, str(version.folder)
        assert dialect is not None
        if not version.is_adapter:
            for call in dialect.weights_calls(folder, version.number):
                await self.load_part(call, folder)
            self.loaded = version
            return
        # A name that was never used: no adapter of an earlier run can be meant by it.
        name, before = f"{self.settings.model or 'student'}-{version.number}-{secrets.token_hex(4)}", self.adapter
        await self.load_part(dialect.adapter_call(folder, name), folder)
        self.loaded, self.adapter = version, name
        if before is not None:
            try:
                await self.send(dialect.unload_call(before))
            except (Refused, AttemptFailed, Malformed) as error:
                self.say(f"{self.connection.name} keeps the adapter {before}: {self.connection.shorten(str(error))}")

    async def load_part(self, call: Call, folder: str) -> None:
        """Send one request that loads weights. Waits while the server is down."""
        dialect = self.dialect
        assert dialect is not None
        failures = attempt = 0
        while True:
            try:
                dialect.check_loaded(await self.send(call))
                return
            except Refused as refused:
                if refused.error.status in (401, 402):
                    self.raise_if_fatal(refused.error)
                raise self.not_loaded(folder, f"HTTP {refused.error.status} {refused.error.message}") from None
            except Malformed as error:
                raise self.not_loaded(folder, str(error)) from None
            except AttemptFailed as failed:
                if failed.reason not in BUSY:
                    failures += 1
                    if failures > self.settings.retries:
                        raise self.not_loaded(folder, f"{failed.reason} {failed.detail}") from None
                attempt += 1
                await self.pause(attempt, failed)

    def not_loaded(self, folder: str, words: str) -> TeacherError:
        """Return the error of weights that the server does not load."""
        dialect = self.dialect
        assert dialect is not None
        return TeacherError(
            f"{self.connection.name} did not load the weights in {folder}, so no reply of it is trained on. "
            f"{dialect.takes_weights}, and let it see that folder under that name (grpo.rollouts.folder). Run the same "
            f"command to continue. What it answered: {self.connection.shorten(words)}"
        )

    def probe_later(self) -> Future[list[list[float]] | None]:
        """Return log p of each token of the samples but their first, in the background. None: it cannot give them."""
        return self.submit(self.probe())

    async def probe(self) -> list[list[float]] | None:
        """Do what `probe_later` says."""
        found = []
        for sample in self.samples:
            ids = [*sample.context, *sample.scored]

            async def ask(ids: list[int] = ids) -> list[float]:
                try:
                    return self.asked.read_probe(await self.send(self.asked.probe_call(ids)), ids)
                except (Malformed, Refused):
                    return []

            found.append(await self.usable(ask, len(ids)))
        return found if all(found) else None

    async def pause(self, attempt: int, failed: AttemptFailed) -> None:
        """Wait before the next attempt, and take note of a server that is away for long."""
        down = self.down_since
        if failed.reason == "no connection" and down is not None and time.monotonic() - down >= SAID_AFTER:
            self.was_away = True
        await super().pause(attempt, failed)

    def refusal(self, error: ServerError, length: int) -> TeacherError:
        """Return the error of a request that the server refuses."""
        words, most = self.connection.shorten(error.message), self.sampling.max_new_tokens
        fix = ""
        if CONTEXT.search(error.message):
            fix = (
                f"The prompt has {length} tokens, and the reply up to {most}. Serve the model with a longer context "
                f"(vLLM: --max-model-len {length + most}, SGLang: --context-length), or lower "
                "grpo.ghosts.max_new_tokens. "
            )
        return TeacherError(
            f"{self.connection.name} refuses a request (HTTP {error.status}). {fix}Its message: {words}"
        )
