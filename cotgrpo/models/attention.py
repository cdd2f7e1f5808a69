"""Attention over packed sequences, in plain XLA: the reference for the other implementations.

A query sees a key if both lie in the same segment and the key's position is not after the query's. Positions restart in
each document, so the same rule serves packed training rows, padding, and a key/value cache.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp

if TYPE_CHECKING:
    from cotgrpo.types import Array, Bool, Float, Int

MASKED = -1e30
"""Score of a masked key. It is finite, so a fully masked row gets uniform weights and not NaN."""


def causal_segment_mask(
    query_positions: Int[Array, "B T"],
    query_segments: Int[Array, "B T"],
    key_positions: Int[Array, "B S"],
    key_segments: Int[Array, "B S"],
    window: Int[Array, ""] | int | None = None,
) -> Bool[Array, "B T S"]:
    """Return True where query t sees key s: same segment, and `0 <= position_t - position_s < window`."""
    same = query_segments[:, :, None] == key_segments[:, None, :]
    seen = same & (key_positions[:, None, :] <= query_positions[:, :, None])
    if window is None:
        return seen
    return seen & (key_positions[:, None, :] > query_positions[:, :, None] - window)


def attention(
    query: Float[Array, "B T Q H"],
    key: Float[Array, "B S K H"],
    value: Float[Array, "B S K H"],
    mask: Bool[Array, "B T S"],
    scale: float | None = None,
    softcap: float | None = None,
    sinks: Float[Array, "Q"] | None = None,
) -> Float[Array, "B T Q H"]:
    """Return `softmax(cap(q k^T * scale) + mask) v`, grouped-query attention with scores and softmax in float32.

    Query head n reads key/value head `n // (Q / K)`. Groups are a dimension of their own, so keys and values are not
    repeated in memory.

    Args:
        query, key, value: any float type.
        mask: True where a query sees a key.
        scale: None: `1 / sqrt(H)`.
        softcap: c: `cap(s) = c * tanh(s / c)`. None: `cap(s) = s`.
        sinks: of each query head, the score of one more key whose value is 0. It takes a part of the weights.
    """
    return attention_by_head(query, jnp.moveaxis(key, 1, 3), jnp.swapaxes(value, 1, 2), mask, scale, softcap, sinks)


def attention_by_head(
    query: Float[Array, "B T Q H"],
    key: Float[Array, "B K H S"],
    value: Float[Array, "B K S H"],
    mask: Bool[Array, "B T S"],
    scale: float | None = None,
    softcap: float | None = None,
    sinks: Float[Array, "Q"] | None = None,
) -> Float[Array, "B T Q H"]:
    """Return what `attention` returns, from keys and values in the layout of a cache.

    In this layout neither of the two matrix products needs a transposed copy.
    """
    B, T, Q, H = query.shape
    K = key.shape[1]
    query = query * jnp.asarray(H**-0.5 if scale is None else scale, query.dtype)
    query_BKGTH = jnp.moveaxis(query.reshape(B, T, K, Q // K, H), 1, 3)
    scores = jnp.einsum("bkgth,bkhs->bkgts", query_BKGTH, key, preferred_element_type=jnp.float32)
    if softcap is not None:
        scores = softcap * jnp.tanh(scores / softcap)
    scores = jnp.where(mask[:, None, None, :, :], scores, MASKED)
    weights = softmax_with_sinks(scores, sinks).astype(value.dtype)
    mixed_BKGTH = jnp.einsum("bkgts,bksh->bkgth", weights, value)
    return jnp.moveaxis(mixed_BKGTH, 3, 1).reshape(B, T, Q, H)


def softmax_with_sinks(scores: Float[Array, "B K G T S"], sinks: Float[Array, "Q"] | None) -> Float[Array, "B K G T S"]:
    """Return the softmax over the last axis, with the sink of each head in its denominator."""
    if sinks is None:
        return jax.nn.softmax(scores, axis=-1)
    sinks = sinks.astype(jnp.float32).reshape(1, scores.shape[1], scores.shape[2], 1, 1)
    highest = jax.lax.stop_gradient(jnp.maximum(jnp.max(scores, axis=-1, keepdims=True), sinks))
    weights = jnp.exp(scores - highest)
    return weights / (jnp.sum(weights, axis=-1, keepdims=True) + jnp.exp(sinks - highest))
