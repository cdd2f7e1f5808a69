"""Batches for the comparison with Group Relative Policy Optimization, with the same loop and sampler.

GRPO in this library is GhostRespond Policy Optimization. The group-relative method is called `group_relative`
everywhere. Its signal is which replies are right, and only the host can compute it: the device waits before each new
batch. With `prefetch`, replies are drawn one update ahead and graded while the previous step runs. Their parameters are
then one update older.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from cotgrpo.data.template import AnyTemplate
from cotgrpo.distributed.processes import is_process_0
from cotgrpo.ghosts.group_relative import group_advantages, group_batch
from cotgrpo.logs.completions import CompletionsLog
from cotgrpo.rollouts.rollouts import (
    PendingReplies,
    RolloutBatch,
    RolloutPrompt,
    Rollouts,
    RolloutSettings,
    grade_replies,
    metric,
    token_ids,
)
from cotgrpo.sampling import Replies, Sampler
from cotgrpo.sharding import jit_eval
from cotgrpo.types import GhostBatch, Metrics, Params


class GroupRelativeBatches(Rollouts):
    """Batches of `group` replies to each question with their advantages. See `Rollouts`.

    With several processes each grades its share of the replies.

    Args:
        sample: the student's sampler at temperature 1, compiled by `jit_eval` for the mesh.
        template, questions, settings, seed, group, merged: as in `Rollouts`; `group` is at least 2.
        prefetch: draw the replies one update ahead.
        completions: a log of some replies with their advantages, written by process 0, or None.
        mesh: of the parameters and the batches; None: JAX's default device.
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
        prefetch: bool = False,
        merged: Callable[[Params], Params] = lambda trained: trained,
        completions: CompletionsLog | None = None,
        mesh: jax.sharding.Mesh | None = None,
    ) -> None:
        super().__init__(template, questions, settings, seed=seed, merged=merged, group=group, mesh=mesh)
        self.sample, self.completions = sample, completions
        self.batch = jit_eval(lambda _, rows: group_batch(rows[0], rows[1], rows[2], group), mesh)
        self.metrics: Metrics = {}
        self.prefetch = prefetch

    def roll_out(self, number: int) -> RolloutBatch:
        """Draw replies and grade them. Waits for the replies."""
        pending, prompts = self.pending or self.draw(number), self.prompts_for(number)
        self.prefetch_next()
        on_host = jax.device_get(pending.replies)
        correct, rewards = self.judged(prompts, on_host)
        self.metrics = self.judged_metrics(correct, rewards, on_host)
        if self.completions is not None and self.completions.due(number + 1) and is_process_0():
            self.log(self.completions, number + 1, prompts, on_host, rewards)
        return RolloutBatch(self.batch((), (self.padded(prompts), pending.replies, rewards)))

    def draw(self, number: int) -> PendingReplies:
        """Queue the replies of batch `number` on the device."""
        return PendingReplies(self.sample(self.params, self.padded(self.prompts_for(number)), self.key_of(number)))

    def prefetch_next(self) -> None:
        """Queue the next batch's replies if the batch just taken is the last one of its rollout."""
        is_last = self.taken % self.settings.updates_per_rollout == 0
        self.pending = self.draw(self.taken) if self.prefetch and is_last else None

    def log(
        self,
        log: CompletionsLog,
        step: int,
        prompts: Sequence[RolloutPrompt],
        replies: Replies,
        rewards: np.ndarray,
    ) -> None:
        """Log some of the replies. Each token's reward is the advantage of its reply."""
        advantages = np.asarray(group_advantages(rewards, self.group))
        first = jax.tree.map(lambda x: x[: log.rows], replies)
        graded = grade_replies(self.template, prompts[: log.rows], first)
        shown = np.broadcast_to(advantages[:, None], replies.tokens.shape)
        ids = token_ids(first)
        log.write(step, self.template.tokenizer, graded, ids, None, shown, version=self.weights_version)

    def reuse_batch(self, batch: RolloutBatch) -> GhostBatch:
        """Return the same batch, which holds the log-probabilities of its replies already."""
        self.prefetch_next()
        return batch.batch

    def observed(self) -> Metrics:
        """Return the metrics of the newest replies, once."""
        found, self.metrics = self.metrics or {"rollout_tokens": metric(0, 1)}, {}
        return found | ({} if self.engine is None else self.engine.observed())

    def get_state(self) -> dict[str, Any]:
        return super().get_state() | ({} if self.pending is None else {"drawn": self.pending})

    def set_state(self, state: dict[str, Any]) -> None:
        super().set_state(state)
        if "drawn" in state:
            self.pending = PendingReplies.from_text(state["drawn"])
