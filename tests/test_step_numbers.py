"""The loss, the gradient and the metrics of float32 steps on awkward logits, weights and shapes, against float64."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from cotgrpo.objectives import Pair
from cotgrpo.train_steps import make_grpo_step
from cotgrpo.types import GhostBatch, Student, TrainState

RANDOM = np.random.default_rng(0)


class Case(NamedTuple):
    """Logits `[B, T, V]`, ghosts and weights `[B, T]` of a batch."""

    logits: np.ndarray
    ghosts: np.ndarray
    weights: np.ndarray
    softcap: float | None = None
    vocab_size: int | None = None


def case(shape: tuple[int, int, int] = (4, 3, 7), scale: float = 2.0, **changes: object) -> Case:
    B, T, V = shape
    ghosts = RANDOM.integers(0, V, (B, T))
    return Case(scale * RANDOM.normal(size=shape), ghosts, np.ones((B, T)))._replace(**changes)


def padded(fill: float, **changes: object) -> Case:
    plain = case()
    return plain._replace(logits=np.pad(plain.logits, ((0, 0), (0, 0), (0, 3)), constant_values=fill), **changes)


def weights(*rows: list[float]) -> np.ndarray:
    return np.array(rows)


CASES = {
    "plain": case(),
    "padding of -inf": padded(-np.inf),
    "padding of -1e9": padded(-1e9),
    "padding of -1e30": padded(-1e30),
    "padding behind vocab_size": padded(50.0, vocab_size=7),
    "padding of NaN behind vocab_size": padded(np.nan, vocab_size=7),
    "logits near 1e4": case(logits=1e4 + RANDOM.integers(-3, 4, (4, 3, 7)).astype(float)),
    "logits near -1e4": case(logits=-1e4 + RANDOM.integers(-3, 4, (4, 3, 7)).astype(float)),
    "logits near 1e30, ghost on top": case(logits=1e30 * np.eye(7)[RANDOM.integers(0, 7, (4, 3))], softcap=None),
    "all tied": case(logits=np.zeros((4, 3, 7))),
    "all tied at 1e4": case(logits=np.full((4, 3, 7), 1e4)),
    "soft-cap of huge logits": case(scale=1e6, softcap=30.0),
    "soft-cap of 1e30": case(scale=1e30, softcap=30.0),
    "soft-cap and padding": padded(0.0, softcap=3.0, vocab_size=7),
    "one token": case((1, 1, 7)),
    "T = 1": case((4, 1, 7)),
    "V = 1": case((4, 3, 1)),
    "V = 2": case((4, 3, 2)),
    "one supervised token": case(weights=np.eye(4, 3) * np.array([[1], [0], [0], [0]])),
    "an empty micro-batch": case(weights=weights([1, 1, 1], [0, 0, 0], [1, 0, 1], [0, 0, 0])),
    "weights of 1e-30": case(weights=np.full((4, 3), 1e-30)),
    "weights of 1e30": case(weights=np.full((4, 3), 1e30)),
    "weights far apart": case(weights=10.0 ** RANDOM.integers(-6, 7, (4, 3))),
    "negative weights": case(weights=weights([1, -0.5, 1], [2, -1, 1], [1, 0, 1], [-0.25, 1, 1])),
    "int8 weights": case(weights=RANDOM.integers(0, 3, (4, 3)).astype(np.int8)),
    "bool weights": case(weights=RANDOM.random((4, 3)) < 0.6),
}
CASES["logits near 1e30, ghost on top"] = CASES["logits near 1e30, ghost on top"]._replace(
    ghosts=CASES["logits near 1e30, ghost on top"].logits.argmax(-1)
)


def oracle(one: Case, pair_weight: float) -> tuple[dict[str, float], np.ndarray]:
    """Return loss and metrics, and the gradient in the logits: the formulas of `Pair` in float64."""
    z = np.asarray(one.logits, np.float32).astype(np.float64)
    slope = np.ones_like(z)
    if one.softcap:
        slope = 1 - np.tanh(z / one.softcap) ** 2
        z = one.softcap * np.tanh(z / one.softcap)
    if one.vocab_size:
        z[..., one.vocab_size :], slope[..., one.vocab_size :] = -np.inf, 0
    ghost = np.eye(z.shape[-1])[one.ghosts]
    at_ghost = np.take_along_axis(z, one.ghosts[..., None], -1)
    shifted = z - z.max(-1, keepdims=True)
    log_mass = np.log(np.sum(np.exp(shifted), -1, keepdims=True))
    p = np.exp(shifted - log_mass)
    gap = np.where(p > 0, z - at_ghost, 0)
    with np.errstate(over="ignore"):
        lost = 1 / (1 + np.exp(-gap))
    log_p_ghost = np.take_along_axis(shifted, one.ghosts[..., None], -1) - log_mass
    entropy = np.sum(p * (log_mass - np.where(p > 0, shifted, 0)), -1)
    loss = -log_p_ghost[..., 0] + 2 * pair_weight * np.sum(p * np.logaddexp(0, gap), -1)
    pushed = (1 - ghost) * (p + 2 * pair_weight * p * lost)
    grad = pushed - ghost * pushed.sum(-1, keepdims=True)
    w = np.asarray(one.weights, np.float64)
    mean = lambda x: float(np.sum(w * x) / w.sum())
    hit = np.argmax(z, -1) == one.ghosts
    means = {"loss": mean(loss), "entropy": mean(entropy), "token_accuracy": mean(hit)}
    return means, w[..., None] * grad * slope / w.sum()


@pytest.mark.parametrize("name", CASES)
def test_a_step_against_float64(name: str) -> None:
    one = CASES[name]
    B, T, V = one.logits.shape
    logits = jnp.asarray(one.logits, jnp.float32)
    # With the logits themselves in the batch, the parameters are an offset, and SGD returns minus the gradient.
    student = Student(
        hidden=lambda params, tokens, *_: logits.reshape(B * T, V)[tokens] + params.reshape(B * T, V)[tokens],
        head=None,
        softcap=one.softcap,
        vocab_size=one.vocab_size,
    )
    batch = GhostBatch(
        tokens=np.arange(B * T, dtype=np.int32).reshape(B, T),
        ghost_tokens=one.ghosts.astype(np.int32),
        positions=np.zeros((B, T), np.int32),
        segment_ids=np.ones((B, T), np.int32),
        loss_mask=one.weights if one.weights.dtype != np.float64 else one.weights.astype(np.float32),
    )
    tx = optax.sgd(1.0)
    state = TrainState.create(params=jnp.zeros_like(logits), tx=tx, key=jax.random.key(0))
    new, metrics = jax.jit(make_grpo_step(student, tx, Pair(), micro_batches=2 if B > 1 else 1))(state, batch)
    means, grad = oracle(one, 0.3)
    assert float(metrics["skipped"].mean()) == 0
    for key, value in means.items():
        np.testing.assert_allclose(metrics[key].mean(), value, rtol=1e-5, atol=1e-6, err_msg=key)
    np.testing.assert_allclose(-np.asarray(new.params), grad, rtol=1e-4, atol=1e-6 * max(1, np.abs(grad).max()))


def test_invalid_ids_do_not_train() -> None:
    plain = CASES["plain"]
    wrong = np.array([[0, 7, 1], [-1, 2, 3], [2**31 - 1, 4, 5], [6, 0, -(2**31)]])
    valid = (wrong >= 0) & (wrong < 7)
    kept = plain._replace(ghosts=np.where(valid, wrong, 0), weights=valid.astype(float))
    logits = jnp.asarray(plain.logits, jnp.float32)
    student = Student.from_logits(lambda params, tokens, *_: logits + params)
    batch = GhostBatch(
        tokens=np.zeros((4, 3), np.int32),
        ghost_tokens=wrong.astype(np.int32),
        positions=np.zeros((4, 3), np.int32),
        segment_ids=np.ones((4, 3), np.int32),
        loss_mask=np.ones((4, 3), np.float32),
    )
    tx = optax.sgd(1.0)
    state = TrainState.create(params=jnp.zeros_like(logits), tx=tx, key=jax.random.key(0))
    new, metrics = jax.jit(make_grpo_step(student, tx))(state, batch)
    means, grad = oracle(kept, 0.3)
    assert float(metrics["invalid_tokens"].mean()) == 4
    np.testing.assert_allclose(metrics["loss"].mean(), means["loss"], rtol=1e-5)
    np.testing.assert_allclose(-np.asarray(new.params), grad, rtol=1e-4, atol=1e-6)
