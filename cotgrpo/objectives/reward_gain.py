"""The change of the reward by an update: a measurement in the form of an objective."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

import jax.numpy as jnp

from cotgrpo.objectives.distribution import softmax
from cotgrpo.objectives.protocol import TokenInputs
from cotgrpo.xla_cpu import vocab_sum

if TYPE_CHECKING:
    from cotgrpo.objectives.protocol import LossAndMetrics
    from cotgrpo.types import Array, Float


@dataclasses.dataclass(frozen=True)
class RewardGain:
    """How much further the ghost is ahead than for a reference r, in the mean over the y that r would draw.

        E_{y ~ r}[R(y) - R_r(y)] = (z(y*) - z_r(y*)) - sum_y r(y) (z(y) - z_r(y))

    z are the student's logits and z_r the reference's. If r is the student before an update, this is what the update
    did to the reward. The loss is minus the gain, and the metric `reward_gain` is the gain, in nats.
    """

    num_draws = 0
    batch_fields = ()
    needs_reference = True

    def __call__(self, logits_V: Float[Array, "V"], inputs: TokenInputs) -> LossAndMetrics:
        before = softmax(inputs.reference_logits)
        # A padded logit may be minus infinity in both.
        change_V = jnp.where(before.p_V > 0, logits_V - inputs.reference_logits, 0.0)
        ghost_change = logits_V[inputs.ghost] - inputs.reference_logits[inputs.ghost]
        gain = ghost_change - vocab_sum(before.p_V * change_V)
        return -gain, {"reward_gain": gain}
