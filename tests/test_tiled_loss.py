"""The tiled engine against naive autodiff over `[N, V]` logits, and the drawing of tokens."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cotgrpo import objectives
from cotgrpo.objectives import (
    ForwardKl,
    Nll,
    Pair,
    ReferenceKl,
    Reinforce,
    RewardGradient,
    TokenInputs,
    draw,
    ghost_reward,
)
from cotgrpo.tiled_loss import HeadSpec, Reference, default_tile_size, tiled_loss

N, D, V, REAL = 50, 16, 300, 290

OBJECTIVES = {
    "nll": Nll(),
    "reinforce": Reinforce(),
    "reward_gradient": RewardGradient(),
    "reward_gradient_3": RewardGradient(samples=3),
    "pair": Pair(),
    "pair_calibrated": Pair(beta=0.5, negatives="calibrated"),
    "pair_drawn": Pair(estimator="drawn"),
    "pair_calibrated_drawn": Pair(beta=0.5, negatives="calibrated", estimator="drawn", samples=2),
    "reference_kl": ReferenceKl(Pair(), 0.3),
    "forward_kl": ForwardKl(5),
    "plain_function": lambda logits, row: (-ghost_reward(logits, row.ghost, row.drawn), {"drawn": row.drawn * 1.0}),
}
SPECS = {
    "plain": HeadSpec(),
    "softcap": HeadSpec(softcap=5.0),
    "padded": HeadSpec(vocab_size=REAL),
    "softcap_padded": HeadSpec(softcap=5.0, vocab_size=REAL),
}


def problem(objective: Any, seed: int = 0) -> tuple[Any, Any, TokenInputs, Reference | None]:
    keys = jax.random.split(jax.random.key(seed), 7)
    hidden = jax.random.normal(keys[0], (N, D))
    head = 0.5 * jax.random.normal(keys[1], (D, V))
    weight = jnp.where(jax.random.uniform(keys[2], (N,)) < 0.6, jax.random.uniform(keys[3], (N,)), 0.0)
    draws = objectives.num_draws(objective)
    log_q = jax.nn.log_softmax(2.0 * jax.random.normal(keys[4], (N, REAL)))
    top_k = objectives.top_k(objective)
    extra = dict(zip(("top_log_probs", "top_ids"), jax.lax.top_k(log_q, top_k), strict=True)) if top_k else {}
    inputs = TokenInputs(
        ghost=jax.random.randint(keys[4], (N,), 0, REAL),
        weight=weight,
        drawn=jax.random.randint(keys[5], (N, draws), 0, REAL) if draws else None,
        extra=extra,
    )
    reference = Reference(jax.random.normal(keys[6], (N, D // 2)), head[: D // 2])
    return hidden, head, inputs, reference if objectives.needs_reference(objective) else None


def naive(objective: Any, spec: HeadSpec, inputs: TokenInputs, reference: Reference | None) -> Callable[..., Any]:
    """All the logits at once, the objective as a plain function, JAX's own gradient."""

    def logits_of(hidden: Any, head: Any, cap: HeadSpec) -> Any:
        logits = hidden @ head
        logits = logits if cap.softcap is None else cap.softcap * jnp.tanh(logits / cap.softcap)
        return logits if cap.vocab_size is None else logits.at[:, cap.vocab_size :].set(-1e30)

    def total(hidden: Any, head: Any) -> Any:
        logits = logits_of(hidden, head, spec)
        frozen = None if reference is None else logits_of(reference.hidden, reference.head, HeadSpec())
        loss = lambda z, token: objective(z, token)[0]
        over_draws = lambda z, token: jnp.mean(jax.vmap(lambda y: loss(z, token.replace(drawn=y)))(token.drawn))
        each = loss if inputs.drawn is None else over_draws
        return jnp.sum(inputs.weight * jax.vmap(each)(logits, inputs.replace(reference_logits=frozen)))

    return total


@pytest.mark.parametrize("name", OBJECTIVES)
@pytest.mark.parametrize("spec", SPECS)
def test_engine_is_naive_autodiff(name: str, spec: str) -> None:
    objective = OBJECTIVES[name]
    hidden, head, rows, reference = problem(objective)
    expected, expected_grads = jax.jit(
        jax.value_and_grad(naive(objective, SPECS[spec], rows, reference), argnums=(0, 1))
    )(hidden, head)

    def engine(hidden: Any, head: Any) -> Any:  # two whole tiles and a half, each of two blocks
        return tiled_loss(objective, hidden, head, rows, spec=SPECS[spec], reference=reference, tile_size=20)

    (loss, _), grads = jax.jit(jax.value_and_grad(engine, argnums=(0, 1), has_aux=True))(hidden, head)
    np.testing.assert_allclose(loss, expected, rtol=1e-5)
    for got, want in zip(grads, expected_grads, strict=True):
        assert float(jnp.max(jnp.abs(got - want))) <= 1e-5 * float(jnp.max(jnp.abs(want)))
    np.testing.assert_allclose(jax.jit(engine)(hidden, head)[0], expected, rtol=1e-5)  # without a gradient


@pytest.mark.parametrize("tile", [1, 7, 16, 50, 64, None])
def test_the_tile_size_changes_nothing(tile: int | None) -> None:
    objective = Pair()
    hidden, head, rows, _ = problem(objective)
    run = jax.jit(
        jax.value_and_grad(
            lambda h, w, t: tiled_loss(objective, h, w, rows, tile_size=t), argnums=(0, 1), has_aux=True
        ),
        static_argnums=2,
    )
    (loss, metrics), grads = run(hidden, head, tile)
    (want_loss, want_metrics), want_grads = run(hidden, head, 50)
    for got, want in zip(
        jax.tree.leaves((loss, metrics, grads)), jax.tree.leaves((want_loss, want_metrics, want_grads)), strict=True
    ):
        np.testing.assert_allclose(got, want, rtol=2e-5, atol=1e-5)


def test_gradient_is_scaled_by_what_comes_in() -> None:
    hidden, head, rows, _ = problem(Nll())
    grad = lambda scale: jax.grad(lambda h: scale * tiled_loss(Nll(), h, head, rows, tile_size=16)[0])(hidden)
    np.testing.assert_allclose(grad(-3.0), -3.0 * grad(1.0), rtol=1e-6)


def test_metrics_are_weighted_sums() -> None:
    hidden, head, rows, _ = problem(Pair())
    _, sums = tiled_loss(Pair(), hidden, head, rows, tile_size=16)
    expected: dict[str, float] = {}
    for i in range(N):
        _, metrics = Pair()((hidden @ head)[i], TokenInputs(rows.ghost[i], rows.weight[i]))
        for name, value in metrics.items():
            expected[name] = expected.get(name, 0.0) + float(rows.weight[i] * value)
    assert sums.keys() == expected.keys()
    for name in sums:
        np.testing.assert_allclose(sums[name], expected[name], rtol=1e-4)


def test_no_supervised_token_is_zero_and_not_nan() -> None:
    hidden, head, rows, _ = problem(Pair())
    rows = rows.replace(weight=jnp.zeros(N))
    (loss, metrics), grads = jax.value_and_grad(
        lambda h, w: tiled_loss(Pair(), h, w, rows, tile_size=16), argnums=(0, 1), has_aux=True
    )(hidden, head)
    assert all(not np.any(x) for x in jax.tree.leaves((loss, metrics, grads)))


def test_unsupervised_tokens_cannot_spoil_the_sums() -> None:
    """Rows with weight 0 may hold anything, NaN included."""
    hidden, head, rows, _ = problem(Pair())
    dead = np.asarray(rows.weight) == 0
    spoiled = jnp.where(jnp.asarray(dead)[:, None], jnp.nan, hidden)
    run = lambda h: jax.value_and_grad(lambda h, w: tiled_loss(Pair(), h, w, rows, tile_size=16)[0], argnums=(0, 1))(
        h, head
    )
    (loss, grads), (want_loss, want_grads) = run(spoiled), run(hidden)
    np.testing.assert_allclose(loss, want_loss)
    np.testing.assert_allclose(grads[0], want_grads[0], rtol=1e-6)
    assert not np.any(np.asarray(grads[0])[dead])
    np.testing.assert_allclose(grads[1], want_grads[1], rtol=1e-5, atol=1e-6)


def test_only_tiles_with_supervised_tokens_run() -> None:
    """A callback counts the tiles: 10 supervised tokens of 50, scattered, are two tiles of 5."""
    seen: list[int] = []

    def counting(logits: Any, row: TokenInputs) -> Any:
        jax.debug.callback(lambda: seen.append(1))
        return -logits[row.ghost], {}

    hidden, head, rows, _ = problem(Nll())
    rows = rows.replace(weight=jnp.where(jnp.arange(N) % 5 == 0, 1.0, 0.0), drawn=jnp.zeros((N, 1), jnp.int32))
    tiled_loss(counting, hidden, head, rows, tile_size=5)
    jax.effects_barrier()
    assert len(seen) == 2


def test_without_a_head_the_hidden_rows_are_logits() -> None:
    hidden, head, rows, _ = problem(Pair())
    logits = hidden @ head
    through_head = jax.grad(lambda x: tiled_loss(Pair(), x, jnp.eye(V), rows, tile_size=16)[0])(logits)
    direct = jax.grad(lambda x: tiled_loss(Pair(), x, None, rows, tile_size=16)[0])(logits)
    np.testing.assert_allclose(direct, through_head, atol=1e-6)


def test_bfloat16_keeps_its_types_and_is_near_float32() -> None:
    hidden, head, rows, _ = problem(Pair())
    run = lambda h, w: jax.value_and_grad(lambda h, w: tiled_loss(Pair(), h, w, rows)[0], argnums=(0, 1))(h, w)
    loss, grads = run(hidden.astype(jnp.bfloat16), head.astype(jnp.bfloat16))
    want_loss, want_grads = run(hidden, head)
    assert loss.dtype == jnp.float32 and all(g.dtype == jnp.bfloat16 for g in grads)
    np.testing.assert_allclose(loss, want_loss, rtol=2e-2)
    for got, want in zip(grads, want_grads, strict=True):
        error = jnp.linalg.norm(got.astype(jnp.float32) - want) / jnp.linalg.norm(want)
        assert float(error) < 2e-2


def test_memory_at_a_real_vocabulary_is_an_eighth_of_the_naive_step() -> None:
    """V = 49,152 and 8,192 tokens, as compiled; nothing runs."""
    tokens, width, vocab = 8_192, 576, 49_152
    float32, int32 = (lambda *s: jax.ShapeDtypeStruct(s, jnp.float32)), (lambda *s: jax.ShapeDtypeStruct(s, jnp.int32))
    rows = TokenInputs(ghost=int32(tokens), weight=float32(tokens))

    def all_at_once(hidden: Any, head: Any, rows: TokenInputs) -> Any:
        each = lambda z, ghost: objective(z, TokenInputs(ghost, jnp.float32(1.0)))[0]
        return jnp.sum(rows.weight * jax.vmap(each)(hidden @ head, rows.ghost))

    def temporaries(function: Any) -> int:
        compiled = jax.jit(jax.grad(function, argnums=(0, 1))).lower(
            float32(tokens, width), float32(width, vocab), rows
        )
        return compiled.compile().memory_analysis().temp_size_in_bytes

    for objective in (Nll(), Pair()):
        engine = temporaries(lambda h, w, rows, o=objective: tiled_loss(o, h, w, rows)[0])
        assert engine <= temporaries(all_at_once) / 8


@pytest.mark.parametrize(("platform", "loops"), [("cpu", 2), ("cuda", 1), ("tpu", 1)])
def test_only_a_cpu_takes_a_tile_in_blocks(platform: str, loops: int) -> None:
    hidden, head, rows, _ = problem(Nll())
    gradient = jax.jit(jax.grad(lambda h: tiled_loss(Nll(), h, head, rows, tile_size=20)[0]))
    program = gradient.trace(hidden).lower(lowering_platforms=(platform,)).as_text()
    assert program.count("stablehlo.while") == loops


@pytest.mark.parametrize("vocab", [5, 256, 300, 1_000])
def test_draws_follow_the_distribution(vocab: int) -> None:
    logits = 2.0 * jax.random.normal(jax.random.key(vocab), (vocab,))
    count = 200_000
    # Evenly spaced numbers make the inverse CDF's counts exact up to one.
    uniform = (jnp.arange(count) + 0.5) / count
    drawn = np.bincount(np.asarray(jax.jit(draw)(logits, uniform)), minlength=vocab)
    expected = count * np.asarray(jax.nn.softmax(logits), np.float64)
    assert np.max(np.abs(drawn - expected)) < 3


def test_draws_at_the_edges() -> None:
    logits = jnp.full((1_000,), objectives.MASKED_LOGIT).at[jnp.array([3, 400])].set(jnp.array([0.0, 0.0]))
    uniform = jnp.array([0.0, 0.25, 0.4999, 0.5001, 0.75, 1 - 2**-24])
    np.testing.assert_array_equal(draw(logits, uniform), [3, 3, 3, 400, 400, 400])
    wide = jax.random.normal(jax.random.key(0), (1_000,)) * 40
    assert np.all(np.isfinite(np.asarray(wide)[np.asarray(draw(wide, uniform))]))


def test_padded_columns_are_never_drawn() -> None:
    hidden, head, rows, _ = problem(RewardGradient())
    head = head.at[:, REAL:].set(10.0 * jnp.sign(hidden[0])[:, None])  # the padded columns would win by far
    drawn_by = lambda logits, row: (jnp.float32(0.0), {"padded": (row.drawn >= REAL) * 1.0})
    rows = rows.replace(drawn=None, weight=jnp.ones(N))
    uniform = jax.random.uniform(jax.random.key(1), (N, 1))
    count = lambda spec: float(tiled_loss(drawn_by, hidden, head, rows, uniform=uniform, spec=spec)[1]["padded"])
    assert count(HeadSpec(vocab_size=REAL)) == 0
    assert count(HeadSpec()) > 0


def test_default_tile_size() -> None:
    assert default_tile_size(8_192, 49_152) == 2**27 // (4 * 49_152)
    assert default_tile_size(100, 512) == 100
    assert default_tile_size(8_192, 512) == 1_024  # eight tiles
    assert default_tile_size(2_048, 512) == 512  # d head is not read and written for less
