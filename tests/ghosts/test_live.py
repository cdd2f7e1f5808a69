"""Live ghosts: a frozen model asked at every prefix of the student's own reply, against one read prefix by prefix."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cotgrpo.ghosts.live import live_ghosts, map_contexts, reply_rewards, with_replies
from cotgrpo.models.decoder import DecoderConfig, init_params, make_student
from cotgrpo.sampling import Prompts, Replies, SamplingSettings, make_sampler, pad_prompts
from cotgrpo.types import Student

VOCAB, EOS, NEW = 37, 0, 6
CONFIG = DecoderConfig(
    vocab_size=VOCAB, width=32, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=8, mlp_width=48, init_scale=0.3
)
PARAMS, TEACHER_PARAMS = (init_params(CONFIG, jax.random.key(seed)) for seed in (0, 1))
PROMPTS = [np.array(p, np.int32) for p in ([5], [3, 4, 5, 6, 7], [1, 2, 3], [9, 9])]
LONGER = [np.array(p, np.int32) for p in ([8, 8, 5], [9, 3, 4, 5, 6, 7, 1, 2], [4, 1, 2, 3], [7, 9, 9, 2, 1, 4, 4])]


LOGITS = jax.jit(make_student(CONFIG).logits)
"""Compiled once: all prefixes below are read in the same shape."""


def reading(prefixes: list[list[int]], params: Any = TEACHER_PARAMS) -> np.ndarray:
    """The logits behind each prefix, every one read alone and unpadded on the left: `[len(prefixes), V]`."""
    tokens, segments = np.zeros((2, 16, 16), np.int32)
    for row, prefix in enumerate(prefixes):
        tokens[row, : len(prefix)], segments[row, : len(prefix)] = prefix, 1
    positions = np.broadcast_to(np.arange(16, dtype=np.int32), tokens.shape)
    logits = LOGITS(params, tokens, positions, segments)
    return np.asarray(logits)[np.arange(len(prefixes)), [len(prefix) - 1 for prefix in prefixes]]


def replies_of(rows: list[list[int]]) -> Replies:
    tokens = np.zeros((len(rows), NEW), np.int32)
    for row, ids in enumerate(rows):
        tokens[row, : len(ids)] = ids
    return Replies(
        tokens=jnp.asarray(tokens),
        log_probs=jnp.zeros((len(rows), NEW)),
        lengths=jnp.asarray([len(ids) for ids in rows], jnp.int32),
        finished=jnp.asarray([ids[-1] == EOS for ids in rows]),
    )


REPLIES = [[11, 12, EOS], [20, 21, 22, 23, 24, 25], [EOS], [30, 31, 32, 33, EOS]]


def prefixes_of(prompts: list[np.ndarray]) -> list[list[int]]:
    return [[*prompt, *reply[:t]] for prompt, reply in zip(prompts, REPLIES, strict=True) for t in range(len(reply))]


@pytest.mark.parametrize(
    ("reads", "tile_size"),
    [(None, None), (None, 3), (LONGER, 3), (PROMPTS[::-1], 100)],
    ids=["teacher", "teacher_tiles", "privileged_tiles", "shorter"],
)
def test_the_ghost_is_the_argmax_after_exactly_that_prefix(reads: Any, tile_size: int | None) -> None:
    """Ragged prompts and replies, padded here and read one by one there. The teacher may read longer prompts."""
    read = PROMPTS if reads is None else reads
    call = jax.jit(functools.partial(live_ghosts, make_student(CONFIG), tile_size=tile_size))
    prompts, read_prompts = pad_prompts(PROMPTS, length=7), None if reads is None else pad_prompts(reads)
    ghosts = call(TEACHER_PARAMS, prompts, replies_of(REPLIES), reads=read_prompts)
    supervised = np.asarray(ghosts.loss_mask) == 1
    assert supervised.sum(axis=1).tolist() == [len(reply) for reply in REPLIES]
    assert np.asarray(ghosts.drawn_tokens)[supervised].tolist() == [i for reply in REPLIES for i in reply]
    want = reading(prefixes_of(read)).argmax(axis=-1)
    np.testing.assert_array_equal(np.asarray(ghosts.ghost_tokens)[supervised], want)
    assert not np.asarray(ghosts.ghost_tokens)[~supervised].any()


@pytest.mark.parametrize("reads", [None, LONGER], ids=["teacher", "privileged"])
def test_the_distribution_after_exactly_that_prefix(reads: Any) -> None:
    """The teacher's likeliest tokens and their log-probabilities, of logits that were read one prefix at a time."""
    call = jax.jit(functools.partial(live_ghosts, make_student(CONFIG), tile_size=5, top_k=4))
    read_prompts = None if reads is None else pad_prompts(reads)
    ghosts = call(TEACHER_PARAMS, pad_prompts(PROMPTS, length=7), replies_of(REPLIES), reads=read_prompts)
    supervised = np.asarray(ghosts.loss_mask) == 1
    logits = reading(prefixes_of(reads or PROMPTS)).astype(np.float64)
    log_q = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    want = np.argsort(-log_q, axis=-1)[:, :4]
    np.testing.assert_array_equal(np.asarray(ghosts.extra["top_ids"])[supervised], want)
    np.testing.assert_allclose(
        np.asarray(ghosts.extra["top_log_probs"])[supervised], np.take_along_axis(log_q, want, -1), atol=1e-5
    )
    np.testing.assert_array_equal(ghosts.ghost_tokens[supervised], ghosts.extra["top_ids"][supervised][:, 0])
    assert not np.asarray(ghosts.extra["top_ids"])[~supervised].any()


def test_contexts_as_a_train_step_reads_them() -> None:
    batch = with_replies(pad_prompts(PROMPTS, length=6, pad_id=36), replies_of(REPLIES))
    row = lambda name: np.asarray(getattr(batch, name))[1].tolist()
    assert row("tokens") == [36, 3, 4, 5, 6, 7, 20, 21, 22, 23, 24, 25]
    assert row("targets")[:-1] == row("tokens")[1:]
    assert row("positions") == [0, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10]
    assert row("segment_ids") == [0] + [1] * 11
    assert row("loss_mask") == [0] * 5 + [1] * 6 + [0]
    ended = np.asarray(batch.segment_ids)[2].tolist(), np.asarray(batch.loss_mask)[2].tolist()
    assert ended == ([0, 0, 0, 1, 1, 1, 1, 0, 0, 0, 0, 0], [0] * 5 + [1] + [0] * 6)


def counting(limit: int) -> Student:
    """A model made by hand: after token i it says i + 1, and after `limit` the end."""

    def logits(params: Any, tokens: Any, positions: Any, segments: Any) -> Any:
        following = jnp.where(tokens == limit, EOS, tokens + 1)
        return 9.0 * jax.nn.one_hot(following, VOCAB)

    return Student.from_logits(logits)


def test_a_reply_that_ends_too_early_or_goes_on_too_long() -> None:
    """The teacher counts from the prompt's 5 to 8. One reply stops at 6, one goes past 8, one is right."""
    rows = [[6, EOS], [6, 7, 8, 9, EOS], [6, 7, 8, EOS]]
    ghosts = live_ghosts(counting(8), {}, pad_prompts([np.array([5], np.int32)] * 3), replies_of(rows))
    said = [
        np.asarray(g)[np.asarray(m) == 1].tolist() for g, m in zip(ghosts.ghost_tokens, ghosts.loss_mask, strict=True)
    ]
    assert said == [[6, 7], [6, 7, 8, EOS, 10], [6, 7, 8, EOS]]


def test_drawn_ghosts_follow_the_teachers_distribution_and_the_key() -> None:
    prompts, replies = pad_prompts([PROMPTS[1]] * 400), replies_of([REPLIES[1]] * 400)
    student = make_student(CONFIG)
    call = jax.jit(lambda key: live_ghosts(student, TEACHER_PARAMS, prompts, replies, key=key).ghost_tokens)
    drawn = np.asarray(call(jax.random.key(3)))
    np.testing.assert_array_equal(drawn, call(jax.random.key(3)))
    assert (drawn != np.asarray(call(jax.random.key(4)))).any()
    p = np.asarray(jax.nn.softmax(reading([PROMPTS[1].tolist()])))[0]
    share = np.bincount(drawn[:, len(PROMPTS[1]) - 1], minlength=VOCAB) / 400
    assert np.abs(share - p).max() < 4 * np.sqrt(p.max() / 400)


@pytest.mark.parametrize("key", [None, 0])
def test_tokens_that_do_not_exist_are_never_said(key: int | None) -> None:
    """The head's last columns are padding, and by far the largest."""
    padded = Student.from_logits(
        lambda params, tokens, *_: jnp.broadcast_to(jnp.arange(VOCAB, dtype=jnp.float32), (*tokens.shape, VOCAB)),
        vocab_size=30,
    )
    key = None if key is None else jax.random.key(key)
    ghosts = live_ghosts(padded, {}, pad_prompts(PROMPTS), replies_of(REPLIES), key=key)
    said = np.asarray(ghosts.ghost_tokens)[np.asarray(ghosts.loss_mask) == 1]
    assert said.max() <= 29 and (key is not None or (said == 29).all())


def test_rewards_are_log_ratios_of_the_student() -> None:
    prompts, replies = pad_prompts(PROMPTS), replies_of(REPLIES)
    ghosts = live_ghosts(counting(40), {}, prompts, replies)
    rewards = np.asarray(jax.jit(functools.partial(reply_rewards, make_student(CONFIG)))(PARAMS, ghosts))
    supervised = np.asarray(ghosts.loss_mask) == 1
    logits = reading(prefixes_of(PROMPTS), PARAMS)
    rows = np.arange(len(logits))
    want = (
        logits[rows, np.asarray(ghosts.ghost_tokens)[supervised]]
        - logits[rows, [i for reply in REPLIES for i in reply]]
    )
    np.testing.assert_allclose(rewards[supervised], want, rtol=1e-4, atol=1e-5)
    assert not rewards[~supervised].any() and np.abs(want).max() > 0.1


@pytest.mark.parametrize("temperature", [0.7, *(pytest.param(t, marks=pytest.mark.slow) for t in (0.0, 1.0))])
def test_the_samplers_log_probs_are_those_of_the_trainer(temperature: float) -> None:
    """At each token of a reply: the cached, padded sampler against one forward pass over `with_replies`."""
    settings = SamplingSettings(NEW, eos_ids=(EOS,), temperature=temperature)
    prompts = pad_prompts(PROMPTS, length=8)
    replies = jax.jit(make_sampler(CONFIG, settings))(PARAMS, prompts, jax.random.key(5))
    batch = with_replies(prompts, replies)
    log_prob = lambda logits_V, token: jax.nn.log_softmax(logits_V)[token]
    logits = functools.partial(map_contexts, make_student(CONFIG), function=log_prob)
    trainer = np.asarray(jax.jit(logits)(PARAMS, batch, columns=batch.targets))
    columns = slice(prompts.tokens.shape[1] - 1, -1)
    np.testing.assert_allclose(trainer[:, columns], replies.log_probs, atol=1e-4)
    assert (np.asarray(batch.loss_mask)[:, columns].sum(axis=1) == np.asarray(replies.lengths)).all()


def test_no_array_of_all_logits(monkeypatch: pytest.MonkeyPatch) -> None:
    """In the compiled program nothing has as many elements as `[B, T, V]`."""
    prompts = Prompts(np.ones((8, 24), np.int32), np.full(8, 24, np.int32))
    replies = replies_of([[1] * NEW] * 8)
    call = lambda params: live_ghosts(make_student(CONFIG), params, prompts, replies, tile_size=16).ghost_tokens
    jaxpr = str(jax.make_jaxpr(call)(PARAMS))
    assert "16,37" in jaxpr and "240,37" not in jaxpr and "8,30,37" not in jaxpr
