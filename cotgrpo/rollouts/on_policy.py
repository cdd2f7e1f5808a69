"""On-policy batches: the student writes its own replies, and a live ghost says the ideal token at each of their prefixes.

GRPO here is GhostRespond Policy Optimization, not Group Relative. Sampling and the ghost's forward pass are one compiled program that is queued behind the running
step: the device never waits for the host, and the replies are those of the newest parameters all the same. The host judges the replies of a batch while the
step works on it.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from cotgrpo.data.template import AnyTemplate
from cotgrpo.distributed.processes import is_process_0
from cotgrpo.ghosts.live import certain, live_ghosts, reply_rewards, reweighted
from cotgrpo.logs.completions import CompletionsLog
from cotgrpo.rollouts.rollouts import (
    RolloutBatch,
    RolloutPrompt,
    Rollouts,
    RolloutSettings,
    ids_of,
    judged,
    metric,
    rollout_metrics,
)
from cotgrpo.sampling import Prompts, Replies, Sampler, pad_prompts
from cotgrpo.sharding import jit_eval
from cotgrpo.types import GhostBatch, Metrics, Params, SftBatch, Student


def make_draw(sample: Sampler, teacher: Student, *, drawn_ghosts: bool = False, top_k: int = 0) -> Callable[..., Any]:
    """`draw((params, teacher_params), (prompts, reads, forced), key) -> (batch, replies, log_probs)`: replies with their ghosts, as one pure function.

    Parameters come first and rows second, as `cotgrpo.sharding.jit_reader` spreads them over a mesh.

    Args:
        sample: the student's sampler.
        teacher: the frozen model that is asked at every prefix.
        drawn_ghosts: ghost tokens are drawn from the teacher's distribution, and not its likeliest.
        top_k: tokens of that distribution in the batch, for `ForwardKl`; teacher-forced rows are then the word of a teacher that is certain.

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
            teacher,
            teacher_params,
            prompts,
            replies,
            reads=reads,
            key=for_ghosts if drawn_ghosts else None,
            top_k=top_k,
        )
        columns = ((0, 0), (prompts.tokens.shape[1] - 1, 1))
        log_probs = jnp.pad(replies.log_probs, columns)
        if forced is not None:
            text = GhostBatch.teacher_forced(forced)
            text = certain(text, top_k) if top_k else text
            join = lambda own, more: jnp.concatenate([own, jnp.asarray(more, own.dtype)])
            ghosts = jax.tree.map(join, ghosts.replace(drawn_tokens=None), text)
            log_probs = jnp.pad(log_probs, ((0, forced.tokens.shape[0]), (0, 0)))
        return ghosts, replies, log_probs

    return draw


class OnPolicyBatches(Rollouts):
    """Batches of replies with a live ghost's token at each prefix; see `Rollouts`, and of several processes the first writes the log.

    Args:
        draw: from `make_draw`, compiled by `jit_eval` for the mesh.
        teacher_params: the live ghost's parameters.
        student: the student, for the weights of replies that are used again, and for the rewards that are logged.
        template, questions, settings, seed, merged: as in `Rollouts`.
        forced: an iterator of teacher-forced batches of the same width, whose rows join each batch, or None.
        completions: a log of some replies with their rewards, or None.
        mesh: where the parameters lie and the batches are made; None: JAX's default device.
    """

    def __init__(
        self,
        draw: Callable[..., Any],
        teacher_params: Params,
        student: Student,
        template: AnyTemplate,
        questions: Sequence[RolloutPrompt],
        settings: RolloutSettings,
        *,
        seed: int,
        merged: Callable[[Any], Params] = lambda trained: trained,
        forced: Any = None,
        completions: CompletionsLog | None = None,
        mesh: jax.sharding.Mesh | None = None,
    ) -> None:
        super().__init__(template, questions, settings, seed=seed, merged=merged)
        self.draw, self.teacher_params = draw, teacher_params
        self.forced, self.completions = forced, completions
        self.read_columns = max(len(q.reads) if q.reads is not None else 0 for q in questions)
        self.rewards = jit_eval(functools.partial(reply_rewards, student), mesh)
        own_B1 = np.arange(settings.replies + settings.forced_rows)[:, None] < settings.replies

        def again(params: Params, held: tuple[GhostBatch, Any]) -> GhostBatch:
            batch, log_probs = held
            return reweighted(student, params, batch, log_probs, jnp.asarray(own_B1), settings.ratio_clip)

        self.reweighted = jit_eval(again, mesh)

    def roll_out(self, number: int) -> RolloutBatch:
        """New replies, queued on the device; nothing waits for them here."""
        asked = self.asked(number)
        reads = [q.reads for q in asked if q.reads is not None]
        read = pad_prompts(reads, length=self.read_columns, pad_id=self.template.pad_id) if reads else None
        forced = None if self.forced is None else next(self.forced)
        batch, replies, log_probs = self.draw(
            (self.params, self.teacher_params), (self.prompts(asked), read, forced), self.key_of(number)
        )
        log, rewards = self.completions, None
        if log is not None and log.due(number + 1):
            shown = jax.tree.map(lambda x: x[: log.rows], batch.replace(drawn_tokens=None))
            rewards = shown.ghost_tokens, self.rewards(self.params, shown)
        return RolloutBatch(batch, log_probs, asked, replies, rewards)

    def again(self, held: RolloutBatch) -> GhostBatch:
        """The replies of an earlier student, weighted for the present one."""
        return self.reweighted(self.params, (held.batch, held.log_probs))

    def observed(self) -> Metrics:
        """See `Rollouts`; logs some replies too, where they are due."""
        if self.held is None or self.held.asked is None:
            return {"rollout_tokens": metric(0, 1)}
        held, asked, self.held = self.held, self.held.asked, dataclasses.replace(self.held, asked=None)
        written, rewards = jax.device_get((held.replies, held.rewards))
        replies = judged(self.template, asked, written)
        if self.completions is not None and rewards is not None and is_process_0():
            ghosts, values = (part[:, self.settings.prompt_columns - 1 : -1] for part in rewards)
            tokenizer = self.template.tokenizer
            self.completions.write(self.taken, tokenizer, replies, ids_of(written), ghosts, values)
        return rollout_metrics([reply.correct for reply in replies], written)

    def get_state(self) -> dict[str, Any]:
        return super().get_state() | {"forced": None if self.forced is None else self.forced.get_state()}

    def set_state(self, state: dict[str, Any]) -> None:
        super().set_state(state)
        if self.forced is not None:
            self.forced.set_state(state["forced"])
