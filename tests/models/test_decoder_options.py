"""What families add to the decoder, without oracle: windows, caps, norms, two rotary bases. Off, they cost nothing."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cotgrpo.models.attention import attention, causal_segment_mask
from cotgrpo.models.config import DecoderConfig
from cotgrpo.models.decoder import Decoder, decode, init_cache, init_params, make_student
from cotgrpo.models.rotary import RopeScaling, rotation, scaled_frequencies

PLAIN = DecoderConfig(vocab_size=31, width=16, num_layers=4, num_heads=4, num_kv_heads=2, head_dim=8, mlp_width=24)
WINDOWED = dataclasses.replace(PLAIN, window=3)
MIXED = dataclasses.replace(
    PLAIN,
    window=3,
    local_layers=(0, 2),
    local_rope_theta=100.0,
    rope_scaling=RopeScaling("linear", 4.0),
    activation="gelu_tanh",
    biases=("query", "out"),
    qk_norm=True,
    post_norms=True,
    norm_plus_one=True,
    embedding_scale=4.0,
    query_scale=0.3,
    attention_softcap=2.0,
    logit_softcap=5.0,
)
T = 14


def random_params(config: DecoderConfig) -> Any:
    """Norms and biases random too, and all large enough that scores are far from uniform."""
    rng = np.random.default_rng(1)
    shapes = jax.eval_shape(lambda: init_params(config, jax.random.key(0)))
    return jax.tree.map(lambda x: jnp.asarray(0.3 * rng.normal(size=x.shape), x.dtype), shapes)


def batch(rows: int = 2) -> tuple[Any, Any, Any]:
    tokens = np.random.default_rng(0).integers(0, PLAIN.vocab_size, (rows, T)).astype(np.int32)
    return tokens, np.tile(np.arange(T, dtype=np.int32), (rows, 1)), np.ones((rows, T), np.int32)


@pytest.mark.parametrize(
    "config",
    [
        pytest.param(MIXED, id="mixed"),
        pytest.param(PLAIN, id="plain", marks=pytest.mark.slow),
        pytest.param(WINDOWED, id="windowed", marks=pytest.mark.slow),
    ],
)
def test_decode_agrees_with_the_whole_pass(config: DecoderConfig) -> None:
    """Prefill of 6, then token by token, against one pass; far past the window."""
    params, (tokens, positions, segments) = random_params(config), batch()
    whole = jax.jit(make_student(config).hidden)(params, tokens, positions, segments)
    cache, rows, read = init_cache(config, 2, T), [], jax.jit(functools.partial(decode, config))
    for start, end in [(0, 6), *((t, t + 1) for t in range(6, T))]:
        part = slice(start, end)
        hidden, cache = read(params, tokens[:, part], positions[:, part], segments[:, part], cache, start)
        rows.append(hidden)
    np.testing.assert_allclose(jnp.concatenate(rows, axis=1), whole, atol=2e-5)


@pytest.mark.parametrize(("config", "reach"), [(WINDOWED, 8), (dataclasses.replace(PLAIN, num_layers=1, window=3), 2)])
def test_the_window_bounds_what_a_token_sees(config: DecoderConfig, reach: int) -> None:
    """Through L layers of a window of W, a row depends on the (W - 1) L tokens before it, and on no others."""
    params, (tokens, positions, segments) = random_params(config), batch(rows=1)

    def last_row(table: jax.Array) -> jax.Array:
        """Every position has an embedding row of its own."""
        own = {**params, "embedding": table}
        wide = dataclasses.replace(config, vocab_size=T)
        hidden, _ = Decoder(wide).apply({"params": own}, jnp.arange(T)[None], positions, segments)
        return jnp.sum(hidden[0, -1] * jnp.arange(1.0, config.width + 1))

    moved = np.abs(jax.jit(jax.grad(last_row))(params["embedding"][tokens[0]])).sum(axis=-1) > 0
    np.testing.assert_array_equal(moved, np.arange(T) >= T - 1 - reach)


def test_packed_documents_stay_apart_under_windows() -> None:
    params, (tokens, positions, segments) = random_params(MIXED), batch()
    logits = jax.jit(make_student(MIXED).logits)
    apart = logits(params, tokens, positions, segments)
    packed = logits(
        params, tokens.reshape(1, -1), positions.reshape(1, -1), np.repeat([[1, 2]], T, axis=1).astype(np.int32)
    )
    np.testing.assert_allclose(packed.reshape(apart.shape), apart, atol=2e-5)


@pytest.mark.slow
def test_remat_changes_nothing() -> None:
    params, inputs = random_params(MIXED), batch()

    def grads(config: DecoderConfig) -> Any:
        of_all = jax.grad(lambda p: jnp.sum(make_student(config).logits(p, *inputs)[..., 3]))
        return jax.tree.leaves(jax.jit(of_all)(params))

    want = grads(MIXED)
    for remat in ("dots", "full"):
        for a, b in zip(grads(dataclasses.replace(MIXED, remat=remat)), want, strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)


def test_a_plain_decoder_pays_for_no_option() -> None:
    """No tanh, no choice between views: one select a pass, the mask's."""
    (tokens, positions, segments) = batch()

    def text(config: DecoderConfig) -> str:
        params = jax.eval_shape(lambda: init_params(config, jax.random.key(0)))
        run = lambda p: Decoder(config).apply({"params": p}, tokens, positions, segments)[0]
        return str(jax.make_jaxpr(run)(params))

    plain, mixed = text(PLAIN), text(MIXED)
    assert plain.count(" tanh") == 0 < mixed.count(" tanh")
    assert plain.count("select_n") < mixed.count("select_n")
    assert plain.count("cos ") == 1 and mixed.count("cos ") == 2, "rotations are computed once, not in each layer"
    assert text(WINDOWED).count("select_n") == plain.count("select_n")


@pytest.mark.parametrize("config", [PLAIN, WINDOWED, MIXED, dataclasses.replace(MIXED, tied_head=False)])
def test_num_params_counts_the_leaves(config: DecoderConfig) -> None:
    leaves = jax.tree.leaves(jax.eval_shape(lambda: init_params(config, jax.random.key(0))))
    assert config.num_params() == sum(leaf.size for leaf in leaves)


def test_masks_by_hand() -> None:
    positions, segments = np.array([[0, 1, 2, 3, 0, 1]]), np.array([[1, 1, 1, 1, 2, 2]])
    mask = causal_segment_mask(positions, segments, positions, segments, window=2)
    rows = ["x.....", "xx....", ".xx...", "..xx..", "....x.", "....xx"]
    np.testing.assert_array_equal(mask[0], [[c == "x" for c in row] for row in rows])


def test_attention_in_numpy() -> None:
    rng = np.random.default_rng(0)
    query, key, value = (rng.normal(size=(1, 5, heads, 4)).astype(np.float32) for heads in (4, 2, 2))
    mask = np.tril(np.ones((1, 5, 5), bool))
    got = attention(query, key, value, mask, scale=0.7, softcap=1.5)
    for head in range(4):
        scores = 1.5 * np.tanh(query[0, :, head] @ key[0, :, head // 2].T * 0.7 / 1.5)
        weights = np.where(mask[0], np.exp(scores), 0)
        want = weights / weights.sum(-1, keepdims=True) @ value[0, :, head // 2]
        np.testing.assert_allclose(got[0, :, head], want, rtol=1e-5, atol=1e-6)


def test_scalings_by_hand() -> None:
    """theta 10,000 and H = 8 give frequencies 1, 0.1, 0.01 and 0.001.

    They turn 15.9, 1.59, 0.159 and 0.0159 times in 100 positions.
    """
    plain = np.array([1, 0.1, 0.01, 0.001], np.float32)
    np.testing.assert_allclose(scaled_frequencies(1e4, 8, None), plain, rtol=1e-6)
    np.testing.assert_allclose(scaled_frequencies(1e4, 8, RopeScaling("linear", 4.0)), plain / 4, rtol=1e-6)
    llama3 = scaled_frequencies(1e4, 8, RopeScaling("llama3", 4.0, 100, low_freq_factor=1.0, high_freq_factor=4.0))
    kept = (10 / (2 * np.pi) - 1) / 3
    np.testing.assert_allclose(llama3, [1, 0.1 * kept + 0.025 * (1 - kept), 0.0025, 0.00025], rtol=1e-5)
    # 10 and 0.1 turns are made by pairs 0.2 and 2.2: 0 and 3 when rounded outwards, so a third is lost with each pair.
    yarn = scaled_frequencies(1e4, 8, RopeScaling("yarn", 4.0, 100, beta_fast=10.0, beta_slow=0.1))
    np.testing.assert_allclose(yarn, plain * [1, 2 / 3 + 1 / 12, 1 / 3 + 2 / 12, 1 / 4], rtol=1e-5)


def test_dynamic_scaling_starts_beyond_the_original_length() -> None:
    scaling = RopeScaling("dynamic", 2.0, original_length=10)
    short, long = np.arange(10)[None], np.arange(16)[None]
    np.testing.assert_allclose(rotation(short, 1e4, 8, scaling)[0], rotation(short, 1e4, 8)[0], rtol=1e-6)
    theta = 1e4 * (2 * 16 / 10 - 1) ** (8 / 6)
    np.testing.assert_allclose(rotation(long, 1e4, 8, scaling)[1], rotation(long, theta, 8)[1], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"activation": "relu"}, "activation must be one of"),
        ({"biases": ("query", "keys")}, "biases must be of .* got 'keys'"),
        ({"window": 0}, "window must be positive or None, got 0"),
        ({"logit_softcap": -1.0}, "logit_softcap must be positive or None"),
        ({"local_layers": (0,)}, "local_layers .* need a window"),
        ({"window": 3, "local_layers": (0, 4)}, r"local_layers must lie in 0\.\.3, but they hold 4"),
        ({"local_rope_theta": 5.0}, "there is no local layer"),
    ],
)
def test_settings_that_make_no_decoder(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(PLAIN, **change)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("ntk", 2.0), "kind must be one of"),
        (("linear", 0.0), "factor must be positive"),
        (("yarn", 2.0), "original_length must be at least 1"),
        (("llama3", 2.0, 10, 4.0, 1.0), "must be below high_freq_factor"),
    ],
)
def test_settings_that_make_no_scaling(arguments: tuple[Any, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        RopeScaling(*arguments)
