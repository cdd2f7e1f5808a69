"""The facts of docs/method.md about each objective, by exact enumeration over a small vocabulary."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cotgrpo import objectives
from cotgrpo.objectives import (
    GroupRelative,
    Nll,
    Pair,
    Reinforce,
    RewardGradient,
    TokenInputs,
    ghost_reward,
)
from cotgrpo.objectives.divergences import ForwardKl, ReferenceKl

V = 7
PAIR_ONLY = Pair(nll_weight=0.0, pair_weight=1.0, estimator="drawn")
CLOSED_FORMS = [
    Nll(),
    Pair(),
    Pair(beta=0.5, pair_weight=2.0),
    Pair(beta=0.5, negatives="calibrated", nll_weight=0.0, pair_weight=1.0),
    Pair(beta=1.0, negatives="calibrated"),
    Pair(estimator="drawn"),
    PAIR_ONLY,
    ReferenceKl(Pair(), 0.3),
    ReferenceKl(RewardGradient(), 0.3),
    ForwardKl(3),
    ReferenceKl(ForwardKl(3), 0.3),
]


def random_logits(seed: int, scale: float = 1.5) -> jax.Array:
    return scale * jax.random.normal(jax.random.key(seed), (V,))


def row(
    ghost: int | jax.Array, drawn: int | jax.Array | None = None, reference: jax.Array | None = None
) -> TokenInputs:
    """With a distribution of the ghost too, whose likeliest tokens are `ghost` and the two behind it."""
    drawn_id = None if drawn is None else jnp.int32(drawn)
    top = (jnp.arange(3) + ghost) % V, jnp.log(jnp.array([0.5, 0.3, 0.1]))
    extra = {"top_ids": top[0], "top_log_probs": top[1]}
    return TokenInputs(jnp.int32(ghost), jnp.float32(1.0), drawn_id, reference, extra)


def told(q: np.ndarray, top_k: int) -> TokenInputs:
    """The row of a live ghost with this distribution."""
    ids = np.argsort(-q, kind="stable")[:top_k]
    log_q = jnp.log(jnp.asarray(q[ids], jnp.float32))
    extra = {"top_ids": jnp.asarray(ids), "top_log_probs": log_q}
    return TokenInputs(jnp.int32(ids[0]), jnp.float32(1.0), extra=extra)


@functools.partial(jax.jit, static_argnums=0)
def loss_and_gradient(objective: objectives.Objective, logits: jax.Array, token: TokenInputs) -> Any:
    """`((loss, metrics), gradient)` by autodiff of the plain function."""
    return jax.value_and_grad(lambda z: objective(z, token), has_aux=True)(logits)


@functools.partial(jax.jit, static_argnums=0)
def closed_form(objective: objectives.Objective, logits: jax.Array, token: TokenInputs) -> Any:
    """`((loss, metrics), gradient)` as a step takes it."""
    return objectives.value_and_grad(objective)(logits, token)


def gradient(objective: objectives.Objective, logits: jax.Array, token: TokenInputs) -> jax.Array:
    return loss_and_gradient(objective, logits, token)[1]


@functools.partial(jax.jit, static_argnums=0)
def mean_over_draws(objective: objectives.Objective, logits: jax.Array, ghost: int | jax.Array) -> Any:
    """The exact means of the drawn loss and its gradient over y ~ n, by enumeration."""
    n = jax.nn.softmax(objectives.draw_logits(objective, logits))
    drawn = jax.vmap(lambda y: jax.value_and_grad(lambda z: objective(z, row(ghost, y))[0])(logits))
    return jax.tree.map(lambda x: jnp.tensordot(n, x, 1), drawn(jnp.arange(V)))


def mean_gradient(objective: objectives.Objective, logits: jax.Array, ghost: int) -> jax.Array:
    return mean_over_draws(objective, logits, ghost)[1]


@pytest.mark.parametrize("jit", [False, True])
def test_ghost_reward_is_the_log_ratio(jit: bool) -> None:
    reward = jax.jit(ghost_reward) if jit else ghost_reward
    np.testing.assert_allclose(reward(jnp.array([1.0, 3.0, 0.5]), 1, 0), 2.0)
    logits = random_logits(0)
    log_p = np.log(np.exp(logits) / np.exp(logits).sum())
    for ghost in range(V):
        for drawn in range(V):
            np.testing.assert_allclose(reward(logits, ghost, drawn), log_p[ghost] - log_p[drawn], atol=1e-6)


def test_ghost_reward_vmaps_over_tokens() -> None:
    logits = jax.random.normal(jax.random.key(1), (5, V))
    ghost, drawn = jnp.array([0, 1, 2, 3, 4]), jnp.array([0, 2, 2, 6, 1])
    expected = np.asarray(logits)[np.arange(5), ghost] - np.asarray(logits)[np.arange(5), drawn]
    np.testing.assert_allclose(jax.vmap(ghost_reward)(logits, ghost, drawn), expected, rtol=1e-6)


@pytest.mark.parametrize("seed", range(5))
def test_reinforce_expected_gradient_is_minus_that_of_the_entropy(seed: int) -> None:
    logits = random_logits(seed)

    def entropy(z: jax.Array) -> jax.Array:
        return -jnp.sum(jax.nn.softmax(z) * jax.nn.log_softmax(z))

    for ghost in range(V):  # the same for every ghost: it carries no information
        np.testing.assert_allclose(mean_gradient(Reinforce(), logits, ghost), -jax.grad(entropy)(logits), atol=1e-6)


@pytest.mark.parametrize("seed", range(5))
def test_reward_gradient_expected_gradient_is_that_of_sft(seed: int) -> None:
    logits = random_logits(seed)
    for ghost in range(V):
        np.testing.assert_allclose(
            mean_gradient(RewardGradient(), logits, ghost), gradient(Nll(), logits, row(ghost)), atol=1e-6
        )


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("negatives", ["policy", "calibrated"])
@pytest.mark.parametrize("beta", [0.3, 1.0])
def test_exact_pair_is_the_mean_of_the_drawn_pair(seed: int, negatives: str, beta: float) -> None:
    logits = random_logits(seed)
    exact, drawn = (
        Pair(beta=beta, nll_weight=0.5, pair_weight=0.7, negatives=negatives, estimator=e) for e in ("exact", "drawn")
    )
    n = jax.nn.softmax(logits * (1.0 if negatives == "policy" else 1.0 - beta))
    np.testing.assert_allclose(jax.nn.softmax(objectives.draw_logits(drawn, logits)), n, rtol=1e-6)
    for ghost in range(V):
        mean_loss, mean_grad = mean_over_draws(drawn, logits, ghost)
        (loss, _), grad = loss_and_gradient(exact, logits, row(ghost))
        np.testing.assert_allclose(loss, mean_loss, rtol=1e-5)
        np.testing.assert_allclose(grad, mean_grad, atol=1e-6)


@pytest.mark.parametrize("beta", [0.5, 1.0, 2.0])
def test_slopes(beta: float) -> None:
    """Every form but REINFORCE has the logit gradient `-sum_{y != y*} p(y) w(y) (e_y* - e_y)`.

    At D = 0 the slope of the pair is that of SFT.
    """
    logits, ghost = random_logits(3), 2
    p = np.asarray(jax.nn.softmax(logits), np.float64)
    advantage = np.asarray(logits[ghost] - logits, np.float64)
    weights = {
        Nll(): np.ones(V),
        Pair(beta=beta, nll_weight=0.0, pair_weight=1.0): 2 / (1 + np.exp(beta * advantage)),
    }
    for objective, w in weights.items():
        expected = sum(p[y] * w[y] * (np.eye(V)[y] - np.eye(V)[ghost]) for y in range(V) if y != ghost)
        np.testing.assert_allclose(gradient(objective, logits, row(ghost)), expected, atol=1e-6)
    flat = jnp.zeros(V)
    np.testing.assert_allclose(
        gradient(Pair(beta=beta, nll_weight=0.0, pair_weight=1.0), flat, row(ghost)),
        gradient(Nll(), flat, row(ghost)),
        atol=1e-6,
    )


@pytest.mark.parametrize("objective", [PAIR_ONLY, RewardGradient()], ids=["pair", "reward_gradient"])
def test_one_small_step_raises_the_ghost_and_lowers_the_drawn_token(objective: objectives.Objective) -> None:
    before, after, reward = log_probs_around_a_step(objective)
    assert np.all(after[:, 0] > before[:, 0]) and np.all(after[:, 1] < before[:, 1])
    assert np.any(reward > 0) and np.any(reward < 0), "the pairs must cover R < 0 and R > 0"


def test_reinforce_fails_that_test() -> None:
    before, after, reward = log_probs_around_a_step(Reinforce())
    wrong = ~((after[:, 0] > before[:, 0]) & (after[:, 1] < before[:, 1]))
    assert np.sum(wrong & (reward > 0)) > 50, "where the ghost is likelier, REINFORCE rewards the drawn token for it"
    assert np.any(wrong & (reward < 0))


def log_probs_around_a_step(objective: objectives.Objective) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """200 random pairs: log p of ghost and drawn token before and after a small step `[200, 2]`, and the reward."""
    with jax.enable_x64(True):
        rng = np.random.default_rng(0)
        logits = 2 * rng.normal(size=(200, V))
        pairs = np.stack([rng.choice(V, 2, replace=False) for _ in logits]).astype(np.int32)

        @jax.jit
        @jax.vmap
        def step(z: jax.Array, pair: jax.Array) -> Any:
            grad = jax.grad(lambda z: objective(z, row(pair[0], pair[1]))[0])(z)
            log_p = [jax.nn.log_softmax(x)[pair] for x in (z, z - 1e-3 * grad)]
            return *log_p, ghost_reward(z, pair[0], pair[1])

        before, after, reward = jax.device_get(step(logits, pairs))
        return before, after, reward


@pytest.mark.parametrize(
    "objective",
    [
        PAIR_ONLY,
        Pair(nll_weight=0.0, pair_weight=1.0, beta=0.5, negatives="calibrated", estimator="drawn"),
        RewardGradient(),
    ],
    ids=["pair", "calibrated", "reward_gradient"],
)
def test_no_gradient_at_all_where_the_drawn_token_is_the_ghost(objective: objectives.Objective) -> None:
    for seed in range(20):
        logits = random_logits(seed, scale=4.0)
        token = row(seed % V, seed % V)
        assert not np.any(gradient(objective, logits, token))
        assert not np.any(closed_form(objective, logits, token)[1])


@pytest.mark.parametrize("beta", [0.25, 0.5, 1.0])
@pytest.mark.parametrize("negatives", ["policy", "calibrated"])
def test_fixed_points(beta: float, negatives: str) -> None:
    """Ghosts drawn from q: the calibrated pair stops at q, the policy pair at q^(1 / (1 + beta)), flatter."""
    q = jax.nn.softmax(random_logits(5))
    objective = Pair(beta=beta, nll_weight=0.0, pair_weight=1.0, negatives=negatives)
    expected = q if negatives == "calibrated" else q ** (1 / (1 + beta)) / jnp.sum(q ** (1 / (1 + beta)))

    def mean_over_ghosts(logits: jax.Array) -> jax.Array:
        per_ghost = jax.vmap(lambda g: gradient(objective, logits, TokenInputs(g, jnp.float32(1.0))))(jnp.arange(V))
        return jnp.sum(q[:, None] * per_ghost, axis=0)

    np.testing.assert_allclose(mean_over_ghosts(jnp.log(expected)), 0.0, atol=1e-6)
    # And plain gradient descent from elsewhere gets there.
    logits = jax.jit(lambda z: jax.lax.fori_loop(0, 4_000, lambda _, z: z - mean_over_ghosts(z), z))(jnp.zeros(V))
    np.testing.assert_allclose(jax.nn.softmax(logits), expected, atol=1e-4)


@pytest.mark.parametrize("top_k", [1, 3, V - 1, V])
@pytest.mark.parametrize("seed", range(3))
def test_forward_kl_by_enumeration(top_k: int, seed: int) -> None:
    """The KL between the two distributions in which all tokens but the top are one, and `p - q'` for its gradient."""
    logits, objective = random_logits(seed), ForwardKl(top_k)
    p, q = (np.asarray(jax.nn.softmax(x), np.float64) for x in (logits, random_logits(seed + 9)))
    token = told(q, top_k)
    top = np.isin(np.arange(V), np.asarray(token["top_ids"]))
    merged = lambda x: np.append(x[top], x[~top].sum()) if top_k < V else x
    want = np.sum(merged(q) * np.log(merged(q) / merged(p)))
    spread = np.where(top, q, p / max(p[~top].sum(), 1e-300) * q[~top].sum())
    (loss, metrics), grad = closed_form(objective, logits, token)
    np.testing.assert_allclose(loss, want, atol=1e-6)
    np.testing.assert_allclose(grad, p - spread, atol=1e-6)
    np.testing.assert_allclose(gradient(objective, logits, token), p - spread, atol=1e-6)
    np.testing.assert_allclose(metrics["top_mass"], q[top].sum(), rtol=1e-6)


def test_forward_kl_rests_at_the_ghosts_distribution() -> None:
    q = np.asarray(jax.nn.softmax(random_logits(5)), np.float64)
    whole, part = (told(q, top_k) for top_k in (V, 3))
    for token, near in ((whole, np.ones(V, bool)), (part, np.isin(np.arange(V), np.asarray(part["top_ids"])))):
        step = lambda _, z, token=token: z - gradient(ForwardKl(token["top_ids"].size), z, token)
        p = jax.nn.softmax(jax.lax.fori_loop(0, 4_000, step, random_logits(6)))
        np.testing.assert_allclose(p[near], q[near], atol=1e-5)


@pytest.mark.parametrize("top_k", [1, 4])
def test_forward_kl_to_a_certain_ghost_is_nll(top_k: int) -> None:
    """As teacher-forced rows tell it: all of q on one token, which is named for the others as well."""
    logits, log_q = random_logits(1), jnp.where(jnp.arange(top_k) == 0, 0.0, objectives.MASKED_LOGIT)
    token = row(2).replace(extra={"top_ids": jnp.full(top_k, 2), "top_log_probs": log_q})
    (loss, _), grad = closed_form(ForwardKl(top_k), logits, token)
    (want, _), want_grad = closed_form(Nll(), logits, token)
    np.testing.assert_allclose(loss, want, rtol=1e-6)
    np.testing.assert_allclose(grad, want_grad, atol=1e-6)


@pytest.mark.parametrize("objective", CLOSED_FORMS, ids=repr)
@pytest.mark.parametrize("seed", range(3))
def test_closed_form_gradient_is_autodiff(objective: objectives.Objective, seed: int) -> None:
    logits = random_logits(seed, scale=3.0)
    draws = objectives.num_draws(objective)
    for ghost in range(V):
        token = row(ghost, (ghost + seed) % V if draws else None, random_logits(seed + 50))
        (loss, metrics), grad = closed_form(objective, logits, token)
        (plain_loss, plain_metrics), plain_grad = loss_and_gradient(objective, logits, token)
        np.testing.assert_allclose(loss, plain_loss, rtol=1e-6)
        np.testing.assert_allclose(grad, plain_grad, atol=2e-6)
        assert metrics.keys() == plain_metrics.keys()


def test_metrics_by_hand() -> None:
    p = np.array([0.5, 0.25, 0.25])
    logits = jnp.log(jnp.asarray(p, jnp.float32))
    loss, metrics = Pair(nll_weight=1.0, pair_weight=0.0)(logits, row(1))
    entropy = 0.5 * np.log(2) + 0.5 * np.log(4)
    expected = {
        "entropy": entropy,
        "token_accuracy": 0.0,  # the greedy token is 0
        "reward": np.log(0.25) + entropy,
        "ghost_prob": 0.25,
        "drawn_prob": 0.375,
        "match_rate": 0.25,
    }
    np.testing.assert_allclose(loss, np.log(4), rtol=1e-6)
    assert metrics.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_allclose(metrics[name], value, atol=1e-6, err_msg=name)
    drawn = RewardGradient()(logits, row(1, 0))[1]
    expected |= {"reward": np.log(0.5), "drawn_prob": 0.5, "match_rate": 0.0}
    for name, value in expected.items():
        np.testing.assert_allclose(drawn[name], value, atol=1e-6, err_msg=name)


def test_reference_kl_by_hand() -> None:
    p, r = np.array([0.5, 0.25, 0.25]), np.array([0.25, 0.5, 0.25])
    kl = 0.5 * np.log(2) + 0.25 * np.log(0.5)
    token = row(1, reference=jnp.log(jnp.asarray(r, jnp.float32)) + 3.0)
    logits = jnp.log(jnp.asarray(p, jnp.float32)) - 1.0
    loss, metrics = ReferenceKl(Nll(), 0.5)(logits, token)
    np.testing.assert_allclose(metrics["kl"], kl, rtol=1e-5)
    np.testing.assert_allclose(loss, np.log(4) + 0.5 * kl, rtol=1e-5)


@pytest.mark.parametrize("shift", [0.0, 300.0, -300.0])
def test_softmax(shift: float) -> None:
    z_V = np.append(np.random.default_rng(0).normal(size=9) + shift, objectives.MASKED_LOGIT).astype(np.float32)
    want = shift + np.log(np.sum(np.exp(z_V.astype(np.float64) - shift)))
    p_V = np.exp(z_V.astype(np.float64) - want)
    value, grad = jax.value_and_grad(lambda z_V: objectives.softmax(z_V).log_z)(jnp.asarray(z_V))
    np.testing.assert_allclose(value, want, rtol=1e-6)
    np.testing.assert_allclose(grad, p_V, rtol=1e-4)
    student = objectives.softmax(jnp.asarray(z_V))
    np.testing.assert_allclose(student.p_V, p_V, rtol=1e-6)
    np.testing.assert_allclose(student.log_prob(jnp.int32(3)), np.log(p_V[3]), rtol=1e-4)
    np.testing.assert_allclose(student.entropy(), -np.sum(p_V[:-1] * np.log(p_V[:-1])), rtol=1e-4)
    assert all(np.all(np.isnan(x)) for x in objectives.softmax(jnp.array([0.0, np.inf]))[1:])


@pytest.mark.parametrize(
    "objective",
    [Nll(), Pair(), Pair(estimator="drawn", negatives="calibrated", beta=0.5), RewardGradient(), ForwardKl(3)],
)
@pytest.mark.parametrize("size", [30.0, 1e4])
def test_extreme_logits_stay_finite(objective: objectives.Objective, size: float) -> None:
    logits = jnp.array([size, -size, 0.0, size, objectives.MASKED_LOGIT, objectives.MASKED_LOGIT, 1.0])
    for ghost in (0, 1, 2):
        token = row(ghost, 3)
        token = token.replace(extra=token.extra | {"top_ids": jnp.array([0, 1, 2])})
        (loss, metrics), grad = closed_form(objective, logits, token)
        assert np.isfinite(loss) and np.all(np.isfinite(grad)) and all(np.isfinite(x) for x in metrics.values())
        assert not np.any(grad[4:6]), "a token that does not exist gets no gradient"


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: Pair(beta=0.0), "Pair.beta must be a positive number, got 0.0"),
        (
            lambda: Pair(beta=1.5, negatives="calibrated"),
            "Pair.beta must be at most 1 with calibrated negatives, got 1.5",
        ),
        (lambda: Pair(negatives="uniform"), "Pair.negatives must be"),
        (lambda: Pair(estimator="sampled"), "Pair.estimator must be"),
        (lambda: Pair(nll_weight=0.0, pair_weight=0.0), "a positive sum"),
        (lambda: Pair(nll_weight=-1.0), "Pair.nll_weight must be"),
        (lambda: Pair(samples=0), "Pair.samples must be"),
        (lambda: RewardGradient(samples=0), "RewardGradient.samples must be"),
        (lambda: GroupRelative(clip=1.0), "GroupRelative.clip must be"),
        (lambda: GroupRelative(kl_weight=-1.0), "GroupRelative.kl_weight must be"),
        (lambda: ReferenceKl(Nll(), -0.1), "ReferenceKl.weight must be"),
        (lambda: ForwardKl(0), "ForwardKl.top_k must be an integer of at least 1, got 0"),
    ],
)
def test_bad_settings_say_what_was_expected(build: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build()


PADDING = (objectives.MASKED_LOGIT, -np.inf, -1e9, float(np.finfo(np.float16).min))
EVERY_EXACT = [
    Nll(),
    Pair(),
    Pair(beta=0.5, negatives="calibrated"),
    Pair(beta=1.0, negatives="calibrated"),
    ForwardKl(3),
    ReferenceKl(Nll(), 0.3),
    ReferenceKl(Pair(beta=1.0, negatives="calibrated"), 0.3),
    ReferenceKl(ForwardKl(3), 0.3),
]


@pytest.mark.parametrize("padding", PADDING)
@pytest.mark.parametrize("objective", EVERY_EXACT)
def test_padding_changes_nothing(objective: objectives.Objective, padding: float) -> None:
    """Impossible tokens, whatever their logit, change no loss, metric or gradient, and get none."""
    logits, reference = random_logits(0), random_logits(1)
    padded = lambda z: jnp.concatenate([z, jnp.full(4, padding, jnp.float32)])
    want = closed_form(objective, logits, row(2, reference=reference))
    for derive in (closed_form, loss_and_gradient):
        (loss, metrics), grad = derive(objective, padded(logits), row(2, reference=padded(reference)))
        np.testing.assert_allclose(loss, want[0][0], rtol=2e-5, atol=1e-6)
        for name, value in want[0][1].items():
            np.testing.assert_allclose(metrics[name], value, rtol=2e-5, atol=1e-6, err_msg=name)
        np.testing.assert_allclose(grad, np.append(want[1], np.zeros(4)), rtol=2e-5, atol=1e-6)


@pytest.mark.parametrize("padding", PADDING)
@pytest.mark.parametrize("beta", [0.3, 0.9, 1.0])
def test_calibrated_negatives_never_draw_padding(beta: float, padding: float) -> None:
    objective = Pair(beta=beta, negatives="calibrated", estimator="drawn")
    logits = jnp.concatenate([random_logits(3), jnp.full(300, padding, jnp.float32)])
    drawn = objectives.draw(objectives.draw_logits(objective, logits), jnp.linspace(0, 1, 200, endpoint=False))
    assert np.all(np.asarray(drawn) < V)


@pytest.mark.parametrize("filler", [-np.inf, -1e30])
@pytest.mark.parametrize("filler_id", [0, 4, -1, V, 10**6])
def test_forward_kl_ignores_fillers(filler: float, filler_id: int) -> None:
    """A short list filled up is the short list, even if the filler's id is a token of the list or of the rest."""
    logits, q = random_logits(0), np.array([0.6, 0.3])
    ids = np.array([4, 2], np.int32)
    short = TokenInputs(
        jnp.int32(4), jnp.float32(1.0), extra={"top_ids": jnp.asarray(ids), "top_log_probs": jnp.log(jnp.asarray(q))}
    )
    extra = {
        "top_ids": jnp.asarray([*ids, filler_id, filler_id], jnp.int32),
        "top_log_probs": jnp.asarray([*np.log(q), filler, filler], jnp.float32),
    }
    filled = TokenInputs(jnp.int32(4), jnp.float32(1.0), extra=extra)
    want = closed_form(ForwardKl(2), logits, short)
    for derive in (closed_form, loss_and_gradient):
        (loss, metrics), grad = derive(ForwardKl(4), logits, filled)
        np.testing.assert_allclose(loss, want[0][0], rtol=1e-5)
        np.testing.assert_allclose(metrics["top_mass"], 0.9, rtol=1e-6)
        np.testing.assert_allclose(grad, want[1], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("shift", [0.0, 1e4, -3e4])
def test_entropy_and_log_probs_of_large_logits(shift: float) -> None:
    small = np.asarray(random_logits(4))
    shifted = np.float32(small + shift).astype(np.float64)
    p = np.exp(shifted - shifted.max()) / np.sum(np.exp(shifted - shifted.max()))
    student = objectives.softmax(jnp.asarray(shifted, jnp.float32))
    np.testing.assert_allclose(student.entropy(), -np.sum(p * np.log(p)), rtol=2e-6)
    np.testing.assert_allclose(student.log_prob(jnp.arange(V)), np.log(p), rtol=2e-6)


@pytest.mark.parametrize("ties", [2, 3, V])
def test_the_first_of_equal_logits_is_the_greedy_token(ties: int) -> None:
    logits = jnp.where(jnp.arange(V) < ties, 1.0, 0.0)
    accuracy = [float(Nll()(logits, row(ghost))[1]["token_accuracy"]) for ghost in range(V)]
    assert accuracy == [1.0, *[0.0] * (V - 1)]


@pytest.mark.parametrize(
    ("objective", "floor"),
    [
        (Pair(), 0.6 * np.log(2)),
        (Pair(beta=0.5, pair_weight=1.0), 4 * np.log(2)),
        (Pair(beta=0.5, negatives="calibrated"), 1.2 * np.log(2)),
        (Pair(estimator="drawn"), 0.6 * np.log(2)),
    ],
)
def test_the_loss_of_a_student_that_agrees_is_its_floor(objective: objectives.Objective, floor: float) -> None:
    certain = jnp.where(jnp.arange(V) == 3, 200.0, 0.0)
    loss, metrics = objective(certain, row(3, 3))
    np.testing.assert_allclose(loss, floor, rtol=1e-5)
    np.testing.assert_allclose(metrics["loss_floor"], floor, rtol=1e-5)
    assert objective(random_logits(0), row(3, 2))[1]["loss_floor"] < floor
