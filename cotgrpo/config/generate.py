"""The settings of `cotgrpo generate`: questions, teacher, prompt and verification."""

from __future__ import annotations

import dataclasses
import os
import string
from typing import Literal

from cotgrpo.config.own_code import OwnVerifier
from cotgrpo.config.sections import ConfigError, at_least, expect
from cotgrpo.data.layouts.own import columns_problem, row_function_problem
from cotgrpo.teachers.endpoint import EndpointSettings

QUESTION_PROMPT = """Solve the problem. Think step by step, and write down every step.
End with one last line: #### followed by the answer alone.

{question}"""


@dataclasses.dataclass(frozen=True)
class TeacherConfig(EndpointSettings):
    """The teacher: a model behind an OpenAI-compatible endpoint, or a model folder on this machine (path).

    Attributes:
        path: a folder or hub id (owner/name or owner/name@revision) of a model that this library runs itself, in place
            of base_url and model.
        batch: send all requests through the provider's batch API, which takes up to a day and costs less. Stopped and
            run again, the command waits for the same batches.
        input_price: price of a million prompt tokens that you pay, in any currency.
        output_price: price of a million reply tokens that you pay.
        batch_size: replies decoded at a time, with path.
        dtype: storage and compute type, with path; null: as in the folder.
        seed: random seed, with path.
    """

    path: str | None = None
    batch: bool = False
    input_price: float = 0.0
    output_price: float = 0.0
    batch_size: int = 16
    dtype: Literal["float32", "bfloat16"] | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(1, self, "batch_size")
        at_least(0, self, "seed", "input_price", "output_price")

    @property
    def name(self) -> str:
        """The model's name, or the last part of its folder."""
        return self.model or os.path.basename(os.path.normpath(self.path or ""))


@dataclasses.dataclass(frozen=True)
class PromptConfig:
    """The prompt of a question.

    Attributes:
        system: system message; empty: none.
        question: the user's message, with {question} in it.
    """

    system: str = ""
    question: str = QUESTION_PROMPT

    def __post_init__(self) -> None:
        if self.question.count("{question}") != 1:
            raise ConfigError(f"question must hold {{question}} once, got {self.question!r}.")

    def messages(self, question: str) -> list[dict[str, str]]:
        """Return the chat that asks one question."""
        system = [{"role": "system", "content": self.system}] if self.system else []
        return [*system, {"role": "user", "content": self.question.replace("{question}", question)}]


@dataclasses.dataclass(frozen=True)
class VerifyConfig(OwnVerifier):
    """How replies are verified, and which right ones become triples.

    Attributes:
        check: a function of your own, "package.module:function"; empty: compare the answer with the row's. It is called
            as function(row, rationale, answer) with the question's row, and returns whether the reply is right.
        without_gold: what to do with a question that has no right answer, without check. error: stop. majority: take
            the answer of most of its replies. unverified: keep each reply that has an answer.
        keep: right replies of a question to keep: all, the shortest, those that differ most, or those with the highest
            verify.reward.
        keep_at_most: number of replies of a question that shortest, diverse and best keep.
        test_sets: files or hub ids of test questions. Questions and replies that share an n-gram with one are dropped.
        ngram: words of an n-gram that must not be shared with a test question. A shorter test question must
            be equal as a whole. In scripts without spaces, an ideograph is a word, and so are two kana or letters.
    """

    check: str = ""
    without_gold: Literal["error", "majority", "unverified"] = "error"
    keep: Literal["all", "shortest", "diverse", "best"] = "all"
    keep_at_most: int = 1
    test_sets: list[str] | str = dataclasses.field(default_factory=list)
    ngram: int = 13

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(1, self, "keep_at_most", "ngram")
        if (self.keep == "best") != bool(self.reward):
            raise ConfigError(
                "reward and keep best belong together: the best replies are those with the highest reward."
            )
        if self.check and self.function:
            raise ConfigError("function and check both decide which replies are right: give one of them.")
        module, colon, function = self.check.partition(":")
        if self.check and not (colon and module.strip(string.whitespace) and function):
            raise ConfigError(f"check must be package.module:function, got {self.check!r}.")


@dataclasses.dataclass(frozen=True)
class GenerateConfig:
    """All settings of `cotgrpo generate`.

    Attributes:
        questions: files, folders, patterns (one or a list) or hub ids of questions, as data.train takes them. To verify
            against, a row needs gold or answer.
        columns: our names of fields and the columns that hold them, such as {question: q, gold: meta.answer}; empty:
            the columns are found by their names. Test sets may have other columns.
        row_function: a function of your own, "package.module:function", that turns a row into one of a known layout.
            It returns None to leave the row out.
        split: keep only rows with this split field; for a folder or a hub id, the split to load.
        bad_rows: what to do with a row that is not a question with a right answer. drop: leave it out and count it. A
            bad row of a test set is always an error.
        max_questions: use the first questions only; 0: all.
        candidates: replies to each question.
        top_logprobs: keep this many of the teacher's likeliest tokens, with their log-probabilities, at every token of
            its replies, in ghosts.parquet, for grpo.ghosts.source cached; 0: none.
        score_for: folder of a stage, such as runs/run/sft. The rows then hold replies, such as a student's own. The
            teacher's server scores them (top_logprobs) in the tokens of that student, and writes none; null: off.
        out: folder of everything that the command writes. Run again, the command resumes there.
        format: file format of the triples.
        teacher: the model that writes the replies.
        prompt: the prompt of a question.
        verify: how replies are verified, and which become triples.
    """

    questions: list[str] | str = dataclasses.field(default_factory=list)
    columns: dict[str, str] = dataclasses.field(default_factory=dict)
    row_function: str = ""
    split: str | None = None
    bad_rows: Literal["error", "drop"] = "error"
    max_questions: int = 0
    candidates: int = 1
    top_logprobs: int = 0
    score_for: str | None = None
    out: str = "ghosts"
    format: Literal["jsonl", "parquet"] = "jsonl"
    teacher: TeacherConfig = TeacherConfig()
    prompt: PromptConfig = PromptConfig()
    verify: VerifyConfig = VerifyConfig()

    def __post_init__(self) -> None:
        at_least(1, self, "candidates")
        at_least(0, self, "max_questions", "top_logprobs")
        if problem := columns_problem(self.columns) or row_function_problem(self.row_function):
            raise ConfigError(problem)
        if self.candidates > 1 and self.teacher.temperature == 0:
            raise ConfigError(
                f"candidates is {self.candidates}, but replies at teacher.temperature 0 are all the same: raise the "
                "temperature."
            )
        if self.verify.without_gold == "majority" and self.candidates < 3:
            raise ConfigError(
                f"candidates must be at least 3 for a majority (verify.without_gold), got {self.candidates}."
            )

    def check_complete(self) -> None:
        """Raise ConfigError unless questions and one teacher are named, which a partial config may leave open."""
        if not self.questions:
            raise ConfigError(
                "questions is empty: name at least one .jsonl or .parquet file of questions, or a hub id."
            )
        teacher = self.teacher
        if self.score_for is not None:
            expect(self.top_logprobs >= 1, self, "top_logprobs", "at least 1 with score_for")
            if teacher.path is not None or teacher.batch or not teacher.base_url:
                raise ConfigError(
                    "score_for needs a server that returns log-probabilities of a given text: set teacher.base_url, "
                    "without teacher.path and teacher.batch."
                )
            return
        if (teacher.path is None) == (teacher.model is None):
            raise ConfigError(
                "Name one teacher: teacher.model (with teacher.base_url) for an endpoint, or teacher.path for a model "
                "folder."
            )
        if teacher.path is not None and teacher.base_url is not None:
            raise ConfigError(
                "teacher.base_url does not apply to a model folder (teacher.path). Remove one of the two."
            )
        if teacher.path is not None and teacher.batch:
            raise ConfigError("teacher.batch does not apply to a model folder (teacher.path). Remove one of the two.")
        if teacher.path is not None and teacher.temperature is None:
            raise ConfigError("teacher.temperature must be a number for a model folder (teacher.path).")
