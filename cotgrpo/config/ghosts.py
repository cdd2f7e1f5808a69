"""The settings of `grpo.ghosts`: where ghost tokens come from, and on whose contexts. GRPO is GhostRespond Policy Optimization, not Group Relative."""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

from cotgrpo.objectives import GroupRelative, Nll, Objective, Pair, Reinforce, RewardGradient
from cotgrpo.objectives.divergences import ForwardKl, ReferenceKl

PRIVILEGED_PROMPT = (
    "{question}\n\nA correct solution, for reference:\n{rationale}\n{answer}\n\nNow answer the question: {question}"
)
LIVE = ("teacher_model", "privileged_self")
"""Sources that are asked at the student's own prefixes."""

OBJECTIVES = {
    "pair": Pair,
    "nll": Nll,
    "forward_kl": ForwardKl,
    "reward_gradient": RewardGradient,
    "reinforce": Reinforce,
    "group_relative": GroupRelative,
}
OF_LIVE = (
    "choice",
    "temperature",
    "max_new_tokens",
    "decode_batch_size",
    "teacher_forced_share",
    "updates_per_rollout",
    "ratio_clip",
)
OWN_SETTINGS: dict[str, tuple[str, ...]] = {
    "teacher_forced": (),
    "teacher_model": ("teacher", "prompts", *OF_LIVE),
    "privileged_self": ("privileged_prompt", *OF_LIVE),
    "self_reply": (
        "num_generations",
        "temperatures",
        "questions",
        "refresh_every",
        "max_new_tokens",
        "decode_batch_size",
    ),
    "verified_reward": (
        "prompts",
        "num_generations",
        "max_new_tokens",
        "decode_batch_size",
        "updates_per_rollout",
        "prefetch_rollouts",
    ),
}


@dataclasses.dataclass(frozen=True)
class ObjectiveConfig:
    """The GhostRespond objective of one token; cotgrpo.objectives has the formulas.

    Attributes:
        name: pair (the default of the method), nll, forward_kl (to the distribution of a live ghost), reward_gradient, or reinforce (for study: it does not
            work). Or, to be compared with, group_relative: what the field calls GRPO, which has no ghost and wants ghosts.source verified_reward.
        beta: of pair, the sharpness of the preference.
        nll_weight: of pair, the weight of -log p(ghost).
        pair_weight: of pair, the weight of the preference.
        negatives: of pair, what the ghost is preferred to.
        estimator: of pair, the exact mean over the vocabulary, or drawn tokens.
        samples: of pair (drawn) and reward_gradient, tokens drawn at each context.
        top_k: of forward_kl, the live ghost's likeliest tokens that are told apart; all others are one outcome.
        clip: of group_relative, the likelihood ratio counts within [1 - clip, 1 + clip].
        reference_kl: weight of KL(student || student before this stage), of group_relative estimated by the drawn token; 0: none.
    """

    name: Literal["pair", "nll", "forward_kl", "reward_gradient", "reinforce", "group_relative"] = "pair"
    beta: float = 1.0
    nll_weight: float = 1.0
    pair_weight: float = 0.3
    negatives: Literal["policy", "calibrated"] = "policy"
    estimator: Literal["exact", "drawn"] = "exact"
    samples: int = 1
    top_k: int = 16
    clip: float = 0.2
    reference_kl: float = 0.0

    def build(self) -> Objective:
        """The objective; raises ValueError where a setting is given that it does not have."""
        kind: Any = OBJECTIVES[self.name]
        has = {field.name for field in dataclasses.fields(kind)} - {"kl_weight"}
        for field in dataclasses.fields(self):
            changed = getattr(self, field.name) != field.default
            if changed and field.name not in has | {"name", "reference_kl"}:
                own = ", ".join(sorted(has)) or "no settings of its own"
                raise ValueError(
                    f"objective.{field.name} is no setting of {self.name!r}, which has {own}. Remove it, or choose another objective."
                )
        settings = {name: getattr(self, name) for name in has}
        if kind is GroupRelative:
            return GroupRelative(**settings, kl_weight=self.reference_kl)
        objective: Objective = kind(**settings)
        return ReferenceKl(objective, self.reference_kl) if self.reference_kl else objective


@dataclasses.dataclass(frozen=True)
class GhostsConfig:
    """Where ghost tokens come from.

    Attributes:
        source: teacher_forced: the text of the training rows, which is the context too; or, on the student's own replies to their questions (on-policy),
            teacher_model: another model with the same tokenizer; privileged_self: the student before this stage, which reads the row's solution. Or
            self_reply: the text of the student's own right replies to the questions, the likeliest of several, written anew from time to time. Or, for the
            objective group_relative alone, verified_reward: no ghost, but which of the student's own replies to a question are right.
        teacher: of teacher_model, a folder or hub id.
        prompts: files or hub ids of questions, with their right answers and no more, that the student replies to instead of those of the training rows.
        choice: the live ghost's likeliest token, or one drawn from its distribution.
        privileged_prompt: of privileged_self, the question as it is put to the student that knows; holds {question}, {rationale} and {answer}.
        temperature: of the student's replies.
        max_new_tokens: the student's replies are cut off here; what data.seq_len leaves beside them is for the question.
        decode_batch_size: the student's replies that are written at a time, where one that ends makes room for the next; null: all of a batch (of self_reply,
            eval.batch_size). Fewer need less memory.
        teacher_forced_share: of a batch's rows, in [0, 1): those with the text of the training rows instead of a reply of the student.
        updates_per_rollout: updates on the same replies; the contexts of a later one are weighted by how much likelier the student now makes them.
        ratio_clip: the weights lie in [1 - ratio_clip, 1 + ratio_clip].
        prefetch_rollouts: of verified_reward, replies are drawn one update ahead and judged while the device works, by the student as it was before that update.
        num_generations: replies to a question: of self_reply, the best is kept; of verified_reward, each is held against the others.
        temperatures: of self_reply, those of the candidates, in turn.
        questions: of self_reply, how many are asked at a time.
        refresh_every: of self_reply, updates between two times.
    """

    source: Literal["teacher_forced", "teacher_model", "privileged_self", "self_reply", "verified_reward"] = (
        "teacher_forced"
    )
    teacher: str | None = None
    prompts: tuple[str, ...] | str = ()
    choice: Literal["argmax", "drawn"] = "argmax"
    privileged_prompt: str = PRIVILEGED_PROMPT
    temperature: float = 1.0
    max_new_tokens: int = 256
    decode_batch_size: int | None = None
    teacher_forced_share: float = 0.0
    updates_per_rollout: int = 1
    ratio_clip: float = 0.2
    prefetch_rollouts: bool = False
    num_generations: int = 4
    temperatures: tuple[float, ...] = (0.7, 1.0)
    questions: int = 256
    refresh_every: int = 50

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            given = getattr(self, field.name) != field.default
            if given and field.name != "source" and field.name not in OWN_SETTINGS[self.source]:
                own = ", ".join(OWN_SETTINGS[self.source]) or "no settings of its own"
                raise ValueError(
                    f"ghosts.{field.name} is no setting of the source {self.source!r}, which has {own}. "
                    "Remove it, or choose another ghosts.source."
                )
        if self.source == "teacher_model" and not self.teacher:
            raise ValueError("ghosts.teacher must name the folder or hub id of the live teacher, got none.")
        self.require(self.temperature > 0, "temperature", "above 0, so that replies differ")
        self.require(self.max_new_tokens >= 1, "max_new_tokens", "at least 1")
        self.require(
            self.decode_batch_size is None or self.decode_batch_size >= 1, "decode_batch_size", "at least 1 or null"
        )
        self.require(0 <= self.teacher_forced_share < 1, "teacher_forced_share", "in [0, 1)")
        self.require(self.updates_per_rollout >= 1, "updates_per_rollout", "at least 1")
        self.require(0 < self.ratio_clip < 1, "ratio_clip", "in (0, 1)")
        for name in ("num_generations", "questions", "refresh_every"):
            self.require(getattr(self, name) >= 1, name, "at least 1")
        alone = self.source == "verified_reward" and self.num_generations == 1
        self.require(not alone, "num_generations", "at least 2 where replies are held against each other")
        sampled = bool(self.temperatures) and all(t > 0 for t in self.temperatures)
        self.require(sampled, "temperatures", "one or more numbers above 0")
        try:
            text = self.privileged(question="\0q", rationale="\0r", answer="\0a")
        except (KeyError, IndexError, ValueError) as error:
            raise ValueError(f"ghosts.privileged_prompt holds a field that is not known: {error}.") from None
        self.require("\0q" in text and "\0a" in text, "privileged_prompt", "a text with {question} and {answer}")

    def require(self, holds: bool, name: str, expected: str) -> None:
        if not holds:
            value: Any = getattr(self, name)
            raise ValueError(f"ghosts.{name} must be {expected}, got {value!r}.")

    def privileged(self, question: str, rationale: str, answer: str) -> str:
        """The question as the student that knows the solution reads it."""
        return self.privileged_prompt.format(question=question, rationale=rationale, answer=answer)

    @property
    def on_policy(self) -> bool:
        """Whether the contexts are the student's own replies, newly drawn."""
        return self.source in (*LIVE, "verified_reward")

    def forced_rows(self, batch_size: int) -> int:
        """How many of a batch's rows are teacher-forced; at least one is the student's own."""
        return min(round(self.teacher_forced_share * batch_size), batch_size - 1)
