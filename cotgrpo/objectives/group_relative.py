"""Group Relative Policy Optimization, which the field calls GRPO, for comparison. It has no ghost."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

import jax.numpy as jnp

from cotgrpo.objectives.distribution import Distribution, as_number, is_token, softmax
from cotgrpo.objectives.protocol import TokenInputs, require

if TYPE_CHECKING:
    from cotgrpo.objectives.protocol import LossAndMetrics
    from cotgrpo.types import Array, Float


@dataclasses.dataclass(frozen=True)
class GroupRelative:
    """Group Relative Policy Optimization: the advantage A of a whole reply weights each of its tokens y.

        -min(r A, clip(r, 1 - clip, 1 + clip) A) + kl_weight (u - log u - 1)

    r = p(y) / p_old(y), where p_old is the student that drew y, and u = p_ref(y) / p(y). The second term is the
    estimator "k3" of KL(p || p_ref). Let c be the derivative in log p(y): `-r A` if the minimum is not clipped, plus
    `kl_weight (1 - u)`. The logit gradient is `c (e_y - p)`.
    Shao et al. 2024, "DeepSeekMath", arXiv:2402.03300.

    The batch carries `drawn_tokens`, and the extra arrays `drawn_log_probs`, log p_old(y), and `advantages`, A.
    `cotgrpo.ghosts.group_relative.group_batch` makes one. Adds the metric `clipped`, the share of tokens whose ratio
    has no gradient, and `kl` if it is weighted.

    Attributes:
        clip: the likelihood ratio counts within [1 - clip, 1 + clip]; in (0, 1).
        kl_weight: weight of KL(student || student before this stage), >= 0; above 0 it needs a reference.
    """

    clip: float = 0.2
    kl_weight: float = 0.0

    num_draws = 1
    batch_fields = ("drawn_log_probs", "advantages")

    def __post_init__(self) -> None:
        require(0 < self.clip < 1, "GroupRelative.clip", "a number in (0, 1)", self.clip)
        require(self.kl_weight >= 0, "GroupRelative.kl_weight", "a number of at least 0", self.kl_weight)

    @property
    def needs_reference(self) -> bool:
        return self.kl_weight > 0

    def __call__(self, logits_V: Float[Array, "V"], inputs: TokenInputs) -> LossAndMetrics:
        loss, metrics, _ = self.loss_and_slope(softmax(logits_V), inputs)
        return loss, metrics

    def value_and_grad(
        self, logits_V: Float[Array, "V"], inputs: TokenInputs
    ) -> tuple[LossAndMetrics, Float[Array, "V"]]:
        student = softmax(logits_V)
        loss, metrics, slope = self.loss_and_slope(student, inputs)
        is_drawn_V = as_number(is_token(logits_V, inputs.drawn), logits_V)
        return (loss, metrics), slope * (is_drawn_V - student.p_V)

    def loss_and_slope(
        self, student: Distribution, inputs: TokenInputs
    ) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]], Float[Array, ""]]:
        """Return `(loss, metrics, dloss / dlog p(y))`."""
        advantage = inputs["advantages"]
        log_p = student.log_prob(inputs.drawn)
        ratio = jnp.exp(log_p - inputs["drawn_log_probs"])
        bounded = jnp.clip(ratio, 1 - self.clip, 1 + self.clip)
        clipped = bounded * advantage < ratio * advantage
        loss = -jnp.minimum(ratio * advantage, bounded * advantage)
        slope = jnp.where(clipped, 0.0, -ratio * advantage)
        metrics = {"entropy": student.entropy(), "clipped": as_number(clipped, student.p_V)}
        if self.kl_weight:
            log_u = softmax(inputs.reference_logits).log_prob(inputs.drawn) - log_p
            metrics["kl"] = jnp.exp(log_u) - log_u - 1
            loss, slope = loss + self.kl_weight * metrics["kl"], slope + self.kl_weight * (1 - jnp.exp(log_u))
        return loss, metrics, slope
