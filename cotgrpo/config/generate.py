"""The settings of `cotgrpo generate`: questions, the teacher, the prompt, and what is kept of its replies."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import re
import string
from typing import Any, Literal
from urllib.parse import urlsplit

from cotgrpo.config.settings import ConfigError, at_least
from cotgrpo.teachers.endpoint import EndpointTeacher

NO_KEY = "none"
"""Sent where no key is wanted, since the client insists on one."""
LOOPBACK = ("localhost", "127.0.0.1", "::1")
VARIABLE = re.compile("[A-Z_][A-Z0-9_]*")
QUESTION_PROMPT = """Solve the problem. Think step by step, and write down every step.
End with one last line: #### followed by the answer alone.

{question}"""


@dataclasses.dataclass(frozen=True)
class TeacherConfig:
    """Who writes the replies: a model behind an OpenAI-compatible endpoint, or a model folder on this machine.

    Attributes:
        base_url: the endpoint, such as http://localhost:8000/v1; null: what the openai client takes itself (OPENAI_BASE_URL, or OpenAI's).
        model: its name there.
        path: instead of both, a folder or hub id of a model that this library runs itself.
        api_key_env: name of the environment variable that holds the key. The key itself is no setting and is written nowhere. An endpoint
            on this machine needs none.
        temperature: of what is drawn; 0 is greedy; null: not sent, as some reasoning models demand.
        top_p: draw from the fewest likeliest tokens that hold this much probability; null: not sent.
        max_tokens: longest reply; for reasoning models the reasoning counts.
        token_limit_field: what the endpoint calls max_tokens; OpenAI's reasoning models want max_completion_tokens.
        extra_body: a JSON object of further fields of every request, such as {"top_k": 20}.
        concurrency: requests at a time.
        requests_per_minute: begun at most; 0: no limit.
        timeout: seconds for one request.
        retries: of a request that failed and may yet succeed.
        retry_delay: seconds before the first retry; doubled each time, with jitter. A longer Retry-After of the server counts.
        longest_delay: seconds that the doubling stops at.
        longest_wait: seconds of a Retry-After that are waited for; a longer one stops the command, which goes on when run again.
        failures_in_a_row: stop after so many requests that failed for good with no reply between them.
        input_price: of a million prompt tokens, in whatever currency.
        output_price: of a million reply tokens.
        batch_size: of path, replies at a time.
        dtype: of path, storage and compute type; null: as in the folder.
        seed: of path, of what is drawn.
    """

    base_url: str | None = None
    model: str | None = None
    path: str | None = None
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
    input_price: float = 0.0
    output_price: float = 0.0
    batch_size: int = 16
    dtype: Literal["float32", "bfloat16"] | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        at_least(1, self, "max_tokens", "concurrency", "failures_in_a_row", "batch_size")
        at_least(0, self, "requests_per_minute", "retries", "retry_delay", "longest_delay", "longest_wait", "seed")
        at_least(0, self, "input_price", "output_price")
        if not (0 < self.timeout < math.inf):
            raise ConfigError(f"teacher.timeout must be positive, got {self.timeout}.")
        if self.temperature is not None and not 0 <= self.temperature < math.inf:
            raise ConfigError(f"teacher.temperature must be at least 0, or null, got {self.temperature}.")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ConfigError(f"teacher.top_p must lie in (0, 1], or be null, got {self.top_p}.")
        if not VARIABLE.fullmatch(self.api_key_env):
            raise ConfigError(  # without the value, which may be the key itself
                "teacher.api_key_env must be the name of an environment variable in capitals, such as OPENAI_API_KEY, and not the key."
            )
        if self.base_url is not None:
            url = urlsplit(self.base_url)
            if url.scheme not in ("http", "https") or not url.hostname:
                raise ConfigError(
                    f"teacher.base_url must be a URL such as http://localhost:8000/v1, got {self.base_url!r:.60}."
                )
            if url.username is not None or url.query:
                raise ConfigError(
                    "teacher.base_url holds a user name or a query, where keys are kept at times, and settings are saved with the output. "
                    "Give the endpoint alone, and the key in the environment (teacher.api_key_env)."
                )
        self.extra_fields()

    def extra_fields(self) -> dict[str, Any]:
        """What `extra_body` holds."""
        try:
            fields = json.loads(self.extra_body or "{}")
        except ValueError as error:
            raise ConfigError(f"teacher.extra_body is not valid JSON ({error}).") from error
        if not isinstance(fields, dict):
            raise ConfigError(f"teacher.extra_body must be a JSON object, got {type(fields).__name__}.")
        return fields

    @property
    def name(self) -> str:
        """The model's name, or the folder's last part."""
        return self.model or os.path.basename(os.path.normpath(self.path or ""))

    def endpoint(self) -> EndpointTeacher:
        """The teacher behind the endpoint, with the key from the environment.

        Raises:
            ConfigError: no key where one is needed, or one that cannot be sent.
        """
        assert self.model is not None
        key = os.environ.get(self.api_key_env, "").strip()
        host = urlsplit(self.base_url or os.environ.get("OPENAI_BASE_URL", "")).hostname
        if not key and host not in LOOPBACK:
            raise ConfigError(
                f"The environment variable {self.api_key_env} is not set: expected the teacher's key in it. Export it, or name another "
                "variable in teacher.api_key_env."
            )
        if not all(" " < letter <= "~" for letter in key):
            raise ConfigError(f"The key in {self.api_key_env} holds characters that no HTTP header can: copy it again.")
        sampling = {"temperature": self.temperature, "top_p": self.top_p, self.token_limit_field: self.max_tokens}
        fields = {name: value for name, value in sampling.items() if value is not None}
        return EndpointTeacher(
            base_url=self.base_url,
            model=self.model,
            api_key=key or NO_KEY,
            fields=fields | self.extra_fields(),
            concurrency=self.concurrency,
            requests_per_minute=self.requests_per_minute,
            timeout=self.timeout,
            retries=self.retries,
            retry_delay=self.retry_delay,
            longest_delay=self.longest_delay,
            longest_wait=self.longest_wait,
            failures_in_a_row=self.failures_in_a_row,
        )


@dataclasses.dataclass(frozen=True)
class PromptConfig:
    """What the teacher reads.

    Attributes:
        system: a system message; empty: none.
        question: the user's message, with {question} in it.
    """

    system: str = ""
    question: str = QUESTION_PROMPT

    def __post_init__(self) -> None:
        if self.question.count("{question}") != 1:
            raise ConfigError(f"prompt.question must hold {{question}} once, got {self.question!r}.")

    def messages(self, question: str) -> list[dict[str, str]]:
        """The chat that asks one question."""
        system = [{"role": "system", "content": self.system}] if self.system else []
        return [*system, {"role": "user", "content": self.question.replace("{question}", question)}]


@dataclasses.dataclass(frozen=True)
class VerifyConfig:
    """Which replies become triples.

    Attributes:
        check: a function of your own, "package.module:function", that is called as function(row, rationale, answer) with the question's
            row as it was read, and returns whether the reply is right; empty: the answer is compared with the row's.
        without_gold: a question without a right answer, where there is no check: error; majority: the answer that most of its replies
            give; unverified: every reply that has an answer.
        keep: of a question's right replies: all, the shortest, or the ones that differ most.
        keep_at_most: of shortest and diverse, how many.
        test_sets: files or hub ids whose questions must not be learned from: a question or reply that shares an n-gram with one is left out.
        ngram: words of such an n-gram; a test question of fewer words must be the same as a whole.
    """

    check: str = ""
    without_gold: Literal["error", "majority", "unverified"] = "error"
    keep: Literal["all", "shortest", "diverse"] = "all"
    keep_at_most: int = 1
    test_sets: list[str] | str = dataclasses.field(default_factory=list)
    ngram: int = 13

    def __post_init__(self) -> None:
        at_least(1, self, "keep_at_most", "ngram")
        module, colon, function = self.check.partition(":")
        if self.check and not (colon and module.strip(string.whitespace) and function):
            raise ConfigError(f"verify.check must be package.module:function, got {self.check!r}.")


@dataclasses.dataclass(frozen=True)
class GenerateConfig:
    """All settings of `cotgrpo generate`.

    Attributes:
        questions: .jsonl or .parquet files (one or a list) or hub ids, with a question and, to verify against, gold or answer in each row.
        split: keep only rows whose split field is this; of a hub id, the split to load.
        max_questions: use the first so many; 0: all.
        candidates: replies to each question.
        out: the folder of everything that the command writes; run again, it goes on there.
        format: of the triples.
        teacher: who writes the replies.
        prompt: what the teacher reads.
        verify: which replies become triples.
    """

    questions: list[str] | str = dataclasses.field(default_factory=list)
    split: str | None = None
    max_questions: int = 0
    candidates: int = 1
    out: str = "ghosts"
    format: Literal["jsonl", "parquet"] = "jsonl"
    teacher: TeacherConfig = TeacherConfig()
    prompt: PromptConfig = PromptConfig()
    verify: VerifyConfig = VerifyConfig()

    def __post_init__(self) -> None:
        at_least(1, self, "candidates")
        at_least(0, self, "max_questions")
        if self.candidates > 1 and self.teacher.temperature == 0:
            raise ConfigError(
                f"candidates is {self.candidates}, but replies at teacher.temperature 0 are all the same: raise the temperature."
            )
        if self.verify.without_gold == "majority" and self.candidates < 3:
            raise ConfigError(
                f"A majority (verify.without_gold) needs at least 3 candidates a question, got candidates {self.candidates}."
            )

    def check_complete(self) -> None:
        """Raises ConfigError where the questions or the teacher are not named, which a partial config may leave open."""
        if not self.questions:
            raise ConfigError(
                "questions is empty: name at least one .jsonl or .parquet file of questions, or a hub id."
            )
        teacher = self.teacher
        if (teacher.path is None) == (teacher.model is None):
            raise ConfigError(
                "Name one teacher: teacher.model (with teacher.base_url) for an endpoint, or teacher.path for a model folder."
            )
        if teacher.path is not None and teacher.base_url is not None:
            raise ConfigError("teacher.base_url is no setting of a model folder (teacher.path). Remove one of the two.")
        if teacher.path is not None and teacher.temperature is None:
            raise ConfigError("teacher.temperature must be a number for a model folder (teacher.path).")
