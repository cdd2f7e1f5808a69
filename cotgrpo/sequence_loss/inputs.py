"""What a sequence loss is: a function of one reply."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import flax.struct
import jax.numpy as jnp

if TYPE_CHECKING:
    from cotgrpo.objectives.protocol import LossAndMetrics
    from cotgrpo.types import Array, Float


class SequenceInputs(flax.struct.PyTreeNode):
    """What a sequence loss knows about one reply: arrays `[T]` over its row, 0 at all tokens that are not its own.

    Attributes:
        losses: the objective's loss of each token, before its weight. The gradient flows through these.
        weight: float32, the token's weight in the loss mask. Own tokens have one that is not 0.
        metrics: what the objective reports of each token, without a gradient.
        extra: the arrays `[T]` or `[T, K]` of the batch's `extra`. `inputs["name"]` reads one.
    """

    losses: Float[Array, "T"]
    weight: Float[Array, "T"]
    metrics: dict[str, Float[Array, "T"]] = flax.struct.field(default_factory=dict)
    extra: dict[str, Array] = flax.struct.field(default_factory=dict)

    def __getitem__(self, name: str) -> Array:
        """Return the array `extra[name]` of this reply."""
        if name not in self.extra:
            raise KeyError(
                f"The sequence loss reads {name!r}, which the batch does not carry: expected an array [B, T] or "
                f"[B, T, K] in GhostBatch(extra={{{name!r}: ...}}), got {sorted(self.extra) or 'no extra arrays'}."
            )
        return self.extra[name]

    def field(self, name: str) -> Array:
        """Return the value of a field of the whole reply, such as its reward: `extra[name]` at its first token."""
        return self[name][jnp.argmax(self.weight != 0)]

    def sum(self, values: Float[Array, "T"]) -> Float[Array, ""]:
        """Return `sum_t weight_t values_t`."""
        return jnp.sum(self.weight * values)

    def mean(self, values: Float[Array, "T"]) -> Float[Array, ""]:
        """Return `sum_t weight_t values_t / sum_t weight_t`."""
        total = jnp.sum(self.weight)
        return self.sum(values) / jnp.where(total == 0, 1.0, total)


SequenceLoss = Callable[[SequenceInputs], "LossAndMetrics"]
"""`sequence_loss(inputs) -> (loss, metrics)` of one reply: a scalar, and a dict of scalars to be averaged."""
