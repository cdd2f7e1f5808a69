"""Reward and ghost in one step: gates by verdicts, advantages, exact divergences; against NumPy and plain autodiff."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from cotgrpo import GhostBatch, TrainState, make_grpo_step
from cotgrpo.ghosts.group_relative import group_advantages, group_batch
from cotgrpo.ghosts.live import live_ghosts, reweighted
from cotgrpo.ghosts.verdicts import with_advantages, with_ghost_weights
from cotgrpo.models.decoder import DecoderConfig, init_params, make_student
from cotgrpo.objectives import (
    ForwardKl,
    GhostRespond,
    GroupRelative,
    JensenShannon,
    Nll,
    Pair,
    ReferenceKl,
    ReverseKl,
    RewardedGhost,
    RewardGradient,
    TokenInputs,
    value_and_grad,
)
from cotgrpo.sampling import SamplingSettings, make_sampler, pad_prompts
from cotgrpo.train_steps import make_batch_loss

V, GROUP = 19, 2
CONFIG = DecoderConfig(
    vocab_size=V, width=16, num_layers=1, num_heads=2, num_kv_heads=1, head_dim=8, mlp_width=16, init_scale=0.3
)
STUDENT = make_student(CONFIG)
PARAMS, TEACHER = (init_params(CONFIG, jax.random.key(seed)) for seed in (0, 1))
PROMPTS = pad_prompts([np.array(p, np.int32) for p in ([3, 4, 5], [6]) for _ in range(GROUP)])
READS = pad_prompts([np.array([9, 8, 7, *p], np.int32) for p in ([3, 4, 5], [6]) for _ in range(GROUP)])
SAMPLE = jax.jit(make_sampler(CONFIG, SamplingSettings(6, eos_ids=(0, 1), temperature=1.0)))
REPLIES = SAMPLE(PARAMS, PROMPTS, jax.random.key(3))
LOG_PROBS = jnp.pad(REPLIES.log_probs, ((0, 0), (PROMPTS.tokens.shape[1] - 1, 1)))
REWARDS = np.array([1, 0, 0, 1], np.float32)


@functools.cache
def batch_of(top_k: int = 0, rows: bool = False, privileged: bool = False) -> GhostBatch:
    """Replies with their ghosts."""
    make = jax.jit(functools.partial(live_ghosts, STUDENT, top_k=top_k, rows=rows))
    return make(TEACHER, PROMPTS, REPLIES, reads=READS if privileged else None)


def loss_and_grads(objective: Any, batch: GhostBatch, reference: Any = None) -> Any:
    """The mean loss of a step over the batch, and its gradient."""
    engine = make_batch_loss(STUDENT, objective, None if reference is None else STUDENT, 5)

    def mean(params: Any) -> Any:
        loss, (sums, weight) = engine(params, batch, None, reference)
        return loss / weight, {name: total / weight for name, total in sums.items()}

    return jax.jit(jax.value_and_grad(mean, has_aux=True))(PARAMS)


def assert_close(got: Any, want: Any, atol: float = 1e-6) -> None:
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=atol), got, want)


def test_gates_are_where_the_verdicts_say() -> None:
    batch = batch_of()
    mask, own = np.asarray(batch.loss_mask) != 0, np.roll(np.asarray(batch.tokens), -1, axis=1)
    correct = np.array([1, 0, 0, 0], np.float32)
    want = {
        "always": np.ones(mask.shape),
        "wrong": np.broadcast_to(1 - correct[:, None], mask.shape),
        "disagree": np.asarray(batch.ghost_tokens) != own,
    }
    for when, weights in want.items():
        got = with_ghost_weights(batch, correct, when, replies=4)
        np.testing.assert_array_equal(np.asarray(got.extra["ghost_weights"])[mask], weights[mask])
        np.testing.assert_array_equal(got.loss_mask, batch.loss_mask)
        text = with_ghost_weights(batch, correct, when, replies=3)  # the last row is text
        np.testing.assert_array_equal(text.extra["ghost_weights"][3], 1.0)
    assert 0 < np.mean(want["disagree"][mask]) < 1 or np.all(want["disagree"][mask])


@pytest.mark.parametrize("objective", [Pair(), Pair(estimator="drawn"), GhostRespond(), ForwardKl(3), Nll()])
@pytest.mark.parametrize("weight", [0.0, 0.7])
def test_one_token_is_the_sum_of_both_and_its_gradient(objective: Any, weight: float) -> None:
    z = jax.random.normal(jax.random.key(0), (V,))
    both = RewardedGhost(objective, weight, clip=0.3)
    for gate, shift, advantage in ((0.0, 0.1, 1.3), (1.0, 1.0, 1.3), (0.8, -1.0, -0.4)):
        extra = {
            "ghost_weights": jnp.float32(gate),
            "drawn_log_probs": jax.nn.log_softmax(z)[7] - shift,
            "advantages": jnp.float32(advantage),
            "top_ids": jnp.array([3, 2, 1]),
            "top_log_probs": jnp.log(jnp.array([0.5, 0.3, 0.1])),
        }
        token = TokenInputs(jnp.int32(3), jnp.float32(1), jnp.int32(7), None, extra)
        (loss, metrics), grad = value_and_grad(both)(z, token)
        (ghost_loss, ghost_metrics), ghost_grad = value_and_grad(objective)(z, token)
        (reward_loss, _), reward_grad = value_and_grad(GroupRelative(0.3))(z, token)
        np.testing.assert_allclose(loss, gate * ghost_loss + weight * reward_loss, rtol=1e-5)
        np.testing.assert_allclose(grad, gate * ghost_grad + weight * reward_grad, atol=1e-6)
        (plain, _), plain_grad = jax.value_and_grad(lambda z, t=token: both(z, t), has_aux=True)(z)
        np.testing.assert_allclose(plain, loss, rtol=1e-6)
        np.testing.assert_allclose(plain_grad, grad, atol=1e-6)
        assert metrics["ghost_share"] == float(gate > 0) and ("clipped" in metrics) == (weight > 0)
        assert metrics["reward"] == ghost_metrics["reward"] if "reward" in ghost_metrics else True
        if "loss_floor" in metrics:
            np.testing.assert_allclose(metrics["loss_floor"], gate * ghost_metrics["loss_floor"], rtol=1e-6)


def test_a_step_is_the_ghosts_mean_plus_the_papers_mean_of_the_reward() -> None:
    """The mean over tokens of the ghost, and the mean over replies of the mean over tokens of the reward."""
    batch = with_advantages(with_ghost_weights(batch_of(), 0 * REWARDS, "always", 4), LOG_PROBS, REWARDS, GROUP)
    assert len(set(np.asarray(REPLIES.lengths).tolist())) > 1
    (loss, metrics), grads = loss_and_grads(RewardedGhost(Pair(), 0.5), batch)
    (ghost, _), ghost_grads = loss_and_grads(Pair(), batch_of())
    (reward, _), reward_grads = loss_and_grads(GroupRelative(), group_batch(PROMPTS, REPLIES, REWARDS, GROUP))
    np.testing.assert_allclose(loss, ghost + 0.5 * reward, rtol=1e-5)
    assert_close(grads, jax.tree.map(lambda a, b: a + 0.5 * b, ghost_grads, reward_grads))
    assert metrics["ghost_share"] == 1
    np.testing.assert_allclose(
        batch.extra["advantages"].mean(axis=1) * REPLIES.lengths / jnp.mean(REPLIES.lengths),
        group_advantages(REWARDS, GROUP),
        rtol=1e-5,
    )


def test_a_batch_without_a_gated_context_is_no_skipped_update() -> None:
    batch = with_ghost_weights(batch_of(), np.ones(4, np.float32), "wrong", 4)  # all replies are right
    tx = optax.sgd(1.0)
    step = jax.jit(make_grpo_step(STUDENT, tx, RewardedGhost(Pair())))
    state, metrics = step(TrainState.create(params=PARAMS, tx=tx, key=0), batch)
    jax.tree.map(np.testing.assert_array_equal, state.params, PARAMS)
    assert metrics["skipped"].mean() == 0 and metrics["loss"].mean() == 0 and metrics["ghost_share"].mean() == 0


def test_replies_used_again_weigh_the_ghost_and_not_the_reward() -> None:
    batch = with_advantages(with_ghost_weights(batch_of(), 0 * REWARDS, "always", 4), LOG_PROBS, REWARDS, GROUP)
    own = jnp.ones((4, 1), bool)
    again = jax.jit(lambda p, b: reweighted(STUDENT, p, b, LOG_PROBS, own, 0.1))
    newer = jax.tree.map(lambda x: 1.5 * x, PARAMS)
    np.testing.assert_array_equal(again(newer, batch).loss_mask, batch.loss_mask)
    plain = again(newer, batch_of())  # without ghost weights the mask has them
    mask = np.asarray(batch.loss_mask) != 0
    weights = np.asarray(again(newer, batch).extra["ghost_weights"])
    np.testing.assert_allclose(weights[mask], np.asarray(plain.loss_mask)[mask], rtol=1e-6)
    assert len(set(np.round(weights[mask], 3).tolist())) > 1


@pytest.mark.parametrize("privileged", [False, True])
def test_exact_divergences_are_those_of_the_whole_list(privileged: bool) -> None:
    """From the teacher's head over rows that came with the batch: the same loss and gradient as with top_k = V."""
    listed, batch = batch_of(V, privileged=privileged), batch_of(rows=True, privileged=privileged)
    np.testing.assert_array_equal(listed.ghost_tokens, batch.ghost_tokens)
    assert batch.extra.keys() == {"reference_rows"} and batch.extra["reference_rows"].shape == (*batch.tokens.shape, 16)
    for kind in (ReverseKl, JensenShannon):
        (want, _), want_grads = loss_and_grads(kind(V), listed)
        (loss, _), grads = loss_and_grads(kind(None), batch, TEACHER)
        np.testing.assert_allclose(loss, want, rtol=1e-5)
        assert_close(grads, want_grads)
        if not privileged:  # and without the rows the reference reads the contexts itself
            (loss, _), grads = loss_and_grads(kind(None), batch.replace(extra={}), TEACHER)
            np.testing.assert_allclose(loss, want, rtol=1e-5)
            assert_close(grads, want_grads)


def test_the_rows_of_the_teacher_are_not_those_of_the_student_before_the_update() -> None:
    """`reward_gain` has a reference of its own."""
    tx = optax.sgd(0.1)
    gains = []
    for batch in (batch_of(rows=True), batch_of(rows=True).replace(extra={})):
        step = jax.jit(make_grpo_step(STUDENT, tx, ReverseKl(None), reference=STUDENT, reward_gain=True))
        _, metrics = step(TrainState.create(params=PARAMS, tx=tx, key=0), batch, TEACHER)
        gains.append(metrics["reward_gain"].mean())
    np.testing.assert_allclose(*gains, rtol=1e-4)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: RewardedGhost(Pair(), -1.0), "RewardedGhost.reward_weight must be a number of at least 0, got -1.0"),
        (lambda: RewardedGhost(Pair(), 1.0, clip=1.0), "RewardedGhost.clip must be"),
        (lambda: RewardedGhost(RewardGradient(2), 1.0), "RewardedGhost.objective must be an objective of one drawn"),
        (lambda: ReferenceKl(RewardedGhost(ReverseKl(None))), "ReferenceKl.objective must be"),
    ],
)
def test_bad_settings_say_what_was_expected(build: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build()


def test_a_batch_without_verdicts_is_an_error() -> None:
    tx = optax.sgd(1.0)
    with pytest.raises(ValueError, match="needs the extra array 'ghost_weights'"):
        make_grpo_step(STUDENT, tx, RewardedGhost(Pair()))(TrainState.create(params=PARAMS, tx=tx, key=0), batch_of())
