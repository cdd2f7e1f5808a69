"""On-policy batches: the student writes its own replies, and a live ghost says the ideal token at each of their prefixes.

GRPO here is GhostRespond Policy Optimization, not Group Relative. A batch depends on the parameters, so the loop tells them (`follow`) before it takes one.
Sampling and the ghost's forward pass are one compiled program that is queued behind the running step: the device never waits for the host, and the replies
are those of the newest parameters all the same. The host judges the replies of a batch while the step works on it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from cotgrpo.data.template import AnyTemplate
from cotgrpo.data.triples import DataError, Triple
from cotgrpo.ghosts.live import live_ghosts
from cotgrpo.run.evaluate import Reply, judge
from cotgrpo.sampling import Prompts, Replies, Sampler, pad_prompts
from cotgrpo.types import GhostBatch, Metric, Metrics, Params, SftBatch, Student

ROLLOUTS = 0x726F6C6C
"""Folded into the run's key: rollouts draw from a stream of their own, apart from the steps'."""


@dataclasses.dataclass(frozen=True)
class Question:
    """A training row whose reply the student writes itself.

    Attributes:
        triple: the row; its answer judges the reply.
        prompt: int32 tokens that the student reads.
        reads: int32 tokens that the live ghost reads instead, or None for the same.
    """

    triple: Triple
    prompt: np.ndarray
    reads: np.ndarray | None = None


def make_draw(sample: Sampler, teacher: Student, *, drawn_ghosts: bool = False) -> Callable[..., Any]:
    """`draw(params, teacher_params, prompts, reads, forced, key) -> (batch, replies)`: replies with their ghosts, as one pure function.

    Args:
        sample: the student's sampler.
        teacher: the frozen model that is asked at every prefix.
        drawn_ghosts: ghost tokens are drawn from the teacher's distribution, and not its likeliest.

    Returns:
        The function. `reads` is what the teacher reads instead of the prompts, or None; `forced` teacher-forced rows of the same width that join the
        batch, or None. The batch holds no drawn tokens then, since those rows have none: an objective that wants some lets the step draw them.
    """

    def draw(
        params: Params,
        teacher_params: Params,
        prompts: Prompts,
        reads: Prompts | None,
        forced: SftBatch | None,
        key: Any,
    ) -> tuple[GhostBatch, Replies]:
        for_sampling, for_ghosts = jax.random.split(key)
        replies = sample(params, prompts, for_sampling)
        ghosts = live_ghosts(
            teacher, teacher_params, prompts, replies, reads=reads, key=for_ghosts if drawn_ghosts else None
        )
        if forced is not None:
            rows = GhostBatch.teacher_forced(forced)
            join = lambda own, text: jnp.concatenate([own, jnp.asarray(text, own.dtype)])
            ghosts = jax.tree.map(join, ghosts.replace(drawn_tokens=None), rows)
        return ghosts, replies

    return draw


class OnPolicyBatches:
    """An endless iterator of on-policy batches, with the state of a data iterator: where it is in the questions.

    Batch n is a function of the run's seed, n, and the parameters that `follow` told last, so a run that is resumed at any step goes on with the same.

    Args:
        draw: from `make_draw`, jitted.
        teacher_params: the live ghost's parameters.
        template: takes replies apart.
        questions: training rows.
        batch_size: replies of a batch.
        seq_len: columns of a row, those of the reply included.
        max_new_tokens: columns of the reply.
        seed: of the order of the questions, and of what is drawn.
        forced: an iterator of teacher-forced batches of the same width, whose rows join each batch, or None.

    Raises:
        DataError: no question, or a prompt that leaves no room for the reply.
    """

    def __init__(
        self,
        draw: Callable[..., Any],
        teacher_params: Params,
        template: AnyTemplate,
        questions: Sequence[Question],
        *,
        batch_size: int,
        seq_len: int,
        max_new_tokens: int,
        seed: int,
        forced: Any = None,
    ) -> None:
        import grain

        self.columns = seq_len - max_new_tokens
        check_questions(questions, self.columns, seq_len, max_new_tokens)
        self.draw, self.teacher_params, self.template = draw, teacher_params, template
        self.questions, self.batch_size, self.forced = list(questions), batch_size, forced
        self.read_columns = max(len(q.reads) for q in questions) if questions[0].reads is not None else 0
        self.order = grain.MapDataset.range(len(questions)).seed(seed).shuffle().repeat(None)
        self.key = jax.random.fold_in(jax.random.key(seed), ROLLOUTS)
        self.taken = 0
        self.params: Params = None
        self.latest: tuple[list[Question], Replies] | None = None

    def follow(self, params: Params) -> None:
        """The parameters that the next batch is drawn with. Called before they are donated to a step."""
        self.params = params

    def __next__(self) -> GhostBatch:
        first = self.taken * self.batch_size
        asked = [self.questions[int(self.order[i])] for i in range(first, first + self.batch_size)]
        prompts = pad_prompts([q.prompt for q in asked], length=self.columns, pad_id=self.template.pad_id)
        reads = [q.reads for q in asked if q.reads is not None]
        read = pad_prompts(reads, length=self.read_columns, pad_id=self.template.pad_id) if reads else None
        forced = None if self.forced is None else next(self.forced)
        key = jax.random.fold_in(self.key, self.taken)
        batch, replies = self.draw(self.params, self.teacher_params, prompts, read, forced, key)
        self.taken += 1
        self.latest = asked, replies
        return batch

    def judged(self) -> list[tuple[Question, Reply, np.ndarray]]:
        """The replies of the latest batch, taken apart, with their tokens; waits for them."""
        assert self.latest is not None
        asked, replies = self.latest
        written = jax.device_get(replies)
        ids = [row[:length] for row, length in zip(written.tokens, written.lengths, strict=True)]
        ended = [bool(f) for f in written.finished]
        return [(q, judge(self.template, q.triple, i, end), i) for q, i, end in zip(asked, ids, ended, strict=True)]

    def observed(self) -> Metrics:
        """Means over the replies of the latest batch: `accuracy`, `reply_length` in tokens, `unfinished`; and `rollout_tokens`, their sum a batch."""
        rows = self.judged()
        n, tokens = np.float32(len(rows)), np.float32(sum(len(ids) for _, _, ids in rows))
        return {
            "accuracy": Metric(np.float32(sum(reply.correct for _, reply, _ in rows)), n),
            "reply_length": Metric(tokens, n),
            "unfinished": Metric(np.float32(sum(not reply.finished for _, reply, _ in rows)), n),
            "rollout_tokens": Metric(tokens, np.float32(1)),
        }

    def get_state(self) -> dict[str, Any]:
        return {"taken": self.taken, "forced": None if self.forced is None else self.forced.get_state()}

    def set_state(self, state: dict[str, Any]) -> None:
        self.taken = state["taken"]
        if self.forced is not None:
            self.forced.set_state(state["forced"])


def check_questions(questions: Sequence[Question], columns: int, seq_len: int, max_new_tokens: int) -> None:
    """Raises DataError where there is no question, or no room for a reply behind one."""
    if not questions:
        raise DataError("On-policy training needs training rows, got none.")
    longest = max(questions, key=lambda q: len(q.prompt))
    if len(longest.prompt) > columns:
        raise DataError(
            f"{longest.triple.source or 'A training row'}: its prompt has {len(longest.prompt)} tokens, but data.seq_len {seq_len} leaves {columns} "
            f"beside a reply of {max_new_tokens} (grpo.live.max_new_tokens). Raise the one, or lower the other."
        )
