"""The student's replies to held-out questions, greedy or drawn, and the verdicts on them."""

from __future__ import annotations

import dataclasses
import hashlib
import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from cotgrpo.data.questions import Question, place_of, question_text
from cotgrpo.data.template import AnyTemplate
from cotgrpo.data.tokenizer import decode_text
from cotgrpo.distributed.processes import fetch
from cotgrpo.models.decoder import DecoderConfig
from cotgrpo.sampling import QUEUE, SamplingSettings, make_sampler, pad_prompts
from cotgrpo.sharding import jit_eval

if TYPE_CHECKING:
    from jaxtyping import Array, Key

    from cotgrpo.types import Params

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
class Draws:
    """How replies are drawn.

    Attributes:
        samples: replies to each question, at least 1.
        temperature, top_p: as in `cotgrpo.sampling.SamplingSettings`.
        seed: in [0, 2^32).
    """

    samples: int
    temperature: float = 1.0
    top_p: float = 1.0
    seed: int = 0


class ReplyWriter:
    """Writes the student's replies to questions. It compiles once and serves any parameters.

    The random key of a drawn reply follows from the seed, the question's text and the number of the reply. So a draw
    does not depend on the other questions, the number of replies, the batch size or the devices.

    Args:
        decoder: the student's shape.
        template: renders prompts and splits replies.
        questions: at least one.
        max_new_tokens: length limit of a reply.
        batch_size: replies decoded at a time.
        draws: how replies are drawn; None: one greedy reply to each question.
        vocab_size: ids from here on are never drawn; None: the tokenizer's size.
        mesh: the mesh of the parameters and the decoding; None: JAX's default device.
    """

    def __init__(
        self,
        decoder: DecoderConfig,
        template: AnyTemplate,
        questions: Sequence[Question],
        *,
        max_new_tokens: int,
        batch_size: int,
        draws: Draws | None = None,
        vocab_size: int | None = None,
        mesh: jax.sharding.Mesh | None = None,
    ) -> None:
        self.template, self.questions = template, list(questions)
        self.prompts = [question.prompt_tokens(template) for question in questions]
        self.samples = 1 if draws is None else draws.samples
        self.keys = None if draws is None else reply_keys(self.questions, draws)
        count, sizes = len(self.questions) * self.samples, {} if mesh is None else mesh.shape
        over = math.prod(size for axis, size in sizes.items() if axis != "tensor")
        # Rounded up: every device decodes the same number of rows.
        slots = -(-min(batch_size, count) // over) * over
        calls = -(-count // (QUEUE * slots))
        self.rows = -(-count // (calls * over)) * over
        settings = SamplingSettings(
            max_new_tokens,
            eos_ids=template.stop_ids,
            temperature=0.0 if draws is None else draws.temperature,
            top_p=1.0 if draws is None else draws.top_p,
            pad_id=template.pad_id,
        )
        vocab_size = vocab_size or len(template.tokenizer)
        self.sampler = jit_eval(make_sampler(decoder, settings, vocab_size, slots), mesh)

    def __call__(self, params: Params, progress: Callable[[int], None] = lambda done: None) -> list[list[Reply]]:
        """Return the replies to each question, in order; `progress` is called with the number of replies done."""
        prompts, replies = self.prompts, dict[tuple[int, int], Reply]()
        # Prompts of similar length together, to save columns.
        in_order = sorted(range(len(prompts)), key=lambda row: len(prompts[row]))
        order = [(row, sample) for row in in_order for sample in range(self.samples)]
        for start in range(0, len(order), self.rows):
            part = order[start : start + self.rows]
            columns = -(-max(len(prompts[row]) for row, _ in part) // PROMPT_COLUMNS) * PROMPT_COLUMNS
            batch = [prompts[row] for row, _ in part]
            padded = pad_prompts(batch, length=columns, rows=self.rows, pad_id=self.template.pad_id)
            written = fetch(self.sampler(params, padded, self.keys_for(part)))
            for i, (row, sample) in enumerate(part):
                ids = written.tokens[i, : written.lengths[i]]
                replies[row, sample] = judge(self.template, self.questions[row], ids, bool(written.finished[i]))
            progress(len(replies))
        return [[replies[row, sample] for sample in range(self.samples)] for row in range(len(prompts))]

    def keys_for(self, part: Sequence[tuple[int, int]]) -> Key[Array, "..."]:
        """Return a random key for each row of a call: (question, number of the reply). Greedy replies need none."""
        if self.keys is None:
            return jax.random.key(0)
        rows = np.array([row for row, _ in part] + [0] * (self.rows - len(part)))
        samples = np.array([sample for _, sample in part] + [0] * (self.rows - len(part)))
        return self.keys[rows, samples]


def reply_keys(questions: Sequence[Question], draws: Draws) -> Key[Array, "Q S"]:
    """Return the random key of each reply to each question."""
    texts = [hashlib.sha256(question_text(question).encode()).digest()[:8] for question in questions]
    halves = np.frombuffer(b"".join(texts), "<u4").reshape(-1, 2)

    def key_of(half_2: Array, sample: Array) -> Key[Array, ""]:
        key = jax.random.fold_in(jax.random.fold_in(jax.random.key(draws.seed), half_2[0]), half_2[1])
        return jax.random.fold_in(key, sample)

    samples = jnp.arange(draws.samples, dtype=jnp.uint32)
    return jax.vmap(lambda half_2: jax.vmap(lambda sample: key_of(half_2, sample))(samples))(jnp.asarray(halves))


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
