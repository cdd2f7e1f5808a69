"""What an optimizer may want besides the gradient: optax's extra arguments."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import optax

if TYPE_CHECKING:
    from cotgrpo.types import Params


def accept_extra_args(tx: optax.GradientTransformation) -> optax.GradientTransformationExtraArgs:
    """Return `tx` such that its update may be given arguments that it does not take.

    `optax.with_extra_args_support` does this for transformations of the plain kind. The others should take any name,
    but some, such as `optax.contrib.sam`, take their own names alone. They get none then.
    """
    inner = optax.with_extra_args_support(tx)

    def update(
        updates: Params, state: optax.OptState, params: Params | None = None, **extra: Any
    ) -> tuple[Params, optax.OptState]:
        try:
            return inner.update(updates, state, params, **extra)
        except TypeError as error:
            if "unexpected keyword argument" not in str(error):
                raise
            return inner.update(updates, state, params)

    return optax.GradientTransformationExtraArgs(tx.init, update)
