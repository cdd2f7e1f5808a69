"""`check_objective` accepts every objective of the library, and names what is wrong with a wrong one."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cotgrpo import ForwardKl, GroupRelative, Nll, Pair, ReferenceKl, Reinforce, RewardGradient, TokenInputs
from cotgrpo.testing import check_objective

TOP = {"top_ids": np.array([2, 5, 1], np.int32), "top_log_probs": np.log([0.5, 0.2, 0.1])}
GROUP = {"drawn_log_probs": np.float64(-1.0), "advantages": np.float64(0.7)}


@pytest.mark.parametrize(
    ("objective", "extra"),
    [
        (Nll(), {}),
        (Pair(), {}),
        (Pair(beta=0.5, negatives="calibrated"), {}),
        (Pair(beta=1.0, negatives="calibrated", estimator="drawn"), {}),
        (Pair(estimator="drawn", samples=2), {}),
        (RewardGradient(), {}),
        (Reinforce(), {}),
        (ForwardKl(3), TOP),
        (ReferenceKl(ForwardKl(3), 0.2), TOP),
        (ReferenceKl(Pair(), 0.2), {}),
        (lambda z_V, token: (-jax.nn.log_softmax(z_V)[token.ghost] * token["weight"], {}), {"weight": 2.0}),
    ],
)
def test_right_objectives_pass(objective: Any, extra: dict[str, Any]) -> None:
    check_objective(objective, extra=extra, num_cases=6)


def nll(z_V: jax.Array, token: TokenInputs) -> jax.Array:
    return -jax.nn.log_softmax(z_V)[token.ghost]


@dataclasses.dataclass(frozen=True)
class WrongSlope:
    """A closed form that forgets the ghost."""

    num_draws = 0

    def __call__(self, z_V: jax.Array, token: TokenInputs) -> Any:
        return nll(z_V, token), {"p": jax.nn.softmax(z_V)[token.ghost]}

    def value_and_grad(self, z_V: jax.Array, token: TokenInputs) -> Any:
        return self(z_V, token), jax.nn.softmax(z_V)


class WrongMetrics(WrongSlope):
    def value_and_grad(self, z_V: jax.Array, token: TokenInputs) -> Any:
        return (nll(z_V, token), {}), jax.nn.softmax(z_V).at[token.ghost].add(-1)


class WrongLoss(WrongSlope):
    def value_and_grad(self, z_V: jax.Array, token: TokenInputs) -> Any:
        loss, metrics = self(z_V, token)
        return (2 * loss, metrics), jax.nn.softmax(z_V).at[token.ghost].add(-1)


class WrongDraws(WrongSlope):
    """Draws at infinite temperature, padded tokens too."""

    num_draws = 1
    value_and_grad = None

    def draw_logits(self, z_V: jax.Array) -> jax.Array:
        return jnp.where(z_V > -1e20, 0.0, -1.0)


@pytest.mark.parametrize(
    ("objective", "problem"),
    [
        (WrongSlope(), "the gradient of value_and_grad must be that of autodiff"),
        (WrongMetrics(), "must return the metrics"),
        (WrongLoss(), "loss of value_and_grad must be that of autodiff"),
        (WrongDraws(), "draws an impossible token"),
        (lambda z_V, token: (-jax.nn.log_softmax(z_V), {}), "scalar"),
        (lambda z_V, token: (nll(z_V, token), {"p": jax.nn.softmax(z_V)}), "p must be a scalar"),
        (
            lambda z_V, token: (nll(z_V, token), {"e": jnp.sum(jax.nn.softmax(z_V) * z_V)}),
            r"(?s)padded by.*e is nan",
        ),
        (
            lambda z_V, token: (-jnp.log(jnp.exp(z_V[token.ghost]) / jnp.sum(jnp.exp(z_V))), {}),
            "loss is nan",
        ),
        (lambda z_V, token: (jnp.mean(jnp.maximum(z_V, -50)) + 0 * z_V[0] + z_V.sum() * 0, {}), "padded"),
        (lambda z_V, token: (jnp.mean(jnp.where(z_V > -1e20, z_V, z_V * 1e-33)), {}), "impossible token is not 0"),
    ],
)
def test_wrong_objectives_are_named(objective: Any, problem: str) -> None:
    with pytest.raises((AssertionError, TypeError), match=problem):
        check_objective(objective, num_cases=4)


def test_missing_extra_arrays() -> None:
    with pytest.raises(ValueError, match="drawn_log_probs"):
        check_objective(GroupRelative())
    with pytest.raises(KeyError, match="'mine'"):
        check_objective(lambda z_V, token: (nll(z_V, token) * token["mine"], {}))
    assert not jax.config.jax_enable_x64
