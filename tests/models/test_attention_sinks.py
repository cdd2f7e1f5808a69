"""Attention sinks: a part of each head's weights that no key gets, in every implementation of attention."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cotgrpo.models.attention import attention, attention_by_head, causal_segment_mask
from cotgrpo.models.blockwise_attention import block_attention
from cotgrpo.models.splash_attention import splash_attention

B, T, Q, K, H = 2, 150, 4, 2, 8
SEGMENTS = np.stack([np.repeat([1, 2, 0], [70, 50, 30]), np.repeat([1, 2], [20, 130])]).astype(np.int32)
POSITIONS = np.stack([np.concatenate([np.arange(n) for n in lengths]) for lengths in ((70, 50, 30), (20, 130))]).astype(
    np.int32
)
REAL = (SEGMENTS != 0)[:, :, None, None]
Attend = Callable[..., jax.Array]


def inputs() -> tuple[jax.Array, ...]:
    rng = np.random.default_rng(0)
    qkv = (jnp.asarray(rng.normal(size=(B, T, heads, H)), jnp.float32) for heads in (Q, K, K))
    return (*qkv, jnp.asarray([-3.0, 0.0, 2.0, 5.0]))


def mask(window: int | None) -> jax.Array:
    return causal_segment_mask(POSITIONS, SEGMENTS, POSITIONS, SEGMENTS, window)


def of(name: str, window: int | None) -> Attend:
    """Return the implementation of this name, as a function of queries, keys, values and sinks."""
    if name == "plain":
        return lambda q, k, v, sinks: attention(q, k, v, mask(window), None, None, sinks)
    if name == "blocks":
        return lambda q, k, v, sinks: block_attention(q, k, v, POSITIONS, SEGMENTS, window, sinks=sinks)
    if name == "splash":
        segments = jnp.asarray(SEGMENTS)
        return lambda q, k, v, sinks: splash_attention(q, k, v, segments, (window,), interpret=True, sinks=sinks)
    return lambda q, k, v, sinks: attention_by_head(
        q, jnp.moveaxis(k, 1, 3), jnp.swapaxes(v, 1, 2), mask(window), sinks=sinks
    )


@pytest.mark.parametrize("window", [None, 30])
def test_plain_attention_with_sinks_in_numpy(window: int | None) -> None:
    """A sink is one more key of score s whose value is 0."""
    query, key, value, sinks = (np.float64(x) for x in inputs())
    got, seen = of("plain", window)(*inputs()), np.asarray(mask(window))
    for head in range(Q):
        scores = np.einsum("bth,bsh->bts", query[:, :, head], key[:, :, head // 2]) * H**-0.5
        weights = np.where(seen, np.exp(scores), 0)
        total = weights.sum(axis=-1, keepdims=True) + np.exp(sinks[head])
        want = np.einsum("bts,bsh->bth", weights / total, value[:, :, head // 2])
        np.testing.assert_allclose(got[:, :, head], want, atol=2e-6)


@pytest.mark.parametrize("window", [None, 30])
@pytest.mark.parametrize("name", ["blocks", "decode", pytest.param("splash", marks=pytest.mark.slow)])
def test_every_implementation_agrees(name: str, window: int | None) -> None:
    """Results and gradients, those of the sinks too."""

    def value_and_gradients(attend: Attend) -> tuple[jax.Array, ...]:
        tangent = jnp.asarray(np.random.default_rng(1).normal(size=(B, T, Q, H)), jnp.float32) * REAL
        mixed, pull_back = jax.vjp(lambda *arrays: attend(*arrays) * REAL, *inputs())
        return (mixed, *pull_back(tangent))

    want = jax.jit(lambda: value_and_gradients(of("plain", window)))()
    got = jax.jit(lambda: value_and_gradients(of(name, window)))()
    assert float(jnp.abs(want[-1]).min()) > 1e-3, "every sink has a gradient, or equality shows nothing"
    for here, there in zip(got, want, strict=True):
        np.testing.assert_allclose(here, there, atol=3e-5, rtol=1e-5)
