"""What an update does to p(y*), p(y) and the reward: the statements of docs/method.md, "What an update does"."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cotgrpo import objectives
from cotgrpo.objectives import Nll, Objective, Pair, RewardGradient, TokenInputs

V = 9
PAIR_ALONE = {"nll_weight": 0.0, "pair_weight": 1.0}
EXACT = {
    "nll": Nll(),
    "default": Pair(),
    "pair alone": Pair(**PAIR_ALONE),
    "sharp pair": Pair(beta=4.0, **PAIR_ALONE),
    "calibrated": Pair(beta=0.5, negatives="calibrated"),
    "calibrated alone": Pair(beta=1.0, negatives="calibrated", **PAIR_ALONE),
}
DRAWN = {
    "reward gradient": RewardGradient(),
    "drawn pair": Pair(estimator="drawn", **PAIR_ALONE),
    "drawn calibrated pair": Pair(beta=0.5, negatives="calibrated", estimator="drawn", **PAIR_ALONE),
}
STEPS = (1e-4, 0.1, 1.0, 30.0)


def table(some: dict[str, Objective]) -> Any:
    return pytest.mark.parametrize("objective", some.values(), ids=some)


def cases(count: int = 300, seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Logits `[count, V]` of many sharpnesses, ghosts, and drawn tokens that are not the ghost."""
    rng = np.random.default_rng(seed)
    logits = rng.normal(size=(count, V)) * rng.uniform(0.1, 4, size=(count, 1))
    ghosts = rng.integers(V, size=count)
    return logits, ghosts, (ghosts + rng.integers(1, V, size=count)) % V


def logit_gradients(objective: Objective, logits: np.ndarray, ghosts: np.ndarray, drawn: np.ndarray) -> np.ndarray:
    """The gradient of each context's loss in its logits, in float64."""

    def one(z: jax.Array, ghost: jax.Array, y: jax.Array) -> jax.Array:
        token = TokenInputs(ghost, jnp.float32(1.0), y if objectives.num_draws(objective) else None)
        return jax.grad(lambda z: objective(z, token)[0])(z)

    return np.asarray(jax.jit(jax.vmap(one))(logits, np.int32(ghosts), np.int32(drawn)))


def log_softmax(z: np.ndarray) -> np.ndarray:
    return z - np.log(np.sum(np.exp(z - z.max(-1, keepdims=True)), -1, keepdims=True)) - z.max(-1, keepdims=True)


def at(array: np.ndarray, ids: np.ndarray) -> np.ndarray:
    return np.take_along_axis(array, ids[:, None], 1)[:, 0]


@table(EXACT | DRAWN)
@pytest.mark.parametrize("step", STEPS)
def test_free_logits_raise_the_ghost_and_every_ratio(objective: Objective, step: float) -> None:
    """With the logits free, a step of any size raises p(y*) and lowers no ratio p(y*) / p(y).

    A ratio is the same to the bit if the step is small and the pair is won by far.
    """
    with jax.enable_x64(True):
        logits, ghosts, drawn = cases()
        after = logits - step * logit_gradients(objective, logits, ghosts, drawn)
    others = np.arange(V) != ghosts[:, None]
    gains = (at(after, ghosts)[:, None] - after) - (at(logits, ghosts)[:, None] - logits)
    assert np.all(gains[others] > -1e-12) and np.mean(gains[others] > 0) > 0.99
    before, now = at(log_softmax(logits), ghosts), at(log_softmax(after), ghosts)
    assert np.all((now > before) | (gains.max(1) < 1e-9))


@table(DRAWN)
@pytest.mark.parametrize("step", STEPS)
def test_free_logits_lower_the_one_drawn_token(objective: Objective, step: float) -> None:
    with jax.enable_x64(True):
        logits, ghosts, drawn = cases()
        after = logits - step * logit_gradients(objective, logits, ghosts, drawn)
    assert np.all(at(log_softmax(after), drawn) < at(log_softmax(logits), drawn))


@table(EXACT)
def test_an_exact_mean_lowers_p_of_y_where_its_slope_is_above_the_mean_push(objective: Objective) -> None:
    """d log p(y) = -s(y) + sum_v p(v) s(v) - p(y*) S for y other than y*, with S the sum of all slopes but the ghost's.

    Some tokens rise. The mean over y ~ p, given that y is not y*, falls.
    """
    with jax.enable_x64(True):
        logits, ghosts, drawn = cases()
        slopes = logit_gradients(objective, logits, ghosts, drawn)
    others = np.arange(V) != ghosts[:, None]
    p = np.exp(log_softmax(logits))
    pushed = np.where(others, slopes, 0.0)
    change = -slopes + np.sum(p * pushed, 1, keepdims=True) - (at(p, ghosts) * pushed.sum(1))[:, None]
    small = log_softmax(logits - 1e-6 * slopes) - log_softmax(logits)
    np.testing.assert_allclose(small[others], 1e-6 * change[others], rtol=1e-3, atol=1e-10)
    assert np.any(change[others] > 0) and np.any(change[others] < 0)
    assert np.all(np.sum(np.where(others, p * change, 0.0), 1) < 0)


def test_sft_raises_a_token_that_one_would_not_have_guessed() -> None:
    """With p = (y*: 0.02, 0.88, 0.10), the likelihood of y* takes from the second token, and the third gains too."""
    p = np.array([0.02, 0.88, 0.10])
    slopes = p - np.eye(3)[0]
    after = np.exp(log_softmax((np.log(p) - 0.1 * slopes)[None]))[0]
    assert after[0] > p[0] and after[1] < p[1] and after[2] > p[2]


def one_parameter(direction: np.ndarray, logits: np.ndarray, objective: Objective, ghost: int, drawn: int) -> Any:
    """Logits z + theta * direction at theta 0: their change by a small step on theta, down the loss of one token."""
    with jax.enable_x64(True):
        slope = logit_gradients(objective, logits[None], np.array([ghost]), np.array([drawn]))[0]
        return -float(slope @ direction) * direction


@pytest.mark.parametrize("seed", range(20))
def test_shared_parameters_and_one_token(seed: int) -> None:
    """For any model and a small step on one token: its loss falls. So Nll raises p(y*), and a drawn pair raises R."""
    rng = np.random.default_rng(seed)
    logits, direction = rng.normal(size=V) * 2, rng.normal(size=V)
    ghost, drawn = (int(i) for i in rng.choice(V, 2, replace=False))
    p = np.exp(log_softmax(logits[None]))[0]
    change = one_parameter(direction, logits, Nll(), ghost, drawn)
    assert change[ghost] - p @ change >= 0
    for objective in DRAWN.values():
        change = one_parameter(direction, logits, objective, ghost, drawn)
        assert change[ghost] - change[drawn] >= 0


def test_with_shared_parameters_nothing_more_holds() -> None:
    """One parameter is enough for each counterexample: it goes up one gradient and down another."""
    rng = np.random.default_rng(0)
    logits = rng.normal(size=V) * 2
    p, ghost, drawn = np.exp(log_softmax(logits[None]))[0], 3, 5
    ghost_up = np.eye(V)[ghost] - p  # the gradient of log p(y*)
    with jax.enable_x64(True):
        pull = -logit_gradients(Pair(), logits[None], np.array([ghost]), np.array([drawn]))[0]
    # The default lowers its loss and p(y*) with it.
    along = (pull @ ghost_up) / (ghost_up @ ghost_up)
    across = pull - along * ghost_up
    direction = across - (across @ across) / (2 * along * (ghost_up @ ghost_up)) * ghost_up
    change = one_parameter(direction, logits, Pair(), ghost, drawn)
    assert change[ghost] - p @ change < 0 < float(pull @ change)
    # Nll raises p(y*), and lowers the reward of a token y.
    reward_up = np.eye(V)[ghost] - np.eye(V)[drawn]
    direction = ghost_up - (1.01 * (ghost_up @ reward_up) / (reward_up @ reward_up)) * reward_up
    change = one_parameter(direction, logits, Nll(), ghost, drawn)
    assert change[ghost] - change[drawn] < 0 < change[ghost] - p @ change


def test_a_batch_lowers_its_mean_loss_and_not_each_one() -> None:
    """Two contexts with the same logits and different ghosts: what the unlikely one gains, the likely one loses."""
    p = np.array([0.05, 0.9, *[0.05 / (V - 2)] * (V - 2)])
    with jax.enable_x64(True):
        slopes = logit_gradients(Pair(), np.log([p, p]), np.array([0, 1]), np.array([2, 2]))
    change = -np.mean(slopes, axis=0)
    assert change[0] - p @ change > 0 > change[1] - p @ change
    assert np.mean(slopes, axis=0) @ change < 0


def rest(q: np.ndarray, objective: Objective) -> np.ndarray:
    """The distribution at which the mean gradient over ghosts y* ~ q vanishes, by gradient descent in float64."""
    with jax.enable_x64(True):

        def mean_gradient(z: jax.Array) -> jax.Array:
            one = lambda g: jax.grad(lambda z: objective(z, TokenInputs(g, jnp.float32(1.0)))[0])(z)
            return jnp.asarray(q) @ jax.vmap(one)(jnp.arange(len(q)))

        step = jax.jit(lambda z: jax.lax.fori_loop(0, 20_000, lambda _, z: z - 2.0 * mean_gradient(z), z))
        return np.asarray(jax.nn.softmax(step(jnp.log(jnp.asarray(q, jnp.float64)))))


@pytest.mark.parametrize(
    ("weight", "odds"), [(0.0, 9.0), (0.1, 9.0), (0.3, 9.0), (0.3, 1.0), (0.3, 0.02), (0.3, 99.0), (1.0, 9.0)]
)
def test_where_the_default_rests(weight: float, odds: float) -> None:
    """Two tokens, beta 1: q's odds s and the resting odds r obey s = r (1 + c r) / (c + r) with c = 1 + 2 weight."""
    r = rest(np.array([odds, 1.0]) / (1 + odds), Pair(pair_weight=weight))
    r, c = r[0] / r[1], 1 + 2 * weight
    np.testing.assert_allclose(r * (1 + c * r) / (c + r), odds, rtol=1e-5)
    if odds == 9.0 and weight == 0.3:
        np.testing.assert_allclose(r / (1 + r), 0.865, atol=5e-4)


def test_proper_objectives_rest_at_the_ghosts_distribution_and_the_default_is_flatter() -> None:
    q = np.array([0.5, 0.3, 0.15, 0.05])
    np.testing.assert_allclose(rest(q, Nll()), q, atol=1e-6)
    np.testing.assert_allclose(rest(q, Pair(beta=0.5, negatives="calibrated")), q, atol=1e-6)
    p = rest(q, Pair())
    assert np.all(np.diff(p) < 0), "the order is q's"
    assert -np.sum(p * np.log(p)) > -np.sum(q * np.log(q))
    alone = q**0.5 / np.sum(q**0.5)
    np.testing.assert_array_less(np.abs(p - q), np.abs(alone - q))


@pytest.mark.parametrize("padding", [0, 3])
def test_reward_gain_by_enumeration(padding: int) -> None:
    """The mean of R after minus R before, over the y that the student drew before."""
    rng = np.random.default_rng(0)
    for ghost in range(V):
        before, after = rng.normal(size=(2, V)) * 2
        p = np.exp(log_softmax(before[None]))[0]
        want = sum(p[y] * ((after[ghost] - after[y]) - (before[ghost] - before[y])) for y in range(V))
        end = [-np.inf] * padding
        token = TokenInputs(jnp.int32(ghost), jnp.float32(1.0), None, jnp.float32([*before, *end]))
        loss, metrics = objectives.RewardGain()(jnp.float32([*after, *end]), token)
        np.testing.assert_allclose(metrics["reward_gain"], want, rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(loss, -want, rtol=1e-5, atol=1e-5)
