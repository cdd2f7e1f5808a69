"""Accuracy and loss on held-out rows: exact match of greedy answers with its interval, and means of an eval step."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

import jax
import numpy as np

from cotgrpo.data.questions import Question, place_of
from cotgrpo.data.template import AnyTemplate
from cotgrpo.data.tokenizer import decode_text
from cotgrpo.distributed.processes import fetch
from cotgrpo.models.decoder import DecoderConfig
from cotgrpo.sampling import QUEUE, SamplingSettings, make_sampler, pad_prompts
from cotgrpo.sharding import batch_shards, jit_eval
from cotgrpo.types import Metrics

if TYPE_CHECKING:
    from cotgrpo.types import Params

P = TypeVar("P")
Batch = TypeVar("Batch")

PROMPT_COLUMNS = 64
"""Prompts are padded to multiples of this, so a sampler compiles for a few shapes instead of every length."""


@dataclasses.dataclass(frozen=True)
class Reply:
    """The student's reply to one held-out row.

    Attributes:
        question, gold: the row's question and right answer.
        text: the whole reply, special tokens as the tokenizer writes them. `UNDECODABLE` of `cotgrpo.data.tokenizer`
            stands for bytes that are no character, as at the end of a reply that was cut off.
        answer: the answer that the template finds (plain: the text after the separator), or None.
        correct: whether the answer is right.
        finished: whether the reply ended with a stop token instead of the length limit.
        reward: by the reward of the user's own; None without one.
        message: what the user's own verifier says; empty without one.
    """

    question: str
    gold: str
    text: str
    answer: str | None
    correct: bool
    finished: bool
    reward: float | None = None
    message: str = ""

    @property
    def score(self) -> float:
        """The reward, or else 1 for a right reply and 0 for a wrong one."""
        return float(self.correct) if self.reward is None else self.reward

    def to_dict(self) -> dict[str, Any]:
        """Return the fields, without a reward and a message if there is none."""
        own = {"reward": self.reward is not None, "message": bool(self.message)}
        return {name: value for name, value in dataclasses.asdict(self).items() if own.get(name, True)}


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
        self.prompts = [question.prompt_tokens(template) for question in questions]
        over = 1 if mesh is None else batch_shards(mesh.shape)
        # Rounded up: every device decodes the same number of rows.
        slots = -(-min(batch_size, len(self.questions)) // over) * over
        calls = -(-len(self.questions) // (QUEUE * slots))
        self.rows = -(-len(self.questions) // (calls * over)) * over
        settings = SamplingSettings(max_new_tokens, eos_ids=template.stop_ids, pad_id=template.pad_id)
        vocab_size = vocab_size or len(template.tokenizer)
        self.sampler = jit_eval(make_sampler(decoder, settings, vocab_size, slots), mesh)

    def __call__(self, params: Params, progress: Callable[[int], None] = lambda done: None) -> Accuracy:
        """Return the student's accuracy with these parameters; `progress` is called with the number of rows done."""
        prompts = self.prompts
        # Prompts of similar length together, to save columns.
        order = sorted(range(len(prompts)), key=lambda row: len(prompts[row]))
        replies: dict[int, Reply] = {}
        for start in range(0, len(order), self.rows):
            rows = order[start : start + self.rows]
            columns = -(-max(len(prompts[row]) for row in rows) // PROMPT_COLUMNS) * PROMPT_COLUMNS
            batch = [prompts[row] for row in rows]
            padded = pad_prompts(batch, length=columns, rows=self.rows, pad_id=self.template.pad_id)
            written = fetch(self.sampler(params, padded, jax.random.key(0)))
            for i, row in enumerate(rows):
                ids = written.tokens[i, : written.lengths[i]]
                replies[row] = judge(self.template, self.questions[row], ids, bool(written.finished[i]))
            progress(len(replies))
        in_order = [replies[row] for row in range(len(self.questions))]
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


def judge(template: AnyTemplate, question: Question, ids: np.ndarray, finished: bool) -> Reply:
    """Split a reply and ask the template's verifier about it.

    Raises:
        OwnCodeError: a function of the user's own failed. The message names it and the row.
    """
    _, answer = template.split_reply(ids)
    text, verifier = decode_text(template.tokenizer, ids), template.verifier
    row = question.row or {"question": question.question, "gold": question.gold}
    verdict = verifier(template.decode(ids), answer, question.gold, row, place_of(question))
    message = verdict.message if verifier.verify is not None else ""
    return Reply(question.question, question.gold, text, answer, verdict.correct, finished, verdict.reward, message)


def mean_reward(replies: Sequence[Reply]) -> float | None:
    """Return the mean of the rewards of the user's own; None without them."""
    rewards = [reply.reward for reply in replies if reply.reward is not None]
    return sum(rewards) / len(rewards) if rewards else None


def wilson_interval(correct: int, n: int, z: float = 1.959964) -> tuple[float, float]:
    """Return Wilson's score interval of a proportion (Wilson 1927, doi:10.1080/01621459.1927.10502953).

        (p + z^2 / 2n  -+  z sqrt(p (1 - p) / n + z^2 / 4n^2)) / (1 + z^2 / n),    p = correct / n

    Args:
        correct: in [0, n].
        n: at least 1.
        z: quantile of the normal distribution; the default is that of a 95 % interval.

    Example:
        >>> [round(x, 3) for x in wilson_interval(8, 10)]
        [0.49, 0.943]
    """
    p, share = correct / n, z * z / n
    half = z * math.sqrt(p * (1 - p) / n + share / (4 * n))
    low, high = (p + share / 2 - half) / (1 + share), (p + share / 2 + half) / (1 + share)
    return max(low, 0.0), min(high, 1.0)


def mean_metrics(eval_step: Callable[[P, Batch], Metrics], params: P, batches: Iterable[Batch]) -> dict[str, float]:
    """Return the means of an eval step's metrics over all tokens of the batches; `loss` is in nats per token."""
    sums: Metrics = {}
    for batch in batches:
        # One program at a time: CPU processes whose programs wait for each other in different orders never end.
        for name, metric in fetch(eval_step(params, batch)).items():
            sums[name] = sums[name] + metric if name in sums else metric
    return {name: metric.mean() for name, metric in sums.items()}
