"""Verdicts on the student's replies as arrays of a batch: which contexts the ghost speaks at, and what a reply earned.

GRPO here is GhostRespond Policy Optimization, not Group Relative. The host grades replies. What it finds becomes
per-token arrays, for `cotgrpo.objectives.RewardedGhost`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import jax.numpy as jnp

from cotgrpo.ghosts.group_relative import group_advantages
from cotgrpo.ghosts.live import own_targets
from cotgrpo.types import GhostBatch

if TYPE_CHECKING:
    from cotgrpo.types import AnyArray, Float

When = Literal["always", "wrong", "disagree"]


def with_ghost_weights(batch: GhostBatch, correct: Float[AnyArray, "B"], when: When, replies: int) -> GhostBatch:
    """Return the batch with `ghost_weights`: 1 at the contexts where the ghost counts, else 0.

    The loss mask stays. So the loss is a mean over all contexts of the replies, and a batch in which the ghost counts
    nowhere is an update of 0 and not a batch without supervision.

    Args:
        batch: from `cotgrpo.ghosts.live.live_ghosts`.
        correct: 1 for each reply that is right, else 0; read by "wrong" only.
        when: "always"; "wrong": in replies that are wrong; "disagree": where the ghost is not the student's own next
            token.
        replies: how many rows are replies. The others, behind them, are text, and there the ghost always counts.
    """
    ones_BT = jnp.ones(batch.tokens.shape, jnp.float32)
    is_text_B1 = (jnp.arange(len(batch.tokens)) >= replies)[:, None]
    if when == "wrong":
        counts_BT = (1 - jnp.asarray(correct))[:, None] * ones_BT
    elif when == "disagree":
        counts_BT = (batch.ghost_tokens != own_targets(batch)).astype(jnp.float32)
    else:
        counts_BT = ones_BT
    return batch.replace(extra={**batch.extra, "ghost_weights": jnp.where(is_text_B1, 1.0, counts_BT)})


def with_advantages(
    batch: GhostBatch, log_probs: Float[AnyArray, "B T"], rewards: Float[AnyArray, "B"], group: int
) -> GhostBatch:
    """Return the batch with `drawn_log_probs` and `advantages`, those of Group Relative Policy Optimization.

    The step takes the mean over tokens. An advantage is therefore weighted by `mean length / length` of its reply. That
    makes it the mean over replies of the mean over their tokens, as in the paper and in `group_batch`.

    Args:
        batch: replies of the student, `group` adjacent rows to each question, without rows of text.
        log_probs: log p of the token after each context when it was drawn.
        rewards: of each reply.
        group: replies to a question, at least 2.
    """
    lengths_B1 = jnp.sum(jnp.asarray(batch.loss_mask) != 0, axis=1, keepdims=True)
    weight_B1 = jnp.mean(lengths_B1) / jnp.maximum(lengths_B1, 1)
    advantages_BT = jnp.broadcast_to(group_advantages(rewards, group)[:, None] * weight_B1, batch.tokens.shape)
    extra = {"drawn_log_probs": jnp.asarray(log_probs), "advantages": advantages_BT}
    return batch.replace(extra={**batch.extra, **extra})
