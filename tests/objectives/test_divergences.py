"""The divergences from a live ghost's distribution, against NumPy in float64 and against autodiff."""

from __future__ import annotations

import functools
import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cotgrpo import objectives
from cotgrpo.objectives import (
    ForwardKl,
    GhostRespond,
    JensenShannon,
    Nll,
    Pair,
    ReferenceKl,
    ReverseKl,
    RewardGradient,
    SkewedKl,
    TokenInputs,
)
from cotgrpo.testing import check_objective

V = 7
KINDS: dict[str, Any] = {
    "forward": ForwardKl,
    "reverse": ReverseKl,
    "jensen_shannon_0": functools.partial(JensenShannon, beta=0.0),
    "jensen_shannon_0.1": functools.partial(JensenShannon, beta=0.1),
    "jensen_shannon": JensenShannon,
    "jensen_shannon_1": functools.partial(JensenShannon, beta=1.0),
    "skewed_forward": SkewedKl,
    "skewed_forward_0": functools.partial(SkewedKl, alpha=0.0),
    "skewed_reverse": functools.partial(SkewedKl, alpha=0.3, direction="reverse"),
    "skewed_reverse_0": functools.partial(SkewedKl, alpha=0.0, direction="reverse"),
}


def kl(a: np.ndarray, b: np.ndarray) -> float:
    """KL(a || b) in float64; outcomes without probability in a add nothing."""
    on = a > 0
    return float(np.sum(a[on] * np.log(a[on] / b[on])))


def oracle(objective: Any, p: np.ndarray, q: np.ndarray) -> float:
    """The formula of the objective's docstring, over outcomes."""
    if isinstance(objective, JensenShannon) and 0 < objective.beta < 1:
        b = objective.beta
        m = b * q + (1 - b) * p
        return b * kl(q, m) + (1 - b) * kl(p, m)
    if isinstance(objective, SkewedKl):
        a = objective.alpha
        return kl(q, a * q + (1 - a) * p) if objective.direction == "forward" else kl(p, a * p + (1 - a) * q)
    reverse = isinstance(objective, ReverseKl) or (isinstance(objective, JensenShannon) and objective.beta == 1)
    return kl(p, q) if reverse else kl(q, p)


def distribution(seed: int, scale: float = 1.5) -> tuple[jax.Array, np.ndarray]:
    """Random logits, and their distribution in float64."""
    logits = scale * jax.random.normal(jax.random.key(seed), (V,))
    raw = np.exp(np.asarray(logits, np.float64) - np.max(logits))
    return logits, raw / raw.sum()


def numeric_gradient(loss: Any, logits: jax.Array) -> np.ndarray:
    """Central differences of a function of the distribution, in float64."""
    z = np.asarray(logits, np.float64)
    softmax = lambda z: np.exp(z - z.max()) / np.exp(z - z.max()).sum()
    return np.array([(loss(softmax(z + s)) - loss(softmax(z - s))) / 2e-4 for s in 1e-4 * np.eye(V)])


def told(top_k: int | None, ghost_logits: jax.Array, q: np.ndarray) -> TokenInputs:
    """What a live ghost of this distribution hands over."""
    ids = np.argsort(-q, kind="stable")[:top_k]
    top = {"top_ids": jnp.asarray(ids), "top_log_probs": jnp.log(jnp.asarray(q[ids], jnp.float32))}
    extra, reference = ({}, ghost_logits) if top_k is None else (top, None)
    return TokenInputs(jnp.int32(ids[0]), jnp.float32(1.0), None, reference, extra)


@functools.partial(jax.jit, static_argnums=0)
def derivatives(objective: Any, logits: jax.Array, token: TokenInputs) -> Any:
    """`((loss, metrics), gradient)`: in closed form, and by autodiff."""
    plain = jax.value_and_grad(lambda z: objective(z, token), has_aux=True)(logits)
    return objectives.value_and_grad(objective)(logits, token), plain


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("top_k", [1, 3, V - 1, V, None])
def test_the_formula_over_outcomes_and_its_gradient(name: str, top_k: int | None) -> None:
    objective = KINDS[name](top_k)
    for seed in range(3):
        (logits, p), (ghost_logits, q) = distribution(seed, 3.0), distribution(seed + 9, 3.0)
        token = told(top_k, ghost_logits, q)
        top = np.isin(np.arange(V), np.argsort(-q, kind="stable")[: top_k or V])
        merged = lambda x, top=top: x[top] if np.all(top) else np.append(x[top], x[~top].sum())
        ((loss, metrics), grad), ((plain_loss, _), plain_grad) = derivatives(objective, logits, token)
        # The rest of q is 1 - sum in float32: its logarithm is known to about 1e-7 / q_rest.
        unsure = 1e-6 if np.all(top) else 3e-7 / q[~top].sum()
        np.testing.assert_allclose(loss, oracle(objective, merged(p), merged(q)), rtol=1e-5, atol=1e-6 + unsure)
        np.testing.assert_allclose(plain_loss, loss, rtol=1e-6, atol=1e-7)
        np.testing.assert_allclose(grad, plain_grad, atol=1e-5)
        # And numerically, so that closed form and autodiff cannot share a mistake of the loss.
        numeric = numeric_gradient(lambda p, m=merged, q=q: oracle(objective, m(p), m(q)), logits)
        np.testing.assert_allclose(grad, numeric, atol=1e-5 + unsure)
        assert ("top_mass" in metrics) == (top_k is not None)


@pytest.mark.parametrize("name", KINDS)
def test_each_rests_at_the_ghosts_distribution(name: str) -> None:
    for top_k in (3, None):
        objective = KINDS[name](top_k)
        ghost_logits, q = distribution(5)
        token = told(top_k, ghost_logits, q)
        beta = getattr(objective, "beta", 0.0)
        rate = 0.9 / (beta * (1 - beta)) if 0 < beta < 1 else 1.0  # the divergence shrinks towards both ends
        grad = lambda z, objective=objective, token=token: objective.value_and_grad(z, token)[1]
        step = lambda _, z, grad=grad, rate=rate: z - rate * grad(z)
        p = jax.nn.softmax(jax.jit(lambda z, step=step: jax.lax.fori_loop(0, 4_000, step, z))(distribution(6)[0]))
        near = np.isin(np.arange(V), np.argsort(-q)[: top_k or V])
        np.testing.assert_allclose(p[near], q[near], atol=2e-4)


@pytest.mark.parametrize("name", KINDS)
def test_fillers_and_padded_tokens_change_nothing(name: str) -> None:
    logits, q = distribution(0)[0], np.array([0.6, 0.3])

    def token(ids: Any, log_q: Any) -> TokenInputs:
        arrays = {"top_ids": jnp.asarray(ids, jnp.int32), "top_log_probs": jnp.asarray(log_q, jnp.float32)}
        return TokenInputs(jnp.int32(4), jnp.float32(1.0), extra=arrays)

    want = derivatives(KINDS[name](2), logits, token([4, 2], np.log(q)))[0]
    for filler in (-np.inf, -1e30):
        for filler_id in (4, -1, 10**6):
            padded = jnp.append(logits, jnp.full(3, filler))
            filled = token([4, 2, filler_id, filler_id], [*np.log(q), filler, filler])
            for (loss, metrics), grad in derivatives(KINDS[name](4), padded, filled):
                np.testing.assert_allclose(loss, want[0][0], rtol=1e-5)
                np.testing.assert_allclose(metrics["top_mass"], 0.9, rtol=1e-6)
                np.testing.assert_allclose(grad, np.append(want[1], np.zeros(3)), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("name", KINDS)
def test_padded_tokens_of_both_models_change_nothing(name: str) -> None:
    objective, (logits, _), (ghost_logits, q) = KINDS[name](None), distribution(0), distribution(1)
    want = derivatives(objective, logits, told(None, ghost_logits, q))[0]
    for padding in (-np.inf, -1e30):
        logits_P, ghost_P = (jnp.append(z, jnp.full(3, padding)) for z in (logits, ghost_logits))
        for (loss, _), grad in derivatives(objective, logits_P, told(None, ghost_P, q)):
            np.testing.assert_allclose(loss, want[0][0], rtol=1e-5)
            np.testing.assert_allclose(grad, np.append(want[1], np.zeros(3)), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("name", KINDS)
def test_hard_cases_are_finite(name: str) -> None:
    """A ghost that is certain of one token, and a student that gives the rest next to nothing."""
    limit = {"jensen_shannon": np.log(2), "skewed_forward": np.log(10), "skewed_reverse": np.log(1 / 0.3)}
    students, ghosts = (1.0, 30.0, 1e4), ([0.0, -np.inf, -np.inf], np.log([0.5, 0.3, 0.1]))
    for sharpness, log_q, ids in itertools.product(students, ghosts, ([0, 1, 2], [3, 0, 1])):
        logits = sharpness * jnp.array([1.0, 0.5, 0.0, -1.0, -1.0, -1.0, -1.0])
        extra = {"top_ids": jnp.asarray(ids, jnp.int32), "top_log_probs": jnp.asarray(log_q, jnp.float32)}
        token = TokenInputs(jnp.int32(ids[0]), jnp.float32(1.0), extra=extra)
        closed, plain = derivatives(KINDS[name](3), logits, token)
        assert np.isfinite(closed[0][0]) and np.all(np.isfinite(closed[1]))
        scale = max(1.0, float(np.max(np.abs(plain[1]))))
        np.testing.assert_allclose(closed[1] / scale, plain[1] / scale, atol=1e-5)
        assert float(closed[0][0]) <= limit.get(name, np.inf) + 1e-5, "bounded"


def test_the_ends_are_the_plain_divergences() -> None:
    (logits, _), (ghost_logits, q) = distribution(2), distribution(3)
    ends = {
        ForwardKl: (JensenShannon(beta=0.0), SkewedKl(alpha=0.0)),
        ReverseKl: (JensenShannon(beta=1.0), SkewedKl(alpha=0.0, direction="reverse")),
    }
    for kind, same in ends.items():
        for top_k in (3, None):
            token = told(top_k, ghost_logits, q)
            (want, _), want_grad = kind(top_k).value_and_grad(logits, token)
            for objective in same:
                (loss, _), grad = type(objective)(**(vars(objective) | {"top_k": top_k})).value_and_grad(logits, token)
                np.testing.assert_allclose(loss, want, rtol=1e-6)
                np.testing.assert_allclose(grad, want_grad, atol=1e-7)
    # The limits over beta and 1 - beta.
    token = told(None, ghost_logits, q)
    for beta, kind, share in ((1e-3, ForwardKl, 1e-3), (1 - 1e-3, ReverseKl, 1e-3)):
        grad = JensenShannon(None, beta).value_and_grad(logits, token)[1]
        np.testing.assert_allclose(grad / share, kind(None).value_and_grad(logits, token)[1], atol=1e-2)


@pytest.mark.parametrize(
    "objective", [ReverseKl(3), JensenShannon(3, 0.5), SkewedKl(3, 0.1, "reverse"), ReverseKl(None)]
)
def test_each_passes_the_check_for_own_objectives(objective: Any) -> None:
    top = {"top_ids": np.array([2, 5, 1], np.int32), "top_log_probs": np.log([0.5, 0.2, 0.1])}
    check_objective(objective, extra={} if objective.top_k is None else top, num_cases=4)


@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0])
def test_ghost_respond_moves_probability_from_the_drawn_token_to_the_ghost(beta: float) -> None:
    """The gradient is `w(R) (e_y - e_ghost)` with w = 2 sigmoid(-beta R), or 1 at beta = 0."""
    logits, p = distribution(1)
    same = Pair(beta, nll_weight=0.0, pair_weight=1.0, estimator="drawn") if beta else RewardGradient()
    mean = np.zeros(V)
    for drawn in range(V):
        token = TokenInputs(jnp.int32(2), jnp.float32(1.0), jnp.int32(drawn))
        ((loss, metrics), grad), (_, plain) = derivatives(GhostRespond(beta), logits, token)
        reward = np.log(p[2]) - np.log(p[drawn])
        weight = 2 / (1 + np.exp(beta * reward)) if beta else 1.0
        want = weight * (np.eye(V)[drawn] - np.eye(V)[2])
        np.testing.assert_allclose(grad, want, atol=1e-6)
        np.testing.assert_allclose(plain, want, atol=1e-6)
        np.testing.assert_allclose(metrics["reward"], reward, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(loss, same(logits, token)[0], rtol=1e-6)
        mean += p[drawn] * np.asarray(grad, np.float64)
    if beta == 0:
        nll = Nll().value_and_grad(logits, TokenInputs(jnp.int32(2), jnp.float32(1.0)))[1]
        np.testing.assert_allclose(mean, nll, atol=1e-6)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: ReverseKl(0), r"ReverseKl.top_k must be an integer of at least 1, got 0"),
        (lambda: JensenShannon(beta=1.5), r"JensenShannon.beta must be a number in \[0, 1\], got 1.5"),
        (lambda: JensenShannon(0), "JensenShannon.top_k must be"),
        (lambda: SkewedKl(alpha=1.0), r"SkewedKl.alpha must be a number in \[0, 1\), got 1.0"),
        (lambda: SkewedKl(direction="both"), 'SkewedKl.direction must be "forward" or "reverse", got \'both\''),
        (lambda: GhostRespond(-1.0), "GhostRespond.beta must be a number of at least 0"),
        (lambda: ReferenceKl(ReverseKl(None)), "ReferenceKl.objective must be an objective with a top_k"),
    ],
)
def test_bad_settings_say_what_was_expected(build: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build()


def test_exact_without_the_teachers_logits_is_an_error() -> None:
    logits, token = distribution(0)[0], TokenInputs(jnp.int32(0), jnp.float32(1.0))
    with pytest.raises(ValueError, match=r"ReverseKl\(top_k=None\) needs the teacher's logits .* got None"):
        ReverseKl(None)(logits, token)
    with pytest.raises(ValueError, match=r"over the student's vocabulary, \(7,\), got \(9,\)"):
        ReverseKl(None)(logits, token.replace(reference_logits=jnp.zeros(9)))
