"""The section `grpo.ghosts`: where ghost tokens come from, and on whose contexts. One dataclass for each source.

GRPO here is GhostRespond Policy Optimization, not Group Relative.
"""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar, Literal

from cotgrpo.config.sections import ConfigError, NotApplicable, at_least, expect
from cotgrpo.teacher_servers.server import ServerSettings

PRIVILEGED_PROMPT = (
    "{question}\n\nA correct solution, for reference:\n{rationale}\n{answer}\n\nNow answer the question: {question}"
)


@dataclasses.dataclass(frozen=True)
class Ghosts:
    """A source of ghost tokens.

    `source` is its name in the settings. `on_policy` is whether the contexts are newly drawn replies of the student.
    """

    source: ClassVar[str]
    on_policy: ClassVar[bool] = False


@dataclasses.dataclass(frozen=True)
class TeacherForced(Ghosts):
    """The text of the training rows is both context and ghost."""

    source: ClassVar[str] = "teacher_forced"


@dataclasses.dataclass(frozen=True)
class StudentReplies(Ghosts):
    """A source that lets the student reply to questions.

    Attributes:
        max_new_tokens: longest reply of the student in tokens. The rest of data.seq_len is for the question.
        decode_batch_size: replies decoded at a time; null: a whole batch. Fewer need less memory. With self_reply, null
            means eval.batch_size. A reply that ends makes room for the next prompt.
    """

    max_new_tokens: int = 256
    decode_batch_size: int | None = None

    def __post_init__(self) -> None:
        at_least(1, self, "max_new_tokens")
        size = self.decode_batch_size
        expect(size is None or size >= 1, self, "decode_batch_size", "at least 1 or null")


@dataclasses.dataclass(frozen=True)
class Prompted(Ghosts):
    """A source that may reply to other questions than those of the training rows.

    Attributes:
        prompts: files or hub ids of questions to reply to; empty: those of the training rows. Each question comes with
            its right answer. No text is needed.
    """

    prompts: tuple[str, ...] | str = ()


@dataclasses.dataclass(frozen=True)
class LiveGhosts(StudentReplies):
    """A model that gives the ghost token at each prefix of the student's own replies (on-policy).

    Attributes:
        choice: ghost token: the likeliest of the live ghost's distribution, or one drawn from it.
        temperature: sampling temperature of the student's replies, above 0.
        teacher_forced_share: share of a batch's rows, in [0, 1), that hold the text of training rows instead.
        updates_per_rollout: updates on the same replies. A later update weights each context by how much likelier the
            student now makes it.
        ratio_clip: bound of the weights of later updates: they lie in [1 - ratio_clip, 1 + ratio_clip].
        num_generations: replies to each question of a batch.
        when: contexts at which the ghost counts: always; only in replies that are wrong; or only where the ghost token
            is not the one that the student drew. At the others only grpo.reward_weight teaches.
    """

    choice: Literal["argmax", "drawn"] = "argmax"
    temperature: float = 1.0
    teacher_forced_share: float = 0.0
    updates_per_rollout: int = 1
    ratio_clip: float = 0.2
    num_generations: int = 1
    when: Literal["always", "wrong", "disagree"] = "always"

    on_policy: ClassVar[bool] = True

    @property
    def is_fixed_model(self) -> bool:
        """Whether the ghost is one frozen model of this process, which a step can compare with exactly."""
        return False

    @property
    def has_other_tokenizer(self) -> bool:
        """Whether the ghost's tokens may be others than the student's."""
        return False

    def __post_init__(self) -> None:
        super().__post_init__()
        expect(self.temperature > 0, self, "temperature", "above 0, so that replies differ")
        expect(0 <= self.teacher_forced_share < 1, self, "teacher_forced_share", "in [0, 1)")
        at_least(1, self, "updates_per_rollout", "num_generations")
        expect(0 < self.ratio_clip < 1, self, "ratio_clip", "in (0, 1)")

    def forced_rows(self, batch_size: int) -> int:
        """Return how many rows of a batch are teacher-forced. At least one row is the student's own."""
        return min(round(self.teacher_forced_share * batch_size), batch_size - 1)


@dataclasses.dataclass(frozen=True)
class Teachers(LiveGhosts, Prompted):
    """A live ghost that may be one of several.

    Attributes:
        teachers: several teachers in place of one. Each batch has one of them. Without a route: each with its share of
            the batches, as {org/a: 0.7, org/b: 0.3}. With one: the teacher of each value of the field, as
            {math: org/a, "*": org/b}, where * stands for all other values.
        route: field of the questions' rows that decides which teacher they have; empty: the shares decide.
    """

    teachers: dict[str, float | str] = dataclasses.field(default_factory=dict, hash=False)
    route: str = ""

    one: ClassVar[str]

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.teachers and self.route:
            raise ConfigError(
                f"route is {self.route!r}, but teachers is empty: name the teacher of each of its values."
            )
        if self.teachers and getattr(self, self.one):
            raise ConfigError(f"{self.one} names one teacher, and teachers several: give one of the two.")
        for name, value in self.teachers.items():
            is_share = isinstance(value, float | int) and not isinstance(value, bool) and value > 0
            if not self.route and not is_share:
                raise ConfigError(f"teachers.{name} must be a share above 0 (or set route), got {value!r}.")
            if self.route and not (isinstance(value, str) and value.strip()):
                raise ConfigError(f"teachers.{name} must name the teacher of that {self.route}, got {value!r}.")

    @property
    def names(self) -> list[str]:
        """The teachers, if there are several."""
        return list(dict.fromkeys(str(value) for value in self.teachers.values())) if self.route else [*self.teachers]

    def alone(self, name: str) -> Teachers:
        """Return the settings of one of several teachers."""
        own: dict[str, Any] = {"teachers": {}, "route": "", self.one: name}
        return dataclasses.replace(self, **own)


@dataclasses.dataclass(frozen=True)
class TeacherModel(Teachers):
    """A live ghost that is another model.

    Attributes:
        teacher: folder or hub id (owner/name or owner/name@revision) of the live teacher.
        other_tokenizer: whether the teacher may have another tokenizer than the student. Contexts inside a token of the
            teacher are not supervised then (docs/teachers.md).
    """

    teacher: str | None = None
    other_tokenizer: bool = False

    source: ClassVar[str] = "teacher_model"
    one: ClassVar[str] = "teacher"

    @property
    def is_fixed_model(self) -> bool:
        return not self.other_tokenizer and not self.teachers

    @property
    def has_other_tokenizer(self) -> bool:
        return self.other_tokenizer

    def __post_init__(self) -> None:
        super().__post_init__()
        expect(bool(self.teacher or self.teachers), self, "teacher", "the folder or hub id of the live teacher")


@dataclasses.dataclass(frozen=True)
class TeacherServer(Teachers, ServerSettings):
    """A live ghost behind an endpoint: a server that returns the log-probabilities of a given text.

    docs/teachers.md has the commands for vLLM, SGLang and llama.cpp. Several teachers are named by their base_url.

    Attributes:
        top_logprobs: likeliest tokens that the server is asked for at each prefix; null: as many as the objective
            reads, or 20 for drawn ghosts, or 1.
        prefetch_rollouts: draw replies one update ahead, and let the server score them while the device works. They
            come from the student before that update.
        tokenizer: folder or hub id of the teacher's tokenizer, if it is another than the student's. Contexts inside a
            token of the teacher are not supervised then.
    """

    top_logprobs: int | None = None
    prefetch_rollouts: bool = False
    tokenizer: str | None = None

    source: ClassVar[str] = "teacher_server"
    one: ClassVar[str] = "base_url"

    @property
    def has_other_tokenizer(self) -> bool:
        return self.tokenizer is not None

    def __post_init__(self) -> None:
        super().__post_init__()
        ServerSettings.__post_init__(self)
        address = "the server's address, such as http://localhost:8000/v1"
        expect(bool(self.base_url or self.teachers), self, "base_url", address)
        if self.teachers and self.prefetch_rollouts:
            raise ConfigError("prefetch_rollouts needs one teacher, for the next batch may have another. Remove it.")
        expect(self.top_logprobs is None or self.top_logprobs >= 1, self, "top_logprobs", "at least 1 or null")

    def wanted(self, top_k: int) -> int:
        """Return how many tokens the server is asked for, if the objective reads `top_k` of them."""
        return max(self.top_logprobs or (20 if self.choice == "drawn" else 1), top_k)


@dataclasses.dataclass(frozen=True)
class PrivilegedSelf(LiveGhosts):
    """A live ghost that is the student itself, with the row's solution in its prompt.

    Attributes:
        privileged_prompt: template of the live ghost's prompt, with {question}, {rationale} and {answer}. {reply} is
            the reply of the student that the ghost is asked about, and {feedback} what the verifier says of it. With
            one of them the device waits while the replies are judged.
        self: the ghost's parameters: those before the stage (frozen), the student's present ones (live), or their
            exponential moving average (ema).
        decay: share of the moving average that stays at each update, in (0, 1).
    """

    privileged_prompt: str = PRIVILEGED_PROMPT
    self: Literal["frozen", "live", "ema"] = "frozen"
    decay: float = 0.99

    source: ClassVar[str] = "privileged_self"

    @property
    def is_fixed_model(self) -> bool:
        return self.self == "frozen" and not self.reads_reply

    @property
    def reads_reply(self) -> bool:
        """Whether the prompt of the ghost depends on the reply."""
        return self.privileged("", "", "", "\0", "\0") != self.privileged("", "", "")

    def not_applicable(self) -> NotApplicable:
        """Return `decay` without a moving average."""
        if self.self == "ema":
            return NotApplicable()
        return NotApplicable(("decay",), "self", f"grpo.ghosts.self {self.self}. Set it to ema, or remove decay.")

    def __post_init__(self) -> None:
        super().__post_init__()
        expect(0 < self.decay < 1, self, "decay", "in (0, 1)")
        try:
            text = self.privileged(question="\0q", rationale="\0r", answer="\0a")
        except (KeyError, IndexError, ValueError) as error:
            raise ConfigError(f"privileged_prompt holds a field that is not known: {error}.") from None
        complete = "\0q" in text and ("\0a" in text or self.reads_reply)
        expect(complete, self, "privileged_prompt", "a text with {question} and {answer}, or {feedback}")

    def privileged(self, question: str, rationale: str, answer: str, reply: str = "", feedback: str = "") -> str:
        """Return the question together with its solution, and the reply with what the verifier says of it."""
        return self.privileged_prompt.format(
            question=question, rationale=rationale, answer=answer, reply=reply, feedback=feedback
        )


@dataclasses.dataclass(frozen=True)
class SelfReply(StudentReplies):
    """The student's own right replies, the likeliest of several for each question, refreshed during training.

    Attributes:
        num_generations: replies to each question.
        temperatures: sampling temperatures of the replies, in turn.
        questions: questions replied to at a time.
        refresh_every: updates between two refreshes.
    """

    num_generations: int = 4
    temperatures: tuple[float, ...] = (0.7, 1.0)
    questions: int = 256
    refresh_every: int = 50

    source: ClassVar[str] = "self_reply"

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(1, self, "num_generations", "questions", "refresh_every")
        sampled = bool(self.temperatures) and all(t > 0 for t in self.temperatures)
        expect(sampled, self, "temperatures", "one or more numbers above 0")


@dataclasses.dataclass(frozen=True)
class VerifiedReward(StudentReplies, Prompted):
    """No ghost: which of the student's replies to a question are right. For the objective group_relative alone.

    Attributes:
        num_generations: replies to each question, which are compared with each other.
        updates_per_rollout: updates on the same replies.
        prefetch_rollouts: draw replies one update ahead, and grade them while the device works. They come from the
            student before that update.
    """

    num_generations: int = 4
    updates_per_rollout: int = 1
    prefetch_rollouts: bool = False

    source: ClassVar[str] = "verified_reward"
    on_policy: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        expect(self.num_generations >= 2, self, "num_generations", "at least 2, since replies are compared")
        at_least(1, self, "updates_per_rollout")


@dataclasses.dataclass(frozen=True)
class Cached(Ghosts):
    """The text of the training rows, with a teacher's distribution at its tokens that was kept before.

    Attributes:
        path: ghosts.parquet, as `cotgrpo generate --top_logprobs K` writes it.
        ghost_token: the teacher's likeliest where it is known, or the row's own token.
        missing: what to do with a training row without an entry in the file; text: learn from the text alone.
    """

    path: str | None = None
    ghost_token: Literal["argmax", "text"] = "argmax"
    missing: Literal["error", "text"] = "error"

    source: ClassVar[str] = "cached"
    is_fixed_model: ClassVar[bool] = False

    def __post_init__(self) -> None:
        expect(bool(self.path), self, "path", "the file of cached ghosts, such as ghosts/ghosts.parquet")


SOURCES: dict[str, type[Ghosts]] = {
    kind.source: kind
    for kind in (TeacherForced, Cached, TeacherModel, TeacherServer, PrivilegedSelf, SelfReply, VerifiedReward)
}
"""Each source by its name."""
