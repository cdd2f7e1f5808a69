"""The student's distribution at one context, and the metrics that every objective reports."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import jax
import jax.numpy as jnp

from cotgrpo.objectives.drawing import likeliest
from cotgrpo.xla_cpu import materialized_on_cpu, vocab_sum

if TYPE_CHECKING:
    from cotgrpo.objectives.protocol import TokenInputs
    from cotgrpo.types import Array, Bool, Float, Int

MASKED_LOGIT = -1e30
"""The logit of an impossible token (a padded column of the head). It is finite, so `0 * logit` is 0 and not NaN."""
IMPOSSIBLE_BELOW = 1e3
"""A logit that is this far below the largest one marks an impossible token, whatever number its model pads with."""


class Distribution(NamedTuple):
    """p = softmax(z) at one context.

    Attributes:
        logits_V: z.
        log_z: the log-normalizer `log sum_v exp(z_v)`; NaN if the largest logit is not finite.
        p_V: `exp(z - log_z)`; NaN in the same case.
        log_mass: `log_z - max_v z_v`, which keeps its digits if the logits are large; NaN in the same case.
    """

    logits_V: Float[Array, "V"]
    log_z: Float[Array, ""]
    p_V: Float[Array, "V"]
    log_mass: Float[Array, ""]

    def log_prob(self, token: Int[Array, "*tokens"]) -> Float[Array, "*tokens"]:
        """Return `log p(token)` of one token or of several."""
        return (self.logits_V[token] - self.top) - self.log_mass

    def entropy(self) -> Float[Array, ""]:
        """Return `-sum_v p_v log p_v`, in nats. Tokens with a logit of minus infinity add nothing."""
        shifted_V = jnp.maximum(self.logits_V - self.top, MASKED_LOGIT)
        return self.log_mass - vocab_sum(self.p_V * shifted_V)

    @property
    def top(self) -> Float[Array, ""]:
        """The largest logit, a constant to autodiff."""
        return jax.lax.stop_gradient(jnp.max(self.logits_V))


def softmax(logits_V: Float[Array, "V"]) -> Distribution:
    """Return the distribution of logits, from one array of exponentials."""
    top = jax.lax.stop_gradient(jnp.max(logits_V))
    mass_V = materialized_on_cpu(jnp.exp(logits_V - top))
    mass = jnp.sum(mass_V)
    return Distribution(logits_V, top + jnp.log(mass), mass_V * (1 / mass), jnp.log(mass))


def softplus(x: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """Return `log(1 + exp(x))`, elementwise, within 6e-8.

    It is computed as `max(x, 0) + log(1 + exp(-|x|))`. XLA's CPU compiler does not vectorize `log1p`.
    """
    rest = jnp.log(1 + jnp.exp(-jnp.abs(x)))
    return jnp.where(x >= 0, x + rest, rest)  # JAX's derivative of |x| is 1 at 0, so this one's is 1/2


def is_token(row_V: Float[Array, "V"], token: Int[Array, ""]) -> Bool[Array, "V"]:
    """Return which entry of a row belongs to a token: its one-hot vector, as booleans."""
    return jnp.arange(row_V.shape[0], dtype=jnp.int32) == jnp.asarray(token).astype(jnp.int32)


def as_number(holds: Bool[Array, "*shape"], like: Float[Array, "..."]) -> Float[Array, "*shape"]:
    """Return 1 if a condition holds, else 0, in the type of another array."""
    return holds.astype(like.dtype)


def toward_ghost(slope_V: Float[Array, "V"], ghost: Int[Array, ""]) -> Float[Array, "V"]:
    """Return the logit gradient `sum_y s(y) (e_y - e_ghost)` of slopes s.

    Every y is pushed down, and the ghost is pushed up by the sum. The slope at the ghost itself cancels. It is left
    out, so that a lone y = y* gives exactly zero.
    """
    is_ghost_V = is_token(slope_V, ghost)
    others_V = jnp.where(is_ghost_V, 0.0, slope_V)
    return jnp.where(is_ghost_V, -jnp.sum(others_V), others_V)


def ghost_reward(
    logits_V: Float[Array, "V"], ghost: int | Int[Array, ""], drawn: int | Int[Array, ""]
) -> Float[Array, ""]:
    """Return the GhostRespond reward of one drawn token: `log p(ghost) - log p(drawn)`, with p = softmax(logits).

    The normalizer cancels, so this is `logits[ghost] - logits[drawn]`: exact, without a pass over the vocabulary.
    `vmap` it over tokens.

    Args:
        logits_V: one context's logits.
        ghost: y* in [0, V).
        drawn: y in [0, V).

    Returns:
        The reward in nats. It is positive if the ghost token is likelier than the drawn one, and 0 if they are equal.

    Example:
        >>> import jax.numpy as jnp
        >>> float(ghost_reward(jnp.array([1.0, 3.0, 0.5]), ghost=1, drawn=0))
        2.0
    """
    return logits_V[ghost] - logits_V[drawn]


def distribution_metrics(student: Distribution, inputs: TokenInputs) -> dict[str, Float[Array, ""]]:
    """Return what every objective reports.

    `entropy` is that of p, in nats. `token_accuracy` is 1 if the ghost is the greedy token, else 0. The first of equal
    logits is the greedy one.
    """
    is_likeliest = likeliest(student.logits_V) == jnp.asarray(inputs.ghost).astype(jnp.int32)
    return {"entropy": student.entropy(), "token_accuracy": as_number(is_likeliest, student.p_V)}


def exact_metrics(student: Distribution, inputs: TokenInputs) -> dict[str, Float[Array, ""]]:
    """Return the reward and its companions as exact means over y ~ p. Nothing is drawn.

    `reward` = E[log p(y*) - log p(y)], `ghost_prob` = p(y*), `drawn_prob` = E[p(y)], `match_rate` = P(y = y*) = p(y*).
    """
    metrics = distribution_metrics(student, inputs)
    ghost_prob = jnp.exp(student.log_prob(inputs.ghost))
    return metrics | {
        "reward": student.log_prob(inputs.ghost) + metrics["entropy"],
        "ghost_prob": ghost_prob,
        "drawn_prob": vocab_sum(student.p_V * student.p_V),
        "match_rate": ghost_prob,
    }


def drawn_metrics(student: Distribution, inputs: TokenInputs) -> dict[str, Float[Array, ""]]:
    """Return the reward and its companions for the one token that was drawn."""
    return distribution_metrics(student, inputs) | {
        "reward": ghost_reward(student.logits_V, inputs.ghost, inputs.drawn),
        "ghost_prob": jnp.exp(student.log_prob(inputs.ghost)),
        "drawn_prob": jnp.exp(student.log_prob(inputs.drawn)),
        "match_rate": as_number(inputs.drawn == inputs.ghost, student.p_V),
    }
