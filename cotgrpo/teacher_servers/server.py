"""A teacher on a server: it is asked for the log-probabilities of texts in a thread of its own, while training goes on.

A server without log-probabilities, or with another tokenizer, is a `TeacherError`.
"""

from __future__ import annotations

import asyncio
import dataclasses
import functools
import re
from collections.abc import Callable, Coroutine, Sequence
from concurrent.futures import Future
from typing import Any, ClassVar, Literal, Protocol, runtime_checkable

import numpy as np

from cotgrpo.objectives import MASKED_LOGIT
from cotgrpo.teacher_servers.dialects import DIALECTS, Dialect, Malformed, Top
from cotgrpo.teacher_servers.patient_server import PatientServer
from cotgrpo.teacher_servers.vocabulary import Vocabulary, cut_differently
from cotgrpo.teachers.endpoint import ConnectionSettings, TeacherError
from cotgrpo.teachers.server_errors import CONTEXT, ServerError

LARGEST_DRIFT = 0.5
"""Nats by which a server's log-probabilities of one text may differ from one time to another. Rounding gives less."""
PROBED_TOKENS = 32
"""Places of the text that shows whether a server still has the same model."""
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


class ScoringServer(PatientServer[ServerSettings]):
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

    thread_name = "teacher server"

    def __init__(
        self,
        settings: ServerSettings,
        vocabulary: Vocabulary,
        top_k: int,
        samples: Sequence[Text],
        say: Callable[[str], None],
    ) -> None:
        super().__init__(settings, say)
        self.vocabulary, self.top_k, self.samples = vocabulary, top_k, samples
        self.dialect: Dialect | None = None
        self.fingerprint: list[float] = []

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
        settings, sample = self.settings, self.samples[0]
        wanted = [kind for kind in DIALECTS if settings.dialect in ("auto", kind.name)]

        async def attempt(kind: type[Dialect]) -> Dialect:
            dialect = kind(str(settings.base_url), settings.model, self.vocabulary)
            if not any(await self.score_once(dialect, Text(sample.context, sample.scored[:PROBED_TOKENS]))):
                raise Malformed("its likeliest tokens are none of the student's")
            return dialect

        attempts: dict[str, Callable[[], Coroutine[Any, Any, Dialect]]] = {
            kind.name: functools.partial(attempt, kind) for kind in wanted
        }
        return await self.first_that_answers(attempts, lambda texts: self.without_log_probs(wanted, texts))

    def without_log_probs(self, wanted: Sequence[type[Dialect]], refusals: Sequence[str]) -> TeacherError:
        """Return the error of a server that no dialect gets log-probabilities from."""
        fixes = "; ".join(dict.fromkeys(kind.fix.format(top_k=self.top_k) for kind in wanted))
        return TeacherError(
            f"The teacher at {self.where} does not return the {self.top_k} likeliest tokens of a given text. {fixes}. "
            f"Or ask for fewer ({self.settings.top_settings}). What it answered: {'; '.join(refusals)}"
        )

    async def check_tokens(self) -> None:
        """Raise TeacherError unless the server cuts the samples into the student's tokens."""
        assert self.dialect is not None
        for sample in self.samples:
            text = self.vocabulary.text([*sample.context, *sample.scored])
            own = self.vocabulary.encode(text)
            theirs = await self.usable(lambda text=text: self.tokens_once(text), len(own))  # type: ignore[misc]
            difference = cut_differently(self.vocabulary, own, theirs)
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
