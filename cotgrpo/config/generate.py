"""The settings of `cotgrpo generate`: questions, the teacher, the prompt, and what is kept of its replies."""

from __future__ import annotations

import dataclasses
import os
import string
from typing import Literal

from cotgrpo.config.sections import ConfigError, at_least
from cotgrpo.teachers.endpoint import EndpointSettings

QUESTION_PROMPT = """Solve the problem. Think step by step, and write down every step.
End with one last line: #### followed by the answer alone.

{question}"""


@dataclasses.dataclass(frozen=True)
class TeacherConfig(EndpointSettings):
    """The teacher: a model behind an OpenAI-compatible endpoint, or a model folder on this machine (path).

    Attributes:
        path: a folder or hub id of a model that this library runs itself, instead of base_url and model.
        input_price: price of a million prompt tokens, in any currency.
        output_price: price of a million reply tokens.
        batch_size: replies decoded at a time, with path.
        dtype: storage and compute type, with path; null: as in the folder.
        seed: random seed, with path.
    """

    path: str | None = None
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
        """The model's name, or the folder's last part."""
        return self.model or os.path.basename(os.path.normpath(self.path or ""))


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
