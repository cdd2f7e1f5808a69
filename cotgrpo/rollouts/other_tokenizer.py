"""A live teacher with another tokenizer, in this process or on a server: it scores the student's replies as text.

GRPO here is GhostRespond Policy Optimization, not Group Relative. `cotgrpo.ghosts.other_tokenizer` says how the two
tokenizers are aligned. The host does it for each reply, so replies and choices go through it.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING

import jax
import numpy as np

from cotgrpo.data.chat import ChatTemplate
from cotgrpo.data.sources import DataError
from cotgrpo.data.template import AnyTemplate
from cotgrpo.data.tokenizer import token_bytes
from cotgrpo.ghosts.live import map_contexts
from cotgrpo.ghosts.other_tokenizer import END, FirstTokens, align
from cotgrpo.objectives import MASKED_LOGIT, likeliest
from cotgrpo.rollouts.rollouts import RolloutPrompt
from cotgrpo.sharding import jit_eval
from cotgrpo.teacher_servers.server import Scorer, Scores, Text
from cotgrpo.teacher_servers.vocabulary import Vocabulary
from cotgrpo.types import Params, SftBatch, Student

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from cotgrpo.types import Array, Float

COLUMNS = 64
"""Texts are padded to multiples of this, so that the teacher compiles for a few shapes instead of every length."""
TEACHER_TOKENS = 4
"""Most tokens of the teacher for one of the student's, over a whole reply. Contexts after that are not supervised."""


class Tokens(Vocabulary):
    """The tokens of a model as bytes.

    Args:
        tokenizer: its tokenizer.
        end_ids: tokens that end a reply, the usual one first.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, end_ids: Sequence[int]) -> None:
        super().__init__(tokenizer, len(tokenizer))
        self.end_ids = tuple(int(i) for i in end_ids)
        letter = self.encode("a")
        self.before = letter[-1] if letter else None
        self.bytes_of = functools.lru_cache(maxsize=None)(self.find_bytes)

    def find_bytes(self, token: int) -> bytes:
        """Return the bytes of a token inside a text."""
        return token_bytes(self.tokenizer, token, self.before)

    def pieces(self, ids: Sequence[int]) -> list[bytes]:
        """Return the bytes of each token inside a text."""
        return [self.bytes_of(int(i)) for i in ids]

    def without_end(self, ids: Sequence[int]) -> tuple[list[int], bool]:
        """Return a reply without its end, and whether it had one."""
        has_end = len(ids) > 0 and int(ids[-1]) in self.end_ids
        return [int(i) for i in ids[: len(ids) - has_end]], has_end


class OtherTokenizer:
    """Scores the student's replies with a teacher that has another tokenizer. It stands for a `ScoringServer`.

    The scores are the ghost token at each place of a reply, with log-probability 0: which other tokens of the student
    the teacher would choose is not known.

    Args:
        student: the student's tokens.
        teacher: the teacher's tokens.
        scorer: scores texts in the teacher's tokens. The contexts it is given are in the teacher's tokens already.
    """

    def __init__(self, student: Tokens, teacher: Tokens, scorer: Scorer) -> None:
        self.student, self.teacher, self.scorer = student, teacher, scorer
        self.first_token = FirstTokens(student.encode, student.pieces)
        self.pool = ThreadPoolExecutor(1, "other tokenizer")

    def check_same_model(self, before: Sequence[float], now: Sequence[float], when: str) -> None:
        """Raise an error if a sample has other log-probabilities than `when`."""
        self.scorer.check_same_model(before, now, when)

    def score_later(self, make_texts: Callable[[], Sequence[Text]], columns: int) -> Future[Scores]:
        """Score replies in the background: `Text.scored` are the student's tokens, `Text.context` the teacher's."""
        replies: list[tuple[Text, Text]] = []  # as the student wrote it, and in the teacher's tokens

        def translated() -> list[Text]:
            replies.extend((text, self.translate(text, TEACHER_TOKENS * columns)) for text in make_texts())
            return [theirs for _, theirs in replies]

        scores = self.scorer.score_later(translated, TEACHER_TOKENS * columns)
        return self.pool.submit(lambda: self.align_all(replies, scores.result(), columns))

    def translate(self, text: Text, most: int) -> Text:
        """Return a reply in the teacher's tokens, at most so many. An end is one of them."""
        own, has_end = self.student.without_end(text.scored)
        theirs = self.teacher.encode(b"".join(self.student.pieces(own)).decode(errors="replace"))
        return Text(text.context, [*theirs, *self.teacher.end_ids[:1] * has_end][:most])

    def align_all(self, replies: Sequence[tuple[Text, Text]], scores: Scores, columns: int) -> Scores:
        """Return the ghost tokens of replies that the teacher has scored, as tokens of the student."""
        ids = np.zeros((len(replies), columns, 1), np.int32)
        log_probs = np.full((len(replies), columns, 1), MASKED_LOGIT, np.float32)
        for row, (text, translated) in enumerate(replies):
            own, _ = self.student.without_end(text.scored)
            places = translated.scored
            theirs, _ = self.teacher.without_end(places)
            choices = [
                self.choice(int(scores.ids[row, n, 0])) if scores.known[row, n] else None for n in range(len(places))
            ]
            found = align(
                self.student.pieces(own),
                self.teacher.pieces(theirs),
                choices,
                self.first_token,
                self.student.end_ids[0],
                places=len(text.scored),
            )
            ids[row, : len(text.scored), 0] = found.ids
            log_probs[row, : len(text.scored), 0] = np.where(found.known, 0.0, MASKED_LOGIT)
        return Scores(ids, log_probs)

    def choice(self, token: int) -> bytes:
        """Return the bytes of a token that the teacher chooses."""
        return END if token in self.teacher.end_ids else self.teacher.bytes_of(token)


class LocalScorer:
    """A model in this process that scores texts in its own tokens: the likeliest token at each place.

    Args:
        teacher: the frozen model.
        params: its parameters.
        mesh: of the parameters; None: JAX's default device.
    """

    def __init__(self, teacher: Student, params: Params, mesh: jax.sharding.Mesh | None = None) -> None:
        self.params = params
        self.pool = ThreadPoolExecutor(1, "teacher")

        def choose(logits_V: Float[Array, "V"], _: object) -> Array:
            return likeliest(logits_V)

        self.choices = jit_eval(lambda held, batch: map_contexts(teacher, held, batch, choose, None), mesh)

    def check_same_model(self, before: Sequence[float], now: Sequence[float], when: str) -> None:
        """Do nothing: the model is read by its name, which the run compares."""

    def score_later(self, make_texts: Callable[[], Sequence[Text]], columns: int) -> Future[Scores]:
        """Score texts in the background."""
        return self.pool.submit(lambda: self.score(make_texts(), columns))

    def score(self, texts: Sequence[Text], columns: int) -> Scores:
        """Return the likeliest token before each scored token."""
        width = -(-max(len(text.context) + len(text.scored) for text in texts) // COLUMNS) * COLUMNS
        tokens, mask = np.zeros((len(texts), width), np.int32), np.zeros((len(texts), width), np.float32)
        lengths = np.zeros((len(texts), 1), np.int64)
        for row, text in enumerate(texts):
            whole = [*text.context, *text.scored]
            tokens[row, : len(whole)], lengths[row] = whole, len(whole)
            mask[row, len(text.context) - 1 : len(whole) - 1] = 1
        positions = np.broadcast_to(np.arange(width, dtype=np.int32), tokens.shape)
        segments = (positions < lengths).astype(np.int32)
        batch = SftBatch(tokens, np.roll(tokens, -1, axis=1), positions * segments, segments, mask)
        chosen = np.asarray(jax.device_get(self.choices(self.params, batch)))
        ids = np.zeros((len(texts), columns, 1), np.int32)
        log_probs = np.full((len(texts), columns, 1), MASKED_LOGIT, np.float32)
        for row, text in enumerate(texts):
            count, start = len(text.scored), len(text.context) - 1
            ids[row, :count, 0], log_probs[row, :count, 0] = chosen[row, start : start + count], 0.0
        return Scores(ids, log_probs)


@dataclasses.dataclass(frozen=True)
class TwoTokenizers:
    """The student's tokens, and those of a teacher with another tokenizer.

    Attributes:
        student, teacher: the tokens of each.
        prompt: returns what the teacher reads in place of a question's prompt, in its tokens.
    """

    student: Tokens
    teacher: Tokens
    prompt: Callable[[RolloutPrompt], Sequence[int] | np.ndarray]

    @classmethod
    def of(
        cls,
        student: AnyTemplate,
        tokenizer: PreTrainedTokenizerBase,
        chat: ChatTemplate | None,
        path: str,
    ) -> TwoTokenizers:
        """Return the two.

        Args:
            student: the student's template.
            tokenizer: the teacher's.
            chat: renders a question in the teacher's own form; None: it reads the text of the student's prompt.
            path: of the teacher, for errors.

        Raises:
            DataError: no token of the teacher ends a text.
        """
        own = Tokens(student.tokenizer, (student.eos_id, *student.stop_ids))
        if chat is not None:
            theirs = Tokens(tokenizer, (chat.eos_id, *chat.stop_ids))
            return cls(own, theirs, lambda asked: chat.prompt_of(asked.question))
        if tokenizer.eos_token_id is None:
            raise DataError(f"{path}: the tokenizer names no token that ends a text (eos_token). Add it.")
        theirs = Tokens(tokenizer, [int(tokenizer.eos_token_id)])
        text = lambda asked: str(student.tokenizer.decode(asked.prompt, skip_special_tokens=True))
        return cls(own, theirs, lambda asked: plain_prompt(theirs, text(asked)))

    @property
    def vocabulary(self) -> tuple[PreTrainedTokenizerBase, int]:
        """The teacher's tokenizer and its size."""
        return self.teacher.tokenizer, len(self.teacher.tokenizer)

    def context_of(self, asked: RolloutPrompt) -> list[int]:
        """Return what the teacher reads in place of a question's prompt."""
        return [int(token) for token in self.prompt(asked)]

    def samples(self, texts: Sequence[str]) -> list[Text]:
        """Return texts in the teacher's tokens, to compare its tokenizer with a server's."""
        rows = [self.teacher.encode(text) for text in texts]
        return [Text(ids[:1], ids[1:]) for ids in rows if len(ids) >= 2]


def check_tokenizers(student: Tokens, teacher: Tokens, texts: Sequence[str]) -> float:
    """Return which share of the student's contexts in these texts a teacher with another tokenizer can supervise.

    Raises:
        DataError: none, since one of the tokenizers changes the texts.
    """
    shared = total = 0
    for text in texts:
        own = student.pieces(student.encode(text))
        theirs = teacher.pieces(teacher.encode(text))
        choices: list[bytes | None] = [*theirs, END]
        found = align(own, theirs, choices, FirstTokens(student.encode, student.pieces), 0, places=len(own) + 1)
        shared, total = shared + int(found.known.sum()), total + len(own) + 1
    if total and shared <= len(texts):  # the start of a text is always a boundary
        raise DataError(
            "The teacher's tokenizer and the student's have no boundaries in common in the training rows: one of them "
            "changes the text (case, accents or spaces). Choose a teacher whose tokenizer keeps the text."
        )
    return shared / max(total, 1)


def plain_prompt(tokens: Tokens, text: str) -> list[int]:
    """Return a prompt in the teacher's tokens, with its token for the start of a text if it has one."""
    start, own = tokens.tokenizer.bos_token_id, tokens.encode(text)
    return [int(start), *own] if start is not None and own[:1] != [start] else own
