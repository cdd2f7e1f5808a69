"""A ghost objective that is gated by verdicts, with the group-relative loss of a verified reward in the same step."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

import jax.numpy as jnp

from cotgrpo.objectives import protocol
from cotgrpo.objectives.distribution import softmax
from cotgrpo.objectives.group_relative import GroupRelative
from cotgrpo.objectives.protocol import Around, Objective, TokenInputs, require

if TYPE_CHECKING:
    from cotgrpo.objectives.protocol import LossAndMetrics
    from cotgrpo.types import Array, Float


@dataclasses.dataclass(frozen=True)
class RewardedGhost(Around):
    """Any ghost objective, times a weight g of each context, plus the group-relative loss of the reply.

        g objective  +  reward_weight * -min(r A, clip(r, 1 - clip, 1 + clip) A),    r = p(y) / p_old(y)

    GRPO here is GhostRespond Policy Optimization. The second term is that of `GroupRelative`: the ghost names the token
    to move to, and the advantage A of the whole reply weighs the token y that the student drew. With g = 0 at a context
    only the reward teaches there. Both share one forward pass.

    The batch carries the extra array `ghost_weights`, g, and with a `reward_weight` also `drawn_tokens`,
    `drawn_log_probs` and `advantages`. `cotgrpo.ghosts.verdicts` makes them. Adds the metric `ghost_share`, the share
    of contexts with g > 0, and with a `reward_weight` the metric `clipped`. The other metrics are those of the
    objective, at all contexts.

    Attributes:
        objective: the ghost objective.
        reward_weight: weight of the group-relative loss, >= 0; 0: the objective is gated only.
        clip: the likelihood ratio counts within [1 - clip, 1 + clip]; in (0, 1).
    """

    objective: Objective
    reward_weight: float = 0.0
    clip: float = 0.2

    def __post_init__(self) -> None:
        require(self.reward_weight >= 0, "RewardedGhost.reward_weight", "a number of at least 0", self.reward_weight)
        require(0 < self.clip < 1, "RewardedGhost.clip", "a number in (0, 1)", self.clip)
        draws = protocol.num_draws(self.objective)
        one = not self.reward_weight or draws <= 1
        require(one, "RewardedGhost.objective", "an objective of one drawn token, that of the reply", self.objective)

    @property
    def num_draws(self) -> int:
        return max(protocol.num_draws(self.objective), int(self.reward_weight > 0))

    @property
    def batch_fields(self) -> tuple[str, ...] | None:
        names = protocol.batch_fields(self.objective)
        if names is None:
            return None
        return (*names, "ghost_weights", *(GroupRelative.batch_fields if self.reward_weight else ()))

    @property
    def needs_reference(self) -> bool:
        return protocol.needs_reference(self.objective)

    @property
    def reads_teacher(self) -> bool:
        return protocol.reads_teacher(self.objective)

    def __call__(self, logits_V: Float[Array, "V"], inputs: TokenInputs) -> LossAndMetrics:
        loss, metrics = self.objective(logits_V, inputs)
        reward_loss, reward_metrics, _ = self.reward_terms(logits_V, inputs)
        weight = inputs["ghost_weights"].astype(logits_V.dtype)
        return weight * loss + reward_loss, self.joined(metrics, weight) | reward_metrics

    def value_and_grad(
        self, logits_V: Float[Array, "V"], inputs: TokenInputs
    ) -> tuple[LossAndMetrics, Float[Array, "V"]]:
        (loss, metrics), grad_V = protocol.value_and_grad(self.objective)(logits_V, inputs)
        reward_loss, reward_metrics, slope = self.reward_terms(logits_V, inputs)
        weight = inputs["ghost_weights"].astype(logits_V.dtype)
        grad_V = weight * grad_V
        if self.reward_weight:
            is_drawn_V = (jnp.arange(logits_V.shape[0]) == inputs.drawn).astype(logits_V.dtype)
            grad_V += slope * (is_drawn_V - softmax(logits_V).p_V)
        return (weight * loss + reward_loss, self.joined(metrics, weight) | reward_metrics), grad_V

    def reward_terms(
        self, logits_V: Float[Array, "V"], inputs: TokenInputs
    ) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]], Float[Array, ""]]:
        """Return the weighted group-relative loss, its metrics, and its derivative in log p(y)."""
        if not self.reward_weight:
            zero = jnp.zeros((), logits_V.dtype)
            return zero, {}, zero
        loss, metrics, slope = GroupRelative(self.clip).loss_and_slope(softmax(logits_V), inputs)
        return self.reward_weight * loss, {"clipped": metrics["clipped"]}, self.reward_weight * slope

    def joined(self, metrics: dict[str, Float[Array, ""]], weight: Float[Array, ""]) -> dict[str, Float[Array, ""]]:
        """Return the metrics of the objective with `ghost_share`. The floor of the loss is gated as the loss is."""
        gated = {name: weight * metrics[name] for name in ("loss_floor",) if name in metrics}
        return metrics | gated | {"ghost_share": (weight != 0).astype(weight.dtype)}
