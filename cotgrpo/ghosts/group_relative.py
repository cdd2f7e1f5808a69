"""Batches of Group Relative Policy Optimization: several replies to each question, rewarded against their mean.

GRPO in this library is GhostRespond Policy Optimization. This is what the field calls GRPO, for comparison, and is
called `group_relative`. It has no ghost. The signal is one number a reply, whether its answer is right, and the group's
mean is the baseline (Shao et al. 2024, "DeepSeekMath", arXiv:2402.03300).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import jax.numpy as jnp

from cotgrpo.ghosts.live import with_replies
from cotgrpo.sampling import Prompts, Replies
from cotgrpo.types import GhostBatch

if TYPE_CHECKING:
    from cotgrpo.types import AnyArray, Array, Float

TINY = 1e-4
"""Added to a group's standard deviation."""


def group_advantages(rewards: Float[AnyArray, "B"], group: int) -> Float[Array, "B"]:
    """Return `(R_i - mean(R)) / (sd(R) + 1e-4)` over each `group` of adjacent rewards; 0 in a group of equal ones.

    Example:
        >>> import numpy as np
        >>> group_advantages(np.array([1.0, 0.0, 1.0, 1.0], np.float32), 2).round(2).tolist()
        [1.0, -1.0, 0.0, 0.0]
    """
    rewards_GR = jnp.reshape(jnp.asarray(rewards), (-1, group))
    above_GR = rewards_GR - jnp.mean(rewards_GR, axis=1, keepdims=True)
    return (above_GR / (jnp.std(rewards_GR, axis=1, keepdims=True) + TINY)).reshape(-1)


def group_batch(prompts: Prompts, replies: Replies, rewards: Float[AnyArray, "B"], group: int) -> GhostBatch:
    """Return replies with their advantages, for `cotgrpo.objectives.GroupRelative`.

    A reply's tokens have the weight 1 / length each. So a step's loss is the mean over replies of the mean over tokens,
    as in the paper.

    Args:
        prompts: `group` adjacent rows have the same one.
        replies: what the student wrote.
        rewards: of each reply.
        group: replies to a question.

    Returns:
        A batch `[B, P + N]` as `with_replies` lays it out. There is no ghost: `ghost_tokens` are the student's own. Its
        extra arrays are `drawn_log_probs` and `advantages`.
    """
    own = with_replies(prompts, replies)
    advantages_B1 = group_advantages(rewards, group)[:, None]
    columns = ((0, 0), (prompts.tokens.shape[1] - 1, 1))
    return GhostBatch(
        tokens=own.tokens,
        ghost_tokens=own.targets,
        positions=own.positions,
        segment_ids=own.segment_ids,
        loss_mask=own.loss_mask / jnp.maximum(replies.lengths, 1)[:, None],
        drawn_tokens=own.targets,
        extra={
            "drawn_log_probs": jnp.pad(replies.log_probs, columns),
            "advantages": jnp.broadcast_to(advantages_B1, own.tokens.shape),
        },
    )
