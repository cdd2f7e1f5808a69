"""How good a student is on held-out rows: exact match of its greedy answers, with an interval, and the mean loss of the reference replies."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import numpy as np

from cotgrpo.data.answers import answers_match, extract_answer
from cotgrpo.data.questions import Question
from cotgrpo.data.template import AnyTemplate
from cotgrpo.distributed.processes import fetch
from cotgrpo.models.decoder import DecoderConfig
from cotgrpo.sampling import QUEUE, SamplingSettings, make_sampler, pad_prompts
from cotgrpo.sharding import batch_shards, jit_eval
from cotgrpo.types import Metrics

PROMPT_COLUMNS = 64
"""Prompts are padded to multiples of this, so that a sampler compiles for a few shapes and not for every length."""


@dataclasses.dataclass(frozen=True)
class Reply:
    """One held-out row as the student answered it.

    Attributes:
        question, gold: of the row.
        text: the whole reply, special tokens as the tokenizer writes them.
        answer: what the template takes for the answer (plain: the text behind the separator), or None where there is none.
        correct: whether the answer is the gold one.
        finished: whether the reply ended with a stop token, and was not cut off.
    """

    question: str
    gold: str
    text: str
    answer: str | None
    correct: bool
    finished: bool


@dataclasses.dataclass(frozen=True)
class Accuracy:
    """The share of correct replies.

    Attributes:
        value: `correct / n`.
        n: rows.
        low, high: the 95 % Wilson interval.
        truncated: replies cut off at the limit of tokens.
        unparsable: replies in which the template finds no answer (plain: without a separator); they count as wrong.
        replies: one a row, in the order of the rows.
    """

    value: float
    n: int
    low: float
    high: float
    truncated: int
    unparsable: int
    replies: list[Reply]

    def figures(self) -> dict[str, float | int]:
        """Value, n and interval, for a report."""
        return {"value": self.value, "n": self.n, "low": self.low, "high": self.high}

    def __str__(self) -> str:
        return f"{self.value:.1%} of {self.n} (95 % interval {self.low:.1%} to {self.high:.1%})"


class ExactMatch:
    """Greedy replies to questions, held against their right answers. Built once, it compiles once for several parameters.

    Args:
        decoder: the student's shape.
        template: renders prompts and takes replies apart.
        questions: held-out rows, at least one.
        max_new_tokens: replies are cut off here, and then have no answer.
        batch_size: replies that are written at a time.
        vocab_size: ids from here on are never drawn; None: the tokenizer's size.
        mesh: where the parameters lie and the replies are written; None: JAX's default device.

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
        over = 1 if mesh is None else batch_shards(mesh.shape)
        # Rounded up, so that every device has the same number of rows.
        slots = -(-min(batch_size, len(self.questions)) // over) * over
        calls = -(-len(self.questions) // (QUEUE * slots))
        self.rows = -(-len(self.questions) // (calls * over)) * over
        settings = SamplingSettings(max_new_tokens, eos_ids=template.stop_ids, pad_id=template.pad_id)
        vocab_size = vocab_size or len(template.tokenizer)
        self.sampler = jit_eval(make_sampler(decoder, settings, vocab_size, slots), mesh)

    def __call__(self, params: Any, progress: Callable[[int], None] = lambda done: None) -> Accuracy:
        """The student's accuracy with these parameters; `progress` hears how many rows are done."""
        prompts = [self.template.prompt(row.question, row.system) for row in self.questions]
        # Prompts of like length together: fewer columns.
        order = sorted(range(len(prompts)), key=lambda row: len(prompts[row]))
        replies: dict[int, Reply] = {}
        for start in range(0, len(order), self.rows):
            rows = order[start : start + self.rows]
            columns = -(-max(len(prompts[row]) for row in rows) // PROMPT_COLUMNS) * PROMPT_COLUMNS
            asked = [prompts[row] for row in rows]
            padded = pad_prompts(asked, length=columns, rows=self.rows, pad_id=self.template.pad_id)
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
        )


def judge(template: AnyTemplate, question: Question, ids: np.ndarray, finished: bool) -> Reply:
    """Takes a reply apart. The answer may stand in a phrase (`The answer is 42.`), and is then extracted from it."""
    _, answer = template.split_reply(ids)
    correct = answer is not None and (
        answers_match(answer, question.gold) or answers_match(extract_answer(answer), question.gold)
    )
    text = template.tokenizer.decode(ids, skip_special_tokens=False)
    return Reply(question.question, question.gold, text, answer, correct, finished)


def wilson_interval(correct: int, n: int, z: float = 1.959964) -> tuple[float, float]:
    """Wilson's score interval of a proportion, 95 % by default (Wilson 1927, doi:10.1080/01621459.1927.10502953).

        (p + z^2 / 2n  -+  z sqrt(p (1 - p) / n + z^2 / 4n^2)) / (1 + z^2 / n),    p = correct / n

    Args:
        correct: in [0, n].
        n: at least 1.
        z: quantile of the normal distribution.

    Example:
        >>> [round(x, 3) for x in wilson_interval(8, 10)]
        [0.49, 0.943]
    """
    p, share = correct / n, z * z / n
    half = z * math.sqrt(p * (1 - p) / n + share / (4 * n))
    low, high = (p + share / 2 - half) / (1 + share), (p + share / 2 + half) / (1 + share)
    return max(low, 0.0), min(high, 1.0)


def mean_metrics(eval_step: Callable[..., Metrics], params: Any, batches: Iterable[Any]) -> dict[str, float]:
    """The means of an eval step's metrics over all tokens of the batches, `loss` first among them, in nats a supervised token."""
    sums: Metrics = {}
    for batch in batches:
        for name, metric in eval_step(params, batch).items():
            sums[name] = sums[name] + metric if name in sums else metric
    return {name: metric.mean() for name, metric in sums.items()}
