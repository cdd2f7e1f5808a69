"""Generation with a cache: against the training forward pass, the filters by hand, ends, raggedness, randomness."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cotgrpo.models.decoder import DecoderConfig, init_params, make_student, unstack_layers
from cotgrpo.objectives import MASKED_LOGIT, likeliest
from cotgrpo.sampling import Prompts, Replies, SamplingSettings, filter_logits, make_sampler, pad_prompts
from cotgrpo.sampling.decode_loop import sample_tokens

CONFIG = DecoderConfig(
    vocab_size=37, width=32, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=8, mlp_width=48, init_scale=0.3
)
PARAMS = init_params(CONFIG, jax.random.key(0))
PROMPTS = [np.array(p, np.int32) for p in ([5], [3, 4, 5, 6, 7], [1, 2, 3], [9, 9])]
NEW = 12
COLUMNS = 32
LOGITS = jax.jit(make_student(CONFIG).logits)


@functools.cache
def jitted(settings: SamplingSettings, vocab_size: int | None = None, decode_batch_size: int | None = None) -> Any:
    return jax.jit(make_sampler(CONFIG, settings, vocab_size, decode_batch_size))


def sample(
    prompts: Prompts,
    seed: int = 0,
    vocab_size: int | None = None,
    decode_batch_size: int | None = None,
    **options: Any,
) -> Replies:
    settings = SamplingSettings(**({"max_new_tokens": NEW} | options))
    return jax.device_get(jitted(settings, vocab_size, decode_batch_size)(PARAMS, prompts, jax.random.key(seed)))


def test_the_likeliest_is_the_first_of_equals() -> None:
    logits = np.array(
        [[0.0, 2.0, 2.0, -1.0], [5.0, 5.0, 5.0, 5.0], [-np.inf, -np.inf, 0.0, -np.inf], [np.nan] * 4], np.float32
    )
    np.testing.assert_array_equal(jax.vmap(likeliest)(logits), [1, 0, 2, 3])
    many = np.random.default_rng(0).integers(0, 9, (50, 200)).astype(np.float32)
    np.testing.assert_array_equal(jax.vmap(likeliest)(many), many.argmax(axis=-1))


def test_layers_taken_apart_before_the_call_change_nothing() -> None:
    prompts, sampler = pad_prompts(PROMPTS), jitted(SamplingSettings(NEW))
    apart = unstack_layers(CONFIG, PARAMS)
    assert unstack_layers(CONFIG, apart) is apart and "layers" not in apart
    want, got = (jax.device_get(sampler(params, prompts, jax.random.key(0))) for params in (PARAMS, apart))
    np.testing.assert_array_equal(got.tokens, want.tokens)
    np.testing.assert_array_equal(got.log_probs, want.log_probs)


def full_logits(tokens: np.ndarray) -> np.ndarray:
    """The trainer's forward pass over one row: `[T, V]`.

    What follows the row is a segment of its own, so one length serves all.
    """
    ids = np.zeros((1, COLUMNS), np.int32)
    ids[0, : len(tokens)] = tokens
    segments = (np.arange(COLUMNS, dtype=np.int32) < len(tokens)).astype(np.int32)[None]
    logits = LOGITS(PARAMS, ids, np.arange(COLUMNS, dtype=np.int32)[None], segments)
    return np.asarray(logits[0, : len(tokens)], np.float64)


def log_softmax(logits: np.ndarray) -> np.ndarray:
    shifted = logits - logits.max(axis=-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))


def test_greedy_tokens_are_those_of_the_full_forward_pass() -> None:
    replies = sample(pad_prompts(PROMPTS))
    for row, prompt in enumerate(PROMPTS):
        tokens = prompt
        for index in range(NEW):
            best = int(np.argmax(full_logits(tokens)[-1]))
            assert replies.tokens[row, index] == best, f"row {row}, token {index}"
            tokens = np.append(tokens, best)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"temperature": 1.5, "top_k": 5, "top_p": 0.8},
        pytest.param({"temperature": 0.7}, marks=pytest.mark.slow),
    ],
    ids=repr,
)
def test_log_probs_are_the_trainers(options: dict[str, Any]) -> None:
    replies = sample(pad_prompts(PROMPTS), **options)
    for row, prompt in enumerate(PROMPTS):
        tokens = np.concatenate([prompt, replies.tokens[row]])
        log_p = log_softmax(full_logits(tokens))[len(prompt) - 1 : -1]
        np.testing.assert_allclose(replies.log_probs[row], log_p[np.arange(NEW), replies.tokens[row]], atol=1e-4)


@pytest.mark.parametrize("temperature", [1.0, pytest.param(0.0, marks=pytest.mark.slow)])
def test_padding_and_batch_mates_change_nothing(temperature: float) -> None:
    together = sample(pad_prompts(PROMPTS), temperature=temperature)
    wider = sample(pad_prompts(PROMPTS, length=17, pad_id=11), temperature=temperature)
    np.testing.assert_array_equal(wider.tokens, together.tokens)
    np.testing.assert_allclose(wider.log_probs, together.log_probs, atol=1e-5)
    alone = sample(pad_prompts(PROMPTS[:1]), temperature=temperature)
    np.testing.assert_array_equal(alone.tokens[0], together.tokens[0])


@pytest.mark.parametrize(
    ("decode_batch_size", "temperature"),
    [(3, 1.0), *(pytest.param(*case, marks=pytest.mark.slow) for case in ((1, 0.0), (8, 0.7), (99, 1.0)))],
)
def test_a_small_decode_batch_writes_the_same_replies(decode_batch_size: int, temperature: float) -> None:
    """Replies of 1 to 12 tokens to prompts of 1 to 8, some rows empty; log-probabilities against the trainer's too."""
    rng = np.random.default_rng(0)
    asked = [rng.integers(0, 37, rng.integers(1, 9)).astype(np.int32) for _ in range(19)]
    options: dict[str, Any] = {"eos_ids": (0, 1, 2), "temperature": temperature, "pad_id": 33}
    at_once = sample(pad_prompts(asked), **options)
    in_slots = sample(pad_prompts(asked, length=10, rows=23), decode_batch_size=decode_batch_size, **options)
    assert len(set(at_once.lengths.tolist())) > 4
    for name in ("tokens", "lengths", "finished"):
        np.testing.assert_array_equal(getattr(in_slots, name)[:19], getattr(at_once, name))
    np.testing.assert_allclose(in_slots.log_probs[:19], at_once.log_probs, atol=1e-5)
    assert not np.any(in_slots.lengths[19:]) and np.all(in_slots.tokens[19:] == 33)
    for row, prompt in enumerate(asked):
        length = int(in_slots.lengths[row])
        tokens = np.concatenate([prompt, in_slots.tokens[row, :length]])
        log_p = log_softmax(full_logits(tokens))[len(prompt) - 1 : -1]
        want = log_p[np.arange(length), in_slots.tokens[row, :length]]
        np.testing.assert_allclose(in_slots.log_probs[row, :length], want, atol=1e-4)


@pytest.mark.parametrize(("decode_batch_size", "held"), [(8, 8), pytest.param(None, 64, marks=pytest.mark.slow)])
def test_there_is_one_cache_of_the_decode_batch(decode_batch_size: int | None, held: int) -> None:
    """In the compiled program: it is updated in place, and all else is small beside it."""
    config = dataclasses.replace(CONFIG, num_kv_heads=4, head_dim=16)
    prompts = Prompts(np.ones((64, 8), np.int32), np.full(64, 8, np.int32))
    sampler = jax.jit(
        make_sampler(config, SamplingSettings(504, eos_ids=(0,), temperature=1.0), decode_batch_size=decode_batch_size)
    )
    shapes = jax.eval_shape(lambda: init_params(config, jax.random.key(0)))
    memory: Any = sampler.lower(shapes, prompts, jax.random.key(0)).compile().memory_analysis()
    cache = 4 * 2 * config.num_layers * 4 * 16 * 512 * held
    assert cache < memory.temp_size_in_bytes < 1.3 * cache


def test_a_reply_ends_with_eos() -> None:
    free = sample(pad_prompts(PROMPTS))
    eos = int(free.tokens[1, 4])
    ended = sample(pad_prompts(PROMPTS), eos_ids=(eos, 999), pad_id=33)
    for row in range(len(PROMPTS)):
        hits = np.flatnonzero(free.tokens[row] == eos)
        length = int(hits[0]) + 1 if len(hits) else NEW
        assert ended.lengths[row] == length and ended.finished[row] == bool(len(hits))
        np.testing.assert_array_equal(ended.tokens[row, :length], free.tokens[row, :length])
        assert np.all(ended.tokens[row, length:] == 33) and not np.any(ended.log_probs[row, length:])
    assert ended.finished[1] and ended.lengths[1] <= 5


def test_the_loop_stops_when_all_rows_have_ended() -> None:
    """A reply of two tokens with room for a hundred thousand: it would not come back otherwise."""
    eos = int(sample(pad_prompts(PROMPTS)).tokens[0, 1])
    replies = sample(pad_prompts(PROMPTS[:1]), eos_ids=(eos,), max_new_tokens=100_000)
    assert replies.lengths[0] <= 2 and replies.finished[0]


def test_draws_follow_the_distribution() -> None:
    """The first token of 20,000 rows with one prompt, against the exact probabilities at that temperature."""
    count, temperature = 20_000, 0.8
    prompts = Prompts(np.full((count, 1), 5, np.int32), np.ones(count, np.int32))
    drawn = sample(prompts, temperature=temperature, max_new_tokens=1).tokens[:, 0]
    p = np.exp(log_softmax(full_logits(np.array([5]))[-1] / temperature))
    deviation = (np.bincount(drawn, minlength=37) - count * p) / np.sqrt(count * p * (1 - p) + 1e-9)
    assert np.max(np.abs(deviation)) < 5


def test_the_key_decides_what_is_drawn() -> None:
    prompts = pad_prompts(PROMPTS)
    first, again, other = (sample(prompts, seed=s, temperature=1.0) for s in (1, 1, 2))
    np.testing.assert_array_equal(first.tokens, again.tokens)
    assert np.any(first.tokens != other.tokens)
    same = sample(pad_prompts([PROMPTS[0]] * 4, length=5), temperature=1.0)
    assert len({tuple(row) for row in same.tokens.tolist()}) > 1, "rows draw independently"


def test_padded_ids_are_never_drawn() -> None:
    replies = sample(pad_prompts(PROMPTS), vocab_size=20, temperature=1.0)
    assert replies.tokens.max() < 20 and np.all(np.isfinite(replies.log_probs))
    assert sample(pad_prompts(PROMPTS), temperature=1.0).tokens.max() >= 20


def test_filters_by_hand() -> None:
    p = np.array([0.1, 0.4, 0.05, 0.3, 0.15])
    logits = jnp.log(jnp.asarray(p, jnp.float32))

    def kept(**options: Any) -> list[int]:
        filtered = filter_logits(logits, SamplingSettings(1, temperature=1.0, **options))
        return np.flatnonzero(np.asarray(filtered) > MASKED_LOGIT).tolist()

    assert kept() == [0, 1, 2, 3, 4]
    assert kept(top_k=1) == [1]
    assert kept(top_k=3) == [1, 3, 4]
    assert kept(top_k=99) == [0, 1, 2, 3, 4]
    assert kept(top_p=0.01) == [1]
    assert kept(top_p=0.39) == [1]
    assert kept(top_p=0.41) == [1, 3]
    assert kept(top_p=0.71) == [1, 3, 4]
    assert kept(top_k=2, top_p=0.5) == [1]  # of the two, 0.4 / 0.7 already holds half
    cold = filter_logits(logits, SamplingSettings(1, temperature=0.5))
    np.testing.assert_allclose(jax.nn.softmax(cold), p**2 / np.sum(p**2), rtol=1e-5)


def test_a_masked_token_stays_masked_at_any_temperature() -> None:
    logits = jnp.array([0.0, MASKED_LOGIT, 1.0])
    hot = filter_logits(logits, SamplingSettings(1, temperature=1e6))
    assert hot[1] == MASKED_LOGIT


@pytest.mark.parametrize("temperature", [1e-6, 1e-38, 1e-50])
@pytest.mark.parametrize("scale", [1.0, 1e4, 1e30])
def test_a_low_temperature_draws_the_likeliest(temperature: float, scale: float) -> None:
    logits = scale * jnp.array([-1.0, 3.0, 2.0, -jnp.inf, MASKED_LOGIT / scale])
    settings = SamplingSettings(1, temperature=temperature, top_p=0.9, top_k=3)
    token, log_prob = sample_tokens(settings, logits[None], jax.random.key(0)[None], jnp.zeros(1, jnp.int32))
    assert token[0] == 1 and np.isfinite(log_prob[0])
    np.testing.assert_array_equal(jax.nn.softmax(filter_logits(logits, settings)), [0, 1, 0, 0, 0])


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: SamplingSettings(0), "max_new_tokens must be at least 1, got 0"),
        (lambda: SamplingSettings(1, temperature=-0.1), "temperature must be at least 0, got -0.1"),
        (lambda: SamplingSettings(1, temperature=float("nan")), "temperature must be at least 0, got nan"),
        (lambda: SamplingSettings(1, top_k=0), "top_k must be at least 1 or None, got 0"),
        (lambda: SamplingSettings(1, top_p=0.0), r"top_p must lie in \(0, 1\], got 0.0"),
        (
            lambda: make_sampler(CONFIG, SamplingSettings(1), decode_batch_size=0),
            "decode_batch_size must be at least 1 or None, got 0",
        ),
        (lambda: pad_prompts(PROMPTS, rows=3), "at most 3 prompts, got 4"),
        (lambda: pad_prompts([]), "at least one token each"),
        (lambda: pad_prompts([np.array([], np.int32)]), "at least one token each"),
        (lambda: pad_prompts(PROMPTS, length=4), "Prompt 1 has 5 tokens, but there are 4 columns"),
    ],
)
def test_bad_settings_say_what_was_expected(build: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build()
