"""What all batches of the student's own replies share: which questions come when, what is kept of the replies, and how they are judged.

A batch depends on the parameters, so the loop tells them (`follow`) before it takes one. `cotgrpo.rollouts.on_policy` learns from a live ghost's word at each prefix of
the replies, and `cotgrpo.rollouts.group_relative` from which of them are right.
"""

from __future__ import annotations

import abc
import base64
import dataclasses
import functools
import io
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from cotgrpo.data.questions import Question
from cotgrpo.data.sources import DataError
from cotgrpo.data.template import AnyTemplate
from cotgrpo.evaluation.accuracy import Reply, judge
from cotgrpo.sampling import Prompts, Replies, pad_prompts
from cotgrpo.types import GhostBatch, Metric, Metrics, Params

ROLLOUTS = 0x726F6C6C
"""Folded into the run's key: rollouts draw from a stream of their own, apart from the steps'."""


@dataclasses.dataclass(frozen=True)
class RolloutPrompt:
    """A training row whose reply the student writes itself.

    Attributes:
        question: the row; its right answer judges the reply.
        prompt: int32 tokens that the student reads.
        reads: int32 tokens that the live ghost reads instead, or None for the same.
    """

    question: Question
    prompt: np.ndarray
    reads: np.ndarray | None = None


@dataclasses.dataclass(frozen=True)
class RolloutSettings:
    """The sizes of a batch, and how often its replies are used.

    Attributes:
        replies: the student's own, one a row.
        seq_len: columns of a row, those of the reply included.
        max_new_tokens: columns of the reply.
        forced_rows: teacher-forced rows beside them.
        updates_per_rollout: updates on the same replies.
        ratio_clip: bound of the weights of a later update (`cotgrpo.ghosts.live.reweighted`).
    """

    replies: int
    seq_len: int
    max_new_tokens: int
    forced_rows: int = 0
    updates_per_rollout: int = 1
    ratio_clip: float = 0.2

    @property
    def prompt_columns(self) -> int:
        return self.seq_len - self.max_new_tokens


@dataclasses.dataclass(frozen=True)
class RolloutBatch:
    """A batch as it was drawn, and what is still to be done with it. In a checkpoint's JSON it is `text`, which waits for the arrays.

    Attributes:
        batch: the contexts with their ghosts.
        log_probs: `[B, T]`, log p of the token behind each context when it was drawn, or None where no later use asks.
        asked: the questions of replies that are not judged yet, or None.
        replies: the replies.
        rewards: ghost tokens and rewards of the rows to log, or None.
    """

    batch: GhostBatch
    log_probs: Any = None
    asked: list[RolloutPrompt] | None = None
    replies: Replies | None = None
    rewards: Any = None

    @functools.cached_property
    def text(self) -> str:
        """The arrays that a later update needs."""
        return arrays_as_text(vars(self.batch) | {"log_probs": self.log_probs})

    @classmethod
    def from_text(cls, text: str) -> RolloutBatch:
        fields = arrays_of_text(text)
        log_probs = fields.pop("log_probs", None)
        return cls(GhostBatch(**fields), log_probs)


@dataclasses.dataclass(frozen=True)
class PendingReplies:
    """Replies that no batch has been made of yet. In a checkpoint's JSON they are `text`, which waits for them."""

    replies: Replies

    @functools.cached_property
    def text(self) -> str:
        return arrays_as_text(vars(self.replies))

    @classmethod
    def from_text(cls, text: str) -> PendingReplies:
        return cls(Replies(**arrays_of_text(text)))


def arrays_as_text(arrays: dict[str, Any]) -> str:
    """Named arrays, of which some may be None and are left out."""
    file = io.BytesIO()
    np.savez_compressed(file, **{name: value for name, value in arrays.items() if value is not None})
    return base64.b64encode(file.getvalue()).decode()


def arrays_of_text(text: str) -> dict[str, Any]:
    """What `arrays_as_text` wrote."""
    with np.load(io.BytesIO(base64.b64decode(text))) as arrays:
        return dict(arrays)


class Rollouts(abc.ABC):
    """An endless iterator of batches of the student's own replies, with the state of a data iterator.

    Batch n is a function of the run's seed, n, and the parameters that `follow` told before it, so a run that is resumed at any step goes on with the same
    batches. Only while replies are used again, or were drawn before their turn, are they part of the state. On a mesh every device writes the replies to its
    share of a batch's questions, and the batch is whole on each; of several processes each makes the same batches.

    Args:
        template: takes replies apart.
        questions: training rows.
        settings: sizes, and how often replies are used.
        seed: of the order of the questions, and of what is drawn.
        merged: the student's whole parameters from those that are trained (LoRA's adapters).
        group: replies to each question, beside each other in a batch; divides `settings.replies`.

    Raises:
        DataError: no question, or a prompt that leaves no room for the reply.
    """

    def __init__(
        self,
        template: AnyTemplate,
        questions: Sequence[RolloutPrompt],
        settings: RolloutSettings,
        *,
        seed: int,
        merged: Callable[[Any], Params] = lambda trained: trained,
        group: int = 1,
    ) -> None:
        import grain

        check_questions(questions, settings)
        self.template, self.questions, self.settings = template, list(questions), settings
        self.merged, self.group = merged, group
        self.order = grain.MapDataset.range(len(questions)).seed(seed).shuffle().repeat(None)
        self.key = jax.random.fold_in(jax.random.key(seed), ROLLOUTS)
        self.taken = 0
        self.params: Params = None
        self.held: RolloutBatch | None = None  # the newest replies: to be judged, and maybe used again

    @abc.abstractmethod
    def roll_out(self, number: int) -> RolloutBatch:
        """Batch `number`, of new replies."""

    @abc.abstractmethod
    def again(self, held: RolloutBatch) -> GhostBatch:
        """The batch of replies that were used before."""

    @abc.abstractmethod
    def observed(self) -> Metrics:
        """Means over the replies of the latest batch, as `rollout_metrics` names them, once for each; waits for the replies."""

    def follow(self, trained: Any) -> None:
        """The newest trained parameters, which the next batch is drawn with. Called before they are donated to a step."""
        self.params = self.merged(trained)

    def __next__(self) -> GhostBatch:
        uses = self.taken % self.settings.updates_per_rollout
        self.taken += 1
        if uses:
            assert self.held is not None
            return self.again(self.held)
        self.held = self.roll_out(self.taken - 1)
        return self.held.batch

    def asked(self, number: int) -> list[RolloutPrompt]:
        """The questions of batch `number`, one a reply."""
        count = self.settings.replies // self.group
        first = number // self.settings.updates_per_rollout * count
        return [self.questions[int(self.order[i])] for i in range(first, first + count) for _ in range(self.group)]

    def prompts(self, asked: Sequence[RolloutPrompt]) -> Prompts:
        """What the student reads."""
        return pad_prompts([q.prompt for q in asked], length=self.settings.prompt_columns, pad_id=self.template.pad_id)

    def key_of(self, number: int) -> Any:
        """The random key of batch `number`."""
        return jax.random.fold_in(self.key, number)

    def get_state(self) -> dict[str, Any]:
        """JSON-able but for arrays, which `Checkpoints.save` turns to text: the loop asks at every step, and the device would wait for that."""
        state: dict[str, Any] = {"taken": self.taken}
        if self.taken % self.settings.updates_per_rollout:
            assert self.held is not None
            state["held"] = self.held
        return state

    def set_state(self, state: dict[str, Any]) -> None:
        self.taken = state["taken"]
        if "held" in state:
            self.held = RolloutBatch.from_text(state["held"])


def ids_of(written: Replies) -> list[np.ndarray]:
    """The tokens of each reply, of arrays on the host."""
    return [np.asarray(row[:length]) for row, length in zip(written.tokens, written.lengths, strict=True)]


def judged(template: AnyTemplate, asked: Sequence[RolloutPrompt], written: Replies) -> list[Reply]:
    """Each reply taken apart, and held against its question's right answer."""
    ids = ids_of(written)
    return [judge(template, q.question, i, bool(end)) for q, i, end in zip(asked, ids, written.finished, strict=True)]


def rollout_metrics(correct: Any, written: Replies) -> Metrics:
    """Means over replies: `accuracy`, `reply_length` in tokens, `unfinished`; and `rollout_tokens` a batch."""
    count, tokens = len(written.lengths), int(written.lengths.sum())
    return {
        "accuracy": metric(int(sum(correct)), count),
        "reply_length": metric(tokens, count),
        "unfinished": metric(count - int(written.finished.sum()), count),
        "rollout_tokens": metric(tokens, 1),
    }


def metric(total: int, weight: int) -> Metric:
    """A metric that the host counted."""
    return Metric(*(np.asarray(value, np.float32) for value in (total, weight)))


def check_questions(questions: Sequence[RolloutPrompt], settings: RolloutSettings) -> None:
    """Raises DataError where there is no question, or no room for a reply behind one."""
    if not questions:
        raise DataError("On-policy training needs training rows, got none.")
    longest = max(questions, key=lambda q: len(q.prompt))
    if len(longest.prompt) > settings.prompt_columns:
        raise DataError(
            f"{longest.question.source or 'A training row'}: its prompt has {len(longest.prompt)} tokens, but data.seq_len {settings.seq_len} leaves "
            f"{settings.prompt_columns} beside a reply of {settings.max_new_tokens} (grpo.ghosts.max_new_tokens). Raise the one, or lower the other."
        )
