"""Accuracy and loss on held-out rows: exact match of greedy answers, pass@k and maj@k of drawn ones, and means."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

import jax

from cotgrpo.data.questions import Question
from cotgrpo.data.template import AnyTemplate
from cotgrpo.distributed.processes import fetch
from cotgrpo.evaluation.estimators import bootstrap_interval, majority_at_k, pass_at_k, vote_groups
from cotgrpo.evaluation.estimators import wilson_interval as wilson_interval
from cotgrpo.evaluation.replies import Draws, ReplyWriter, mean_reward
from cotgrpo.evaluation.replies import Reply as Reply
from cotgrpo.evaluation.replies import judge as judge
from cotgrpo.models.decoder import DecoderConfig
from cotgrpo.types import Metrics

if TYPE_CHECKING:
    from cotgrpo.types import Params

P = TypeVar("P")
Batch = TypeVar("Batch")


@dataclasses.dataclass(frozen=True)
class Accuracy:
    """The share of correct replies.

    Attributes:
        value: `correct / n`.
        n: rows.
        low, high: the 95 % Wilson interval.
        truncated: replies cut off at the token limit.
        unparsable: replies without an answer (plain: without a separator); they count as wrong.
        replies: one for each row, in order.
        reward: the mean reward of the user's own; None without one.
    """

    value: float
    n: int
    low: float
    high: float
    truncated: int
    unparsable: int
    replies: list[Reply]
    reward: float | None = None

    def figures(self) -> dict[str, float | int]:
        """Return value, n and interval, for a report."""
        return {"value": self.value, "n": self.n, "low": self.low, "high": self.high}

    def __str__(self) -> str:
        return f"{self.value:.1%} of {self.n} (95 % interval {self.low:.1%} to {self.high:.1%})"


class ExactMatch:
    """Grades greedy replies to questions. It compiles once and serves any parameters.

    Args:
        decoder: the student's shape.
        template: renders prompts and splits replies.
        questions: held-out rows, at least one.
        max_new_tokens: length limit of a reply.
        batch_size: replies decoded at a time.
        vocab_size: ids from here on are never drawn; None: the tokenizer's size.
        mesh: the mesh of the parameters and the decoding; None: JAX's default device.

    Raises:
        ValueError: no rows.
    """

    def __init__(
        self,
        decoder: DecoderConfig,
        template: AnyTemplate,
        questions: Sequence[Question],
        *,
        max_new_tokens: int,
        batch_size: int,
        vocab_size: int | None = None,
        mesh: jax.sharding.Mesh | None = None,
    ) -> None:
        if not questions:
            raise ValueError("Exact match needs at least one held-out row, got none.")
        self.template, self.questions = template, list(questions)
        self.write = ReplyWriter(
            decoder,
            template,
            questions,
            max_new_tokens=max_new_tokens,
            batch_size=batch_size,
            vocab_size=vocab_size,
            mesh=mesh,
        )

    def __call__(self, params: Params, progress: Callable[[int], None] = lambda done: None) -> Accuracy:
        """Return the student's accuracy with these parameters; `progress` is called with the number of rows done."""
        in_order = [reply for (reply,) in self.write(params, progress)]
        correct = sum(reply.correct for reply in in_order)
        low, high = wilson_interval(correct, len(in_order))
        return Accuracy(
            value=correct / len(in_order),
            n=len(in_order),
            low=low,
            high=high,
            truncated=sum(not reply.finished for reply in in_order),
            unparsable=sum(reply.answer is None for reply in in_order),
            replies=in_order,
            reward=mean_reward(in_order),
        )


@dataclasses.dataclass(frozen=True)
class Share:
    """The mean of a probability over questions.

    Attributes:
        value: the mean.
        n: questions.
        low, high: its 95 % interval, of `bootstrap_interval`.
    """

    value: float
    n: int
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float], seed: int) -> Share:
        """Return the mean of one value for each question."""
        low, high = bootstrap_interval(values, seed)
        return cls(sum(values) / len(values), len(values), low, high)

    def __str__(self) -> str:
        return f"{self.value:.1%} ({self.low:.1%} to {self.high:.1%})"


@dataclasses.dataclass(frozen=True)
class SampledAccuracy:
    """What drawn replies to each question show.

    Attributes:
        draws: how they were drawn.
        pass_at_k: by k, the probability that one of k replies is right.
        maj_at_k: by k, the probability that the majority vote of k replies is right.
        truncated, unparsable: as in `Accuracy`, of all replies.
        replies: those to each question, in order.
        reward: the mean reward of the user's own; None without one.
    """

    draws: Draws
    pass_at_k: dict[int, Share]
    maj_at_k: dict[int, Share]
    truncated: int
    unparsable: int
    replies: list[list[Reply]]
    reward: float | None = None

    @classmethod
    def of(cls, draws: Draws, ks: Sequence[int], replies: list[list[Reply]]) -> SampledAccuracy:
        """Return the estimates from the replies to each question.

        Args:
            draws: how they were drawn.
            ks: the k of pass@k and maj@k, each in [1, draws.samples].
            replies: `draws.samples` to each question.
        """
        n, every = draws.samples, [reply for several in replies for reply in several]
        right = [sum(reply.correct for reply in several) for several in replies]
        votes = [vote_groups([r.answer for r in several], [r.correct for r in several]) for several in replies]
        return cls(
            draws,
            {k: Share.of([pass_at_k(n, c, k) for c in right], draws.seed) for k in ks},
            {k: Share.of([majority_at_k(groups, n, k) for groups in votes], draws.seed) for k in ks},
            truncated=sum(not reply.finished for reply in every),
            unparsable=sum(reply.answer is None for reply in every),
            replies=replies,
            reward=mean_reward(every),
        )

    def shares(self) -> dict[str, Share]:
        """Return all estimates by name, such as pass@8. maj@1 is pass@1, and left out."""
        passed = {f"pass@{k}": share for k, share in self.pass_at_k.items()}
        return passed | {f"maj@{k}": share for k, share in self.maj_at_k.items() if k > 1}

    def figures(self) -> dict[str, Any]:
        """Return the numbers without the replies, for a report."""
        numbers = {name: dataclasses.asdict(share) for name, share in self.shares().items()}
        reward = {} if self.reward is None else {"reward": self.reward}
        counts = {"truncated": self.truncated, "unparsable": self.unparsable}
        return dataclasses.asdict(self.draws) | numbers | counts | reward

    def __str__(self) -> str:
        shown = ", ".join(f"{name} {share}" for name, share in self.shares().items())
        return f"{shown}: {draws_text(self.draws)}"


def draws_text(draws: Draws) -> str:
    """Return how replies were drawn, in a few words."""
    top_p = "" if draws.top_p == 1 else f", top_p {draws.top_p:g}"
    return f"{draws.samples} replies to each question, temperature {draws.temperature:g}{top_p}, seed {draws.seed}"


def draws_of(figures: Mapping[str, Any]) -> Draws:
    """Return how replies were drawn, from what `SampledAccuracy.figures` has returned."""
    return Draws(*(figures[field.name] for field in dataclasses.fields(Draws)))


class SampledMatch:
    """Grades drawn replies to questions, for pass@k and maj@k. It compiles once and serves any parameters.

    Args:
        decoder, template, questions, max_new_tokens, batch_size, vocab_size, mesh: as in `ExactMatch`.
        draws: how replies are drawn.
        ks: the k of pass@k and maj@k, each in [1, draws.samples].
    """

    def __init__(
        self,
        decoder: DecoderConfig,
        template: AnyTemplate,
        questions: Sequence[Question],
        draws: Draws,
        ks: Sequence[int],
        *,
        max_new_tokens: int,
        batch_size: int,
        vocab_size: int | None = None,
        mesh: jax.sharding.Mesh | None = None,
    ) -> None:
        self.draws, self.ks = draws, list(ks)
        self.write = ReplyWriter(
            decoder,
            template,
            questions,
            max_new_tokens=max_new_tokens,
            batch_size=batch_size,
            draws=draws,
            vocab_size=vocab_size,
            mesh=mesh,
        )

    @property
    def num_replies(self) -> int:
        """The replies of one measurement."""
        return len(self.write.questions) * self.draws.samples

    def __call__(self, params: Params, progress: Callable[[int], None] = lambda done: None) -> SampledAccuracy:
        """Return the estimates with these parameters; `progress` is called with the number of replies done."""
        return SampledAccuracy.of(self.draws, self.ks, self.write(params, progress))


def mean_metrics(eval_step: Callable[[P, Batch], Metrics], params: P, batches: Iterable[Batch]) -> dict[str, float]:
    """Return the means of an eval step's metrics over all tokens of the batches; `loss` is in nats per token."""
    sums: Metrics = {}
    for batch in batches:
        # One program at a time: CPU processes whose programs wait for each other in different orders never end.
        for name, metric in fetch(eval_step(params, batch)).items():
            sums[name] = sums[name] + metric if name in sums else metric
    return {name: metric.mean() for name, metric in sums.items()}
