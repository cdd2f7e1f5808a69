"""What all batches of the student's own replies share: the order of the questions, saved replies, and grading.

A batch depends on the parameters, so the loop calls `set_params` before it takes one. `cotgrpo.rollouts.on_policy`
learns from a live ghost at each prefix of the replies. `cotgrpo.rollouts.group_relative` learns from which of them are
right.
"""

from __future__ import annotations

import abc
import base64
import dataclasses
import functools
import io
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import jax
import numpy as np

from cotgrpo.data.questions import Question
from cotgrpo.data.sources import DataError
from cotgrpo.data.template import AnyTemplate
from cotgrpo.distributed.processes import gather_rows, process_rows
from cotgrpo.evaluation.accuracy import Reply, judge
from cotgrpo.ghosts.verdicts import When
from cotgrpo.sampling import Prompts, Replies, pad_prompts
from cotgrpo.sharding import batch_sharding
from cotgrpo.types import GhostBatch, Metric, Metrics, Params

ROLLOUTS = 0x726F6C6C
"""Folded into the run's key, so that rollouts and steps draw from separate random streams."""


@dataclasses.dataclass(frozen=True)
class RolloutPrompt:
    """A question that the student replies to.

    Attributes:
        question: the row, whose right answer grades the reply.
        prompt: int32 tokens that the student reads.
        teacher_prompt: int32 tokens that the live ghost reads instead, or None for `prompt`.
    """

    question: Question
    prompt: np.ndarray
    teacher_prompt: np.ndarray | None = None


@dataclasses.dataclass(frozen=True)
class RolloutSettings:
    """The sizes of a batch, and how often its replies are used.

    Attributes:
        replies: rows with a reply of the student.
        seq_len: columns of a row, including those of the reply.
        max_new_tokens: columns of the reply.
        forced_rows: further rows that are teacher-forced.
        updates_per_rollout: updates on the same replies.
        ratio_clip: bound of the weights of a later update, as in `cotgrpo.ghosts.live`.
        group: replies to each question, adjacent in a batch; divides `replies`.
        when: the contexts at which a live ghost counts, as in `cotgrpo.ghosts.verdicts`.
        rewarded: whether a batch also carries the advantages of its replies.
    """

    replies: int
    seq_len: int
    max_new_tokens: int
    forced_rows: int = 0
    updates_per_rollout: int = 1
    ratio_clip: float = 0.2
    group: int = 1
    when: When = "always"
    rewarded: bool = False

    @property
    def prompt_columns(self) -> int:
        return self.seq_len - self.max_new_tokens


@dataclasses.dataclass(frozen=True)
class RolloutBatch:
    """A batch as it was drawn. A checkpoint's JSON holds its `text`, which waits for the arrays.

    Attributes:
        batch: the contexts with their ghosts.
        log_probs: `[B, T]`, log p of the token after each context when it was drawn, or None if no later update needs
            it.
        prompts: the questions of replies that have not been graded, or None.
        replies: the replies.
        rewards: ghost tokens and rewards of the rows to log, or None.
    """

    batch: GhostBatch
    log_probs: jax.Array | np.ndarray | None = None
    prompts: list[RolloutPrompt] | None = None
    replies: Replies | None = None
    rewards: tuple[jax.Array, jax.Array] | None = None

    @functools.cached_property
    def text(self) -> str:
        """The arrays that a later update needs, as text."""
        fields = {name: value for name, value in vars(self.batch).items() if name != "extra"}
        return arrays_as_text(fields | self.batch.extra | {"log_probs": self.log_probs})

    @classmethod
    def from_text(cls, text: str) -> RolloutBatch:
        """Restore the arrays of `text`."""
        fields = arrays_of_text(text)
        log_probs = fields.pop("log_probs", None)
        own = {field.name for field in dataclasses.fields(GhostBatch)}
        extra = {name: fields.pop(name) for name in set(fields) - own}
        return cls(GhostBatch(**fields, extra=extra), log_probs)


@dataclasses.dataclass(frozen=True)
class PendingReplies:
    """Replies that were drawn before their batch. A checkpoint's JSON holds their `text`, which waits for them."""

    replies: Replies

    @functools.cached_property
    def text(self) -> str:
        """The arrays as text."""
        return arrays_as_text(vars(self.replies))

    @classmethod
    def from_text(cls, text: str) -> PendingReplies:
        """Restore the arrays of `text`."""
        return cls(Replies(**arrays_of_text(text)))


def arrays_as_text(arrays: Mapping[str, jax.Array | np.ndarray | None]) -> str:
    """Return named arrays as base64 text. Arrays that are None are left out."""
    file = io.BytesIO()
    present: dict[str, Any] = {name: value for name, value in arrays.items() if value is not None}
    np.savez_compressed(file, **present)
    return base64.b64encode(file.getvalue()).decode()


def arrays_of_text(text: str) -> dict[str, Any]:
    """Return the arrays that `arrays_as_text` wrote."""
    with np.load(io.BytesIO(base64.b64decode(text))) as arrays:
        return dict(arrays)


@runtime_checkable
class Engine(Protocol):
    """Draws the replies in place of this process's sampler, from weights that may be older than the student."""

    @property
    def is_stale(self) -> bool:
        """Whether older weights than the student's wrote the newest replies."""
        ...

    def version_of(self, ahead: bool) -> int:
        """Return the version of the weights that wrote the newest replies, or with `ahead` the ones before."""
        ...

    def observed(self) -> Metrics:
        """Return the metrics of the replies since the last call."""
        ...

    def get_state(self) -> dict[str, Any]: ...

    def set_state(self, state: dict[str, Any]) -> None: ...


class Rollouts(abc.ABC):
    """An endless iterator of batches of the student's own replies, with the state of a data iterator.

    Batch n is a function of the run's seed, n, and the newest parameters. A run that is resumed at any step therefore
    gets the same batches. Replies are part of the state only while later updates need them.

    On a mesh every device writes the replies to its share of a batch's questions, and the batch is whole on each. With
    several processes each makes the same batches.

    Args:
        template: splits replies into rationale and answer.
        questions: what the student replies to. A list is checked as a whole. Another sequence is read by index while
            training, and checks what it reads.
        settings: sizes, and how often replies are used.
        seed: of the order of the questions, and of the draws.
        merged: returns what the student computes with for the trained parameters: for LoRA, `AdaptedParams`.
        group: in place of `settings.group`.
        mesh: of the parameters and the batches; None: JAX's default device.

    Raises:
        DataError: no questions, or a prompt that leaves no room for the reply.
    """

    def __init__(
        self,
        template: AnyTemplate,
        questions: Sequence[RolloutPrompt],
        settings: RolloutSettings,
        *,
        seed: int,
        merged: Callable[[Params], Params] = lambda trained: trained,
        group: int | None = None,
        mesh: jax.sharding.Mesh | None = None,
    ) -> None:
        import grain

        if isinstance(questions, list | tuple):
            check_questions(questions, settings)
        self.template, self.questions, self.settings = template, questions, settings
        self.merged, self.mesh = merged, mesh
        self.group = settings.group if group is None else group
        self.order = grain.MapDataset.range(len(questions)).seed(seed).shuffle().repeat(None)
        self.key = jax.random.fold_in(jax.random.key(seed), ROLLOUTS)
        self.taken = 0
        self.params: Params = None
        self.newest: RolloutBatch | None = None  # to be graded, and used again by later updates
        self.pending: PendingReplies | None = None  # the replies of the next batch
        self.engine: Engine | None = None  # what draws the replies, if it is not this process

    @abc.abstractmethod
    def roll_out(self, number: int) -> RolloutBatch:
        """Return batch `number`, with new replies."""

    @abc.abstractmethod
    def reuse_batch(self, batch: RolloutBatch) -> GhostBatch:
        """Return a batch of replies that an earlier update has used."""

    @abc.abstractmethod
    def observed(self) -> Metrics:
        """Return the `rollout_metrics` of the newest batch, once for each batch. Waits for the replies."""

    def set_params(self, trained: Params) -> None:
        """Set the trained parameters that draw the next batch. Called before they are donated to a step."""
        self.params = self.merged(trained)

    def __next__(self) -> GhostBatch:
        uses = self.taken % self.settings.updates_per_rollout
        self.taken += 1
        if uses:
            assert self.newest is not None
            return self.reuse_batch(self.newest)
        self.newest = self.roll_out(self.taken - 1)
        return self.first_use(self.newest)

    def first_use(self, batch: RolloutBatch) -> GhostBatch:
        """Return the batch for the first update on it."""
        return batch.batch

    @property
    def weights_version(self) -> int | None:
        """The version of an engine's weights that wrote the newest batch; None: this process wrote it."""
        return None if self.engine is None else self.engine.version_of(self.pending is not None)

    def prompts_for(self, number: int) -> list[RolloutPrompt]:
        """Return the questions of batch `number`, one for each reply."""
        count = self.settings.replies // self.group
        first = number // self.settings.updates_per_rollout * count
        asked = [self.questions[int(self.order[i])] for i in range(first, first + count)]
        return [question for question in asked for _ in range(self.group)]

    def judged(self, prompts: Sequence[RolloutPrompt], replies: Replies) -> tuple[np.ndarray, np.ndarray]:
        """Return 1 for each reply that is right and 0 for the others, and the float32 reward of each.

        With several processes each grades its share of the replies.
        """
        count, rows = len(prompts), np.arange(len(prompts))
        if self.mesh is not None and jax.process_count() > 1:
            rows = process_rows(batch_sharding(self.mesh), replies.tokens.shape)
        own = jax.tree.map(lambda x: x[rows], replies)
        graded = grade_replies(self.template, [prompts[int(row)] for row in rows], own)
        scores = np.array([reply.score for reply in graded], np.float32)
        own_values = np.stack([np.array([reply.correct for reply in graded], np.uint32), scores.view(np.uint32)])
        correct, bits = gather_rows(rows, own_values, count)
        return correct, bits.view(np.float32)

    def judged_metrics(self, correct: np.ndarray, rewards: np.ndarray, replies: Replies) -> Metrics:
        """Return the metrics of replies that were judged."""
        metrics = rollout_metrics(correct, replies)
        if self.template.verifier.reward is not None:
            metrics["reply_reward"] = Metric(
                np.asarray(rewards.sum(), np.float32), np.asarray(len(rewards), np.float32)
            )
        return metrics

    def padded(self, prompts: Sequence[RolloutPrompt]) -> Prompts:
        """Return what the student reads, padded."""
        tokens = [prompt.prompt for prompt in prompts]
        return pad_prompts(tokens, length=self.settings.prompt_columns, pad_id=self.template.pad_id)

    def key_of(self, number: int) -> jax.Array:
        """Return the random key of batch `number`."""
        return jax.random.fold_in(self.key, number)

    def get_state(self) -> dict[str, Any]:
        """Return the position. Its arrays become text in `Checkpoints.save`, so that no step waits for them."""
        state: dict[str, Any] = {"taken": self.taken}
        if self.taken % self.settings.updates_per_rollout:
            assert self.newest is not None
            state["held"] = self.newest
        return state if self.engine is None else state | {"engine": self.engine.get_state()}

    def set_state(self, state: dict[str, Any]) -> None:
        """Restore the position."""
        self.taken = state["taken"]
        if self.engine is not None:
            self.engine.set_state(state["engine"])
        if "held" in state:
            self.newest = RolloutBatch.from_text(state["held"])


def token_ids(replies: Replies) -> list[np.ndarray]:
    """Return the tokens of each reply. The arrays must be on the host."""
    return [np.asarray(row[:length]) for row, length in zip(replies.tokens, replies.lengths, strict=True)]


def grade_replies(template: AnyTemplate, prompts: Sequence[RolloutPrompt], replies: Replies) -> list[Reply]:
    """Split each reply into rationale and answer, and compare the answer with the right one."""
    ids = token_ids(replies)
    return [judge(template, p.question, i, bool(end)) for p, i, end in zip(prompts, ids, replies.finished, strict=True)]


def rollout_metrics(correct: Iterable[bool | int | np.integer], replies: Replies) -> Metrics:
    """Return means over replies (`accuracy`, `reply_length`, `unfinished`), and `rollout_tokens` per batch."""
    count, tokens = len(replies.lengths), int(replies.lengths.sum())
    return {
        "accuracy": metric(int(sum(correct)), count),
        "reply_length": metric(tokens, count),
        "unfinished": metric(count - int(replies.finished.sum()), count),
        "rollout_tokens": metric(tokens, 1),
    }


def metric(total: int, weight: int) -> Metric:
    """Return a metric that the host counted."""
    return Metric(*(np.asarray(value, np.float32) for value in (total, weight)))


def check_questions(questions: Sequence[RolloutPrompt], settings: RolloutSettings) -> None:
    """Raise DataError without questions, or if one leaves no room for a reply."""
    if not questions:
        raise DataError("On-policy training needs training rows, got none.")
    longest = max(questions, key=lambda q: len(q.prompt))
    if len(longest.prompt) > settings.prompt_columns:
        place = longest.question.source or "A training row"
        raise DataError(
            f"{place}: its prompt has {len(longest.prompt)} tokens, but data.seq_len "
            f"{settings.seq_len} leaves {settings.prompt_columns} besides a reply of {settings.max_new_tokens} "
            "(grpo.ghosts.max_new_tokens). Raise the first, or lower the second."
        )
