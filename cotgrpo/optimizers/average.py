"""A moving average of the parameters, kept in the optimizer's state. So it is saved, restored and laid out with it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from cotgrpo.optimizers.extra_args import accept_extra_args

if TYPE_CHECKING:
    from cotgrpo.types import Params


class MovingAverage(NamedTuple):
    """The state of `with_moving_average`.

    Attributes:
        inner: the state of the optimizer.
        average: the average, in float32, which keeps small changes of narrow parameters.
    """

    inner: optax.OptState
    average: Params


def with_moving_average(tx: optax.GradientTransformation, decay: float) -> optax.GradientTransformationExtraArgs:
    """Return an optimizer that makes the same updates, and keeps the exponential moving average of the parameters.

        average <- decay average + (1 - decay) params,    after each update, from the first parameters

    A step that skips an update keeps the optimizer's state, and so the average too. Of LoRA only the adapters are
    trained, so only they are averaged.

    Args:
        tx: the optimizer.
        decay: in (0, 1).
    """
    inner = accept_extra_args(tx)

    def init(params: Params) -> MovingAverage:
        return MovingAverage(inner.init(params), jax.tree.map(lambda p: p.astype(jnp.float32), params))

    def update(
        updates: Params, state: MovingAverage, params: Params | None = None, **extra: Any
    ) -> tuple[Params, MovingAverage]:
        updates, own = inner.update(updates, state.inner, params, **extra)
        mix = lambda old, new: decay * old + (1 - decay) * new.astype(jnp.float32)
        average = jax.tree.map(mix, state.average, optax.apply_updates(params, updates))
        return updates, MovingAverage(own, average)

    return optax.GradientTransformationExtraArgs(init, update)
