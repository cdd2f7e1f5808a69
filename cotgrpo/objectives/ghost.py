"""The objectives of one ghost token: likelihood, the reward itself, and the preference of the ghost over a draw."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Literal

import jax
import jax.numpy as jnp

from cotgrpo.objectives.distribution import (
    IMPOSSIBLE_BELOW,
    MASKED_LOGIT,
    Distribution,
    as_number,
    distribution_metrics,
    drawn_metrics,
    exact_metrics,
    ghost_reward,
    is_token,
    softmax,
    softplus,
    toward_ghost,
)
from cotgrpo.objectives.protocol import TokenInputs, require, value_and_grad
from cotgrpo.xla_cpu import vocab_sum

if TYPE_CHECKING:
    from cotgrpo.objectives.protocol import LossAndMetrics
    from cotgrpo.types import Array, Float


@dataclasses.dataclass(frozen=True)
class Nll:
    """Maximum likelihood of the ghost token: `-log p(y*)`. On text this is SFT.

    Logit gradient: `p - e_{y*}`. The objective is proper: against ghosts drawn from q the minimum is p = q.
    """

    num_draws = 0
    batch_fields = ()

    def __call__(self, logits_V: Float[Array, "V"], inputs: TokenInputs) -> LossAndMetrics:
        student = softmax(logits_V)
        return -student.log_prob(inputs.ghost), distribution_metrics(student, inputs)

    def value_and_grad(
        self, logits_V: Float[Array, "V"], inputs: TokenInputs
    ) -> tuple[LossAndMetrics, Float[Array, "V"]]:
        return self(logits_V, inputs), toward_ghost(softmax(logits_V).p_V, inputs.ghost)


@dataclasses.dataclass(frozen=True)
class Reinforce:
    """The formula taken literally: `-sg(R) log p(y)`, y ~ p, R = log p(y*) - log p(y). For study; it does not work.

    Warning: `log p(y*)` is a constant baseline and drops out of the expected gradient, which is exactly minus the
    gradient of the *entropy* of p. It carries no information about y*. It raises the entropy without end, and destroys
    a trained student in a few hundred steps. It is the negative control of the tests.
    """

    num_draws = 1
    batch_fields = ()

    def __call__(self, logits_V: Float[Array, "V"], inputs: TokenInputs) -> LossAndMetrics:
        student = softmax(logits_V)
        metrics = drawn_metrics(student, inputs)
        return -jax.lax.stop_gradient(metrics["reward"]) * student.log_prob(inputs.drawn), metrics


@dataclasses.dataclass(frozen=True)
class RewardGradient:
    """Ascent on the reward itself: `-(log p(y*) - log p(y))`, with y ~ p held fixed.

    Logit gradient: `e_y - e_{y*}`. Its mean over y ~ p is exactly the gradient of `Nll`. Drawing y only adds noise.

    Attributes:
        samples: tokens drawn at each context and averaged, at least 1.
    """

    samples: int = 1

    batch_fields = ()

    def __post_init__(self) -> None:
        require(self.samples >= 1, "RewardGradient.samples", "an integer of at least 1", self.samples)

    @property
    def num_draws(self) -> int:
        return self.samples

    def __call__(self, logits_V: Float[Array, "V"], inputs: TokenInputs) -> LossAndMetrics:
        return -ghost_reward(logits_V, inputs.ghost, inputs.drawn), drawn_metrics(softmax(logits_V), inputs)


@dataclasses.dataclass(frozen=True)
class Pair:
    """A logistic preference of the ghost over what the student would say, plus the likelihood of the ghost.

        nll_weight * -log p(y*)  +  pair_weight * E_y[(2 / beta) softplus(-beta D(y))],    y ~ n held fixed

    The factor 2 makes the slope at D = 0 that of `Nll`. Pairs that are won by a margin (D large) push no more.

    With negatives from the policy (n = p) the pair term alone is not proper. Against ghosts drawn from q its fixed
    point is p proportional to q^(1/(1+beta)), flatter than q, and on the student's own contexts it collapses. Together
    with the likelihood it is safe, and rests between the two: `Pair()` at 0.865 where q is 0.9 (docs/method.md). A
    ghost that is always the same token makes no difference between them. Calibrated negatives, n proportional to
    p^(1-beta), make the fixed point exactly q, and need no anchor: `Pair(beta=0.5, negatives="calibrated")`.

    The pair y = y* adds a constant, `pair_weight (2 / beta) log 2`, and no gradient. So the loss of a student that
    agrees with its ghost is not 0: it is 0.416 for `Pair()`. The metric `loss_floor` is that part of the loss.

    Attributes:
        beta: sharpness of the preference, > 0; at most 1 with calibrated negatives (1: uniform negatives).
        nll_weight: weight of -log p(ghost), >= 0.
        pair_weight: weight of the preference, >= 0.
        negatives: what the ghost is preferred to: tokens of the "policy", or "calibrated" ones.
        estimator: "exact" takes the mean over the whole vocabulary; "drawn" draws y.
        samples: tokens drawn at each context and averaged, with the estimator "drawn" only.
    """

    beta: float = 1.0
    nll_weight: float = 1.0
    pair_weight: float = 0.3
    negatives: Literal["policy", "calibrated"] = "policy"
    estimator: Literal["exact", "drawn"] = "exact"
    samples: int = 1

    batch_fields = ()

    def __post_init__(self) -> None:
        require(self.beta > 0, "Pair.beta", "a positive number", self.beta)
        require(self.nll_weight >= 0, "Pair.nll_weight", "a number of at least 0", self.nll_weight)
        require(self.pair_weight >= 0, "Pair.pair_weight", "a number of at least 0", self.pair_weight)
        require(self.nll_weight + self.pair_weight > 0, "Pair.nll_weight + pair_weight", "a positive sum", 0)
        require(
            self.negatives in ("policy", "calibrated"), "Pair.negatives", '"policy" or "calibrated"', self.negatives
        )
        require(self.estimator in ("exact", "drawn"), "Pair.estimator", '"exact" or "drawn"', self.estimator)
        require(self.samples >= 1, "Pair.samples", "an integer of at least 1", self.samples)
        if self.negatives == "calibrated":
            require(self.beta <= 1, "Pair.beta", "at most 1 with calibrated negatives", self.beta)

    @property
    def num_draws(self) -> int:
        return self.samples if self.estimator == "drawn" else 0

    def draw_logits(self, logits_V: Float[Array, "V"]) -> Float[Array, "V"]:
        """Return the logits of the distribution n of the negatives."""
        if self.negatives == "policy":
            return logits_V
        # An impossible token stays impossible at any temperature (0 * -1e30 would make it likely).
        impossible_V = logits_V < jnp.max(logits_V) - IMPOSSIBLE_BELOW
        return jnp.where(impossible_V, MASKED_LOGIT, (1 - self.beta) * logits_V)

    def __call__(self, logits_V: Float[Array, "V"], inputs: TokenInputs) -> LossAndMetrics:
        student = softmax(logits_V)
        if self.estimator == "drawn":
            pair = softplus(-self.beta * ghost_reward(logits_V, inputs.ghost, inputs.drawn))
            drew_ghost = as_number(inputs.drawn == inputs.ghost, logits_V)
            metrics = drawn_metrics(student, inputs)
        else:
            n_V = jax.lax.stop_gradient(self.negatives_V(student))
            pair = vocab_sum(n_V * softplus(self.beta * (logits_V - logits_V[inputs.ghost])))
            drew_ghost = n_V[inputs.ghost]
            metrics = exact_metrics(student, inputs)
        scale = self.pair_weight * (2 / self.beta)
        if self.pair_weight:
            metrics["loss_floor"] = scale * jnp.log(2.0) * drew_ghost
        return scale * pair - self.nll_weight * student.log_prob(inputs.ghost), metrics

    def negatives_V(self, student: Distribution) -> Float[Array, "V"]:
        """Return the distribution n of the negatives."""
        return student.p_V if self.negatives == "policy" else softmax(self.draw_logits(student.logits_V)).p_V

    def value_and_grad(
        self, logits_V: Float[Array, "V"], inputs: TokenInputs
    ) -> tuple[LossAndMetrics, Float[Array, "V"]]:
        student = softmax(logits_V)
        if self.estimator == "drawn":
            n_V = as_number(is_token(logits_V, inputs.drawn), logits_V)
        else:
            n_V = self.negatives_V(student)
        lost_V = jax.nn.sigmoid(self.beta * (logits_V - logits_V[inputs.ghost]))
        slope_V = self.nll_weight * student.p_V + (2 * self.pair_weight) * n_V * lost_V
        return self(logits_V, inputs), toward_ghost(slope_V, inputs.ghost)


@dataclasses.dataclass(frozen=True)
class GhostRespond:
    """The method as it is stated: the student draws one y, and the update moves probability from y to y*.

        (2 / beta) softplus(-beta R),    R = log p(y*) - log p(y),    y ~ p held fixed,    w(R) = 2 sigmoid(-beta R)

    Logit gradient: `w(R) (e_y - e_{y*})`. A step down it raises p(y*) and lowers p(y), and nothing else: every other
    logit stays. The reward is the weight. At beta = 1, `w = 2 p(y) / (p(y) + p(y*))`: 2 if the student prefers its own
    token by far, 1 if both are equally likely, 0 if the ghost has won. y = y* has no gradient. At beta = 0 the loss is
    `-R` and w = 1, the plain ascent on the reward, whose mean over y is SFT (`RewardGradient`).

    Why not `-R log p(y)`: there the ghost drops out of the mean, see `Reinforce`. This loss is that of
    `Pair(beta, nll_weight=0, pair_weight=1, estimator="drawn")`, with its fixed point: against ghosts drawn from q, p
    proportional to q^(1/(1+beta)), flatter than q. Against a ghost that is always the same token, that token. There is
    no anchor here, so choose beta = 0, or `Pair()`, if ghost tokens are samples.

    Attributes:
        beta: how sharply the reward decides the weight, >= 0.
    """

    beta: float = 1.0

    num_draws = 1
    batch_fields = ()

    def __post_init__(self) -> None:
        require(self.beta >= 0, "GhostRespond.beta", "a number of at least 0", self.beta)

    @property
    def update(self) -> Pair | RewardGradient:
        """The objective of this formula."""
        if self.beta == 0:
            return RewardGradient()
        return Pair(self.beta, nll_weight=0.0, pair_weight=1.0, estimator="drawn")

    def __call__(self, logits_V: Float[Array, "V"], inputs: TokenInputs) -> LossAndMetrics:
        return self.update(logits_V, inputs)

    def value_and_grad(
        self, logits_V: Float[Array, "V"], inputs: TokenInputs
    ) -> tuple[LossAndMetrics, Float[Array, "V"]]:
        return value_and_grad(self.update)(logits_V, inputs)
