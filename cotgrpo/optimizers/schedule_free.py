"""Schedule-free training (Defazio et al. 2024, arXiv:2405.15682) with the averaged weights as the parameters.

There are three sequences: z takes the steps, x averages it, and gradients are taken at y = b1 x + (1 - b1) z. In
`optax.contrib.schedule_free` the parameters are y, and whoever measures, samples or saves has to compute x. Here the
parameters are x, and the train step alone computes y, with `gradient_params`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import optax
from optax.contrib import ScheduleFreeState, schedule_free, schedule_free_eval_params

if TYPE_CHECKING:
    from cotgrpo.types import Params


class AveragedState(NamedTuple):
    """State of `averaged_params`: that of `optax.contrib.schedule_free`."""

    schedule_free: ScheduleFreeState


def averaged_params(
    base: optax.GradientTransformation, learning_rate: Any, b1: float
) -> optax.GradientTransformationExtraArgs:
    """Return `optax.contrib.schedule_free(base)` for parameters that are the average x.

    Its gradients have to be those at `gradient_params(params, opt_state)`, as in the train steps of `cotgrpo`.
    """
    inner = schedule_free(base, learning_rate, b1)

    def init(params: Params) -> AveragedState:
        return AveragedState(inner.init(params))

    def update(
        updates: Params, state: AveragedState, params: Params | None = None, **extra: Any
    ) -> tuple[Params, AveragedState]:
        y = interpolated(params, state)
        moves, after = inner.update(updates, state.schedule_free, y, **extra)
        x = schedule_free_eval_params(after, optax.apply_updates(y, moves))
        return jax.tree.map(lambda new, old: new - old, x, params), AveragedState(after)

    return optax.GradientTransformationExtraArgs(init, update)


def gradient_params(params: Params, opt_state: optax.OptState) -> Params:
    """Return the parameters at which the next gradient is taken: `params`, but y for the optimizer `schedule_free`."""
    found = [
        node
        for node in jax.tree.leaves(opt_state, is_leaf=lambda node: isinstance(node, AveragedState))
        if isinstance(node, AveragedState)
    ]
    return interpolated(params, found[0]) if found else params


def interpolated(params: Params, state: AveragedState) -> Params:
    """Return y = b1 x + (1 - b1) z, in the types of x."""
    b1, z = state.schedule_free.b1, state.schedule_free.z
    return jax.tree.map(lambda x, own: (b1 * x + (1 - b1) * own).astype(x.dtype), params, z)
