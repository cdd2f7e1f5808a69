"""What an objective is: a function of one token, with optional attributes that say what it needs."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import flax.struct
import jax

if TYPE_CHECKING:
    from cotgrpo.types import Array, Float, Int

    LossAndMetrics = tuple[Float[Array, ""], dict[str, Float[Array, ""]]]
    """The loss of one token, and the metrics to be averaged over tokens."""


class TokenInputs(flax.struct.PyTreeNode):
    """What an objective knows about one token, besides the student's logits.

    The same fields with leading batch dimensions are the input of `cotgrpo.tiled_loss.tiled_loss`.

    Attributes:
        ghost: int32 in [0, V), the ghost token y*.
        weight: float32, the token's weight in the loss. The step applies it; an objective need not.
        drawn: int32 in [0, V), the drawn token y, or None if the objective asks for no draws.
        reference_logits: float32 `[V]`, the frozen reference's logits at this context, or None without a reference.
        extra: further arrays of this token by name, from the `extra` of the batch. `inputs["name"]` reads one.
    """

    ghost: Int[Array, "*batch"]
    weight: Float[Array, "*batch"]
    drawn: Any = None  # Int[Array, "*draws"]: an objective knows whether it asked for draws
    reference_logits: Any = None  # Float[Array, "V"]: likewise
    extra: dict[str, Array] = flax.struct.field(default_factory=dict)

    def __getitem__(self, name: str) -> Array:
        """Return the array `extra[name]` of this token."""
        if name not in self.extra:
            raise KeyError(
                f"The objective reads {name!r}, which the batch does not carry: expected an array [B, T] or "
                f"[B, T, K] in GhostBatch(extra={{{name!r}: ...}}), got {sorted(self.extra) or 'no extra arrays'}."
            )
        return self.extra[name]


@runtime_checkable
class Objective(Protocol):
    """A function of one token: `objective(logits_V, inputs) -> (loss, metrics)`.

    `logits_V` are the student's float32 logits at one context, `inputs` is a `TokenInputs`, `loss` a scalar, and
    `metrics` a dict of scalars. A plain function is an objective. The step maps it over tokens, weights it, sums it
    and takes its gradient. These attributes are optional, and say more:

        num_draws          tokens y to draw at each context; the results are averaged over them (default: 1)
        draw_logits        `draw_logits(logits_V) -> logits_V`, the distribution of the draws (default: the student's)
        batch_fields       names that must be in the batch's `extra`; no others are passed (default: all are passed)
        needs_reference    whether `inputs.reference_logits` is read (default: False)
        value_and_grad     `value_and_grad(logits_V, inputs) -> ((loss, metrics), dloss_dlogits_V)`, a closed form
                           that replaces autodiff
    """

    def __call__(self, logits_V: Float[Array, "V"], inputs: TokenInputs, /) -> LossAndMetrics:
        """Return the loss and the metrics of one token."""


def num_draws(objective: Objective) -> int:
    """Return how many tokens are drawn at each context."""
    return getattr(objective, "num_draws", 1)


def batch_fields(objective: Objective) -> tuple[str, ...] | None:
    """Return the names of the extra arrays that the objective needs, or None for whatever the batch carries."""
    names = getattr(objective, "batch_fields", None)
    return None if names is None else tuple(names)


def needs_reference(objective: Objective) -> bool:
    """Return whether the objective reads the logits of a frozen reference model."""
    return getattr(objective, "needs_reference", False)


def reads_teacher(objective: Objective) -> bool:
    """Return whether the reference of the objective is the live teacher, and not the student before the stage."""
    return getattr(objective, "reads_teacher", False)


def top_k(objective: Objective) -> int:
    """Return how many of the ghost's likeliest tokens the batch holds for the objective; 0 if it needs none."""
    return getattr(objective, "top_k", 0) or 0


def draw_logits(objective: Objective, logits_V: Float[Array, "V"]) -> Float[Array, "V"]:
    """Return the logits of the distribution that tokens are drawn from."""
    own = getattr(objective, "draw_logits", None)
    return logits_V if own is None else own(logits_V)


def value_and_grad(
    objective: Objective,
) -> Callable[[Float[Array, "V"], TokenInputs], tuple[LossAndMetrics, Float[Array, "V"]]]:
    """Return the objective's closed-form gradient, or autodiff if it has none.

    Returns:
        `(logits_V, inputs) -> ((loss, metrics), dloss_dlogits_V)`.
    """
    own = getattr(objective, "value_and_grad", None)
    return jax.value_and_grad(objective, has_aux=True) if own is None else own


class Around:
    """An objective around another: it draws and reads what the inner one does, unless it says otherwise."""

    objective: Objective

    @property
    def num_draws(self) -> int:
        return num_draws(self.objective)

    @property
    def batch_fields(self) -> tuple[str, ...] | None:
        return batch_fields(self.objective)

    @property
    def top_k(self) -> int:
        return top_k(self.objective)

    def draw_logits(self, logits_V: Float[Array, "V"]) -> Float[Array, "V"]:
        return draw_logits(self.objective, logits_V)


def require(holds: bool, name: str, expected: str, got: Any) -> None:
    """Raise ValueError with the argument's name, what was expected and what came, unless `holds`."""
    if not holds:
        raise ValueError(f"{name} must be {expected}, got {got!r}.")
