"""On-policy batches: the student writes its own replies, and a live ghost says the ideal token at each of their prefixes.

GRPO here is GhostRespond Policy Optimization, not Group Relative. A batch depends on the parameters, so the loop tells them (`follow`) before it takes one.
Sampling and the ghost's forward pass are one compiled program that is queued behind the running step: the device never waits for the host, and the replies
are those of the newest parameters all the same. The host judges the replies of a batch while the step works on it.
"""

from __future__ import annotations

import base64
import dataclasses
import functools
import io
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from cotgrpo.data.questions import Question
from cotgrpo.data.sources import DataError
from cotgrpo.data.template import AnyTemplate
from cotgrpo.ghosts.live import live_ghosts, reply_rewards, reweighted
from cotgrpo.run.completions import CompletionsLog
from cotgrpo.run.evaluate import judge
from cotgrpo.run.hosts import is_first
from cotgrpo.sampling import Prompts, Replies, Sampler, pad_prompts
from cotgrpo.sharding import jit_reader
from cotgrpo.types import GhostBatch, Metric, Metrics, Params, SftBatch, Student

ROLLOUTS = 0x726F6C6C
"""Folded into the run's key: rollouts draw from a stream of their own, apart from the steps'."""


@dataclasses.dataclass(frozen=True)
class Asked:
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
        reuse: updates on the same replies.
        ratio_clip: bound of the weights of a later update (`cotgrpo.ghosts.live.reweighted`).
    """

    replies: int
    seq_len: int
    max_new_tokens: int
    forced_rows: int = 0
    reuse: int = 1
    ratio_clip: float = 0.2

    @property
    def prompt_columns(self) -> int:
        return self.seq_len - self.max_new_tokens


@dataclasses.dataclass(frozen=True)
class Held:
    """A batch as it was drawn, and what is still to be done with it.

    Attributes:
        batch: the contexts with their ghosts.
        log_probs: `[B, T]`, log p of the token behind each context when it was drawn.
        asked: the questions of replies that are not judged yet, or None.
        replies: the replies.
        rewards: ghost tokens and rewards of the rows to log, or None.
    """

    batch: GhostBatch
    log_probs: Any
    asked: list[Asked] | None = None
    replies: Replies | None = None
    rewards: Any = None

    @functools.cached_property
    def text(self) -> str:
        """The arrays that a later update needs, for a checkpoint's JSON."""
        fields = {name: value for name, value in vars(self.batch).items() if value is not None}
        file = io.BytesIO()
        np.savez_compressed(file, log_probs=self.log_probs, **fields)
        return base64.b64encode(file.getvalue()).decode()

    @classmethod
    def from_text(cls, text: str) -> Held:
        with np.load(io.BytesIO(base64.b64decode(text))) as arrays:
            fields = dict(arrays)
        log_probs = fields.pop("log_probs")
        return cls(GhostBatch(**fields), log_probs)


def make_draw(sample: Sampler, teacher: Student, *, drawn_ghosts: bool = False) -> Callable[..., Any]:
    """`draw((params, teacher_params), (prompts, reads, forced), key) -> (batch, replies, log_probs)`: replies with their ghosts, as one pure function.

    Parameters come first and rows second, as `cotgrpo.sharding.jit_reader` spreads them over a mesh.

    Args:
        sample: the student's sampler.
        teacher: the frozen model that is asked at every prefix.
        drawn_ghosts: ghost tokens are drawn from the teacher's distribution, and not its likeliest.

    Returns:
        The function. `reads` is what the teacher reads instead of the prompts, or None; `forced` teacher-forced rows of the same width that join the
        batch, or None. The batch holds no drawn tokens then, since those rows have none: an objective that wants some lets the step draw them.
        `log_probs` are the student's own of the token behind each context of a reply, `[B, T]`, and 0 elsewhere.
    """

    def draw(
        models: tuple[Params, Params], rows: tuple[Prompts, Prompts | None, SftBatch | None], key: Any
    ) -> tuple[GhostBatch, Replies, Any]:
        (params, teacher_params), (prompts, reads, forced) = models, rows
        for_sampling, for_ghosts = jax.random.split(key)
        replies = sample(params, prompts, for_sampling)
        ghosts = live_ghosts(
            teacher, teacher_params, prompts, replies, reads=reads, key=for_ghosts if drawn_ghosts else None
        )
        columns = ((0, 0), (prompts.tokens.shape[1] - 1, 1))
        log_probs = jnp.pad(replies.log_probs, columns)
        if forced is not None:
            text = GhostBatch.teacher_forced(forced)
            join = lambda own, more: jnp.concatenate([own, jnp.asarray(more, own.dtype)])
            ghosts = jax.tree.map(join, ghosts.replace(drawn_tokens=None), text)
            log_probs = jnp.pad(log_probs, ((0, forced.tokens.shape[0]), (0, 0)))
        return ghosts, replies, log_probs

    return draw


class OnPolicyBatches:
    """An endless iterator of on-policy batches, with the state of a data iterator.

    Batch n is a function of the run's seed, n, and the parameters that `follow` told before it, so a run that is resumed at any step goes on with the same
    batches. Only while replies are used again are they part of the state. On a mesh every device writes the replies to its share of a batch's questions, and
    the batch is whole on each; of several processes each makes the same batches, and the first writes the log.

    Args:
        draw: from `make_draw`, compiled by `jit_reader` for the mesh.
        teacher_params: the live ghost's parameters.
        student: the student, for the weights of replies that are used again, and for the rewards that are logged.
        template: takes replies apart.
        questions: training rows.
        settings: sizes, and how often replies are used.
        seed: of the order of the questions, and of what is drawn.
        merged: the student's whole parameters from those that are trained (LoRA's adapters).
        forced: an iterator of teacher-forced batches of the same width, whose rows join each batch, or None.
        completions: a log of some replies with their rewards, or None.
        mesh: where the parameters lie and the batches are made; None: JAX's default device.

    Raises:
        DataError: no question, or a prompt that leaves no room for the reply.
    """

    def __init__(
        self,
        draw: Callable[..., Any],
        teacher_params: Params,
        student: Student,
        template: AnyTemplate,
        questions: Sequence[Asked],
        settings: RolloutSettings,
        *,
        seed: int,
        merged: Callable[[Any], Params] = lambda trained: trained,
        forced: Any = None,
        completions: CompletionsLog | None = None,
        mesh: jax.sharding.Mesh | None = None,
    ) -> None:
        import grain

        check_questions(questions, settings)
        self.draw, self.teacher_params, self.template = draw, teacher_params, template
        self.questions, self.settings, self.forced = list(questions), settings, forced
        self.completions, self.merged = completions, merged
        self.read_columns = max(len(q.reads) if q.reads is not None else 0 for q in questions)
        self.order = grain.MapDataset.range(len(questions)).seed(seed).shuffle().repeat(None)
        self.key = jax.random.fold_in(jax.random.key(seed), ROLLOUTS)
        self.rewards = jit_reader(functools.partial(reply_rewards, student), mesh)
        own_B1 = np.arange(settings.replies + settings.forced_rows)[:, None] < settings.replies
        self.reweighted = jit_reader(
            lambda params, held: reweighted(student, params, *held, own_B1, settings.ratio_clip), mesh
        )
        self.taken = 0
        self.params: Params = None
        self.held: Held | None = None  # the newest replies: to be judged, and maybe used again

    def follow(self, trained: Any) -> None:
        """The newest trained parameters, which the next batch is drawn with. Called before they are donated to a step."""
        self.params = self.merged(trained)

    def __next__(self) -> GhostBatch:
        uses = self.taken % self.settings.reuse
        self.taken += 1
        if uses:
            assert self.held is not None
            return self.reweighted(self.params, (self.held.batch, self.held.log_probs))
        self.held = self.roll_out(self.taken - 1)
        return self.held.batch

    def roll_out(self, number: int) -> Held:
        """New replies, queued on the device; nothing waits for them here."""
        settings = self.settings
        first = number // settings.reuse * settings.replies
        asked = [self.questions[int(self.order[i])] for i in range(first, first + settings.replies)]
        pad = functools.partial(pad_prompts, pad_id=self.template.pad_id)
        prompts = pad([q.prompt for q in asked], length=settings.prompt_columns)
        reads = [q.reads for q in asked if q.reads is not None]
        read = pad(reads, length=self.read_columns) if reads else None
        forced = None if self.forced is None else next(self.forced)
        key = jax.random.fold_in(self.key, number)
        batch, replies, log_probs = self.draw((self.params, self.teacher_params), (prompts, read, forced), key)
        log, rewards = self.completions, None
        if log is not None and log.due(number + 1):
            shown = jax.tree.map(lambda x: x[: log.rows], batch.replace(drawn_tokens=None))
            rewards = shown.ghost_tokens, self.rewards(self.params, shown)
        return Held(batch, log_probs, asked, replies, rewards)

    def observed(self) -> Metrics:
        """Means over the replies of the latest batch, once for each: `accuracy`, `reply_length` in tokens, `unfinished`, and `rollout_tokens` a batch.

        Waits for the replies, and logs some where they are due.
        """
        if self.held is None or self.held.asked is None:
            return {"rollout_tokens": metric(0, 1)}
        held, asked, self.held = self.held, self.held.asked, dataclasses.replace(self.held, asked=None)
        written, rewards = jax.device_get((held.replies, held.rewards))
        ids = [row[:length] for row, length in zip(written.tokens, written.lengths, strict=True)]
        replies = [
            judge(self.template, q.question, i, bool(end))
            for q, i, end in zip(asked, ids, written.finished, strict=True)
        ]
        if self.completions is not None and rewards is not None and is_first():
            ghosts, values = (part[:, self.settings.prompt_columns - 1 : -1] for part in rewards)
            self.completions.write(self.taken, self.template.tokenizer, replies, ids, ghosts, values)
        tokens = sum(map(len, ids))
        return {
            "accuracy": metric(sum(reply.correct for reply in replies), len(ids)),
            "reply_length": metric(tokens, len(ids)),
            "unfinished": metric(sum(not reply.finished for reply in replies), len(ids)),
            "rollout_tokens": metric(tokens, 1),
        }

    def get_state(self) -> dict[str, Any]:
        state = {"taken": self.taken, "forced": None if self.forced is None else self.forced.get_state()}
        if self.taken % self.settings.reuse:
            assert self.held is not None
            state["held"] = self.held.text
        return state

    def set_state(self, state: dict[str, Any]) -> None:
        self.taken = state["taken"]
        if self.forced is not None:
            self.forced.set_state(state["forced"])
        if "held" in state:
            self.held = Held.from_text(state["held"])


def metric(total: int, weight: int) -> Metric:
    """A metric that the host counted."""
    return Metric(*(np.asarray(value, np.float32) for value in (total, weight)))


def check_questions(questions: Sequence[Asked], settings: RolloutSettings) -> None:
    """Raises DataError where there is no question, or no room for a reply behind one."""
    if not questions:
        raise DataError("On-policy training needs training rows, got none.")
    longest = max(questions, key=lambda q: len(q.prompt))
    if len(longest.prompt) > settings.prompt_columns:
        raise DataError(
            f"{longest.question.source or 'A training row'}: its prompt has {len(longest.prompt)} tokens, but data.seq_len {settings.seq_len} leaves "
            f"{settings.prompt_columns} beside a reply of {settings.max_new_tokens} (grpo.ghosts.max_new_tokens). Raise the one, or lower the other."
        )
