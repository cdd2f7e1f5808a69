"""Attention over packed sequences, in plain XLA: the reference that every other backend has to agree with.

A query sees a key when both lie in the same segment and the key's position is not after the query's. Positions restart in each document,
so this one rule serves packed training rows, padding, and a key/value cache.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp

if TYPE_CHECKING:
    from cotgrpo.types import Array, Bool, Float, Int

MASKED = -1e30
"""The score of a key that may not be seen: finite, so that a fully masked row is a uniform row and not NaN."""


def causal_segment_mask(
    query_positions: Int[Array, "B T"],
    query_segments: Int[Array, "B T"],
    key_positions: Int[Array, "B S"],
    key_segments: Int[Array, "B S"],
    window: Int[Array, ""] | int | None = None,
) -> Bool[Array, "B T S"]:
    """True where query t may read key s: same segment, position of s <= position of t, and less than `window` before it."""
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
) -> Float[Array, "B T Q H"]:
    """Grouped-query attention, `softmax(cap(q k^T * scale) + mask) v`; scores and softmax in float32.

    Query head n reads key/value head `n // (Q / K)`. The group stays an axis of its own, so keys and values are never repeated in memory.
    `scale` is `1 / sqrt(H)` where it is None; `cap(s) = softcap * tanh(s / softcap)`, or s where softcap is None.
    """
    return attention_by_head(query, jnp.moveaxis(key, 1, 3), jnp.swapaxes(value, 1, 2), mask, scale, softcap)


def attention_by_head(
    query: Float[Array, "B T Q H"],
    key: Float[Array, "B K H S"],
    value: Float[Array, "B K S H"],
    mask: Bool[Array, "B T S"],
    scale: float | None = None,
    softcap: float | None = None,
) -> Float[Array, "B T Q H"]:
    """The same, of keys and values that lie as a cache keeps them, so that neither of the two matrix products needs a transposed copy."""
    B, T, Q, H = query.shape
    K = key.shape[1]
    query = query * jnp.asarray(H**-0.5 if scale is None else scale, query.dtype)
    query_BKGTH = jnp.moveaxis(query.reshape(B, T, K, Q // K, H), 1, 3)
    scores = jnp.einsum("bkgth,bkhs->bkgts", query_BKGTH, key, preferred_element_type=jnp.float32)
    if softcap is not None:
        scores = softcap * jnp.tanh(scores / softcap)
    scores = jnp.where(mask[:, None, None, :, :], scores, MASKED)
    weights = jax.nn.softmax(scores, axis=-1).astype(value.dtype)
    mixed_BKGTH = jnp.einsum("bkgts,bksh->bkgth", weights, value)
    return jnp.moveaxis(mixed_BKGTH, 3, 1).reshape(B, T, Q, H)
