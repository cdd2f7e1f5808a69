"""Batches for the comparison with Group Relative Policy Optimization, on the loop and the sampler of the method itself.

GRPO in this library is GhostRespond Policy Optimization; the group-relative method is called `group_relative` everywhere. What it learns from, which replies are right, only the
host can say: the device waits for it before each new batch, where a live ghost's batch is queued behind the running step. Replies that were drawn one update ahead are judged
while the step before theirs runs, at the price of parameters that are one update older.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from cotgrpo.data.template import AnyTemplate
from cotgrpo.distributed.processes import gather_rows, is_process_0, process_rows
from cotgrpo.ghosts.group_relative import group_advantages, group_batch
from cotgrpo.logs.completions import CompletionsLog
from cotgrpo.rollouts.rollouts import (
    PendingReplies,
    RolloutBatch,
    RolloutPrompt,
    Rollouts,
    RolloutSettings,
    ids_of,
    judged,
    metric,
    rollout_metrics,
)
from cotgrpo.sampling import Sampler
from cotgrpo.sharding import batch_sharding, jit_eval
from cotgrpo.types import GhostBatch, Metrics, Params


class GroupRelativeBatches(Rollouts):
    """Batches of `group` replies to each question with their advantages; see `Rollouts`. Of several processes each judges its share of the replies.

    Args:
        sample: the student's sampler at temperature 1, compiled by `jit_eval` for the mesh.
        template, questions, settings, seed, group, merged: as in `Rollouts`; `group` is at least 2.
        ahead: draw the replies one update ahead.
        completions: a log of some replies with their advantages, which the first process writes, or None.
        mesh: where the parameters lie and the batches are made; None: JAX's default device.
    """

    def __init__(
        self,
        sample: Sampler,
        template: AnyTemplate,
        questions: Sequence[RolloutPrompt],
        settings: RolloutSettings,
        *,
        seed: int,
        group: int,
        ahead: bool = False,
        merged: Callable[[Any], Params] = lambda trained: trained,
        completions: CompletionsLog | None = None,
        mesh: jax.sharding.Mesh | None = None,
    ) -> None:
        super().__init__(template, questions, settings, seed=seed, merged=merged, group=group)
        self.sample, self.mesh, self.completions = sample, mesh, completions
        self.batch = jit_eval(lambda _, rows: group_batch(rows[0], rows[1], rows[2], group), mesh)
        self.metrics: Metrics = {}
        self.ahead = ahead
        self.drawn: PendingReplies | None = None  # the replies of the next batch

    def roll_out(self, number: int) -> RolloutBatch:
        """New replies, judged: waits for them."""
        drawn, asked = self.drawn or self.draw(number), self.asked(number)
        self.draw_ahead()
        prompts, replies = self.prompts(asked), drawn.replies
        written = jax.device_get(replies)
        correct = self.correct(asked, written)
        self.metrics = rollout_metrics(correct, written)
        if self.completions is not None and self.completions.due(number + 1) and is_process_0():
            self.log(self.completions, number + 1, asked, written, correct)
        return RolloutBatch(self.batch((), (prompts, replies, correct.astype(np.float32))))

    def draw(self, number: int) -> PendingReplies:
        """The replies of batch `number`, queued on the device."""
        return PendingReplies(self.sample(self.params, self.prompts(self.asked(number)), self.key_of(number)))

    def draw_ahead(self) -> None:
        """Queues the next batch's replies where the batch just taken is the last of its own."""
        self.drawn = (
            self.draw(self.taken) if self.ahead and self.taken % self.settings.updates_per_rollout == 0 else None
        )

    def correct(self, asked: Sequence[RolloutPrompt], written: Any) -> np.ndarray:
        """1 for each reply that is right, and 0."""
        count, rows = len(asked), np.arange(len(asked))
        if self.mesh is not None and jax.process_count() > 1:
            rows = process_rows(batch_sharding(self.mesh), written.tokens.shape)
        own = jax.tree.map(lambda x: x[rows], written)
        replies = judged(self.template, [asked[int(row)] for row in rows], own)
        return gather_rows(rows, np.array([[reply.correct for reply in replies]], np.uint32), count)[0]

    def log(
        self, log: CompletionsLog, step: int, asked: Sequence[RolloutPrompt], written: Any, correct: np.ndarray
    ) -> None:
        """Some of the replies, with the advantage of each as the reward of its tokens."""
        advantages = np.asarray(group_advantages(correct.astype(np.float32), self.group))
        first = jax.tree.map(lambda x: x[: log.rows], written)
        replies = judged(self.template, asked[: log.rows], first)
        rewards = np.broadcast_to(advantages[:, None], written.tokens.shape)
        log.write(step, self.template.tokenizer, replies, ids_of(first), None, rewards)

    def again(self, held: RolloutBatch) -> GhostBatch:
        """The same replies: how likely they were is part of the batch."""
        self.draw_ahead()
        return held.batch

    def observed(self) -> Metrics:
        found, self.metrics = self.metrics or {"rollout_tokens": metric(0, 1)}, {}
        return found

    def get_state(self) -> dict[str, Any]:
        return super().get_state() | ({} if self.drawn is None else {"drawn": self.drawn})

    def set_state(self, state: dict[str, Any]) -> None:
        super().set_state(state)
        if "drawn" in state:
            self.drawn = PendingReplies.from_text(state["drawn"])
