"""The distribution that tokens are drawn from, read off the boundaries of the inverse CDF, against float64."""

from __future__ import annotations

from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cotgrpo.ghosts.live import live_ghosts, with_replies
from cotgrpo.objectives import MASKED_LOGIT, draw, draw_uniform
from cotgrpo.sampling import Prompts, Replies, SamplingSettings
from cotgrpo.sampling.decode_loop import sample_tokens
from cotgrpo.train_steps import uniforms_for
from cotgrpo.types import GhostBatch, Student

if TYPE_CHECKING:
    from cotgrpo.objectives import TokenInputs

NUMBERS = 2**46
"""How many pairs of uniform numbers there are."""
DRAW = jax.jit(draw)
RANDOM = np.random.default_rng(0)


def pairs(number: np.ndarray) -> jax.Array:
    """Return the number-th pair of uniform numbers, counted from 0."""
    high, low = np.divmod(np.minimum(number, NUMBERS - 1), 2**23)
    return jnp.asarray(np.stack([high, low], axis=-1) * 2.0**-23, jnp.float32)


def chances(logits: jax.Array, tokens: np.ndarray) -> np.ndarray:
    """Return the share of all pairs that draw each token. A token's pairs are neighbours, so their ends are sought."""
    wanted = np.concatenate([tokens, tokens + 1])
    low, high = np.zeros(len(wanted), np.int64), np.full(len(wanted), NUMBERS)
    while np.any(low < high):
        middle = (low + high) // 2
        reached = (middle >= NUMBERS) | (np.asarray(DRAW(logits, pairs(middle))) >= wanted)
        low, high = np.where(reached, low, np.minimum(middle + 1, high)), np.where(reached, middle, high)
    first, behind = low.reshape(2, -1)
    return (behind - first) / NUMBERS


def ends(vocab: int) -> np.ndarray:
    """Return the first and the last token, and 300 others."""
    return np.unique(np.concatenate([[0, vocab // 2, vocab - 1], RANDOM.integers(0, vocab, 300)]))


def sparse(vocab: int, tokens: list[int], logits: list[float], fill: float) -> np.ndarray:
    logits_V = np.full(vocab, fill)
    logits_V[tokens] = logits
    return logits_V


CASES = {
    "uniform over 151,936": np.zeros(151_936),
    "uniform over 256,000": np.zeros(256_000),
    "uniform over 7": np.zeros(7),
    "one token": np.zeros(1),
    "two tokens, one rare": np.array([-18.0, 0.0]),
    "wide": 4 * RANDOM.normal(size=151_936),
    "large numbers": 1e4 + 4 * RANDOM.normal(size=50_000),
    "one likely token among rare ones": sparse(151_936, [70_000], [0.0], -17.0),
    "rare tokens in all corners": sparse(
        1_025, [0, 255, 256, 511, 600, 601, 1_024], [-18.0, -18.1, -18.2, -18.3, 0.0, -18.4, -18.4], -np.inf
    ),
    "masked by -1e9": sparse(2_000, [3, 1_999], [-18.0, 0.0], -1e9),
    "masked by MASKED_LOGIT": sparse(2_000, [0, 1_998], [0.0, -18.0], MASKED_LOGIT),
    "one-hot": sparse(1_000, [999], [0.0], -np.inf),
    "a logit of 1e30": sparse(1_000, [0], [1e30], 0.0),
}


@pytest.mark.parametrize("name", CASES)
def test_every_token_has_its_probability(name: str) -> None:
    logits = jnp.asarray(CASES[name], jnp.float32)
    exact = np.asarray(logits, np.float64)
    p = np.exp(exact - exact.max())
    p /= p.sum()
    tokens = np.unique(np.concatenate([ends(len(p)), np.flatnonzero(exact > exact.max() - 20)[:300]]))
    got, want = chances(logits, tokens), p[tokens]
    np.testing.assert_allclose(got[want >= 1e-8], want[want >= 1e-8], rtol=2e-4)
    np.testing.assert_allclose(got[want >= 1e-9], want[want >= 1e-9], rtol=1e-3)
    np.testing.assert_array_equal(got[want < 1e-30], 0)


@pytest.mark.parametrize("name", CASES)
def test_the_largest_number_draws_a_possible_token(name: str) -> None:
    logits = jnp.asarray(CASES[name], jnp.float32)
    p = np.asarray(jax.nn.softmax(logits))
    largest = np.nextafter(np.float32(1), np.float32(0))
    for uniform in ([0.0], [largest], [1.0], [[0.0, 0.0]], [[1 - 2**-23, largest]], [[1.0, 1.0]]):
        token = int(DRAW(logits, jnp.asarray(uniform, jnp.float32))[0])
        assert p[token] > 0, (uniform, token)


def test_one_number_is_a_pair_without_lower_bits() -> None:
    logits = jnp.asarray(CASES["wide"], jnp.float32)
    one = jax.random.uniform(jax.random.key(0), (500,))
    np.testing.assert_array_equal(DRAW(logits, one), DRAW(logits, jnp.stack([one, jnp.zeros(500)], axis=-1)))


def test_a_float64_number_has_the_digits_of_a_pair() -> None:
    with jax.enable_x64(True):
        logits = jnp.asarray(CASES["rare tokens in all corners"])
        number = RANDOM.integers(0, NUMBERS, 2_000)
        one = jax.jit(draw)(logits, jnp.asarray(number / NUMBERS))
        np.testing.assert_array_equal(one, jax.jit(draw)(logits, pairs(number).astype(jnp.float64)))


def test_numbers_of_a_pair_are_independent() -> None:
    high, low = np.asarray(draw_uniform(jax.random.key(0), (100_000,))).T
    np.testing.assert_array_equal(high, jax.random.uniform(jax.random.key(0), (100_000,)))
    assert abs(np.corrcoef(high, low)[0, 1]) < 0.02
    np.testing.assert_allclose([high.mean(), low.mean()], 0.5, atol=0.005)
    np.testing.assert_array_equal(high * 2**23, np.floor(high * 2**23))


def test_the_sampler_draws_with_pairs() -> None:
    logits = jnp.zeros((1, 700_000))
    settings = SamplingSettings(1, temperature=1.0)
    keys = jax.random.split(jax.random.key(0), 100)
    token = jax.jit(lambda logits, key: sample_tokens(settings, logits, key[None], jnp.zeros(1, jnp.int32))[0][0])
    tokens = [int(token(logits, key)) for key in keys]
    uniform = jax.vmap(lambda key: draw_uniform(jax.random.fold_in(key, 0)))(keys)
    np.testing.assert_array_equal(tokens, DRAW(logits[0], uniform))
    assert np.any(tokens != np.asarray(DRAW(logits[0], uniform[:, 0])))  # the lower bits decide some


def test_steps_and_live_ghosts_draw_with_pairs() -> None:
    logits_V = jnp.asarray(CASES["wide"][:1000], jnp.float32)
    flat = Student.from_logits(lambda params, tokens, *_: jnp.broadcast_to(logits_V, (*tokens.shape, 1000)))
    prompts = Prompts(tokens=jnp.ones((2, 3), jnp.int32), lengths=jnp.array([3, 2]))
    replies = Replies(
        tokens=jnp.ones((2, 4), jnp.int32),
        log_probs=jnp.zeros((2, 4)),
        lengths=jnp.array([4, 3]),
        finished=jnp.ones(2, bool),
    )
    key = jax.random.key(5)
    ghosts = live_ghosts(flat, {}, prompts, replies, key=key)
    text = with_replies(prompts, replies)
    drawn = DRAW(logits_V, draw_uniform(key, text.tokens.shape).reshape(-1, 2)).reshape(text.tokens.shape)
    np.testing.assert_array_equal(ghosts.ghost_tokens, jnp.where(text.loss_mask > 0, drawn, 0))

    def objective(logits_V: jax.Array, inputs: TokenInputs) -> tuple[jax.Array, dict[str, jax.Array]]:
        return logits_V[0], {}

    uniform = uniforms_for(objective, GhostBatch.teacher_forced(text), key)
    np.testing.assert_array_equal(uniform, draw_uniform(key, (*text.tokens.shape, 1)))


@pytest.mark.parametrize("parts", [1, 2, 4])
def test_a_vocabulary_in_parts(parts: int) -> None:
    """Parts that are no multiples of a block draw what NumPy finds in the cumulative sum, up to rounding at an edge."""
    rng = np.random.default_rng(parts)
    logits_V = (3 * rng.standard_normal(1_200)).astype(np.float32)
    uniform_G = rng.random(2_000).astype(np.float32)
    mass_V = np.exp(logits_V.astype(np.float64))
    cumulative_V = np.cumsum(mass_V) / mass_V.sum()
    got = np.asarray(jax.jit(draw, static_argnums=2)(logits_V, uniform_G, parts))
    want = np.searchsorted(cumulative_V, uniform_G, side="right")
    near_an_edge = np.abs(cumulative_V[:, None] - uniform_G[None, :]).min(axis=0) < 1e-6
    np.testing.assert_array_equal(got[~near_an_edge], want[~near_an_edge])
    assert near_an_edge.mean() < 0.01 and len(set((got // (1_200 // parts)).tolist())) == parts
